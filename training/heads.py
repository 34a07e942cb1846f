"""Heads that exist in training only: they ask hidden states which objects are where.

Asking a middle layer of the DiT which object every token belongs to is REPA with labels that the
world gives for free; asking the encoder for the layout of the picture to come teaches it to read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import KINDS


class TokenHead(nn.Module):
    """Shape, colour, fill and size of the object on every token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, sum(KINDS))

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, tokens, dim), labels (B, 4, tokens) -> cross-entropy, accuracy on objects."""
        return class_loss(self.out(self.norm(hidden)), labels)

    @torch.no_grad()
    def objects(self, hidden: Tensor) -> Tensor:
        """How likely an object is on every token: hidden (B, tokens, dim) -> (B, tokens)."""
        shapes = self.out(self.norm(hidden))[..., : KINDS[0]]
        return 1 - shapes.float().softmax(-1)[..., 0]


class LayoutHead(nn.Module):
    """Nine cell queries that read the encoder's states and tell what stands in each cell."""

    def __init__(self, dim: int, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(9, width) * 0.5)
        self.key, self.value = nn.Linear(dim, width), nn.Linear(dim, width)
        self.norm, self.heads = nn.LayerNorm(dim), heads
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width)
        )
        self.out = nn.Linear(width, sum(KINDS))

    def forward(self, hidden: Tensor, layout: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, L, dim), layout (B, 4, 9) -> mean cross-entropy, shape accuracy on objects."""
        hidden = self.norm(hidden)
        split = (-1, self.heads, self.query.shape[1] // self.heads)
        k = self.key(hidden).unflatten(-1, split[1:]).transpose(1, 2)
        v = self.value(hidden).unflatten(-1, split[1:]).transpose(1, 2)
        q = self.query.unflatten(-1, split[1:]).transpose(0, 1).expand(len(hidden), -1, -1, -1)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return class_loss(self.out(read + self.mix(read)), layout)


def class_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, all classes), labels (B, kinds, N); empty places weigh a third."""
    parts = logits.float().split(KINDS, dim=-1)
    taken = labels[:, 0] > 0
    weight = torch.where(taken, 1.0, 0.33)
    weight = weight / weight.sum()
    losses = [
        (F.cross_entropy(part.transpose(1, 2), labels[:, i], reduction="none") * weight).sum()
        for i, part in enumerate(parts)
    ]
    right = (parts[0].argmax(-1) == labels[:, 0]) & (parts[1].argmax(-1) == labels[:, 1])
    return torch.stack(losses).mean(), right[taken].float().mean()
