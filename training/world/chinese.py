"""Chinese words for requests and for single objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .english import word
from .requests import ObjectSpec, Request
from .scenes import pick
from .vocabulary import (
    CHINESE,
    CHINESE_NUMBERS,
    CHINESE_PLACES,
    CHINESE_RELATIONS,
    PHOTO,
    TRANSPARENT,
)


def noun(spec: ObjectSpec, rng: np.random.Generator) -> str:
    """「大的红色条纹星形」, without number or place."""
    parts = []
    if spec.size:
        parts.append(word(spec.size, rng, CHINESE) + pick(rng, ("的", "的", "")))
    middle = [word(spec.colour, rng, CHINESE)] if spec.colour else []
    if spec.fill:
        middle.insert(int(rng.random() < 0.7), word(f"fill {spec.fill}", rng, CHINESE))
    name = word(spec.shape, rng, CHINESE) if spec.shape else pick(rng, ("形状", "图形"))
    link = "的" if middle and rng.random() < 0.5 else ""
    return "".join([*parts, *middle]) + link + name


def counted(spec: ObjectSpec, rng: np.random.Generator) -> str:
    if spec.count == 1 and rng.random() < 0.2:
        return noun(spec, rng)
    return CHINESE_NUMBERS[spec.count] + noun(spec, rng)


def placed(spec: ObjectSpec, rng: np.random.Generator) -> str:
    if not spec.place:
        return counted(spec, rng)
    place = word(spec.place, rng, CHINESE_PLACES)
    form = rng.random()
    if form < 0.5:
        return f"{place}有{CHINESE_NUMBERS[spec.count]}{noun(spec, rng)}"
    if form < 0.8:
        return f"{counted(spec, rng)}在{place}"
    return f"{place}的{noun(spec, rng)}"


def ground(colour: str | None, texture: str | None, rng: np.random.Generator) -> str:
    """「沙色条纹背景」; "" when nothing is asked."""
    if texture == PHOTO:
        return pick(rng, ("照片背景", "照片"))
    if texture == TRANSPARENT:
        return "透明背景"
    parts = [word(f"ground {colour}", rng, CHINESE)] if colour else []
    if texture:
        at = len(parts) if rng.random() < 0.7 else 0
        parts.insert(at, word(f"texture {texture}", rng, CHINESE))
    if not parts:
        return ""
    return "".join(parts) + pick(rng, ("背景", "背景", "的背景"))


def enumerate_(parts: Sequence[str], rng: np.random.Generator) -> str:
    if len(parts) < 2:
        return parts[0]
    if any("在" in part or "有" in part for part in parts):
        return "，".join(parts)
    return "、".join(parts[:-1]) + pick(rng, ("和", "和", "、")) + parts[-1]


def _objects(request: Request, rng: np.random.Generator) -> str:
    specs = request.objects
    if not request.relations:
        return enumerate_([placed(spec, rng) for spec in specs], rng)
    relation = request.relations[0]
    link = word(relation.kind, rng, CHINESE_RELATIONS)
    first, second = specs[relation.subject], specs[relation.other]
    form = rng.random()
    if form < 0.4:
        text = f"{noun(second, rng)}{link}的{noun(first, rng)}"
    elif form < 0.8:
        text = f"{counted(first, rng)}在{counted(second, rng)}的{link}"
    else:
        text = f"{counted(second, rng)}{link}有一个{noun(first, rng)}"
    rest = [
        placed(s, rng) for i, s in enumerate(specs) if i not in (relation.subject, relation.other)
    ]
    return "，".join([text, *rest])


def _vague(request: Request, rng: np.random.Generator) -> str:
    if not request.objects:
        return pick(rng, ("一些形状", "几个图形", "一些图形", "几个形状"))
    if not request.exact:
        return counted(request.objects[0], rng) + pick(rng, ("和其他形状", "和一些其他图形"))
    return ""


def write(request: Request, rng: np.random.Generator) -> str:
    """One of many phrasings of `request`."""
    text = _vague(request, rng) or _objects(request, rng)
    behind = ground(request.ground, request.texture, rng)
    if behind:
        form = rng.random()
        if behind == "照片":
            text = f"照片上{'有' if text[0] in '一两三四几' else '，'}{text}"
        elif form < 0.35:
            text = f"{text}，{behind}"
        elif form < 0.7:
            text = f"{behind}，{text}" if rng.random() < 0.5 else f"{behind}上，{text}"
        elif behind.endswith("的背景"):
            text = f"{text}，背景是{behind[:-3]}"
        else:
            text = f"{text}，背景是{behind[:-2]}{'的' if behind == '透明背景' else ''}"
    if rng.random() < 0.1:
        text = pick(rng, ("画", "请画", "一张图：")) + text
    return text + "。" if rng.random() < 0.1 else text
