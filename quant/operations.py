"""Where a model's layers come from.

A DiT, VAE or encoder never names `torch.nn.Linear`: it receives an `Operations` and builds its
layers from that. Precision, quantization and memory management are then decisions of whoever loads
the model:

    class Block(nn.Module):
        def __init__(self, config, operations: Operations, device=None, dtype=None): ...
            self.proj = operations.Linear(dim, dim, bias=False, device=device, dtype=dtype)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Operations:
    """Constructors of the layers that hold weights, with the signatures of `torch.nn`'s classes.

    All take `device` and `dtype`; the parameters are named as in torch (`weight`, `bias`). Where
    `casts`, layers take weights of any dtype, mixed as a file has them.
    """

    name: str
    Linear: Callable[..., nn.Module]
    Conv2d: Callable[..., nn.Module]
    LayerNorm: Callable[..., nn.Module]
    RMSNorm: Callable[..., nn.Module]
    Embedding: Callable[..., nn.Module]
    casts: bool = False


TORCH = Operations("torch", nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def has_bf16_products() -> bool:
    """Has this processor units for products of bf16 matrices (AMX, or AVX-512 BF16)?

    As oneDNN sees it, which makes the products: ONEDNN_MAX_CPU_ISA can take them away.
    """
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widened(compute_dtype: torch.dtype = torch.float32, *, narrow: bool = False) -> Operations:
    """Layers that keep 16-bit weights resident, compute in `compute_dtype` and return that.

    For processors without fast 16-bit arithmetic: the weights take half the memory of an fp32 model
    and the arithmetic is the fp32 model's, bit for bit. The big weights pass through one buffer
    that all layers of this namespace share, so memory grows by the largest single weight. Not for
    two threads at a time.

    With `narrow`, bf16 weights are multiplied as they are, by inputs rounded to bf16: several times
    faster where `has_bf16_products`, and off by bf16's rounding (2^-9 of each number). What lies
    between the products stays in `compute_dtype`.
    """
    scratch = Scratch(compute_dtype, narrow)
    return Operations(
        "bf16 products" if narrow else "widened",
        Linear=partial(WidenedLinear, scratch=scratch),
        Conv2d=partial(WidenedConv2d, scratch=scratch),
        LayerNorm=partial(WidenedLayerNorm, compute_dtype=compute_dtype),
        RMSNorm=partial(WidenedRMSNorm, compute_dtype=compute_dtype),
        Embedding=partial(WidenedEmbedding, compute_dtype=compute_dtype),
        casts=True,
    )


class Scratch:
    """One flat buffer per device that every widened weight is copied into right before its use."""

    def __init__(self, dtype: torch.dtype, narrow: bool = False) -> None:
        self.dtype = dtype
        self.narrow = torch.bfloat16 if narrow else None
        self._buffers: dict[torch.device, Tensor] = {}

    def widen(self, weight: Tensor, x: Tensor) -> Tensor:
        """The values of `weight` in the compute dtype, valid until the next call."""
        if weight.dtype == self.dtype:
            return weight
        if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
            return weight.to(self.dtype)  # autograd keeps it until the backward pass
        buffer = self._buffers.get(weight.device)
        if buffer is None or buffer.numel() < weight.numel():
            self._buffers.pop(weight.device, None)  # the small one goes before the large one comes
            with torch.inference_mode(False):  # so that it can be written to in and out of it
                buffer = torch.empty(weight.numel(), dtype=self.dtype, device=weight.device)
            self._buffers[weight.device] = buffer
        return buffer[: weight.numel()].view(weight.shape).copy_(weight.detach())


class WidenedLinear(nn.Linear):
    def __init__(self, *args, scratch: Scratch, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scratch = scratch

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == self.scratch.narrow:
            y = F.linear(
                input.to(self.weight.dtype), self.weight, _cast(self.bias, self.weight.dtype)
            )
            return y.to(self.scratch.dtype)
        x = input.to(self.scratch.dtype)
        return F.linear(x, self.scratch.widen(self.weight, x), _cast(self.bias, x.dtype))


class WidenedConv2d(nn.Conv2d):
    def __init__(self, *args, scratch: Scratch, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scratch = scratch

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == self.scratch.narrow:
            bias = _cast(self.bias, self.weight.dtype)
            y = self._conv_forward(input.to(self.weight.dtype), self.weight, bias)
            return y.to(self.scratch.dtype)
        x = input.to(self.scratch.dtype)
        weight = self.scratch.widen(self.weight, x)
        return self._conv_forward(x, weight, _cast(self.bias, x.dtype))


class WidenedLayerNorm(nn.LayerNorm):
    def __init__(self, *args, compute_dtype: torch.dtype, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _cast(self.weight, self.compute_dtype), _cast(self.bias, self.compute_dtype)
        x = input.to(self.compute_dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class WidenedRMSNorm(nn.RMSNorm):
    def __init__(self, *args, compute_dtype: torch.dtype, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        weight = _cast(self.weight, self.compute_dtype)
        return F.rms_norm(x.to(self.compute_dtype), self.normalized_shape, weight, self.eps)


class WidenedEmbedding(nn.Embedding):
    def __init__(self, *args, compute_dtype: torch.dtype, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)  # only the rows that were looked up


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
