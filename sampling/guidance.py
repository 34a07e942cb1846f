"""Classifier-free guidance: away from what the negative prompt predicts.

Ho & Salimans, arXiv 2207.12598.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Both velocities combined. A scale of 1 is `positive` itself: skip the negative run then."""
    return positive if scale == 1 else negative + scale * (positive - negative)


def norm_rescale(combined: Tensor, positive: Tensor, dim: int = 1) -> Tensor:
    """`combined` with the length of `positive` in each token: guidance turns, it never stretches.

    `dim` is the channel axis: 1 in (B, C, h, w), -1 in (B, tokens, C). Qwen-Image-Edit does this
    (diffusers: pipeline_qwenimage_edit_plus.py), to tokens that are patches of 2 x 2 latents.
    """
    wanted = torch.linalg.vector_norm(positive, dim=dim, keepdim=True)
    length = torch.linalg.vector_norm(combined, dim=dim, keepdim=True)
    return combined * (wanted / length.clamp_min(torch.finfo(length.dtype).tiny))
