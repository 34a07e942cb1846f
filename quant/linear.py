"""The one quantized linear layer, for every family's network and for text encoders.

A weight stays in memory as it is stored. Where the machine has no product for its layout, it passes
block by block through one buffer that all layers of a network share.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import Layout

# Weights that become numbers at a time: on a CPU what stays in its cache, on a card enough to fill.
BLOCK = {"cpu": 1 << 17}
LARGE_BLOCK = 1 << 24


class Buffer:
    """Room for the largest weight in full precision, shared by layers that work one by one."""

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def room(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count, room = math.prod(shape), self._room
        if room is None or room.numel() < count or (room.dtype, room.device) != (dtype, device):
            self._room = None  # the small one goes before the large one comes
            with torch.inference_mode(False):  # so that it can be written to in and out of it
                room = self._room = torch.empty(count, dtype=dtype, device=device)
        return room[:count].view(shape)


class Holder(nn.Module):
    """A layer whose weight is a layout; `weight` itself is an empty tensor on its device."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        device = next(layout.buffers()).device
        self.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.layout = layout


class QuantizedLinear(Holder):
    """y = W x + b in the dtype of x, W (out, in) in any layout.

    ComfyUI's LoRA loader exchanges weights: it asks `convert_weight` for W in full precision and
    hands the sum to `set_weight`, which holds until `weight` is empty again.
    """

    bias: nn.Parameter | None

    def __init__(self, layout: Layout, bias: Tensor | None, buffer: Buffer) -> None:
        super().__init__(layout)
        self.out_features, self.in_features = layout.shape
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )
        self.buffer = buffer

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.weight.numel():
            return F.linear(input, self.weight.to(input.dtype), bias)
        y = self.layout.product(input)
        if y is None:
            y = F.linear(self.layout.inputs(input), self.values(input.dtype))
        y = self.layout.extra(input, y)
        return y if bias is None else y + bias

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: object) -> Tensor:
        """W in the dtype of `weight`, on its device."""
        return self.layout.weight().to(weight)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: int | None = None,
        return_weight: bool = False, **_: object,
    ) -> Tensor | None:  # fmt: skip
        if return_weight:
            return weight
        self.weight = nn.Parameter(weight, requires_grad=False)
        return None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The stored matrix (out, in) in full precision, valid until the next layer's turn."""
        matrix = self.buffer.room(self.layout.shape, dtype, self.weight.device)
        for start, stop in blocks(self.layout):
            matrix[start:stop] = self.layout.values(slice(start, stop))
        return matrix

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.layout.format}"


class QuantizedEmbedding(Holder):
    """Rows of a table in any layout; only those that are looked up become numbers."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__(layout)
        self.num_embeddings, self.embedding_dim = layout.shape
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = self.layout.weight(input.flatten())
        return rows.to(self.dtype).view(*input.shape, -1)


def blocks(layout: Layout) -> list[tuple[int, int]]:
    """Ranges of rows that become numbers at a time."""
    out, width = layout.shape
    device = next(layout.buffers()).device.type
    step = max(1, BLOCK.get(device, LARGE_BLOCK) // max(width, 1))
    return [(start, min(start + step, out)) for start in range(0, out, step)]


def write_weight(layout: Layout, out: Tensor) -> None:
    """The weight into `out` (out, in), block by block."""
    for start, stop in blocks(layout):
        out[start:stop] = layout.weight(slice(start, stop))
