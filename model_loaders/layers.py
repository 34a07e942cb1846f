"""Parts that networks of several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.operations import Operations


@dataclass
class KeptKeys:
    """Keys and values of tokens that no step changes, computed once, read at every step.

    `keys[layer]`, `values[layer]`: (B, heads, length + room, head_dim), keys after rotation. The
    room behind `length` is scratch space where a step writes its own keys and values, so that
    attention reads one buffer and nothing is concatenated.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int

    @property
    def bytes(self) -> int:
        """Bytes that are kept, without the scratch room."""
        k = self.keys[0]
        return 2 * len(self.keys) * k[:, :, : self.length].numel() * k.element_size()

    def keep(self, k: Tensor, v: Tensor, room: int) -> None:
        """Add a layer: k and v (B, heads, length, head_dim)."""
        self.keys.append(_with_room(k, room))
        self.values.append(_with_room(v, room))

    def reserve(self, tokens: int) -> None:
        """Make sure that `tokens` of a step fit behind those that are kept."""
        if self.keys[0].shape[2] >= self.length + tokens:
            return
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = _with_room(old[:, :, : self.length], tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a step's tokens (B, heads, tokens, head_dim) to what is kept and themselves.

        What is kept has batch B, or fewer: then many share it, in turn.
        """
        keys, values, start = self.keys[layer], self.values[layer], self.length
        end = start + k.shape[2]
        if torch.is_grad_enabled():  # training: buffers are not written in place
            shared = (-1 if keys.shape[0] == k.shape[0] else k.shape[0], -1, -1, -1)
            k = torch.cat([keys[:, :, :start].expand(shared), k], dim=2)
            v = torch.cat([values[:, :, :start].expand(shared), v], dim=2)
            return F.scaled_dot_product_attention(q, k, v)
        parts = []
        for i in range(0, len(q), len(keys)):
            part = slice(i, i + len(keys))
            keys[:, :, start:end], values[:, :, start:end] = k[part], v[part]
            parts.append(
                F.scaled_dot_product_attention(q[part], keys[:, :, :end], values[:, :, :end])
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _with_room(x: Tensor, room: int) -> Tensor:
    """x (B, heads, tokens, head_dim) in a buffer with `room` free tokens behind it."""
    return x if torch.is_grad_enabled() else F.pad(x, (0, 0, 0, room))


def replace_layers(
    root: nn.Module, operations: Operations, device: Any, dtype: torch.dtype | None
) -> None:
    """Exchange every layer under `root` that holds weights for its like from `operations`."""
    place = {"device": device, "dtype": dtype}
    for parent in list(root.modules()):
        for name, layer in list(parent.named_children()):
            new: nn.Module | None = None
            if isinstance(layer, nn.Linear):
                bias = layer.bias is not None
                new = operations.Linear(layer.in_features, layer.out_features, bias=bias, **place)
            elif isinstance(layer, nn.Embedding):
                new = operations.Embedding(layer.num_embeddings, layer.embedding_dim, **place)
            elif isinstance(layer, nn.LayerNorm):
                new = operations.LayerNorm(layer.normalized_shape, eps=layer.eps, **place)
            elif type(layer).__name__.endswith("RMSNorm"):
                width = layer.get_parameter("weight").shape[0]
                eps = float(getattr(layer, "variance_epsilon"))  # noqa: B009  # transformers' name
                new = operations.RMSNorm(width, eps=eps, **place)
            if new is not None:
                setattr(parent, name, new)
