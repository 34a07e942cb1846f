"""Sets of two to four pictures that belong together, made one after the other.

Every picture after the first is asked for in words that are empty without the pictures before it
("now the star is at the top", "it moves down"). What they do not mention stays: all nuisance of the
objects (rotation, size, phase of the texture, light), the background and its grain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import chinese, english
from .captions import Caption, sample_caption, sample_language
from .checker import Found, Reading, judge, read
from .edits import STEPS, empty_cells, neighbour, refer, with_object
from .fitting import period
from .instructions import Instruction, write_instruction
from .requests import ObjectSpec, Request
from .scenes import Scene, Thing, pick, sample_scene, sample_thing, split
from .vocabulary import (
    CHINESE,
    CHINESE_NUMBERS,
    CHINESE_PLACES,
    COLOURS,
    ENGLISH_PLACES,
    PLACES,
)

PLAIN_WORDS = 0.35  # of the pictures are asked for as an edit is
_COUNT_ODDS = (0.2, 0.3, 0.5)  # of two, three and four pictures
RADIUS_SPAN = 0.15  # within which two objects are of one size, as a share
# In radians. Those read off true pictures of one object agree within .02; objects drawn at random
# turn by up to .39 either way, so one in three passes by chance.
TURN_SPAN = 0.14


@dataclass(frozen=True)
class Panel:
    """A picture of a set: how it is asked for, and what it was told to show, besides as many
    objects as `scene` has.
    """

    scene: Scene
    caption: Caption
    told: Request


@dataclass(frozen=True)
class PictureSet:
    """Pictures in their order. Objects keep their index in `scene.objects` over the whole set."""

    kind: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class SetVerdict:
    """`told[k]`: picture k shows what it was asked for; `kept[k]`: picture k + 1 shows every object
    of the pictures before it again, as it was painted there first. `attributes`: the same over the
    whole set, but for sizes and rotations.
    """

    told: tuple[bool, ...]
    kept: tuple[bool, ...]
    attributes: bool

    @property
    def identity(self) -> bool:
        return all(self.kept)


# {s} a noun, {it} the object or "it", {p} at a place, {t} to a place, {c} a colour, {n} a new
# object, {d} a direction.
_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "places": ("the same {s} {p}", "the same {s} {p}", "the same {s}, now {p}",
                   "now {it} is {p}", "{it} is now {p}"),
        "colours": ("the same {s} in {c}", "the same {s} in {c}", "the same {s}, now {c}",
                    "now {it} is {c}", "{it} is now {c}"),
        "growing": ("the same with {n} {p}", "now also {n} {p}", "and {n} {p}", "then {n} {p}"),
        "step": ("{it} moves {d}", "{it} moves one step {d}", "then {it} moves {d}",
                 "now {it} goes one step {d}"),
        "go": ("{it} goes to {t}", "then {it} moves to {t}", "now {it} jumps to {t}"),
        "back": ("{it} goes back to where it began", "then {it} returns to its first place"),
    },
    "zh": {
        "places": ("同一个{s}在{p}", "同一个{s}，现在在{p}", "{p}有同一个{s}", "现在{it}在{p}"),
        "colours": ("同一个{s}，{c}", "同一个{s}，现在是{c}", "现在{it}是{c}", "{it}现在是{c}"),
        "growing": ("现在{p}还有{n}", "再在{p}加{n}", "{p}又有{n}", "然后{p}有{n}"),
        "step": ("{it}向{d}移动", "然后{it}往{d}移一格", "现在{it}向{d}移一格"),
        "go": ("{it}移到{t}", "然后{it}移动到{t}", "现在{it}放到{t}"),
        "back": ("{it}回到开始的位置", "然后{it}回到第一张图的位置"),
    },
}  # fmt: skip
_DIRECTIONS = {
    "en": {"left": "left", "right": "right", "above": "up", "below": "down"},
    "zh": {"left": "左", "right": "右", "above": "上", "below": "下"},
}


def _place(place: str, spoken: str, rng: np.random.Generator) -> str:
    return english.word(place, rng, CHINESE_PLACES if spoken == "zh" else ENGLISH_PLACES)


def _to(place: str, spoken: str, rng: np.random.Generator) -> str:
    """ "the top left"; "the left side", because "to the left" is a step."""
    if spoken == "zh":
        return _place(place, spoken, rng)
    return f"the {place} side" if place in ("left", "right") else f"the {place}"


def _noun(spec: ObjectSpec, spoken: str, rng: np.random.Generator) -> str:
    return (chinese if spoken == "zh" else english).noun(spec, rng)


def _it(scene: Scene, index: int, spoken: str, rng: np.random.Generator) -> str:
    """The object as the subject of a sentence; "it" where there is no other."""
    if len(scene.objects) == 1 and rng.random() < 0.3:
        return "它" if spoken == "zh" else "it"
    spec = refer(scene, index, rng)
    name = _noun(spec, spoken, rng)
    if spoken == "zh":
        return f"{_place(spec.place, spoken, rng)}的{name}" if spec.place else name
    return f"the {name} {_place(spec.place, spoken, rng)}" if spec.place else f"the {name}"


def _say(form: str, spoken: str, rng: np.random.Generator, **words: str) -> Caption:
    text = pick(rng, _WORDS[spoken][form]).format(**words)
    if spoken == "en" and rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1:
        text += "。" if spoken == "zh" else "."
    return Caption(text, spoken, 3)


def _instruct(instruction: Instruction, spoken: str, rng: np.random.Generator) -> Caption:
    return Caption(write_instruction(instruction, spoken, rng), spoken, 3)


def _shape_only(thing: Thing, rng: np.random.Generator) -> ObjectSpec:
    """What the object is called where its colour changes."""
    return ObjectSpec(thing.shape if rng.random() < 0.8 else None)


def _places(seen: list[Scene], spoken: str, rng: np.random.Generator) -> Panel:
    """The same object in another place."""
    last = seen[-1]
    used = {scene.objects[0].cell for scene in seen}
    cell = pick(rng, [c for c in range(9) if c not in used])
    scene = with_object(last, 0, cell=cell)
    if rng.random() < PLAIN_WORDS:
        words = Instruction("move", refer(last, 0, rng), place=PLACES[cell])
        caption = _instruct(words, spoken, rng)
    else:
        caption = _say(
            "places", spoken, rng, s=_noun(refer(last, 0, rng), spoken, rng),
            it=_it(last, 0, spoken, rng), p=_place(PLACES[cell], spoken, rng),
        )  # fmt: skip
    return Panel(scene, caption, Request((ObjectSpec(place=PLACES[cell]),)))


def _colours(seen: list[Scene], spoken: str, rng: np.random.Generator) -> Panel:
    """The same object in another colour."""
    last = seen[-1]
    thing = last.objects[0]
    used = {scene.objects[0].colour for scene in seen}
    colour = pick(rng, [c for c in COLOURS if c not in used])
    scene = with_object(last, 0, colour=colour)
    spec = _shape_only(thing, rng)
    if rng.random() < PLAIN_WORDS:
        words = Instruction("recolour", spec, value=colour, old=thing.colour)
        caption = _instruct(words, spoken, rng)
    else:
        name, zh = _noun(spec, spoken, rng), spoken == "zh"
        said = english.word(colour, rng, CHINESE) if zh else english.word(colour, rng)
        it = pick(rng, ("它", name)) if zh else pick(rng, ("it", f"the {name}"))
        caption = _say("colours", spoken, rng, s=name, it=it, c=said)
    return Panel(scene, caption, Request((ObjectSpec(colour=colour, place=thing.place),)))


def _growing(seen: list[Scene], spoken: str, rng: np.random.Generator) -> Panel:
    """One object more."""
    last = seen[-1]
    thing = sample_thing(rng, pick(rng, empty_cells(last)))
    scene = replace(last, objects=(*last.objects, thing))
    said = ObjectSpec(
        thing.shape,
        thing.colour,
        thing.fill if thing.fill != "plain" or rng.random() < 0.2 else None,
        thing.size if rng.random() < 0.5 else None,
    )
    if rng.random() < PLAIN_WORDS:
        caption = _instruct(Instruction("add", said, place=thing.place), spoken, rng)
    else:
        name = _noun(said, spoken, rng)
        new = CHINESE_NUMBERS[1] + name if spoken == "zh" else english.article(name)
        caption = _say("growing", spoken, rng, n=new, p=_place(thing.place, spoken, rng))
    told = replace(said, place=thing.place)
    return Panel(scene, caption, Request((told,), exact=False))


def _moves(seen: list[Scene], spoken: str, rng: np.random.Generator) -> Panel:
    """The first object goes on, from where it is in the last picture."""
    last = seen[-1]
    thing, start = last.objects[0], seen[0].objects[0].cell
    free = empty_cells(last)
    steps = [(d, n) for d in STEPS if (n := neighbour(thing.cell, d)) is not None and n in free]
    it, form = _it(last, 0, spoken, rng), rng.random()
    if len(seen) > 1 and start in free and form < 0.15:
        cell, caption = start, _say("back", spoken, rng, it=it)
    elif steps and form < 0.7:
        direction, cell = pick(rng, steps)
        if rng.random() < PLAIN_WORDS:
            words = Instruction("move", refer(last, 0, rng), value=direction)
            caption = _instruct(words, spoken, rng)
        else:
            caption = _say("step", spoken, rng, it=it, d=_DIRECTIONS[spoken][direction])
    else:
        cell = pick(rng, free)
        caption = _say("go", spoken, rng, it=it, t=_to(PLACES[cell], spoken, rng))
    told = ObjectSpec(thing.shape, thing.colour, place=PLACES[cell])
    return Panel(with_object(last, 0, cell=cell), caption, Request((told,), exact=False))


_MAKERS: dict[str, Callable[[list[Scene], str, np.random.Generator], Panel]] = {
    "places": _places,
    "colours": _colours,
    "growing": _growing,
    "moves": _moves,
}
SET_KINDS = tuple(_MAKERS)


def opening(scene: Scene, spoken: str, rng: np.random.Generator) -> Panel:
    """The first picture: a full caption that says where everything is."""
    while True:
        caption, request = sample_caption(scene, rng, language=spoken, level=3)
        if all(spec.place for spec in request.objects):
            return Panel(scene, caption, request)


def sample_set(
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    count: int | None = None,
    held_out: bool = False,
    language: str | None = None,
    photo: float = 0.15,
) -> PictureSet:
    """A random set of 2 to 4 pictures. Training sets consist of "train" scenes only; held-out ones
    end in a held-out scene.
    """
    chosen, spoken = kind or pick(rng, SET_KINDS), language or sample_language(rng)
    number = count or int(pick(rng, (2, 3, 4), _COUNT_ODDS))
    while True:
        things = int(pick(rng, (1, 2), (0.6, 0.4))) if chosen == "moves" else 1
        panels = [opening(sample_scene(rng, count=things, photo=photo), spoken, rng)]
        while len(panels) < number:
            made = _MAKERS[chosen]([panel.scene for panel in panels], spoken, rng)
            if split(made.scene) == "held-out" and not held_out:
                break
            panels.append(made)
        if len(panels) == number and (split(panels[-1].scene) == "held-out") == held_out:
            return PictureSet(chosen, tuple(panels))


def turned(first: Found, second: Found) -> float:
    """By how many radians two objects of one shape differ in rotation."""
    whole = period(first.shape)
    gap = abs(first.angle - second.angle)
    return min(gap % whole, -gap % whole) if whole else 0.0


def alike(first: Found, second: Found, *, colour: bool = True, form: bool = True) -> bool:
    """Whether two objects, read off two pictures, are one: shape, fill, `colour`, and as `form`
    size and rotation.
    """
    return (
        first.shape == second.shape
        and first.fill == second.fill
        and (first.colour == second.colour or not colour)
        and (abs(first.radius / second.radius - 1) <= RADIUS_SPAN or not form)
        and (turned(first, second) <= TURN_SPAN or not form)
    )


def _nearest(thing: Thing, seen: Sequence[Found]) -> Found | None:
    """What was painted for `thing`: the object nearest to its cell."""
    row, column = divmod(thing.cell, 3)
    y, x = (row + 0.5) / 3, (column + 0.5) / 3
    return min(seen, key=lambda found: (found.x - x) ** 2 + (found.y - y) ** 2, default=None)


def _kept(readings: Sequence[Reading], made: PictureSet, form: bool) -> tuple[bool, ...]:
    """For each picture but the first, whether it shows all objects of those before it again."""
    anchors: list[Found | None] = []
    kept = []
    for panel, reading in zip(made.panels, readings, strict=True):
        left, found = list(reading.objects), []
        for anchor in anchors:
            same = [
                seen
                for seen in left
                if anchor and alike(anchor, seen, colour=made.kind != "colours", form=form)
            ]
            found.append(bool(same))
            if same:
                left.remove(same[0])
        kept.append(all(found))
        for thing in panel.scene.objects[len(anchors) :]:
            anchors.append(_nearest(thing, left))
            left = [seen for seen in left if seen is not anchors[-1]]
    return tuple(kept[1:])


def _as_told(reading: Reading, panel: Panel) -> bool:
    verdict = judge(reading, panel.told)
    complete = len(reading.objects) == len(panel.scene.objects)
    return complete and verdict.colour and verdict.shape and verdict.place


def check_set(pictures: Sequence[np.ndarray], made: PictureSet) -> SetVerdict:
    """Whether uint8 pictures (n, n, 3 or 4) are the set `made`.

    Every object is known by how it was *painted* where it appears first, right or wrong; from then
    on every picture must show it again. Whether it is what and where it should be is in `told`.
    """
    if len(pictures) != len(made.panels):
        raise ValueError(
            f"The set has {len(made.panels)} pictures, but {len(pictures)} were given."
        )
    readings = [read(picture) for picture in pictures]
    told = tuple(map(_as_told, readings, made.panels))
    return SetVerdict(told, _kept(readings, made, True), all(_kept(readings, made, False)))
