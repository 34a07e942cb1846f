"""Captions back to requests: reads what people type in the world's words, in English or Chinese.

It knows the phrases that `write` makes and nothing else; words it does not know are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .requests import ObjectSpec, Relation, Request
from .vocabulary import (
    CHINESE,
    CHINESE_NUMBERS,
    CHINESE_PLACES,
    CHINESE_RELATIONS,
    COLOURS,
    ENGLISH,
    ENGLISH_NUMBERS,
    ENGLISH_PLACES,
    ENGLISH_RELATIONS,
    FILLS,
    GROUNDS,
    PHOTO,
    SHAPES,
    SIZES,
    TEXTURES,
    TRANSPARENT,
)

Tokens = list[tuple[str, str]]
_VAGUE = "some"  # "number" of an unknown many


@dataclass
class _Lexicon:
    """Phrases of one language: text -> (kind, value), found longest first."""

    phrases: dict[str, tuple[str, str]] = field(default_factory=dict)
    edge: str = ""

    def add(self, kind: str, value: str, words: Iterable[str]) -> None:
        self.phrases.update({word: (kind, value) for word in words})

    def tokens(self, text: str) -> Tokens:
        ordered = sorted(self.phrases, key=len, reverse=True)
        pattern = self.edge + "(" + "|".join(map(re.escape, ordered)) + ")" + self.edge
        return [self.phrases[match] for match in re.findall(pattern, text)]


def _lexicon(words: dict[str, tuple[str, ...]], places: dict, relations: dict) -> _Lexicon:
    book = _Lexicon()
    for kind, names, prefix in (
        ("shape", SHAPES, ""), ("colour", COLOURS, ""),
        ("size", SIZES, ""), ("fill", FILLS, "fill "),
    ):  # fmt: skip
        for name in names:
            book.add(kind, name, words[prefix + name])
    for kind, table in (("place", places), ("relation", relations)):
        for name, forms in table.items():
            book.add(kind, name, forms)
    return book


def _english() -> _Lexicon:
    book = _lexicon(ENGLISH, ENGLISH_PLACES, ENGLISH_RELATIONS)
    for phrase, (kind, name) in list(book.phrases.items()):
        if kind == "shape":
            book.add("shape", name, (phrase + "s", phrase + "es"))
    book.add("shape", "", ("shape", "shapes", "object", "objects"))
    for number, name in enumerate(ENGLISH_NUMBERS):
        book.add("number", str(number), (name, str(number)))
    book.add("number", "1", ("an", "one"))
    book.add("number", _VAGUE, ("some", "a few", "several"))
    book.add("tail", "striped", ("with stripes",))
    book.add("tail", "dotted", ("with dots",))
    book.add("others", "", ("some other shapes", "other shapes", "more shapes"))
    book.edge = r"\b"
    return book


def _chinese() -> _Lexicon:
    book = _lexicon(CHINESE, CHINESE_PLACES, CHINESE_RELATIONS)
    book.add("shape", "", ("形状", "图形"))
    for number, name in enumerate(CHINESE_NUMBERS):
        book.add("number", str(number), (name,))
    book.add("number", _VAGUE, ("一些", "几个"))
    book.add("others", "", ("其他形状", "一些其他图形"))
    book.add("at", "", ("在",))
    return book


_BOOKS = {"en": _english(), "zh": _chinese()}


def _names(prefix: str, names: Iterable[str], words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for name in names for word in words[f"{prefix} {name}"]}


_GROUND = {"en": _names("ground", GROUNDS, ENGLISH), "zh": _names("ground", GROUNDS, CHINESE)}
_TEXTURE = {"en": _names("texture", TEXTURES, ENGLISH), "zh": _names("texture", TEXTURES, CHINESE)}


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


def _background(text: str, language: str) -> tuple[str, str | None, str | None]:
    """The text without its words about the background, and the ground and texture they name."""
    ground, texture = _GROUND[language], _TEXTURE[language]
    either = _any([*ground, *texture])
    if language == "en":
        special = r"(?:on )?(?:a |an )?(transparent background|photo background|photograph|photo)\b"
        drawn = (
            rf"(?:\bon )?\b(?:a |an )((?:{either} )+)background",
            rf"\bon ({_any(ground)})\b", rf"^({_any(ground)}) with\b",
        )  # fmt: skip
    else:
        special = r"(照片背景|背景是照片|照片上|透明背景|背景是透明)"
        drawn = (rf"背景是({either}+)", rf"({either}+)的?背景")
    found = re.search(special, text)
    if found:
        clear = found[1].startswith("transparent") or "透明" in found[1]
        return text.replace(found[0], "；"), None, TRANSPARENT if clear else PHOTO
    for pattern in drawn:
        found = re.search(pattern, text)
        if found:
            words = re.findall(either, found[1])
            colour = next((ground[w] for w in words if w in ground), None)
            kind = next((texture[w] for w in words if w in texture), None)
            return text.replace(found[0], "；"), colour, kind
    return text, None, None


class _Reader:
    """Collects objects from tokens; a place or relation may come before or after its object."""

    def __init__(self, language: str) -> None:
        self.chinese = language == "zh"
        self.specs: list[ObjectSpec] = []
        self.relations: list[Relation] = []
        self.others = self.vague = False

    def clause(self, tokens: Tokens) -> None:
        open_: dict[str, str | int] = {}
        start, at, relation = len(self.specs), False, ""
        relation_after = 0
        for kind, value in tokens:
            if kind == "number":
                if value == _VAGUE:
                    self.vague = True
                else:
                    open_["count"] = int(value)
            elif kind in ("colour", "fill", "size"):
                open_[kind] = value
            elif kind == "place" and (not self.chinese or at):
                self._place(value)
            elif kind == "place":
                open_["place"] = value
            elif kind == "shape":
                self._close(open_, value)
                open_ = {}
            elif kind == "tail" and self.specs:
                self.specs[-1] = _with(self.specs[-1], fill=value)
            elif kind == "relation":
                relation, relation_after = value, len(self.specs) - start
            elif kind == "others":
                self.others = True
            at = kind == "at"
        if relation and len(self.specs) >= start + 2:
            if self.chinese and relation_after == 1:  # "B's left: A": the subject comes second
                self.specs[start], self.specs[start + 1] = self.specs[start + 1], self.specs[start]
            self.relations.append(Relation(start, relation, start + 1))

    def _place(self, value: str) -> None:
        if self.specs:
            self.specs[-1] = _with(self.specs[-1], place=value)

    def _close(self, facts: dict[str, str | int], shape: str) -> None:
        if shape:
            facts["shape"] = shape
        if not facts and (self.vague or not self.chinese):  # "some shapes", "shapes"
            self.vague = True
            return
        self.specs.append(_with(ObjectSpec(), **facts))


def _with(spec: ObjectSpec, **facts: str | int) -> ObjectSpec:
    return ObjectSpec(**{**vars(spec), **facts})  # type: ignore[arg-type]


def parse(text: str) -> Request:
    """The request that a caption makes; English unless it holds Chinese characters."""
    language = "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in text) else "en"
    text = text.lower().strip().rstrip(".。")
    text = re.sub(r"^(draw|a picture of|show me|please draw|请画|画|一张图：)\s*", "", text)
    text, ground, texture = _background(text, language)
    reader = _Reader(language)
    for clause in re.split("[，；]" if language == "zh" else "；", text):
        reader.clause(_BOOKS[language].tokens(clause))
    exact = not (reader.others or (reader.vague and not reader.specs))
    return Request(
        tuple(reader.specs), tuple(reader.relations), ground, texture, exact, 1 if exact else 2
    )
