"""Overlapping tiles that cover a picture, and one result that they are blended into.

For what is too large to be done at once and has no exact way (`model_loaders/strips.py` is exact).
Every point is a mean of the tiles over it, each weighing less towards its inner edges, so a
difference between two tiles becomes a slope as wide as their overlap, never a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import SamplingError

Size = tuple[int, int]  # height, width


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin that cover `length`, evenly spread, overlapping by `overlap` or more."""
    if not 0 <= overlap < window:
        raise SamplingError(
            f"windows of {window} cannot overlap by {overlap}; the overlap must be smaller."
        )
    if window >= length:
        return [0]
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(k * (length - window) / (count - 1)) for k in range(count)]


def weights(length: int, window: int, overlap: int) -> list[Tensor]:
    """How much each window (of `starts`) counts at each of its points; they add to 1 everywhere.

    A window rises over the overlap from its edge, but not from the edge of the whole.
    """
    begin, window = starts(length, window, overlap), min(window, length)
    at = torch.arange(window, dtype=torch.float64)
    total, raw = torch.zeros(length, dtype=torch.float64), []
    for start in begin:
        rise = at + 1 if start > 0 else torch.full_like(at, math.inf)
        fall = window - at if start + window < length else torch.full_like(at, math.inf)
        raw.append(torch.minimum(rise, fall).clamp(max=overlap + 1))
        total[start : start + window] += raw[-1]
    return [
        (part / total[start : start + window]).float()
        for start, part in zip(begin, raw, strict=True)
    ]


def in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, window: Size, overlap: Size
) -> Tensor:
    """`function` of tiles of x (..., H, W), which keeps their shape, blended into one result."""
    done = torch.zeros_like(x)
    rows, columns = (
        list(zip(starts(*sizes), weights(*sizes), strict=True))
        for sizes in zip(x.shape[-2:], window, overlap, strict=True)
    )
    for top, down in rows:
        for left, across in columns:
            part = (..., slice(top, top + len(down)), slice(left, left + len(across)))
            weight = torch.outer(down, across).to(x)
            done[part] += function(x[part]) * weight
    return done
