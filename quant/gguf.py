"""Weights in GGUF's blocks (ggml's `block_q4_K` and so on), and how each block becomes numbers.

A row is a run of blocks of 32 or 256 weights. Every function takes blocks as bytes (n, size) and
returns their weights (n, 32 or 256) in fp32, in the order of operations of the `gguf` library, so
that results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import constant, look_up, look_up_bytes

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FIVE = -16  # what Q5_0's codes start from


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of each block (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, run: int, bits: int) -> Tensor:
    """Codes of `bits` bits: of each `run` bytes first the lowest bits of all, then the next."""
    runs, mask = packed.unflatten(1, (-1, run)), (1 << bits) - 1
    # One shift at a time: by a tensor of shifts it takes four times as long on a CPU.
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def _by_group(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (n, m) as floats (n, groups, m / groups), one group for each scale (n, groups)."""
    return codes.float().unflatten(1, (scale.shape[1], -1))


def q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_shifted(blocks[:, 2:], 16, 4).to(torch.int8) - 8).float()


def q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _shifted(blocks[:, 4:], 16, 4).float() + _half(blocks, 2)


def _five(blocks: Tensor, start: int) -> Tensor:
    """Codes whose fifth bits (32 bits) lie at `start`, the others behind them."""
    high = look_up_bytes(constant(_fifth_bits, blocks.device), blocks[:, start : start + 4])
    return _shifted(blocks[:, start + 4 :], 16, 4) | high


def _fifth_bits() -> Tensor:
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    return ((byte >> torch.arange(8, dtype=torch.uint8)) & 1) << 4


def q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_five(blocks, 2).to(torch.int8) + FIVE).float()


def q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _five(blocks, 4).float() + _half(blocks, 2)


def q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    step = _half(blocks, 80) * (scales & 15).float()
    least = _half(blocks, 82) * (scales >> 4).float()
    codes = _by_group(_shifted(blocks[:, 16:80], 32, 2), step)
    return (step[..., None] * codes - least[..., None]).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 96:108]
    low, high = _shifted(scales[:, :8], 8, 4), _shifted(scales[:, 8:], 4, 2)
    step = _half(blocks, 108) * ((low | (high << 4)).to(torch.int8) - 32).float()
    absent = _shifted(blocks[:, :32], 32, 1) ^ 1  # the mask says where 4 is not taken away
    codes = _shifted(blocks[:, 32:96], 32, 2).to(torch.int8) - (absent << 2).to(torch.int8)
    return (step[..., None] * _by_group(codes, step)).flatten(1)


def _scale_min(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of 6 bits each in 12 bytes, as Q4_K and Q5_K pack them."""
    scale, least, rest = packed.split(4, dim=1)
    scales = torch.cat((scale & 63, (rest & 15) | ((scale >> 2) & 48)), dim=1)
    minima = torch.cat((least & 63, (rest >> 4) | ((least >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _affine(blocks: Tensor, codes: Tensor) -> Tensor:
    scales, minima = _scale_min(blocks[:, 4:16])
    step, least = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (_by_group(codes, step).mul_(step[..., None]).sub_(least[..., None])).flatten(1)


def q4_k(blocks: Tensor) -> Tensor:
    return _affine(blocks, _shifted(blocks[:, 16:], 32, 4))


def q5_k(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, 16:48], 32, 1)
    return _affine(blocks, _shifted(blocks[:, 48:], 32, 4) | (high << 4))


def q6_k(blocks: Tensor) -> Tensor:
    step = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = _shifted(blocks[:, :128], 64, 4) | (_shifted(blocks[:, 128:192], 32, 2) << 4)
    codes = codes.to(torch.int8) - 32
    return _by_group(codes, step).mul_(step[..., None]).flatten(1)


def iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _levels(_shifted(blocks[:, 2:], 16, 4))


def iq4_xs(blocks: Tensor) -> Tensor:
    high = (_shifted(blocks[:, 2:4], 1, 2)) << 4  # 16 bits, two for each of the 8 groups
    shifts = torch.tensor([0, 4], dtype=torch.uint8, device=blocks.device)
    low = ((blocks[:, 4:8, None] >> shifts) & 15).flatten(1)
    step = _half(blocks, 0) * ((low | high).to(torch.int8) - 32).float()
    levels = _levels(_shifted(blocks[:, 8:], 16, 4)).unflatten(1, (8, 32))
    return (step[..., None] * levels).flatten(1)


def _levels(codes: Tensor) -> Tensor:
    return look_up(torch.tensor(IQ4, dtype=torch.float32, device=codes.device), codes)


# Type: weights in a block, bytes of a block, and its numbers. Names as the `gguf` library's.
TYPES: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (32, 18, q4_0), "Q4_1": (32, 20, q4_1), "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1), "Q8_0": (32, 34, q8_0), "Q2_K": (256, 84, q2_k),
    "Q3_K": (256, 110, q3_k), "Q4_K": (256, 144, q4_k), "Q5_K": (256, 176, q5_k),
    "Q6_K": (256, 210, q6_k), "IQ4_NL": (32, 18, iq4_nl), "IQ4_XS": (256, 136, iq4_xs),
}  # fmt: skip


class GGUF(Layout):
    """Blocks of one type; the setting `type` says which. Blocks may run over the ends of rows."""

    format = "gguf"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        kind = parts.setting("type", "")
        if kind not in TYPES:
            raise LayoutError(f"is of GGUF's type {kind}; readable are {', '.join(TYPES)}")
        self.block, self.size, self.numbers = TYPES[kind]
        parts.needs_multiple(self.block, "blocks of")
        width = self.shape[1] // self.block * self.size
        self.keep(stored=parts.weight(torch.uint8, width))

    def values(self, rows: Rows = ALL) -> Tensor:
        blocks = self.stored[rows].reshape(-1, self.size)
        return self.numbers(blocks).view(-1, self.shape[1])


class Stacked(Layout):
    """Two frames of a patch embedding, which GGUF keeps apart: (out, in) is channel by frame."""

    format = "stacked"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        frames = [parts.need("weight"), parts.need("second")]
        if frames[0].shape != frames[1].shape or frames[0].ndim != 4:
            raise LayoutError("has two frames of different shapes")
        both = torch.stack([f.float() for f in frames], dim=2)  # out, channel, frame, y, x
        self.keep(stored=both.flatten(1))

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows]
