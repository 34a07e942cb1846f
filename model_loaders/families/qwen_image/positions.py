"""Latents of Qwen-Image as tokens, and where each token stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...embeddings import grid_positions

PATCH = 2  # latents per side of a token
Grid = tuple[int, int]  # rows, columns of tokens


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 w/2, 4 C): 2 x 2 latents each, channel first."""
    b, c, h, w = x.shape
    if h % PATCH or w % PATCH:
        raise ValueError(f"latents of {w} x {h} cannot be cut into squares of {PATCH} x {PATCH}")
    x = x.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH * PATCH)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """The inverse of `pack`."""
    h, w = grid
    x = tokens.view(tokens.shape[0], h, w, -1, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], -1, h * PATCH, w * PATCH)


def positions(
    words: int, targets: Sequence[Grid], references: Sequence[Grid], layered: bool
) -> Tensor:
    """Rotary positions (words + tokens, 3): of the text, the targets, then the references.

    Every picture is a frame with a grid centred on 0; the text goes on along the diagonal, behind
    the farthest corner of all pictures. A layered target is frames 0, 1, ... and its reference -1.
    """
    pictures = [*targets, *references]
    frames = list(range(len(pictures)))
    start = max(side // 2 for grid in pictures for side in grid)
    if layered:
        frames[len(targets) :] = [-1] * len(references)
        start = max(start, len(pictures) - 1)
    text = torch.arange(start, start + words)[:, None].expand(-1, 3)
    images = [grid_positions(f, *grid) for f, grid in zip(frames, pictures, strict=True)]
    return torch.cat([text, *images])
