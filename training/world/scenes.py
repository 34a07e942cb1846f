"""Scenes of the Glyphfarm world: plain data that fully determines a picture, and how they are
drawn at random.

A picture is 3x3 cells with at most one object in each. Every object and the background carry
their own `seed` for everything no caption mentions (jitter, rotation, texture phase, light,
wobble), so an edit of one part leaves the others exactly as they were.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from .vocabulary import (
    COLOURS,
    FILLS,
    GROUNDS,
    PHOTO,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    TRANSPARENT,
)

CELL = 1.0 / 3.0
RADIUS = {"small": 12.0 / 128.0, "big": 17.5 / 128.0}
MARGIN = 1.3 / 128.0
MAX_JITTER = 8.0 / 128.0
MAX_TURN = math.pi / 8  # either way; full turns want many times the training
# One scene content in so many is held out, and so are about one in so many (shape, colour, fill)
# triples, wherever they appear.
HELD_OUT_SCENES = 32
HELD_OUT_OBJECTS = 40
_FILL_ODDS = (0.56, 0.22, 0.22)
_COUNT_ODDS = (0.32, 0.34, 0.2, 0.14)


@dataclass(frozen=True)
class Thing:
    """One object. `cell` is 0..8 in reading order; `seed` fixes what no caption mentions."""

    shape: str
    colour: str
    fill: str
    size: str
    cell: int
    seed: int

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def kind(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.fill, self.size


@dataclass(frozen=True)
class Background:
    """`texture` may also be "photo" or "transparent"; then `colour` is ""."""

    colour: str
    texture: str
    seed: int


@dataclass(frozen=True)
class Scene:
    """Objects, background and the seed of the film grain: everything `render` needs."""

    objects: tuple[Thing, ...]
    background: Background
    grain: int


@dataclass(frozen=True)
class Pose:
    """Where and how an object sits, in fractions of the picture; rotation in radians."""

    x: float
    y: float
    radius: float
    rotation: float
    draws: np.ndarray  # (24,) further uniform numbers for texture, light and wobble


def seed_of(rng: np.random.Generator) -> int:
    """A fresh nuisance seed (31 bits)."""
    return int(rng.integers(1 << 31))


def pick(rng: np.random.Generator, options: Sequence, odds: Sequence[float] | None = None):
    """One of `options`; much faster than `rng.choice` for short tuples."""
    if odds is None:
        return options[int(rng.integers(len(options)))]
    level = rng.random() * sum(odds)
    for option, weight in zip(options, odds, strict=True):
        level -= weight
        if level < 0:
            return option
    return options[-1]


def pose(thing: Thing) -> Pose:
    """The nuisance of one object. It stays in its cell, so small objects wander further."""
    draws = np.random.Generator(np.random.PCG64(thing.seed)).random(28)
    radius = RADIUS[thing.size] * (0.94 + 0.06 * draws[0])
    reach = min(MAX_JITTER, CELL / 2 - radius - MARGIN)
    row, column = divmod(thing.cell, 3)
    return Pose(
        x=(column + 0.5) * CELL + reach * (2 * draws[1] - 1),
        y=(row + 0.5) * CELL + reach * (2 * draws[2] - 1),
        radius=radius,
        rotation=MAX_TURN * (2 * draws[3] - 1),
        draws=draws[4:],
    )


def is_held_out_kind(shape: str, colour: str, fill: str) -> bool:
    """Whether this (shape, colour, fill) triple is kept from training altogether."""
    return zlib.crc32(f"glyph/{shape}/{colour}/{fill}".encode()) % HELD_OUT_OBJECTS == 33


def split(scene: Scene) -> str:
    """ "train" or "held-out", by a hash of what the scene shows: not of its nuisance, so no
    prompt leaks.
    """
    if any(is_held_out_kind(t.shape, t.colour, t.fill) for t in scene.objects):
        return "held-out"
    shown = sorted((*t.kind, t.cell) for t in scene.objects)
    text = f"scene/{shown}/{scene.background.colour}/{scene.background.texture}"
    return "held-out" if zlib.crc32(text.encode()) % HELD_OUT_SCENES == 0 else "train"


def sample_thing(rng: np.random.Generator, cell: int) -> Thing:
    return Thing(
        pick(rng, SHAPES),
        pick(rng, COLOURS),
        pick(rng, FILLS, _FILL_ODDS),
        pick(rng, SIZES),
        cell,
        seed_of(rng),
    )


@lru_cache(maxsize=1)
def _has_photographs() -> bool:
    """Photographs come with scikit-image; without it there are none."""
    return find_spec("skimage") is not None


def sample_background(
    rng: np.random.Generator, *, photo: float = 0.15, transparent: float = 0.05
) -> Background:
    level = rng.random()
    if level < transparent:
        return Background("", TRANSPARENT, seed_of(rng))
    if level < transparent + photo and _has_photographs():
        return Background("", PHOTO, seed_of(rng))
    return Background(pick(rng, GROUNDS), pick(rng, TEXTURES), seed_of(rng))


def _sample(rng: np.random.Generator, count: int | None, photo: float, transparent: float) -> Scene:
    number = count if count is not None else int(pick(rng, (1, 2, 3, 4), _COUNT_ODDS))
    cells = rng.permutation(9)[:number]
    things = [sample_thing(rng, int(cell)) for cell in cells]
    if number > 1 and rng.random() < 0.3:  # twins: "two green circles" must be worth saying
        twins = number if rng.random() < 0.6 else 2
        things[1:twins] = [
            replace(things[0], cell=thing.cell, seed=thing.seed) for thing in things[1:twins]
        ]
    background = sample_background(rng, photo=photo, transparent=transparent)
    return Scene(tuple(things), background, seed_of(rng))


def sample_scene(
    rng: np.random.Generator,
    *,
    count: int | None = None,
    held_out: bool = False,
    photo: float = 0.15,
    transparent: float = 0.05,
) -> Scene:
    """A random scene of 1-4 objects, or `count`, from the asked side of the split."""
    wanted = "held-out" if held_out else "train"
    while True:
        scene = _sample(rng, count, photo, transparent)
        if split(scene) == wanted:
            return scene


def layout(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four (3, 3) int64 grids: shape, colour, fill, size ids of each cell, 0 = empty."""
    grids = np.zeros((4, 9), np.int64)
    for thing in scene.objects:
        grids[:, thing.cell] = class_ids(thing)
    shape, colour, fill, size = grids.reshape(4, 3, 3)
    return shape, colour, fill, size


def class_ids(thing: Thing) -> tuple[int, int, int, int]:
    """1-based ids of shape, colour, fill, size."""
    return (
        SHAPES.index(thing.shape) + 1,
        COLOURS.index(thing.colour) + 1,
        FILLS.index(thing.fill) + 1,
        SIZES.index(thing.size) + 1,
    )
