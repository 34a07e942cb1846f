"""Positions and times as diffusion transformers read them: rotations on several axes, sinusoids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEP_CHANNELS = 256


def grid_positions(frame: int, height: int, width: int) -> Tensor:
    """Rotary positions (height * width, 3) of a picture: its frame, and a grid centred on 0.

    An odd side has the larger half before 0, as Qwen-Image was trained (diffusers: QwenEmbedRope).
    """
    rows = torch.arange(height) - (height - height // 2)
    cols = torch.arange(width) - (width - width // 2)
    h, w = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([torch.full_like(h, frame), h, w], dim=-1).reshape(-1, 3)


def rotation(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Complex rotations (tokens, head_dim / 2) for positions (tokens, axes)."""
    angles = []
    for axis, channels in enumerate(axes):
        scale = 1.0 / torch.pow(theta, torch.arange(0, channels, 2, dtype=torch.float32) / channels)
        angles.append(torch.outer(positions[:, axis].float(), scale))
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate channel pairs of x (B, tokens, heads, head_dim) by `turn` (tokens, head_dim / 2), or
    (B, tokens, head_dim / 2) where each of the batch lies elsewhere."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[..., None, :]).flatten(-2).to(x.dtype)


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoids (B, 256) of t (B,) in 0..1: cosines first, t scaled by 1000."""
    half = TIMESTEP_CHANNELS // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
