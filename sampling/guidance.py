"""Classifier-free guidance: away from what the negative prompt predicts.

Ho & Salimans, arXiv 2207.12598.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def guided(positive: Tensor, negative: Tensor, scale: float, rescale: int = 0) -> Tensor:
    """Both velocities (B, C, h, w) combined. A scale of 1 is `positive`: skip the negative run.

    With `rescale`, every square of so many latents a side keeps the length that it has in
    `positive`: guidance turns it, and never stretches it.
    """
    if scale == 1:
        return positive
    combined = negative + scale * (positive - negative)
    if not rescale:
        return combined
    tokens = [F.pixel_unshuffle(x, rescale) for x in (combined, positive)]
    return F.pixel_shuffle(norm_rescale(tokens[0], tokens[1]), rescale)


def norm_rescale(combined: Tensor, positive: Tensor, dim: int = 1) -> Tensor:
    """`combined` with the length of `positive` in each token: guidance turns, it never stretches.

    `dim` is the channel axis: 1 in (B, C, h, w), -1 in (B, tokens, C). Qwen-Image-Edit does this
    (diffusers: pipeline_qwenimage_edit_plus.py), to tokens that are patches of 2 x 2 latents.
    """
    wanted = torch.linalg.vector_norm(positive, dim=dim, keepdim=True)
    length = torch.linalg.vector_norm(combined, dim=dim, keepdim=True)
    return combined * (wanted / length.clamp_min(torch.finfo(length.dtype).tiny))
