"""Edits: two scenes that differ in one thing, and the instruction that leads to the second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .captions import Caption, sample_language
from .instructions import Instruction, write_instruction
from .requests import ObjectSpec, Request
from .scenes import Background, Scene, Thing, pick, sample_scene, sample_thing, seed_of, split
from .vocabulary import COLOURS, FILLS, GROUNDS, PLACES, SHAPES, TEXTURES, TRANSPARENT

STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
MAX_OBJECTS = 4


@dataclass(frozen=True)
class Edit:
    """`region`: the cells 0..8 in which pixels may change; `request`: everything true of `after`
    that was asked.

    An edit of the background has as its region all nine cells; the objects must stay.
    """

    before: Scene
    after: Scene
    instruction: Caption
    kind: str
    region: frozenset[int]
    request: Request


@dataclass(frozen=True)
class Change:
    """An edit before it has words: the new scene, the facts to say, the cells it touches."""

    after: Scene
    instruction: Instruction
    region: frozenset[int]
    free: int | None = None  # index in after.objects of an object whose place was not asked for


def spec_of(thing: Thing, place: bool = True) -> ObjectSpec:
    return ObjectSpec(
        thing.shape, thing.colour, thing.fill, thing.size, thing.place if place else None
    )


def describe(scene: Scene, free: int | None = None) -> Request:
    """All facts of `scene` as a request; the object `free` may be anywhere."""
    ground = scene.background
    specs = tuple(spec_of(t, place=i != free) for i, t in enumerate(scene.objects))
    return Request(specs, (), ground.colour or None, ground.texture, exact=True, least=0)


def matches(thing: Thing, spec: ObjectSpec) -> bool:
    """Whether everything `spec` says holds for `thing`."""
    return all(
        wanted in (None, have)
        for wanted, have in (
            (spec.shape, thing.shape),
            (spec.colour, thing.colour),
            (spec.fill, thing.fill),
            (spec.size, thing.size),
            (spec.place, thing.place),
        )
    )


def refer(scene: Scene, index: int, rng: np.random.Generator) -> ObjectSpec:
    """A description that fits this object of the scene and no other one."""
    thing = scene.objects[index]
    full = spec_of(thing)
    candidates = [
        ObjectSpec(shape=full.shape),
        ObjectSpec(shape=full.shape, colour=full.colour),
        ObjectSpec(shape=full.shape, colour=full.colour),
        replace(full, size=None, place=None),
        ObjectSpec(shape=full.shape, colour=full.colour, size=full.size),
        ObjectSpec(shape=full.shape, place=full.place),
        replace(full, size=None, fill=None),
    ]
    if thing.fill == "plain":
        candidates.pop(3)
    if len(scene.objects) == 1:
        candidates = [c for c in candidates if c.place is None] + [
            ObjectSpec(),
            ObjectSpec(full.shape),
        ]
    elif rng.random() < 0.1:
        candidates.append(ObjectSpec(colour=full.colour))
    good = [c for c in candidates if sum(matches(t, c) for t in scene.objects) == 1]
    return pick(rng, good)


def with_object(scene: Scene, index: int, **changes: object) -> Scene:
    """The same scene with one object changed, all nuisance kept."""
    things = list(scene.objects)
    things[index] = replace(things[index], **changes)
    return replace(scene, objects=tuple(things))


def empty_cells(scene: Scene) -> list[int]:
    taken = {thing.cell for thing in scene.objects}
    return [cell for cell in range(9) if cell not in taken]


def neighbour(cell: int, direction: str) -> int | None:
    """The next cell in that direction, None beyond the border."""
    down, across = STEPS[direction]
    row, column = cell // 3 + down, cell % 3 + across
    return row * 3 + column if 0 <= row < 3 and 0 <= column < 3 else None


def _other(rng: np.random.Generator, options: tuple[str, ...], current: str) -> str:
    return pick(rng, [option for option in options if option != current])


def _attribute(scene: Scene, rng: np.random.Generator, kind: str) -> Change:
    index = int(rng.integers(len(scene.objects)))
    thing = scene.objects[index]
    name, options = {
        "recolour": ("colour", COLOURS),
        "reshape": ("shape", SHAPES),
        "refill": ("fill", FILLS),
        "resize": ("size", ("small", "big")),
    }[kind]
    old = getattr(thing, name)
    value = _other(rng, options, old)
    after = with_object(scene, index, **{name: value})
    words = Instruction(kind, refer(scene, index, rng), value=value, old=old)
    return Change(after, words, frozenset([thing.cell]))


def _target_cell(
    scene: Scene, rng: np.random.Generator, skip: int | None
) -> tuple[int, str | None, ObjectSpec | None] | None:
    """A free cell beside another object: (cell, direction, description of that object)."""
    free = set(empty_cells(scene))
    options = [
        (cell, direction, index)
        for index, thing in enumerate(scene.objects)
        if index != skip
        for direction in STEPS
        if (cell := neighbour(thing.cell, direction)) in free and cell is not None
    ]
    if not options:
        return None
    cell, direction, index = pick(rng, options)
    return cell, direction, refer(scene, index, rng)


def _move(scene: Scene, rng: np.random.Generator, kind: str) -> Change:
    index = int(rng.integers(len(scene.objects)))
    thing, target = scene.objects[index], refer(scene, index, rng)
    free, form = empty_cells(scene), rng.random()
    steps = [(d, n) for d in STEPS if (n := neighbour(thing.cell, d)) is not None and n in free]
    beside = _target_cell(scene, rng, index) if form < 0.3 else None
    if beside is not None:
        cell, direction, anchor = beside
        words = Instruction(kind, target, relation=direction, anchor=anchor)
    elif form < 0.55 and steps:
        direction, cell = pick(rng, steps)
        words = Instruction(kind, target, value=direction)
    else:
        cell = pick(rng, free)
        words = Instruction(kind, target, place=PLACES[cell])
    after = with_object(scene, index, cell=cell)
    return Change(after, words, frozenset([thing.cell, cell]))


def _add(scene: Scene, rng: np.random.Generator, kind: str) -> Change:
    form = rng.random()
    beside = _target_cell(scene, rng, None) if form < 0.35 else None
    if beside is not None:
        cell, direction, anchor = beside
    else:
        cell, direction, anchor = pick(rng, empty_cells(scene)), None, None
    thing = sample_thing(rng, cell)
    anywhere = beside is None and form > 0.85
    said = ObjectSpec(
        thing.shape,
        thing.colour,
        thing.fill if thing.fill != "plain" or rng.random() < 0.2 else None,
        thing.size if rng.random() < 0.6 else None,
    )
    place = None if anywhere or beside else thing.place
    words = Instruction(kind, said, place=place, relation=direction, anchor=anchor)
    after = replace(scene, objects=(*scene.objects, thing))
    free = len(scene.objects) if anywhere else None
    region = frozenset(empty_cells(scene)) if anywhere else frozenset([cell])
    return Change(after, words, region, free)


def _remove(scene: Scene, rng: np.random.Generator, kind: str) -> Change:
    index = int(rng.integers(len(scene.objects)))
    rest = tuple(t for i, t in enumerate(scene.objects) if i != index)
    words = Instruction(kind, refer(scene, index, rng))
    return Change(replace(scene, objects=rest), words, frozenset([scene.objects[index].cell]))


def _background(scene: Scene, rng: np.random.Generator, kind: str) -> Change:
    old, form = scene.background, rng.random()
    if form < 0.08 and old.texture != TRANSPARENT:
        new = Background("", TRANSPARENT, seed_of(rng))
        words = Instruction(kind, value="", texture=TRANSPARENT)
    elif form < 0.3 and old.colour:  # the colour alone: the texture stays where it is
        new = replace(old, colour=_other(rng, GROUNDS, old.colour))
        words = Instruction(kind, value=new.colour)
    elif form < 0.5 and old.colour:
        new = replace(old, texture=_other(rng, TEXTURES, old.texture))
        words = Instruction(kind, texture=new.texture)
    else:
        colour = _other(rng, GROUNDS, old.colour)
        new = Background(colour, pick(rng, TEXTURES), seed_of(rng))
        words = Instruction(kind, value=new.colour, texture=new.texture)
    return Change(replace(scene, background=new), words, frozenset(range(9)))


_MAKERS: dict[str, Callable[[Scene, np.random.Generator, str], Change]] = {
    "recolour": _attribute,
    "reshape": _attribute,
    "refill": _attribute,
    "resize": _attribute,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "background": _background,
}
EDIT_KINDS = tuple(_MAKERS)
_ODDS = (0.17, 0.15, 0.08, 0.06, 0.16, 0.14, 0.1, 0.14)


def sample_edit(
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    held_out: bool = False,
    language: str | None = None,
    photo: float = 0.2,
) -> Edit:
    """A random edit. Training edits have both sides in "train"; held-out ones end in a held-out
    scene.
    """
    chosen = kind or pick(rng, EDIT_KINDS, _ODDS)
    while True:
        before = sample_scene(rng, held_out=held_out and rng.random() < 0.5, photo=photo)
        if chosen == "add" and len(before.objects) >= MAX_OBJECTS:
            continue
        change = _MAKERS[chosen](before, rng, chosen)
        if (split(change.after) == "held-out") == held_out:
            break
    spoken = language or sample_language(rng)
    # what the instruction leaves open is open: a size or a fill that was not asked for
    request = describe(change.after, change.free)
    if chosen == "add":
        said = change.instruction.target or ObjectSpec()
        last = replace(request.objects[-1], fill=said.fill, size=said.size)
        request = replace(request, objects=(*request.objects[:-1], last))
    text = write_instruction(change.instruction, spoken, rng)
    return Edit(before, change.after, Caption(text, spoken, 3), chosen, change.region, request)
