"""Where tokens of FLUX.2 stand on the rotary axes: time, row, column, word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES = 10  # between the times at which references stand


def word_positions(count: int) -> Tensor:
    """Rotary positions (count, 4) of text: only the last axis counts."""
    return F.pad(torch.arange(count)[:, None], (3, 0))


def picture_positions(time: int, height: int, width: int) -> Tensor:
    """Rotary positions (height * width, 4) of a picture, rows and columns from 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frame = torch.full_like(rows, time)
    return torch.stack([frame, rows, columns, 0 * rows], dim=-1).reshape(-1, 4)


def reference_positions(grids: Sequence[tuple[int, int]]) -> Tensor:
    """Rotary positions (R, 4) of references one after the other."""
    parts = [picture_positions(FRAMES * i, h, w) for i, (h, w) in enumerate(grids, start=1)]
    return torch.cat([torch.empty(0, 4, dtype=torch.long), *parts])
