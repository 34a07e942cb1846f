"""Weights in full precision into ComfyUI's quantized formats: grids, scales, rounding, packing.

A grid is all values that a format can give to the columns of a weight: `levels` times a scale for
each row and group of columns. `refine` chooses among them column by column, so that what is lost in
one is made good in those that follow (GPTQ, arXiv:2210.17323), for inputs as they were observed;
`descend` then chooses each anew, all others as they are (arXiv:2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .floats import E2M1, tiled
from .rotation import largest_group, rotate

F8 = torch.float8_e4m3fn
# Lloyd-Max levels for 4 bits of rotated weights over their group's largest (comfy-kitchen's table).
TABLE = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
DAMPING = 0.01  # of the mean of the inputs' squares, added to each
PANEL = 128  # columns between two updates of all that follow


SWEEPS = 2  # of `descend`; more gained less than 0.05 dB


@dataclass(frozen=True)
class Way:
    """A way to store a weight, and to multiply it.

    `stored` bits for each weight, a scale for every `group` of its columns (0: for a row), `bits`
    that inputs are rounded to (16: they are not). `like`: the way whose numbers these are.
    """

    name: str
    format: str
    rotated: bool
    stored: int
    group: int = 0
    bits: int = 8
    like: str = ""


SIX = "6 bits"
FOUR, FOUR_BY_FOUR = "4 bits", "4 bits, inputs too"
BASES = (
    Way("int8", "int8_tensorwise", rotated=False, stored=8),
    Way("int8 rotated", "int8_tensorwise", rotated=True, stored=8),
    Way(SIX, "asym_w4a8_int8", rotated=True, stored=6, group=64),
    Way("4 bits in groups", "asym_w4a8_int8", rotated=True, stored=4, group=16),
    Way("4 bits in groups of 64", "asym_w4a8_int8", rotated=True, stored=4, group=64),
    Way(FOUR, "convrot_w4a4", rotated=True, stored=4),
    Way("nvfp4 smoothed", "nvfp4", rotated=False, stored=4, group=16, bits=16),
)
FOURS = (replace(way, name=FOUR_BY_FOUR, bits=4, like=FOUR) for way in BASES if way.name == FOUR)
WHOLE = (
    replace(way, name=f"{way.name}, inputs whole", bits=16, like=way.name)
    for way in BASES
    if way.bits < 16
)
WAYS = {way.name: way for way in (*BASES, *FOURS, *WHOLE)}


class EncodeError(ValueError):
    """A weight that cannot be encoded. The message is the rest of a sentence."""


@dataclass(frozen=True)
class Encoded:
    """A weight as a layout takes it: `tensors` by their names in files, and `settings`."""

    format: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def as_way(self, way: Way) -> Encoded:
        """The same numbers, with inputs rounded as `way` says."""
        settings = {**self.settings}
        if self.format == "convrot_w4a4":
            settings["linear_dtype"] = "int4" if way.bits == 4 else "int8"
        if way.bits == 16:
            settings["full_precision_matrix_mult"] = True
        return replace(self, settings=settings)


def possible(way: Way, shape: tuple[int, int]) -> bool:
    """Whether a weight (out, in) of this shape can be stored so, for all who read the format."""
    if way.format == "nvfp4":
        return shape[1] % way.group == 0 and shape[0] % 16 == 0
    return largest_group(shape[1]) >= 64 if way.rotated else shape[1] % 16 == 0


def bytes_of(way: Way, shape: tuple[int, int]) -> int:
    """What a weight (out, in) takes so, before it has been encoded; without smoothing."""
    out, width = shape
    numbers = out * width * way.stored // 8
    if way.format == "nvfp4":  # scales lie in tiles of 128 x 4
        return numbers + -(-out // 128) * 128 * -(-width // 64) * 4 + 4
    groups = width // way.group if way.group else 0
    table = 64 if way.group and way.stored == 4 else 0
    return numbers + out * (groups + 4) + table


@dataclass
class Grid:
    """`levels` (k,) ascending, `scale` (rows, groups), `size` columns in a group.

    Scales are float8 numbers times `unit`; where `whole` (rows, 1) is given too, values are brought
    onto the integers -127..127 times it.
    """

    levels: Tensor
    scale: Tensor
    size: int
    unit: Tensor | None = None
    whole: Tensor | None = None

    def stored(self, scale: Tensor) -> Tensor:
        """The nearest scale that can be stored."""
        if self.unit is None:
            return scale
        return (scale / self.unit).clamp(max=448).to(F8).float() * self.unit

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        """Indices of the nearest levels for w over scale."""
        middle = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(w / scale.clamp_min(1e-30), middle)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        values = self.levels[codes] * scale
        if self.whole is None:
            return values
        return (values / self.whole).round().clamp(-127, 127) * self.whole

    def spread(self, width: int) -> Tensor:
        """The scale of each column (rows, width)."""
        return self.scale.repeat_interleave(self.size, dim=1)[:, :width]


def search(grid: Grid, w: Tensor, importance: Tensor, factors: Tensor) -> None:
    """Give each group the multiple of its scale that loses least, errors weighed by column."""
    first = grid.scale
    best = torch.full_like(first, torch.inf)
    chosen = grid.stored(first)
    for factor in factors.tolist():
        grid.scale = grid.stored(first * factor)
        scale = grid.spread(w.shape[1])
        error = (grid.values(grid.codes(w, scale), scale) - w).square_().mul_(importance)
        error = error.unflatten(1, (-1, grid.size)).sum(dim=2)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, grid.scale, chosen)
    grid.scale = chosen


def grid_of(way: Way, w: Tensor, importance: Tensor) -> Grid:
    """The grid of a format for a weight that is already rotated or smoothed."""
    rows, width = w.shape
    largest = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    if way.format in ("int8_tensorwise", "convrot_w4a4"):
        top = 127 if way.format == "int8_tensorwise" else 7
        grid = Grid(torch.arange(-top, top + 1.0, device=w.device), largest / top, width)
        factors = torch.linspace(0.9, 1, 3) if top == 127 else torch.linspace(0.4, 1, 25)
        search(grid, w, importance, factors)
        return grid
    groups = w.abs().unflatten(1, (-1, way.group)).amax(dim=2)
    if way.format == "nvfp4":
        levels = torch.tensor(sorted({*E2M1, *(-v for v in E2M1)}), device=w.device)
        grid = Grid(levels, groups / 6, way.group, unit=largest.max() / (448 * 6))
    else:
        whole = largest / 127
        levels = torch.arange(-31, 32.0) if way.stored == 6 else torch.tensor(TABLE)
        top = 31 if way.stored == 6 else 1
        grid = Grid(levels.to(w.device), groups / top, way.group, whole, whole)
    search(grid, w, importance, torch.linspace(0.7, 1.1, 17))
    return grid


def refine(w: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """Codes (rows, in) for w, given the damped second moments `h` (in, in) of what it multiplies.

    Raises EncodeError where those are no numbers."""
    rows, width = w.shape
    w, scale = w.clone(), grid.spread(width)
    root, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise EncodeError("was given inputs in the calibration that are no numbers")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    codes = torch.empty(rows, width, dtype=torch.long, device=w.device)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        errors = torch.empty(rows, stop - start, device=w.device)
        for j in range(start, stop):
            codes[:, j] = grid.codes(w[:, j : j + 1], scale[:, j : j + 1])[:, 0]
            value = grid.values(codes[:, j : j + 1], scale[:, j : j + 1])[:, 0]
            error = (w[:, j] - value) / upper[j, j]
            w[:, j:stop] -= error[:, None] * upper[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def descend(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> None:
    """Give each column of `codes` the values that are best beside all others, one by one."""
    scale = grid.spread(w.shape[1])
    q = grid.values(codes, scale)
    slope = (q - w) @ h  # half of the gradient of tr((q - w) h (q - w)^T)
    for start in range(0, w.shape[1], PANEL):
        stop = min(start + PANEL, w.shape[1])
        old, own = q[:, start:stop].clone(), slope[:, start:stop].clone()
        for j in range(start, stop):
            best = q[:, j] - own[:, j - start] / h[j, j]
            codes[:, j : j + 1] = grid.codes(best[:, None], scale[:, j : j + 1])
            value = grid.values(codes[:, j : j + 1], scale[:, j : j + 1])[:, 0]
            own += (value - q[:, j])[:, None] * h[j, start:stop]
            q[:, j] = value
        slope += (q[:, start:stop] - old) @ h[start:stop]


def encode(
    way: Way, weight: Tensor, moments: Tensor | None = None, smooth: Tensor | None = None
) -> Encoded:
    """A weight (out, in) in fp32, stored in this way.

    `moments` (in, in) are the mean products of its inputs; without them each number is rounded for
    itself. `smooth` (in,) of nvfp4: the weight is multiplied by it and the inputs are divided.
    """
    w, group = weight, largest_group(weight.shape[1]) if way.rotated else 0
    if group:
        w = rotate(w, group)
        moments = None if moments is None else rotate(rotate(moments, group).mT, group)
    if smooth is not None:
        w = w * smooth
        moments = None if moments is None else moments / smooth / smooth[:, None]
    if moments is None:
        grid = grid_of(way, w, torch.ones(w.shape[1], device=w.device))
        codes = grid.codes(w, grid.spread(w.shape[1]))
    else:
        h = moments.clone()
        h.diagonal().add_(DAMPING * h.diagonal().mean().clamp_min(1e-12))
        grid = grid_of(way, w, h.diagonal())
        codes = refine(w, h, grid)
        for _ in range(SWEEPS):
            descend(w, h, grid, codes)
    return packed(way, codes, grid, group, smooth).as_way(way)


def packed(way: Way, codes: Tensor, grid: Grid, group: int, smooth: Tensor | None) -> Encoded:
    settings: dict[str, Any] = {"format": way.format}
    tensors: dict[str, Tensor] = {}
    if way.format == "int8_tensorwise":
        tensors = {"weight": (codes - 127).to(torch.int8), "weight_scale": grid.scale}
        settings |= {"convrot": True, "convrot_groupsize": group} if group else {}
    elif way.format == "convrot_w4a4":
        tensors = {"weight": _pairs((codes - 7) & 15), "weight_scale": grid.scale.flatten()}
        settings |= {"convrot_groupsize": group}
    elif way.format == "asym_w4a8_int8":
        assert grid.whole is not None
        tensors = {
            "weight_s_rel": (grid.scale / grid.whole).to(F8),
            "weight_s_channel": grid.whole.flatten(),
        }
        if len(grid.levels) == 16:
            tensors |= {"weight": _pairs(codes), "weight_codebook": grid.levels}
        else:
            high = ((codes + 1) >> 4).unflatten(1, (-1, 4)) << torch.tensor([0, 2, 4, 6])
            high = high.sum(dim=2).to(torch.uint8).view(torch.int8)
            tensors["weight"] = torch.cat((_pairs((codes + 1) & 15), high), dim=1)
        settings |= {"group_size": way.group, "convrot_groupsize": group}
    else:
        magnitude = torch.tensor([E2M1.index(abs(v)) for v in grid.levels.tolist()])
        e2m1 = (magnitude + 8 * (grid.levels < 0))[codes]
        assert grid.unit is not None
        tensors = {
            "weight": _pairs(e2m1.unflatten(1, (-1, 2)).flip(2).flatten(1)).view(torch.uint8),
            "weight_scale": tiled((grid.scale / grid.unit).to(F8).view(torch.uint8)).view(F8),
            "weight_scale_2": grid.unit,
        }
        tensors |= {} if smooth is None else {"pre_quant_scale": 1 / smooth}
    return Encoded(way.format, {k: t.contiguous() for k, t in tensors.items()}, settings)


def _pairs(codes: Tensor) -> Tensor:
    """Codes 0..15 two in a byte, the first in its lower half."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).to(torch.uint8).view(torch.int8)
