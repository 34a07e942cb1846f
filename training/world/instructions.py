"""The words of edit instructions, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import chinese, english
from .requests import ObjectSpec
from .scenes import pick
from .vocabulary import (
    CHINESE,
    CHINESE_PLACES,
    CHINESE_RELATIONS,
    ENGLISH_PLACES,
    ENGLISH_RELATIONS,
    TRANSPARENT,
)


@dataclass(frozen=True)
class Instruction:
    """Facts of an instruction: `target` is the object meant (or to add), `value` the new
    attribute.

    Move and add go to `place`, or to the side `relation` of `anchor`; a move may instead have a
    direction in `value`.
    """

    kind: str
    target: ObjectSpec | None = None
    value: str | None = None
    old: str | None = None
    place: str | None = None
    relation: str | None = None
    anchor: ObjectSpec | None = None
    texture: str | None = None


def the(spec: ObjectSpec, rng: np.random.Generator) -> str:
    """ "the red star at the top left"."""
    text = "the " + english.noun(spec, rng)
    return f"{text} {english.word(spec.place, rng, ENGLISH_PLACES)}" if spec.place else text


def zh_the(spec: ObjectSpec, rng: np.random.Generator) -> str:
    """「左上角的红色星形」"""
    text = chinese.noun(spec, rng)
    return f"{english.word(spec.place, rng, CHINESE_PLACES)}的{text}" if spec.place else text


# "move ... to the left" would be read as a step, so the middle cells of the border say "side" or
# "center"
_TO = {
    "top left": ("the top left", "the top left corner"), "top": ("the top", "the top center"),
    "top right": ("the top right", "the top right corner"), "left": ("the left side",),
    "center": ("the center", "the middle"), "right": ("the right side",),
    "bottom left": ("the bottom left", "the bottom left corner"),
    "bottom": ("the bottom", "the bottom center"),
    "bottom right": ("the bottom right", "the bottom right corner"),
}  # fmt: skip
_STEP = {"left": "left", "right": "right", "above": "up", "below": "down"}
_ZH_STEP = {"left": "左", "right": "右", "above": "上", "below": "下"}


def _where(i: Instruction, rng: np.random.Generator) -> str:
    if i.anchor is not None and i.relation:
        link = english.word(i.relation, rng, ENGLISH_RELATIONS)
        return f" {link} {the(i.anchor, rng)}"
    return f" {english.word(i.place, rng, ENGLISH_PLACES)}" if i.place else ""


def _english_attribute(i: Instruction, it: str, rng: np.random.Generator) -> str:
    value = i.value or ""
    if i.kind == "recolour":
        colour = english.word(value, rng)
        forms = (f"make {it} {colour}", f"make {it} {colour}", f"turn {it} {colour}",
                 f"paint {it} {colour}", f"recolor {it} {colour}", f"change {it} to {colour}",
                 f"change the color of {it} to {colour}")  # fmt: skip
    elif i.kind == "reshape":
        shape = english.article(english.word(value, rng))
        forms = (f"change {it} to {shape}", f"change {it} into {shape}", f"turn {it} into {shape}",
                 f"replace {it} with {shape}", f"make {it} {shape}")  # fmt: skip
    elif i.kind == "refill":
        fill = english.word(f"fill {value}", rng)
        marks = {"striped": "stripes", "dotted": "dots"}
        extra = f"change {it} to {fill}"
        if value == "plain":
            extra = f"remove the {marks[i.old or 'striped']} from {it}"
        elif i.old == "plain":
            extra = f"add {marks[value]} to {it}"
        forms = (f"make {it} {fill}", f"make {it} {fill}", extra)
    else:
        more = pick(rng, ("bigger", "larger") if value == "big" else ("smaller",))
        verb = pick(rng, ("enlarge", "grow") if value == "big" else ("shrink",))
        forms = (f"make {it} {more}", f"make {it} {english.word(value, rng)}", f"{verb} {it}")
    return pick(rng, forms)


def _english(i: Instruction, rng: np.random.Generator) -> str:
    if i.kind == "background":
        return _english_background(i, rng)
    target = i.target or ObjectSpec()
    if i.kind == "add":
        verb = pick(rng, ("add", "add", "put", "draw", "place"))
        return f"{verb} {english.counted(target, rng)}{_where(i, rng)}"
    it = the(target, rng)
    if i.kind == "remove":
        return pick(
            rng, (f"remove {it}", f"remove {it}", f"delete {it}", f"erase {it}", f"take {it} away")
        )
    if i.kind == "move":
        verb = "move" if rng.random() < 0.8 else "shift"
        if i.anchor is not None:
            return f"{verb if rng.random() < 0.7 else 'put'} {it}{_where(i, rng)}"
        if i.place:
            return f"{verb} {it} to {pick(rng, _TO[i.place])}"
        step = _STEP[i.value or "left"]
        return pick(rng, (f"{verb} {it} {step}", f"{verb} {it} one step {step}"))
    return _english_attribute(i, it, rng)


def _english_background(i: Instruction, rng: np.random.Generator) -> str:
    if i.texture == TRANSPARENT:
        return pick(rng, ("make the background transparent", "remove the background",
                          "put it on a transparent background"))  # fmt: skip
    if i.value and i.texture:
        behind = english.article(_behind(i, rng))
        return pick(rng, (f"put it on {behind}", f"put everything on {behind}",
                          f"change the background to {behind}", f"use {behind}",
                          f"replace the background with {behind}"))  # fmt: skip
    new = english.word(f"ground {i.value}" if i.value else f"texture {i.texture}", rng)
    if i.texture == "gradient":
        new = pick(rng, ("a gradient", "graded"))
    forms = (
        f"make the background {new}",
        f"change the background to {new}",
        f"turn the background {new}",
    )
    if i.value:
        forms = (*forms, f"change the color of the background to {new}", f"{new} background")
    return pick(rng, forms)


def _behind(i: Instruction, rng: np.random.Generator) -> str:
    colour, texture = (
        english.word(f"ground {i.value}", rng),
        english.word(f"texture {i.texture}", rng),
    )
    return (
        f"{colour} {texture} background" if rng.random() < 0.5 else f"{texture} {colour} background"
    )


def _zh_where(i: Instruction, rng: np.random.Generator) -> str:
    if i.anchor is not None and i.relation:
        return f"{zh_the(i.anchor, rng)}的{english.word(i.relation, rng, CHINESE_RELATIONS)}"
    return english.word(i.place, rng, CHINESE_PLACES) if i.place else ""


def _chinese_attribute(i: Instruction, it: str, rng: np.random.Generator) -> str:
    value = i.value or ""
    ba = pick(rng, ("把", "把", "将"))
    if i.kind == "recolour":
        colour = english.word(value, rng, CHINESE)
        forms = (f"{ba}{it}变成{colour}", f"{ba}{it}改成{colour}", f"{ba}{it}涂成{colour}",
                 f"{ba}{it}的颜色改成{colour}")  # fmt: skip
    elif i.kind == "reshape":
        shape = english.word(value, rng, CHINESE)
        forms = (f"{ba}{it}变成{shape}", f"{ba}{it}换成{shape}", f"{ba}{it}改成一个{shape}")
    elif i.kind == "refill":
        fill = english.word(f"fill {value}", rng, CHINESE)
        old = english.word(f"fill {i.old}", rng, CHINESE)
        extra = f"{ba}{it}的{old}改成{fill}"
        if value == "plain":
            extra = f"去掉{it}的{old}"
        elif i.old == "plain":
            extra = f"给{it}加上{fill}"
        forms = (f"{ba}{it}变成{fill}", f"{ba}{it}改成{fill}", extra)
    else:
        new = english.word(value, rng, CHINESE)
        forms = (
            f"{ba}{it}变{new}",
            f"{'放大' if value == 'big' else '缩小'}{it}",
            f"让{it}变{new}一点",
        )
    return pick(rng, forms)


def _chinese(i: Instruction, rng: np.random.Generator) -> str:
    if i.kind == "background":
        return _chinese_background(i, rng)
    target, ba = i.target or ObjectSpec(), pick(rng, ("把", "把", "将"))
    if i.kind == "add":
        verb = pick(rng, ("加", "添加", "画", "放"))
        where = _zh_where(i, rng)
        thing = chinese.counted(target, rng)
        return f"在{where}{verb}{thing}" if where else f"{'添加' if verb == '放' else verb}{thing}"
    it = zh_the(target, rng)
    if i.kind == "remove":
        return pick(rng, (f"去掉{it}", f"删除{it}", f"移除{it}", f"{ba}{it}去掉", f"{ba}{it}删掉"))
    if i.kind == "move":
        if i.anchor is not None or i.place:
            verb = pick(rng, ("移到", "移动到", "放到"))
            return f"{ba}{it}{verb}{_zh_where(i, rng)}"
        step = _ZH_STEP[i.value or "left"]
        return pick(
            rng, (f"{ba}{it}向{step}移动", f"{ba}{it}向{step}移一格", f"{ba}{it}往{step}移")
        )
    return _chinese_attribute(i, it, rng)


def _chinese_background(i: Instruction, rng: np.random.Generator) -> str:
    ba = pick(rng, ("把", "把", "将"))
    if i.texture == TRANSPARENT:
        return pick(rng, (f"{ba}背景变成透明", "去掉背景", "换成透明背景"))
    parts = [english.word(f"ground {i.value}", rng, CHINESE)] if i.value else []
    if i.texture:
        parts.insert(int(rng.random() < 0.7), english.word(f"texture {i.texture}", rng, CHINESE))
    new = "".join(parts)
    if i.value and i.texture:
        return pick(
            rng, (f"换成{new}背景", f"{ba}背景换成{new}", f"放到{new}背景上", f"{ba}背景改成{new}")
        )
    return pick(rng, (f"{ba}背景变成{new}", f"{ba}背景改成{new}", f"背景变{new}"))


def write_instruction(instruction: Instruction, language: str, rng: np.random.Generator) -> str:
    """One of many phrasings; now and then polite, capitalised or with a full stop."""
    if language == "zh":
        text = _chinese(instruction, rng)
        if rng.random() < 0.07:
            text = "请" + text
        return text + "。" if rng.random() < 0.1 else text
    text = _english(instruction, rng)
    if rng.random() < 0.05:
        text = "please " + text
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text
