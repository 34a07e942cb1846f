"""Captions: a scene described at one of three levels, in English or Chinese."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import chinese, english
from .requests import Request, sample_request
from .scenes import Scene

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Caption:
    """`language` is "en" or "zh"; `level` 1 (vague) to 3 (full); instructions of edits have level
    3.
    """

    text: str
    language: str
    level: int


def sample_language(rng: np.random.Generator) -> str:
    return LANGUAGES[int(rng.random() < 0.5)]


def write(request: Request, language: str, rng: np.random.Generator) -> str:
    """`request` in words of `language`."""
    return (chinese if language == "zh" else english).write(request, rng)


def sample_caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    language: str | None = None,
    level: int | None = None,
) -> tuple[Caption, Request]:
    """A random true caption of `scene` and what it asks for."""
    request, level = sample_request(scene, rng, level)
    language = language or sample_language(rng)
    return Caption(write(request, language, rng), language, level), request
