"""Compositions: a target made from parts of two or three numbered reference pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import chinese, english
from .captions import Caption, sample_language
from .edits import STEPS, describe, empty_cells, neighbour, refer, spec_of
from .requests import ObjectSpec, Relation, Request
from .scenes import Scene, Thing, pick, sample_background, sample_scene, seed_of, split
from .vocabulary import (
    CHINESE_PLACES,
    CHINESE_RELATIONS,
    ENGLISH_PLACES,
    ENGLISH_RELATIONS,
    PLACES,
)

_ZH_DIGITS = ("零", "一", "二", "三")
_ORDINALS = ("", "first", "second", "third")


@dataclass(frozen=True)
class Composition:
    """`references[i]` is "image i+1" of the instruction; `request` holds all facts asked of
    `target`.
    """

    references: tuple[Scene, ...]
    target: Scene
    instruction: Caption
    kind: str
    request: Request


@dataclass(frozen=True)
class _Plan:
    """Pictures by role, the target, and templates: {a}, {b} objects, {c} a picture, {p} a place."""

    pictures: tuple[Scene, ...]
    target: Scene
    parts: tuple[
        tuple[int, ObjectSpec], ...
    ]  # {a}, {b}: picture (by role) and the description of the object
    whole: int | None  # {c}
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    place: str | None = None
    relation: str | None = None
    free: tuple[int, ...] = ()  # objects of the target whose place is open
    ground: tuple[str, str] | None = None  # a background described in words


def _single(rng: np.random.Generator) -> tuple[Scene, Thing]:
    scene = sample_scene(rng, count=1)
    return scene, scene.objects[0]


def _spec(scene: Scene, rng: np.random.Generator) -> ObjectSpec:
    return refer(scene, 0, rng) if rng.random() < 0.7 else ObjectSpec()


def _canvas(rng: np.random.Generator) -> Scene:
    return sample_scene(rng, count=pick(rng, (1, 2, 3), (0.6, 0.28, 0.12)))


def _beside(rng: np.random.Generator) -> _Plan | None:
    """Object of one picture beside an object of another, in that other picture."""
    (one, thing), canvas = _single(rng), _canvas(rng)
    index = int(rng.integers(len(canvas.objects)))
    free = empty_cells(canvas)
    sides = [s for s in STEPS if neighbour(canvas.objects[index].cell, s) in free]
    if not sides:
        return None
    side = pick(rng, sides)
    new = replace(thing, cell=neighbour(canvas.objects[index].cell, side))
    target = replace(canvas, objects=(*canvas.objects, new))
    parts = ((0, _spec(one, rng)), (1, refer(canvas, index, rng)))
    return _Plan(
        (one, canvas), target, parts, None,
        ("put {a} {p} {b}", "place {a} {p} {b}", "add {a} {p} {b}", "{a} {p} {b}"),
        ("把{a}放到{b}的{p}", "在{b}的{p}放{a}", "{b}{p}是{a}"),
        relation=side,
    )  # fmt: skip


def _place(rng: np.random.Generator) -> _Plan:
    (one, thing), canvas = _single(rng), _canvas(rng)
    cell = pick(rng, empty_cells(canvas))
    target = replace(canvas, objects=(*canvas.objects, replace(thing, cell=cell)))
    parts = ((0, _spec(one, rng)),)
    if rng.random() < 0.2:
        return _Plan(
            (one, canvas), target, parts, 1,
            ("add {a} to {c}", "put {a} into {c}"), ("把{a}加到{c}里", "把{a}放进{c}"),
            free=(len(canvas.objects),),
        )  # fmt: skip
    words = ("place {a} {p} of {c}", "put {a} {p} of {c}", "add {a} to {c} {p}")
    if cell in (3, 5):  # "on the right of image 2" would be beside it
        words = words[2:]
    return _Plan(
        (one, canvas), target, parts, 1,
        words,
        ("把{a}放到{c}的{p}", "把{a}加到{c}{p}"),
        place=PLACES[cell],
    )  # fmt: skip


def _gather(rng: np.random.Generator) -> _Plan:
    """Two objects on the background of a third picture, or on one described in words."""
    (one, first), (two, second) = _single(rng), _single(rng)
    bare = sample_scene(rng, count=0)
    cells = [int(c) for c in rng.permutation(9)[:2]]
    side = None
    if rng.random() < 0.6:
        side = pick(rng, tuple(STEPS))
        cells[1] = pick(rng, [c for c in range(9) if neighbour(c, side) is not None])
        beside = neighbour(cells[1], side)
        cells[0] = beside if beside is not None else cells[0]
    things = (replace(first, cell=cells[0]), replace(second, cell=cells[1]))
    parts = ((0, _spec(one, rng)), (1, _spec(two, rng)))
    link, zh_link = ("{p}", "在{b}的{p}") if side else ("and", "和{b}")
    if rng.random() < 0.65:
        target = replace(bare, objects=things)
        return _Plan(
            (one, two, bare), target, parts, 2,
            (f"{{a}} {link} {{b}} on the background of {{c}}",
             f"put {{a}} {link} {{b}} on the background of {{c}}",
             f"{{a}} {link} {{b}}, on the background from {{c}}"),
            (f"{{a}}{zh_link}，用{{c}}的背景", f"在{{c}}的背景上，{{a}}{zh_link}"),
            relation=side, free=(0, 1),
        )  # fmt: skip
    ground = sample_background(rng, photo=0.0, transparent=0.0)
    target = Scene(things, ground, seed_of(rng))
    return _Plan(
        (one, two), target, parts, None,
        (f"{{a}} {link} {{b}} on {{g}}", f"put {{a}} {link} {{b}} on {{g}}"),
        (f"{{a}}{zh_link}，{{g}}", f"{{g}}上，{{a}}{zh_link}"),
        relation=side, free=(0, 1), ground=(ground.colour, ground.texture),
    )  # fmt: skip


def _onto(rng: np.random.Generator) -> _Plan:
    """All of one picture's objects, where they are, on another picture's background."""
    one, thing = _single(rng)
    bare = sample_scene(rng, count=0)
    return _Plan(
        (one, bare), replace(bare, objects=(thing,)), ((0, _spec(one, rng)),), 1,
        ("put {a} on the background of {c}", "{a} on the background of {c}",
         "use {c} as the background of {a}"),
        ("把{a}放到{c}的背景上", "{a}用{c}的背景", "用{c}作为{a}的背景"),
    )  # fmt: skip


def _borrow(rng: np.random.Generator) -> _Plan | None:
    """One object takes the colour, the pattern or the shape of another picture's object."""
    (one, thing), (two, giver) = _single(rng), _single(rng)
    name = pick(rng, ("colour", "fill", "shape"), (0.5, 0.3, 0.2))
    value = getattr(giver, name)
    if getattr(thing, name) == value:
        return None
    said, zh = {
        "colour": ("color", "颜色"),
        "fill": ("pattern", "花纹"),
        "shape": ("shape", "形状"),
    }[name]
    target = replace(one, objects=(replace(thing, **{name: value}),))
    parts = ((0, _spec(one, rng)), (1, refer(two, 0, rng)))
    return _Plan(
        (one, two), target, parts, None,
        (f"give {{a}} the {said} of {{b}}", f"change the {said} of {{a}} to that of {{b}}"),
        (f"把{{a}}的{zh}换成{{b}}的{zh}", f"让{{a}}用{{b}}的{zh}"),
    )  # fmt: skip


_MAKERS: dict[str, Callable[[np.random.Generator], _Plan | None]] = {
    "beside": _beside,
    "place": _place,
    "gather": _gather,
    "onto": _onto,
    "borrow": _borrow,
}
COMPOSITION_KINDS = tuple(_MAKERS)
_ODDS = (0.25, 0.2, 0.3, 0.13, 0.12)


def _english(plan: _Plan, order: list[int], rng: np.random.Generator) -> str:
    style = rng.random()

    def picture(role: int) -> str:
        number = order[role] + 1
        if style < 0.75:
            return f"image {number}"
        return f"picture {number}" if style < 0.87 else f"the {_ORDINALS[number]} image"

    words = {}
    for letter, (role, spec) in zip("ab", plan.parts, strict=False):
        at = f" {english.word(spec.place, rng, ENGLISH_PLACES)}" if spec.place else ""
        joint = pick(rng, ("of", "from", "in"))
        words[letter] = f"the {english.noun(spec, rng)}{at} {joint} {picture(role)}"
    if plan.whole is not None:
        words["c"] = picture(plan.whole)
    if plan.relation:
        words["p"] = english.word(plan.relation, rng, ENGLISH_RELATIONS)
    elif plan.place:
        words["p"] = english.word(plan.place, rng, ENGLISH_PLACES)
    if plan.ground:
        words["g"] = english.ground(*plan.ground, rng)
    return pick(rng, plan.english).format(**words)


def _chinese(plan: _Plan, order: list[int], rng: np.random.Generator) -> str:
    style = rng.random()

    def picture(role: int) -> str:
        number = order[role] + 1
        return f"图{number}" if style < 0.8 else f"第{_ZH_DIGITS[number]}张图"

    words = {}
    for letter, (role, spec) in zip("ab", plan.parts, strict=False):
        at = f"{english.word(spec.place, rng, CHINESE_PLACES)}的" if spec.place else ""
        words[letter] = (
            f"{picture(role)}{pick(rng, ('的', '中的', '里的'))}{at}{chinese.noun(spec, rng)}"
        )
    if plan.whole is not None:
        words["c"] = picture(plan.whole)
    if plan.relation:
        words["p"] = english.word(plan.relation, rng, CHINESE_RELATIONS)
    elif plan.place:
        words["p"] = english.word(plan.place, rng, CHINESE_PLACES)
    if plan.ground:
        words["g"] = chinese.ground(*plan.ground, rng)
    return pick(rng, plan.chinese).format(**words)


def _request(plan: _Plan) -> Request:
    request = describe(plan.target)
    specs = list(request.objects)
    for index in plan.free:
        specs[index] = spec_of(plan.target.objects[index], place=False)
    request = replace(request, objects=tuple(specs))
    if plan.relation and plan.free:
        request = replace(request, relations=(Relation(0, plan.relation, 1),))
    return request


def sample_composition(
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    held_out: bool = False,
    language: str | None = None,
) -> Composition:
    """A random composition. Training ones consist of "train" scenes only; held-out ones have a
    held-out target.
    """
    chosen = kind or pick(rng, COMPOSITION_KINDS, _ODDS)
    while True:
        plan = _MAKERS[chosen](rng)
        if plan is not None and (split(plan.target) == "held-out") == held_out:
            break
    order = (
        [int(i) for i in rng.permutation(len(plan.pictures))]
        if rng.random() < 0.5
        else list(range(len(plan.pictures)))
    )
    references = [plan.pictures[0]] * len(plan.pictures)
    for role, position in enumerate(order):
        references[position] = plan.pictures[role]
    spoken = language or sample_language(rng)
    text = (_chinese if spoken == "zh" else _english)(plan, order, rng)
    return Composition(
        tuple(references), plan.target, Caption(text, spoken, 3), chosen, _request(plan)
    )
