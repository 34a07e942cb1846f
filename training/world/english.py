"""English words for requests and for single objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .requests import ObjectSpec, Request
from .scenes import pick
from .vocabulary import (
    ENGLISH,
    ENGLISH_NUMBERS,
    ENGLISH_PLACES,
    ENGLISH_RELATIONS,
    PHOTO,
    TRANSPARENT,
)

_PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses", "disc": "discs"}


def word(key: str, rng: np.random.Generator, table: dict[str, tuple[str, ...]] = ENGLISH) -> str:
    """The usual word, or now and then a synonym."""
    words = table[key]
    return words[0] if len(words) == 1 or rng.random() < 0.75 else pick(rng, words[1:])


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def noun(spec: ObjectSpec, rng: np.random.Generator) -> str:
    """ "big striped red star", without article, number or place; "shapes" for an object of
    unknown shape.
    """
    parts = [word(spec.size, rng)] if spec.size else []
    tail = ""
    if spec.fill:
        if spec.fill != "plain" and rng.random() < 0.2:
            tail = " with stripes" if spec.fill == "striped" else " with dots"
        else:
            parts.append(word(f"fill {spec.fill}", rng))
    if spec.colour:
        place = len(parts) if rng.random() < 0.8 else len(parts) - bool(spec.fill and not tail)
        parts.insert(place, word(spec.colour, rng))
    name = word(spec.shape, rng) if spec.shape else pick(rng, ("shape", "shape", "object"))
    if spec.count > 1:
        name = _PLURALS.get(name, name + "s")
    return " ".join([*parts, name]) + tail


def counted(spec: ObjectSpec, rng: np.random.Generator) -> str:
    """The noun with its article or number, without a place."""
    name = noun(spec, rng)
    if spec.count == 1:
        return article(name) if rng.random() < 0.95 else "one " + name
    number = ENGLISH_NUMBERS[spec.count]
    return f"{number if rng.random() < 0.9 else spec.count} {name}"


def placed(spec: ObjectSpec, rng: np.random.Generator) -> str:
    text = counted(spec, rng)
    return f"{text} {word(spec.place, rng, ENGLISH_PLACES)}" if spec.place else text


def ground(colour: str | None, texture: str | None, rng: np.random.Generator) -> str:
    """ "a blue striped background", with its article; "" when nothing is asked."""
    if texture == PHOTO:
        return pick(rng, ("a photo", "a photograph", "a photo background"))
    if texture == TRANSPARENT:
        return "a transparent background"
    parts = [word(f"ground {colour}", rng)] if colour else []
    if texture:
        at = len(parts) if rng.random() < 0.65 else 0
        parts.insert(at, word(f"texture {texture}", rng))
    elif colour and rng.random() < 0.15:
        return parts[0]  # "on sand"
    return article(" ".join([*parts, "background"])) if parts else ""


def enumerate_(parts: Sequence[str], rng: np.random.Generator) -> str:
    if len(parts) < 2:
        return parts[0]
    joint = pick(rng, (" and ", " and ", ", "))
    return ", ".join(parts[:-1]) + joint + parts[-1]


def _vague(request: Request, rng: np.random.Generator) -> str:
    if not request.objects:
        return pick(
            rng, ("some shapes", "a few shapes", "several objects", "shapes", "some objects")
        )
    if not request.exact:
        rest = pick(rng, ("some other shapes", "other shapes", "more shapes"))
        return f"{counted(request.objects[0], rng)} and {rest}"
    return ""


def _objects(request: Request, rng: np.random.Generator) -> str:
    specs = request.objects
    if not request.relations:
        return enumerate_([placed(spec, rng) for spec in specs], rng)
    relation = request.relations[0]
    link = word(relation.kind, rng, ENGLISH_RELATIONS)
    first, second = placed(specs[relation.subject], rng), placed(specs[relation.other], rng)
    verb = "is " if len(specs) == 2 and rng.random() < 0.15 else ""
    text = f"{first} {verb}{link} {second}"
    rest = [
        placed(s, rng) for i, s in enumerate(specs) if i not in (relation.subject, relation.other)
    ]
    return enumerate_([text, *rest], rng) if rest else text


def write(request: Request, rng: np.random.Generator) -> str:
    """One of many phrasings of `request`."""
    text = _vague(request, rng) or _objects(request, rng)
    behind = ground(request.ground, request.texture, rng)
    if behind:
        form = rng.random()
        if form < 0.65:
            text = f"{text}{',' if rng.random() < 0.3 else ''} on {behind}"
        elif form < 0.8:
            text = f"on {behind}, {text}"
        else:
            text = f"{behind} with {text}"
    if rng.random() < 0.12:
        text = pick(rng, ("draw ", "a picture of ", "show me ", "please draw ")) + text
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text
