"""Signed distances of the eight shapes: each fits the unit circle, any rotation differs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.9


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = math.sqrt(3.0) / 2.0
    return np.maximum(side * np.abs(x) - 0.5 * y, y) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: fold the plane into one half-point, then one line from tip to corner."""
    step = 2.0 * math.pi / 5.0
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - step * np.round(angle / step))
    radius = np.sqrt(x * x + y * y)
    inner = 0.44
    across, along = inner * math.sin(step / 2), 1.0 - inner * math.cos(step / 2)
    length = math.hypot(across, along)
    return ((radius * np.cos(angle) - 1.0) * across + radius * np.sin(angle) * along) / length


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with two half discs, tip down."""
    scale = 0.70
    x, y = np.abs(x) * scale, 0.53 - y * scale
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2.0) / 4.0
    below = (x - y) / math.sqrt(2.0)
    return np.where(x + y > 1.0, lobe, np.maximum(below, (x + y - 1.5))) / scale


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.93, np.minimum(x, y) - 0.31)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.69) - 0.24


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x * 1.03 - 0.15, y * 1.03
    return np.maximum(np.hypot(x, y) - 0.92, 0.70 - np.hypot(x - 0.45, y)) / 1.03


FIELDS: dict[str, Field] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}
