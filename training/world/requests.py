"""What a caption asks for, as facts: its text is written, and a picture is judged, from these."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from .scenes import Scene, Thing, pick
from .vocabulary import PHOTO, TRANSPARENT

LEVEL_ODDS = (0.25, 0.25, 0.5)


@dataclass(frozen=True)
class ObjectSpec:
    """`count` objects that share every attribute that is not None; `place` is one of PLACES."""

    shape: str | None = None
    colour: str | None = None
    fill: str | None = None
    size: str | None = None
    place: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Relation:
    """`objects[subject]` lies left, right, above or below of `objects[other]`."""

    subject: int
    kind: str
    other: int


@dataclass(frozen=True)
class Request:
    """What must be true of a picture. `exact`: nothing but `objects`; else at least `least`
    objects in all.

    `ground` is a background colour, `texture` a background texture or "photo" or "transparent";
    None = anything (but never transparent).
    """

    objects: tuple[ObjectSpec, ...] = ()
    relations: tuple[Relation, ...] = ()
    ground: str | None = None
    texture: str | None = None
    exact: bool = True
    least: int = 1


def relation_between(first: int, second: int, rng: np.random.Generator) -> str:
    """How cell `first` lies to cell `second`, along the axis on which they differ most."""
    down, across = first // 3 - second // 3, first % 3 - second % 3
    if abs(across) > abs(down) or (abs(across) == abs(down) and rng.random() < 0.5):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


class Behind(TypedDict, total=False):
    """The part of a request that is about the background."""

    ground: str | None
    texture: str | None


def _background(scene: Scene, rng: np.random.Generator, odds: float) -> Behind:
    """Photographs and transparency are always named, the rest with probability `odds`."""
    ground = scene.background
    if ground.texture in (PHOTO, TRANSPARENT):
        return {"texture": ground.texture}
    if rng.random() >= odds:
        return {}
    if ground.texture == "plain":
        said = rng.random() < 0.35
        return {"ground": ground.colour, "texture": "plain" if said else None}
    level = rng.random()
    if level < 0.8:
        return {"ground": ground.colour, "texture": ground.texture}
    return {"ground": ground.colour} if level < 0.9 else {"texture": ground.texture}


def _full_spec(thing: Thing, rng: np.random.Generator, place: bool) -> ObjectSpec:
    said = rng.random() < (0.3 if thing.fill == "plain" else 0.92)
    return ObjectSpec(
        thing.shape,
        thing.colour,
        thing.fill if said else None,
        thing.size if rng.random() < 0.5 else None,
        thing.place if place else None,
    )


def _merge(specs: list[ObjectSpec]) -> tuple[ObjectSpec, ...]:
    """Equal specs become one with a count."""
    return tuple(
        ObjectSpec(s.shape, s.colour, s.fill, s.size, s.place, number)
        for s, number in Counter(specs).items()
    )


def _vague(scene: Scene, rng: np.random.Generator) -> Request:
    number = len(scene.objects)
    background = _background(scene, rng, 0.6)
    if number == 1:
        return Request((ObjectSpec(),), exact=True, **background)
    if rng.random() < 0.25:  # "a red star and other shapes"
        thing = pick(rng, scene.objects)
        return Request((ObjectSpec(thing.shape, thing.colour),), exact=False, least=2, **background)
    return Request(exact=False, least=2, **background)


def _partial(scene: Scene, rng: np.random.Generator) -> Request:
    background = _background(scene, rng, 0.35)
    things = list(scene.objects)
    order = rng.permutation(len(things))
    form = pick(rng, ("kinds", "colours", "count", "both"), (0.3, 0.2, 0.15, 0.35))
    if form == "kinds":
        specs = [ObjectSpec(shape=things[i].shape) for i in order]
    elif form == "colours":
        specs = [ObjectSpec(colour=things[i].colour) for i in order]
    elif form == "count":
        specs = [ObjectSpec() for _ in order]
    else:
        specs = [ObjectSpec(shape=things[i].shape, colour=things[i].colour) for i in order]
    return Request(_merge(specs), exact=True, **background)


def _full(scene: Scene, rng: np.random.Generator) -> Request:
    things = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    background = _background(scene, rng, 0.75)
    form = rng.random()
    if len(things) in (2, 3) and form < 0.45:  # "a red star left of a blue circle"
        brief = rng.random() < 0.4
        specs = [
            ObjectSpec(t.shape, t.colour) if brief else _full_spec(t, rng, False) for t in things
        ]
        if len(set(specs)) == len(specs):
            kind = relation_between(things[0].cell, things[1].cell, rng)
            if len(specs) == 3 and rng.random() < 0.5:
                specs[2] = _full_spec(things[2], rng, True)
            return Request(tuple(specs), (Relation(0, kind, 1),), exact=True, **background)
    if form < 0.6:  # no places: "two green circles and a red star"
        return Request(
            _merge([_full_spec(t, rng, False) for t in things]), exact=True, **background
        )
    return Request(tuple(_full_spec(t, rng, True) for t in things), exact=True, **background)


def sample_request(
    scene: Scene, rng: np.random.Generator, level: int | None = None
) -> tuple[Request, int]:
    """A true statement about `scene`, and its level: 1 vague, 2 kinds or counts, 3 full."""
    if level is None:
        level = int(pick(rng, (1, 2, 3), LEVEL_ODDS))
    make = {1: _vague, 2: _partial, 3: _full}[level]
    return make(scene, rng), level
