"""The one quantized linear layer, for every family's network and for text encoders.

A weight stays in memory as it is stored. Where the machine has no product for its layout, it passes
block by block through one buffer that all layers of a network share: on a card the whole weight, on
a CPU, whose products need no more to be fast, as much of it as its cache may hold.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import ALL, Layout

PART = 1 << 22  # weights that are multiplied at a time on a CPU, 16 MB
LARGE_BLOCK = 1 << 24  # weights that become numbers at a time on a card: enough to fill it


class Buffer:
    """Room for weights in full precision, shared by layers that work one by one."""

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
            y = self.widened(self.layout.inputs(input))
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

    def widened(self, x: Tensor) -> Tensor:
        """The stored matrix times x (..., in) -> (..., out), in full precision."""
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.values(x.dtype))
        flat, count = x.reshape(-1, self.in_features), max(1, PART // max(self.in_features, 1))
        y = flat.new_empty(len(flat), self.out_features)
        for start in range(0, self.out_features, count):
            rows = slice(start, min(start + count, self.out_features))
            torch.mm(flat, self.values(x.dtype, rows).t(), out=y[:, rows])
        return y.view(*x.shape[:-1], self.out_features)

    def values(self, dtype: torch.dtype, rows: slice = ALL) -> Tensor:
        """Rows of the stored matrix (n, in) in full precision, valid until the next call."""
        first, last, _ = rows.indices(self.out_features)
        shape = (last - first, self.in_features)
        matrix = self.buffer.room(shape, dtype, self.weight.device)
        for start, stop in blocks(self.layout, first, last):
            self.layout.write(matrix[start - first : stop - first], slice(start, stop))
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


def blocks(layout: Layout, first: int, last: int) -> list[tuple[int, int]]:
    """Ranges of rows from `first` to `last` that become numbers at a time."""
    width = layout.shape[1]
    on_cpu = next(layout.buffers()).device.type == "cpu"
    step = max(1, (layout.together if on_cpu else LARGE_BLOCK) // max(width, 1))
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def write_weight(layout: Layout, out: Tensor) -> None:
    """The weight into `out` (out, in), block by block."""
    for start, stop in blocks(layout, 0, layout.shape[0]):
        out[start:stop] = layout.weight(slice(start, stop))
