"""The checker: what a picture shows, whether that is what was asked, and whether an edit kept the
rest.

It looks at colours, shapes, places, fills, backgrounds and also at how clean the edges are, so
that a blurred or lumpy shape does not pass. It reads at 128 px; larger pictures are averaged
down.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np

from .edits import Edit
from .fitting import fit, period, read_fill
from .render import object_mask
from .requests import ObjectSpec, Relation, Request
from .segment import SIDE, Ground, segment, to_side
from .vocabulary import PHOTO, PLACES, TRANSPARENT

BIG_FROM = 14.3  # pixels of radius at 128
# Measured on 300 objects: true ones stay below .45 and 1.12 under noise of 6 levels, a blur of .7
# px or JPEG at 34 dB; shapes bent by 2 px reach .94 at the median, and a blur of 2 px reaches 1.43.
LUMP_LIMIT = 0.75
BLUR_LIMIT = 1.3
_PHOTO_LUMP = 1.3  # what a busy photograph does to the edge of a true object
_RADII = (7.0, 24.0)
_APART = 0.08  # least distance, as a share of the picture, for "left of" and the like
_CAP = 99.0  # dB, for equal pixels


@dataclass(frozen=True)
class Found:
    """One object: `x`, `y`, `radius` in shares of the picture, `lump`, `blur` in px at 128.

    `angle` is in radians, from 0 to where the shape looks the same again; 0 for round ones.
    """

    shape: str
    colour: str
    fill: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    lump: float
    blur: float
    angle: float


@dataclass(frozen=True)
class Reading:
    objects: tuple[Found, ...]
    ground: Ground


@dataclass(frozen=True)
class Verdict:
    """One flag for each thing that can be wrong; a thing that was not asked for counts as right."""

    colour: bool
    shape: bool
    place: bool
    fill: bool
    size: bool
    edges: bool
    background: bool
    count: bool

    @property
    def ok(self) -> bool:
        return all(vars(self).values())


def read(image: np.ndarray) -> Reading:
    """What a uint8 picture (n, n, 3 or 4) shows."""
    blobs, ground = segment(to_side(image))
    found = []
    for blob in blobs:
        best = fit(blob)
        x, y = blob.left + best.x + 0.5, blob.top + best.y + 0.5
        stray = best.lump > _PHOTO_LUMP or not _RADII[0] < best.radius < _RADII[1]
        if ground.texture == PHOTO and stray:
            continue
        row, column = (min(max(int(v * 3 / SIDE), 0), 2) for v in (y, x))
        size = "big" if best.radius > BIG_FROM else "small"
        found.append(
            Found(
                best.shape, blob.colour, read_fill(blob, best), size, row * 3 + column,
                x / SIDE, y / SIDE, best.radius / SIDE, best.lump, best.blur,
                best.angle % period(best.shape) if period(best.shape) else 0.0,
            )
        )  # fmt: skip
    return Reading(tuple(found), ground)


_ATTRIBUTES = (("shape", 4), ("colour", 4), ("place", 3), ("fill", 2), ("size", 1))


def _rights(spec: ObjectSpec, seen: Found | None) -> dict[str, bool]:
    """Attribute -> whether it is as `spec` asks; nothing asked is always right."""
    rights = {}
    for name, _ in _ATTRIBUTES:
        wanted = getattr(spec, name)
        if wanted is None:
            rights[name] = True
        elif seen is None:
            rights[name] = False
        else:
            have = PLACES[seen.cell] if name == "place" else getattr(seen, name)
            rights[name] = wanted == have
    return rights


def _holds(relation: Relation, chosen: list[tuple[int, Found | None]]) -> bool:
    """Whether every object of the first spec lies on the asked side of every one of the second."""
    first = [seen for spec, seen in chosen if spec == relation.subject]
    second = [seen for spec, seen in chosen if spec == relation.other]
    for one in first:
        for two in second:
            if one is None or two is None:
                return False
            gap = {"left": two.x - one.x, "right": one.x - two.x,
                   "above": two.y - one.y, "below": one.y - two.y}[relation.kind]  # fmt: skip
            if gap < _APART:
                return False
    return True


def _assign(request: Request, seen: tuple[Found, ...]) -> tuple[dict[str, bool], list[Found]]:
    """The pairing of asked and seen under which most is right: flags, and the objects used."""
    wanted = [i for i, spec in enumerate(request.objects) for _ in range(spec.count)]
    pool: list[Found | None] = sorted(seen, key=lambda found: -found.radius)[:7]  # type: ignore[assignment]
    pool += [None] * max(len(wanted) - len(pool), 0)
    best_score, best = -1, ({name: True for name, _ in _ATTRIBUTES}, [])
    for order in permutations(pool, len(wanted)):
        chosen = list(zip(wanted, order, strict=True))
        flags = {name: True for name, _ in _ATTRIBUTES}
        score = 0
        for index, found in chosen:
            for (name, weight), right in zip(
                _ATTRIBUTES, _rights(request.objects[index], found).values(), strict=True
            ):
                flags[name] &= right
                score += weight * right
        held = all(_holds(relation, chosen) for relation in request.relations)
        flags["place"] &= held
        score += 3 * held
        if score > best_score:
            best_score, best = score, (flags, [found for found in order if found is not None])
    return best


def _ground_right(request: Request, ground: Ground) -> bool:
    if request.texture == TRANSPARENT or ground.texture == TRANSPARENT:
        return request.texture == ground.texture
    if request.texture is not None and request.texture != ground.texture:
        return False
    return request.ground is None or request.ground == ground.colour


def judge(reading: Reading, request: Request) -> Verdict:
    """Whether what was seen is what was asked."""
    flags, used = _assign(request, reading.objects)
    asked = sum(spec.count for spec in request.objects)
    number = len(reading.objects)
    photo = reading.ground.texture == PHOTO
    judged = used if used else reading.objects
    edges = all(
        found.lump <= (_PHOTO_LUMP if photo else LUMP_LIMIT) and (photo or found.blur <= BLUR_LIMIT)
        for found in judged
    )
    return Verdict(
        colour=flags["colour"],
        shape=flags["shape"],
        place=flags["place"],
        fill=flags["fill"],
        size=flags["size"],
        edges=edges,
        background=_ground_right(request, reading.ground),
        count=number == asked if request.exact else number >= max(asked, request.least),
    )


def check(image: np.ndarray, request: Request) -> Verdict:
    """Whether a uint8 picture (n, n, 3 or 4) is what `request` asks for."""
    return judge(read(image), request)


def kept_mask(edit: Edit, size: int = SIDE) -> np.ndarray:
    """Where an edit must leave the pixels alone, bool (size, size): outside its cells.

    A new background must leave the inside of the objects alone.
    """
    if edit.kind == "background":
        kept = np.zeros((size, size), bool)
        for thing in edit.before.objects:
            mask = object_mask(thing, size) > 0.999
            inner = mask.copy()
            inner[1:] &= mask[:-1]
            inner[:-1] &= mask[1:]
            inner[:, 1:] &= mask[:, :-1]
            inner[:, :-1] &= mask[:, 1:]
            kept |= inner
        return kept
    cells = (np.arange(size) * 3) // size
    index = cells[:, None] * 3 + cells[None]
    return ~np.isin(index, sorted(edit.region))


def _over_grey(image: np.ndarray) -> np.ndarray:
    """Float RGB, laid over mid-grey where it is transparent."""
    pixels = image.astype(np.float32)
    if image.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:] / 255.0
    return pixels[..., :3] * alpha + 128.0 * (1 - alpha)


class EditVerdict(NamedTuple):
    """`background_psnr`: dB over what the edit must not touch, against the given picture."""

    done: bool
    background_psnr: float


def check_edit(before: np.ndarray, after: np.ndarray, edit: Edit) -> EditVerdict:
    """Whether `after` shows the edit done and keeps the rest of `before`: uint8, one size."""
    if before.shape[:2] != after.shape[:2]:
        raise ValueError(
            "The two pictures of an edit must have one size; "
            f"they are {before.shape[:2]} and {after.shape[:2]}."
        )
    reading = read(after)
    changed = tuple(
        spec
        for spec, thing in zip(edit.request.objects, edit.after.objects, strict=True)
        if thing not in edit.before.objects
    )
    ground = edit.kind == "background" or edit.after.background.texture == TRANSPARENT
    asked = Request(
        changed,
        (),
        edit.request.ground if ground else None,
        edit.request.texture if ground else None,
        exact=False,
        least=len(edit.after.objects),
    )
    verdict = judge(reading, asked)
    gone = {t.cell for t in edit.before.objects} - {t.cell for t in edit.after.objects}
    number = len(reading.objects) == len(edit.after.objects)
    done = verdict.ok and number and not any(found.cell in gone for found in reading.objects)
    kept = kept_mask(edit, before.shape[0])
    if not kept.any():
        return EditVerdict(done, _CAP)
    error = float(((_over_grey(before) - _over_grey(after)) ** 2)[kept].mean())
    psnr = 10 * float(np.log10(255.0**2 / max(error, 1e-9)))
    return EditVerdict(done, min(_CAP, psnr))
