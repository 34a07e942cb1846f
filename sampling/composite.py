"""Edit a part of a picture and keep the rest: locked while painting, and put back at the end.

A region is (H, W) in 0..1, 1 where something may change. The lock in latent space makes the model
paint what fits its surroundings; the composite in pixels makes the rest the original's, bit for
bit, whatever the VAE did to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import SamplingError
from .noise import add_noise
from .samplers import Model

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@dataclass(frozen=True)
class Edit:
    """A picture being edited: what the model sees of it, and where it may change.

    `original` (H, W, 3 or 4) in 0..1; `alpha` (H, W) says how much of the painted picture is taken
    where, None for all of it; the model sees `box`, padded to `padded` (width, height).
    """

    original: Tensor
    alpha: Tensor | None
    box: Box
    padded: tuple[int, int]

    def seen(self) -> Tensor:
        """What the model sees: the box, its last column and row repeated up to `padded`."""
        left, top, width, height = self.box
        part = self.original[top : top + height, left : left + width]
        right, below = self.padded[0] - width, self.padded[1] - height
        whole = F.pad(part.permute(2, 0, 1)[None], (0, right, 0, below), mode="replicate")
        return whole[0].permute(1, 2, 0)

    def free(self, factor: int) -> Tensor:
        """(1, h, w): 1 for every latent of `seen`, `factor` pixels wide, that may change."""
        width, height = self.padded
        if self.alpha is None:
            return torch.ones(1, height // factor, width // factor)
        left, top, w, h = self.box
        part = (self.alpha[top : top + h, left : left + w] > 0).float()
        whole = F.pad(part[None, None], (0, width - w, 0, height - h), mode="replicate")
        return F.max_pool2d(whole, factor)[:, 0]

    def finished(self, painted: Tensor) -> Tensor:
        """The original (H, W, 3 or 4) with what was painted, which is as large as `seen`."""
        if (painted.shape[1], painted.shape[0]) != self.padded:
            raise SamplingError(
                f"the painted picture is {painted.shape[1]} x {painted.shape[0]} pixels, but the "
                f"edit was prepared for {self.padded[0]} x {self.padded[1]}; paint the latent that "
                "Edit Region gives, and resize nothing in between."
            )
        left, top, width, height = self.box
        painted = painted[:height, :width].to(self.original)
        rows, columns = slice(top, top + height), slice(left, left + width)
        part = self.original[rows, columns]
        alpha = torch.ones_like(part[..., 0])
        if self.alpha is not None:
            alpha = self.alpha[rows, columns].to(part)
        new = blend(part, painted, alpha)
        done = with_alpha(self.original) if new.shape[-1] == 4 else self.original
        done = done.clone()
        done[rows, columns] = new
        return done


@dataclass(frozen=True)
class Where:
    """Where a picture may change, as it is written: `boxes`, `points` and `tolerance` as for
    `selected`, `grow` in pixels as for `grown`, `feather` and `context` as for `prepared`.
    """

    boxes: str = ""
    points: str = ""
    tolerance: float = 0.1
    grow: int = 0
    feather: int = 4
    context: int = 0

    def __post_init__(self) -> None:
        for name in ("feather", "context"):
            if getattr(self, name) < 0:
                raise SamplingError(f"{name} is {getattr(self, name)}; give pixels, 0 or more.")

    def region(self, image: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """(H, W), 1 where `image` (H, W, 3 or 4) may change; None when nothing says where.

        A `mask` (H, W) of 0.5 and more is joined with boxes and points.
        """
        height, width = image.shape[:2]
        found = selected((width, height), self.boxes, self.points, image, self.tolerance)
        if mask is not None:
            if mask.shape != (height, width):
                raise SamplingError(
                    f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {width} x "
                    f"{height}; give the mask that belongs to the picture."
                )
            drawn = (mask >= 0.5).to(image)
            found = drawn if found is None else torch.maximum(found, drawn)
        return None if found is None else grown(found, self.grow)

    def edit(self, image: Tensor, region: Tensor | None, step: int, least: int) -> Edit:
        """The edit of `image` in its `region`, as `prepared`."""
        own = {"feather": self.feather, "context": self.context}
        return prepared(image, region, step, least=least, **own)


def locked(model: Model, start: Tensor, noise: Tensor, free: Tensor) -> Model:
    """`model` whose x follows `start` and `noise` (C, h, w) exactly where `free` (1, 1, h, w) is 0.

    There the velocity is noise - x0 of what is there already, so every sampler goes straight back
    to it, and the model sees it at each step as noisy as the rest. Between 0 and 1 both are mixed.
    """

    def velocity(x: Tensor, sigma: float) -> Tensor:
        v = model(torch.lerp(add_noise(start, noise, sigma), x, free), sigma)
        return torch.lerp(noise - start, v, free)

    return velocity


def free_of(mask: Tensor, index: int, latents: Tensor) -> Tensor:
    """(1, 1, h, w) for image `index` of a LATENT's noise mask (B, H, W) or (B, 1, H, W)."""
    masks = mask.reshape(-1, 1, *mask.shape[-2:])
    one = masks[index % len(masks)][None].to(latents)
    if one.shape[-2:] != latents.shape[-2:]:  # a mask in pixels: as core brings it to latents
        one = F.interpolate(one, latents.shape[-2:], mode="bilinear")
    return one.clamp(0, 1)


def prepared(
    original: Tensor, region: Tensor | None, step: int, *, feather: int = 0, context: int = 0,
    least: int = 0,
) -> Edit:  # fmt: skip
    """An edit of `original` (H, W, 3 or 4) in `region` (H, W), None for everywhere.

    `feather`: over so many pixels inside the region's edge the new picture fades in. `context`: the
    model sees so many pixels around the region, and at least a square of `least`; 0 is the whole
    picture. It sees multiples of `step`. Nothing is ever resized.
    """
    height, width = original.shape[:2]
    if region is None:
        box, alpha = (0, 0, width, height), None
    else:
        refuse_empty(region)
        alpha = feathered(region, feather)
        box = surroundings(region, context, least, step) if context else (0, 0, width, height)
    padded = tuple(-(-side // step) * step for side in box[2:])
    return Edit(original, alpha, box, (padded[0], padded[1]))


def refuse_empty(region: Tensor) -> None:
    if not bool((region > 0).any()):
        raise SamplingError(
            "the region is empty, so nothing could change; draw a mask, write a box, or lower what "
            "shrinks it."
        )


def surroundings(region: Tensor, context: int, least: int, step: int) -> Box:
    """The box around a region that the model sees: multiples of `step` where the picture is so."""
    spans = []
    for axis, side in ((0, region.shape[1]), (1, region.shape[0])):
        inside = torch.nonzero((region > 0).any(dim=axis)).flatten()
        first, last = int(inside[0]) - context, int(inside[-1]) + 1 + context
        length = min(-(-max(last - first, least) // step) * step, side)
        start = min(max((first + last - length) // 2, 0), side - length)
        spans.append((start, length))
    (left, width), (top, height) = spans
    return left, top, width, height


def grown(region: Tensor, pixels: int) -> Tensor:
    """A region (H, W) larger by so many pixels on every side, or smaller when they are negative."""
    if pixels == 0:
        return region
    sign = 1 if pixels > 0 else -1
    x = highest(sign * region, abs(pixels))  # outside of the picture there is nothing
    return sign * highest(x.T, abs(pixels)).T


def highest(x: Tensor, pixels: int) -> Tensor:
    """The highest value of a column (of (H, W)) within so many pixels up and down.

    Spans double: as many passes as the number has digits in base 2, however far it looks.
    """
    length = x.shape[0]
    pixels = min(pixels, length - 1)
    width = 2 * pixels + 1
    most, span = F.pad(x, (0, 0, pixels, pixels), value=-math.inf), 1
    while 2 * span <= width:
        most = torch.maximum(most[:-span], most[span:])
        span *= 2
    return torch.maximum(most[:length], most[width - span : width - span + length])


def feathered(region: Tensor, pixels: int) -> Tensor:
    """A hard region (H, W) that rises from its edge to 1 over so many pixels, all inside of it.

    At the picture's own edge it does not fall. A region that is nowhere deep enough for that rises
    over the depth it has: its middle is always 1.
    """
    deep = depth(region > 0).clamp(max=max(pixels, 0) + 1)
    rising = deep / deep.amax().clamp_min(1)
    return rising * rising * (3 - 2 * rising)


def depth(inside: Tensor) -> Tensor:
    """How many pixels (of fp32) each of a region (H, W) is away from the nearest outside of it.

    A diagonal step counts as one: the chessboard distance, in two passes (Rosenfeld and Pfaltz
    1966), row by row. What leaves the picture is not outside.
    """
    height, width = inside.shape
    far = float(height + width)
    found = np.full((height + 2, width + 2), far, np.float32)
    found[1:-1, 1:-1] = np.where(inside.cpu().numpy(), far, 0)
    at = np.arange(width + 2, dtype=np.float32)
    for _ in range(2):  # from the top left, then, turned by half, from the bottom right
        for row, above in zip(found[1:], found, strict=False):
            row[1:-1] = np.minimum(row[1:-1], np.minimum(above[:-2], above[2:]) + 1)
            row[:] = np.minimum(row, above + 1)
            row[:] = np.minimum.accumulate(row - at) + at
        found = found[::-1, ::-1]
    return torch.from_numpy(found[1:-1, 1:-1].copy()).to(inside.device)


def with_alpha(image: Tensor) -> Tensor:
    """(H, W, 3 or 4) as RGBA; opaque when it had none."""
    if image.shape[-1] == 4:
        return image
    return torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)


def blend(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """`above` over `below`, (H, W, 3 or 4) each, by `share` (H, W); with alpha if one has it.

    Where the share is 0 or 1 the bits are those of one picture. Colours are mixed as they are seen,
    weighted by their alphas: no dark rim where one of them is transparent.
    """
    if below.shape[-1] != above.shape[-1]:
        below, above = with_alpha(below), with_alpha(above)
    part = share[..., None]
    if below.shape[-1] == 3:
        mixed = torch.lerp(below, above, part)
    else:
        alpha = torch.lerp(below[..., 3:], above[..., 3:], part)
        seen = torch.lerp(below[..., :3] * below[..., 3:], above[..., :3] * above[..., 3:], part)
        plain = torch.lerp(below[..., :3], above[..., :3], part)
        colour = torch.where(alpha > 0, seen / alpha.clamp_min(1e-8), plain)
        mixed = torch.cat([colour, alpha], dim=-1)
    return torch.where(part <= 0, below, torch.where(part >= 1, above, mixed))


def selected(
    size: tuple[int, int], boxes: str = "", points: str = "", image: Tensor | None = None,
    tolerance: float = 0.1,
) -> Tensor | None:  # fmt: skip
    """The region (H, W) of written boxes and points in a picture of `size`; None when none is.

    A box is `x, y, width, height`, a point `x, y`: one a line or with `;` between, in pixels or in
    percent of the picture. A point takes what is joined to it and differs from its colour by at
    most `tolerance` in every channel of `image` (H, W, 3 or 4). SamplingError for other words.
    """
    width, height = size
    region = torch.zeros(height, width)
    found = False
    for left, top, wide, high in numbers(boxes, ("x", "y", "width", "height"), size):
        right, bottom = math.ceil(left + wide), math.ceil(top + high)
        if wide <= 0 or high <= 0:
            raise SamplingError(
                f"the box {left:g}, {top:g}, {wide:g}, {high:g} is {wide:g} x {high:g} and holds "
                "nothing; write x, y, width, height, the last two above 0."
            )
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise SamplingError(
                f"the box {left:g}, {top:g}, {wide:g}, {high:g} lies outside of the picture, which "
                f"is {width} x {height}; write x, y, width, height."
            )
        region[max(int(top), 0) : bottom, max(int(left), 0) : right] = 1
        found = True
    for x, y in numbers(points, ("x", "y"), size):
        column, row = int(x), int(y)
        if image is None or not (0 <= column < width and 0 <= row < height):
            raise SamplingError(
                f"the point {x:g}, {y:g} lies outside of the picture, which is {width} x {height}; "
                f"write x, y from 0, 0 to {width - 1}, {height - 1}."
            )
        alike = (image - image[row, column]).abs().amax(dim=-1) <= tolerance
        region = torch.maximum(region, joined(alike, row, column))
        found = True
    return region if found else None


def numbers(text: str, names: tuple[str, ...], size: tuple[int, int]) -> list[list[float]]:
    """The numbers of each line, percents turned into pixels."""
    found = []
    for line in (part.strip() for part in text.replace(";", "\n").splitlines()):
        if not line:
            continue
        words = line.replace(",", " ").split()
        try:
            if len(words) != len(names):
                raise ValueError
            values = [
                float(word.rstrip("%")) * (size[k % 2] / 100 if word.endswith("%") else 1)
                for k, word in enumerate(words)
            ]
            if not all(map(math.isfinite, values)):
                raise ValueError
        except ValueError:
            raise SamplingError(
                f"'{line}' is not {', '.join(names)}; write {len(names)} numbers, in pixels or "
                "with % of the picture."
            ) from None
        found.append(values)
    return found


def joined(alike: Tensor, row: int, column: int) -> Tensor:
    """The part of `alike` (H, W) that is joined to a pixel of it, side by side: 0 or 1.

    Runs of rows, each looked at once, however winding the shape is.
    """
    height, width = alike.shape
    flat = np.zeros((height, width + 1), np.int8)  # a gap ends every row
    flat[:, :width] = alike.cpu().numpy()
    width += 1
    turns = np.diff(flat.ravel(), prepend=0)
    starts, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
    taken = np.zeros(len(starts), bool)
    edge = np.array([np.searchsorted(starts, row * width + column, "right") - 1])
    while len(edge):
        taken[edge] = True
        beside = []
        for to in (-width, width):  # runs of the row above, and below, that share a column
            low = np.searchsorted(ends, starts[edge] + to, "right")
            count = np.searchsorted(starts, ends[edge] + to, "left") - low
            first = np.repeat(low - np.cumsum(count) + count, count)
            beside.append(first + np.arange(len(first)))
        edge = np.unique(np.concatenate(beside))
        edge = edge[~taken[edge]]
    turned = np.zeros(height * width, np.float32)
    turned[starts[taken]] = 1
    turned[ends[taken]] = -1
    filled = np.cumsum(turned, dtype=np.float32).reshape(height, width)[:, :-1]
    return torch.from_numpy(filled.copy()).to(alike.device)
