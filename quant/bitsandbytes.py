"""Weights as the bitsandbytes library stores them: NF4 and FP4 (QLoRA, arXiv:2305.14314), int8.

4 bits: codes in the order of the weight, two in a byte, the first in the upper half; a table of 16
levels; a scale for each block, which may itself be 8-bit codes with a table, scales and an offset.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import look_up_pairs, pairs_table


class FourBit(Layout):
    format = "fp4"
    table: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        out, width = self.shape
        self.size = parts.setting("blocksize", 64)
        start, stop = parts.rows or (0, parts.out)
        parts.needs_multiple(2, "pairs of")
        if self.size < 1 or (start * width) % self.size or (parts.out * width) % self.size:
            raise LayoutError(f"has blocks of {self.size}, which do not end with its rows")
        table, stored = parts.numbers("quant_map").float(), parts.need("weight", torch.uint8)
        if stored.numel() != parts.out * width // 2 or table.shape != (16,):
            raise LayoutError(f"has a weight of {tuple(stored.shape)} for {parts.out} x {width}")
        scale = _absmax(parts)
        if scale.numel() != parts.out * width // self.size:
            raise LayoutError(f"has absmax of {tuple(scale.shape)} for blocks of {self.size}")
        first, last = start * width // self.size, math.ceil(stop * width / self.size)
        self.keep(
            stored=parts.cut(stored.reshape(-1, width // 2)),
            table=table,
            scale=scale.flatten()[first:last],
        )

    def values(self, rows: Rows = ALL) -> Tensor:
        out, width = self.shape
        bytes = self.stored[rows]
        if width % self.size == 0:
            scale = self.scale.view(out, -1)[rows]
        else:  # blocks run over the ends of rows
            row = torch.arange(out, device=bytes.device)[rows, None]
            scale = self.scale[
                (row * width + torch.arange(width, device=bytes.device)) // self.size
            ]
        levels = look_up_pairs(pairs_table(self.table, upper_first=True), bytes)
        levels.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None])
        return levels


class NF4(FourBit):
    format = "nf4"


def _absmax(parts: Parts) -> Tensor:
    """The scale of each block; of twice quantized ones, made from their codes."""
    scale = parts.need("absmax")
    if scale.dtype != torch.uint8:
        return parts.numbers("absmax").float()
    table = parts.numbers("nested_quant_map").float()
    whole = parts.numbers("nested_absmax", 1).float()
    size, offset = parts.setting("nested_blocksize", 256), parts.setting("nested_offset", 0.0)
    if not math.isfinite(offset):
        raise LayoutError(f"has a nested_offset of {offset}")
    if table.shape != (256,) or size < 1 or len(whole) != math.ceil(scale.numel() / size):
        raise LayoutError("has nested scales that do not fit its scales")
    numbers = table[scale.flatten().int()]
    return numbers * whole.repeat_interleave(size)[: len(numbers)] + offset


class Int8Rows(Layout):
    """LLM.int8() (arXiv:2208.07339): rows of int8, each with its largest magnitude as `SCB`."""

    format = "llm_int8"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        self.keep(stored=parts.weight(torch.int8, self.shape[1]), scale=parts.scales("SCB").float())

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows].float() * self.scale[rows] * (1 / 127)
