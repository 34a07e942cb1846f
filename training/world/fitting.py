"""Which shape a soft mask is: match every shape at every angle, refine the best by Gauss-Newton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .segment import Blob, second_share
from .shapes import FIELDS
from .vocabulary import SHAPES

_GRID = 40  # side of the normalised masks
_REACH = 2.6  # a normalised mask spans +- this many root areas / 2
_TURNS = {"circle": 1, "ring": 1, "square": 12, "cross": 12, "triangle": 14, "star": 10,
          "heart": 40, "moon": 40}  # fmt: skip
_PERIOD = {"square": math.pi / 2, "cross": math.pi / 2, "triangle": 2 * math.pi / 3,
           "star": 2 * math.pi / 5}  # fmt: skip


def period(shape: str) -> float:
    """The turn in radians after which a shape looks the same again, 0 when it always does."""
    return _PERIOD.get(shape, 2 * math.pi) if _TURNS[shape] > 1 else 0.0


@dataclass(frozen=True)
class Fit:
    """A shape laid over a blob: `x`, `y`, `radius`, `lump`, `blur` in pixels at 128."""

    shape: str
    x: float
    y: float
    radius: float
    angle: float
    lump: float
    blur: float


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, list[tuple[str, float, float, float, float]]]:
    """Masks (n, 1600) of one area and centroid; for each (shape, angle, centroid, root area)."""
    fine = np.linspace(-1.2, 1.2, 241, dtype=np.float32)
    x, y = np.meshgrid(fine, fine)
    line = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    masks, facts = [], []
    for shape in SHAPES:
        inside = FIELDS[shape](x, y) < 0
        root = math.sqrt(inside.mean()) * 2.4
        cx, cy = float(x[inside].mean()), float(y[inside].mean())
        for turn in range(_TURNS[shape]):
            angle = turn / _TURNS[shape] * _PERIOD.get(shape, 2 * math.pi)
            u, v = np.meshgrid(line, line)
            u, v = u * root * _REACH / 2, v * root * _REACH / 2
            c, s = math.cos(angle), math.sin(angle)
            distance = FIELDS[shape](c * u + s * v + cx, c * v - s * u + cy)
            masks.append(np.clip(0.5 - distance / (root * _REACH / _GRID), 0, 1).ravel())
            facts.append((shape, angle, cx, cy, root))
    return np.array(masks, np.float32), facts


def _starts(mask: np.ndarray) -> list[tuple[str, float, float, float, float]]:
    """(shape, x, y, radius, angle) of the most similar templates, one per shape, best first."""
    area = float(mask.sum())
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    cy, cx = float((mask * y).sum() / area), float((mask * x).sum() / area)
    root = math.sqrt(area)
    line = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * root * _REACH / 2
    rows, columns = np.meshgrid(line + cy, line + cx, indexing="ij")
    normal = ndimage.map_coordinates(mask, [rows, columns], order=1).ravel()
    masks, facts = _templates()
    common = np.minimum(masks, normal).sum(1)
    overlap = common / (masks.sum(1) + normal.sum() - common)
    starts, seen = [], set()
    for index in np.argsort(-overlap):
        shape, angle, tx, ty, unit = facts[index]
        if shape in seen or (starts and overlap[index] < overlap.max() - 0.22):
            continue
        seen.add(shape)
        radius = root / unit
        c, s = math.cos(angle), math.sin(angle)
        starts.append(
            (shape, cx - radius * (c * tx - s * ty), cy - radius * (s * tx + c * ty), radius, angle)
        )
    return starts[:4]


def _distance(shape: str, at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance in pixels for parameters (x, y, radius, angle) of any leading shape."""
    px, py, radius, angle = (at[..., i, None, None] for i in range(4))
    c, s = np.cos(angle), np.sin(angle)
    u, v = (x - px) / radius, (y - py) / radius
    return FIELDS[shape](c * u + s * v, c * v - s * u) * radius


_NUDGE = np.array(
    [[0, 0, 0, 0], [0.3, 0, 0, 0], [0, 0.3, 0, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.03]], np.float32
)
_CALM = np.array([0.02, 0.02, 0.02, 0.02], np.float32)


def _refine(start: tuple, blob: Blob, x: np.ndarray, y: np.ndarray, rounds: int) -> np.ndarray:
    shape, *numbers = start
    at = np.array(numbers, np.float32)
    root = np.sqrt(blob.weight).ravel()
    for _ in range(rounds):
        soft = 0.5 - 0.5 * np.tanh(_distance(shape, at + _NUDGE, x, y) / 1.4)
        base = soft[0].ravel()
        slopes = (soft[1:].reshape(4, -1) - base).T / np.diag(_NUDGE[1:]) * root[:, None]
        rest = (blob.cover.ravel() - base) * root
        normal = slopes.T @ slopes
        normal += np.diag(_CALM * np.diag(normal) + 1e-3)
        step = np.linalg.solve(normal, slopes.T @ rest)
        at = at + np.clip(step, [-2, -2, -2, -0.25], [2, 2, 2, 0.25]).astype(np.float32)
        at[2] = min(max(at[2], 4.0), 40.0)
    return at


def _perimeter(distance: np.ndarray) -> float:
    """Length of the zero line, from the area within half a pixel of it."""
    return max(float((np.abs(distance) < 1.0).sum()) / 2.0, 8.0)


def _edge_errors(distance: np.ndarray, blob: Blob) -> tuple[float, float]:
    """(lump, blur), both areas over the length of the edge, so pixels.

    Lump: where the mask, cut at one half, is not the shape. Blur: how far the soft mask is from
    its own cut.
    """
    hard = blob.cover > 0.5
    band = np.abs(distance) < 2
    share = max(float(blob.weight[band].mean()) if band.any() else 1.0, 0.2)
    scale = _perimeter(distance) * share
    lump = float(((hard != (distance < 0)) * blob.weight).sum()) / scale
    near = np.abs(distance) < 3
    blur = float((np.abs(blob.cover - hard) * blob.weight * near).sum()) / scale
    return lump, blur


def fit(blob: Blob) -> Fit:
    """The best shape for `blob`."""
    x, y = np.meshgrid(
        np.arange(blob.cover.shape[1], dtype=np.float32),
        np.arange(blob.cover.shape[0], dtype=np.float32),
    )
    mask = np.where(blob.weight > 0, blob.cover, 0)
    mask = np.clip((mask - 0.2) / 0.6, 0, 1)
    mask = ndimage.grey_closing(mask, size=3) if blob.weight.min() < 0.6 else mask
    best: Fit | None = None
    for start in _starts(mask):
        at = _refine(start, blob, x, y, 6)
        lump, blur = _edge_errors(_distance(start[0], at, x, y), blob)
        if best is None or lump < best.lump:
            cx, cy, radius, angle = (float(value) for value in at)
            best = Fit(start[0], cx, cy, radius, angle, lump, blur)
    assert best is not None
    return best


def read_fill(blob: Blob, shape: Fit) -> str:
    """Plain, striped or dotted, from how the second tone lies inside the fitted shape."""
    x, y = np.meshgrid(
        np.arange(blob.cover.shape[1], dtype=np.float32),
        np.arange(blob.cover.shape[0], dtype=np.float32),
    )
    at = np.array([shape.x, shape.y, shape.radius, shape.angle], np.float32)
    distance = _distance(shape.shape, at, x, y)
    share = second_share(blob.rgb, blob.colour)
    inside = distance < -0.6
    for depth, enough in ((2.0, 60), (1.3, 25)):
        if (distance < -depth).sum() >= enough:
            inside = distance < -depth
            break
    values = share[inside]
    if values.size < 12 or np.percentile(values, 88) - np.percentile(values, 12) < 0.48:
        return "plain"
    gy, gx = np.asarray(np.gradient(ndimage.gaussian_filter(share, 0.6)))
    deep = distance < -1.8 if (distance < -1.8).sum() > 40 else inside
    gy, gx = gy[deep], gx[deep]
    xx, yy, xy = (gx * gx).mean(), (gy * gy).mean(), (gx * gy).mean()
    coherence = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9)
    return "striped" if coherence > 0.55 else "dotted"
