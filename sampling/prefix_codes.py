"""Keys and values in 8 or 4 bits: half and a quarter of 16-bit memory, at a measured error.

Rounded symmetrically in groups of channels of one head of one token, each with its own scale: all
channels together in 8 bits, `GROUP` at a time in 4, as KIVI (arXiv 2402.02750) found to suffice
for values; keys are treated alike, because blocks are read whole and a token stays one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import SamplingError

GROUP = 32  # channels that share a scale in 4 bits
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Codes:
    """Packed (B, heads, tokens, head_dim): int8, or two numbers in each uint8; scales in bf16."""

    data: Tensor
    scales: Tensor  # (B, heads, tokens, groups)
    bits: int

    @property
    def bytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> Codes:
        return Codes(self.data.to(device), self.scales.to(device), self.bits)

    def unpack(self, out: Tensor) -> Tensor:
        """Write the numbers into `out` (B, heads, tokens, head_dim)."""
        data = self.data
        if self.bits == 4:
            data = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
        grouped = data.unflatten(-1, (self.scales.shape[-1], -1))
        return out.copy_((grouped.to(out.dtype) * self.scales[..., None].to(out.dtype)).flatten(-2))


def pack(x: Tensor, bits: int) -> Codes:
    """x (B, heads, tokens, head_dim) in 8 or 4 bits."""
    channels = x.shape[-1]
    group = channels if bits == 8 else GROUP
    if channels % group or channels % 2:
        raise SamplingError(
            f"keys of {channels} channels cannot be kept in {bits} bits, which takes a multiple of "
            f"{GROUP}; keep them exactly."
        )
    top = 2 ** (bits - 1) - 1
    grouped = x.float().unflatten(-1, (-1, group))
    # A little more than needed, so that rounding to bf16 never cuts off the largest number.
    scales = (grouped.abs().amax(-1) * (1.005 / top)).clamp_min(1e-30).to(torch.bfloat16)
    codes = (grouped / scales[..., None].float()).round().clamp(-top, top).flatten(-2)
    if bits == 8:
        return Codes(codes.to(torch.int8), scales, bits)
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return Codes(low | high << 4, scales, bits)


@dataclass
class Loss:
    """What rounding has cost: the error relative to what was rounded, root mean square."""

    missed: float = 0.0
    total: float = 0.0

    def add(self, x: Tensor, codes: Codes) -> None:
        wide = x.float()
        back = codes.unpack(torch.empty_like(wide))
        self.missed += float((back - wide).square().sum())
        self.total += float(wide.square().sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.missed / self.total) if self.total else 0.0
