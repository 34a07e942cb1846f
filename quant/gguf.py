"""Weights in GGUF's blocks (ggml's `block_q4_K` and so on), and how each block becomes numbers.

A row is a run of blocks of 32 or 256 weights. Every function takes blocks as bytes (n, size) and
writes their weights into `out` (n, 32 or 256) in fp32, in the order of operations of the `gguf`
library, so that results are the same bit for bit.

Codes are cut out of words of eight (or four) bytes at once, laid in order while they are bytes, and
become floats once, contiguous: torch's loops on a CPU are slow over runs of 32 bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import constant, halves, look_up, quarters

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LOWER = 0x00FF00FF00FF00FF  # byte of each 16 bits
CACHED = 1 << 16  # weights whose floats stay in a processor's cache
Writer = Callable[[Tensor, Tensor], None]


def _half(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """The `count` fp16 numbers from byte `start` on of each block (n, count)."""
    return blocks.view(torch.float16)[:, start // 2 : start // 2 + count].float()


def _words(blocks: Tensor, start: int, stop: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Bytes from `start` to `stop` of each block as words."""
    if blocks.shape[1] % dtype.itemsize == 0 and start % dtype.itemsize == 0:
        return blocks.view(dtype)[:, start // dtype.itemsize : stop // dtype.itemsize]
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _each(byte: int, words: Tensor) -> int:
    """A word of such bytes."""
    return int.from_bytes(bytes([byte] * words.itemsize), "little")


def _spread(words: Tensor, run: int, bits: int, up: int = 0) -> Tensor:
    """Codes of `bits` bits, one in each byte, `up` bits above its lowest, as words.

    Of each `run` bytes first the lowest bits of all, then the next, and so on.
    """
    run //= words.itemsize
    runs = words.view(len(words), -1, run)
    mask = _each(((1 << bits) - 1) << up, words)
    found = words.new_empty(len(words), runs.shape[1], 8 // bits, run)
    # One shift at a time: by a tensor of shifts it takes four times as long on a CPU.
    for place, by in enumerate(range(-up, 8 - up, bits)):
        moved = runs if by == 0 else runs >> by if by > 0 else runs << -by
        torch.bitwise_and(moved, mask, out=found.select(2, place))
    return found.view(len(words), -1)


def _signed(words: Tensor, zero: int) -> Tensor:
    """Codes in bytes less `zero`, in the place of the words."""
    return words.view(torch.int8).sub_(zero)


def _times(codes: Tensor, step: Tensor, out: Tensor, least: Tensor | None = None) -> None:
    """step * codes - least in `out` (n, m); codes (n, m), or words of them, step and least
    (n, groups), each for m / groups neighbours."""
    codes = codes.view(torch.uint8) if codes.itemsize > 2 else codes
    rows = max(1, CACHED // out.shape[1]) if out.device.type == "cpu" else len(out)
    found = [t.view(-1, step.shape[1], out.shape[1] // step.shape[1]) for t in (out, codes)]
    given = [t.unsqueeze(2) for t in (step, least) if t is not None]
    for part, part_codes, scale, *rest in zip(
        *(t.split(rows) for t in (*found, *given)), strict=True
    ):
        part.copy_(part_codes).mul_(scale)
        if rest:
            part.sub_(rest[0])


def _steps(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and minima (n, groups) from words of their codes (n, 2 groups), times (n, 2)."""
    numbers = codes.view(torch.uint8).float().view(len(codes), 2, -1)
    # Each contiguous: what is not makes loops over a scale for each group slow.
    return numbers[:, 0] * scales[:, :1], numbers[:, 1] * scales[:, 1:]


def q4_0(blocks: Tensor, out: Tensor) -> None:
    _times(_signed(_spread(_words(blocks, 2, 18), 16, 4), 8), _half(blocks, 0), out)


def q4_1(blocks: Tensor, out: Tensor) -> None:
    codes = _spread(_words(blocks, 4, 20), 16, 4)
    _times(codes, _half(blocks, 0), out, -_half(blocks, 2))


def _five(blocks: Tensor, start: int) -> Tensor:
    """Codes whose fifth bits (32 bits) lie at `start`, the others behind them."""
    bytes = blocks[:, start : start + 4].flatten().int()
    high = constant(_fifth_bits, blocks.device).index_select(0, bytes).view(-1, 4)
    return _spread(_words(blocks, start + 4, start + 20), 16, 4).bitwise_or_(high)


def _fifth_bits() -> Tensor:
    """Words (256,) that have the bits of a byte, each as 16 in a byte of its own."""
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    bits = ((byte >> torch.arange(8, dtype=torch.uint8)) & 1) << 4
    return bits.view(torch.int64).flatten()


def q5_0(blocks: Tensor, out: Tensor) -> None:
    _times(_signed(_five(blocks, 2), 16), _half(blocks, 0), out)


def q5_1(blocks: Tensor, out: Tensor) -> None:
    _times(_five(blocks, 4), _half(blocks, 0), out, -_half(blocks, 2))


def q8_0(blocks: Tensor, out: Tensor) -> None:
    _times(blocks[:, 2:].view(torch.int8), _half(blocks, 0), out)


def q2_k(blocks: Tensor, out: Tensor) -> None:
    step, least = _steps(_spread(_words(blocks, 0, 16), 16, 4), _half(blocks, 80, 2))
    codes = _spread(_words(blocks, 16, 80), 32, 2)
    _times(codes, step, out, least)


def q3_k(blocks: Tensor, out: Tensor) -> None:
    packed = _words(blocks, 96, 108, torch.int32)
    scales = _spread(packed[:, :2], 8, 4).bitwise_or_(_spread(packed[:, 2:], 4, 2, up=4))
    step = _half(blocks, 108) * _signed(scales, 32)
    # The mask says where 4 is not taken away.
    codes = _spread(_words(blocks, 32, 96), 32, 2)
    codes.bitwise_or_(_spread(_words(blocks, 0, 32), 32, 1, up=2))
    _times(_signed(codes, 4), step, out)


def _affine(blocks: Tensor, codes: Tensor, out: Tensor) -> None:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits each lie in 12 bytes."""
    packed = _words(blocks, 4, 16, torch.int32)
    own = packed[:, :2]
    upper = _spread(packed[:, 2:], 4, 4).bitwise_or_((own >> 2).bitwise_and_(_each(48, own)))
    both = torch.stack((own & _each(63, own), upper), dim=2).flatten(1)
    step, least = _steps(both, _half(blocks, 0, 2))
    _times(codes, step, out, least)


def q4_k(blocks: Tensor, out: Tensor) -> None:
    _affine(blocks, _spread(_words(blocks, 16, 144), 32, 4), out)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    high = _spread(_words(blocks, 16, 48), 32, 1, up=4)
    _affine(blocks, _spread(_words(blocks, 48, 176), 32, 4).bitwise_or_(high), out)


def q6_k(blocks: Tensor, out: Tensor) -> None:
    step = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    codes = _spread(_words(blocks, 0, 128), 64, 4)
    codes.bitwise_or_(_spread(_words(blocks, 128, 192), 32, 2, up=4))
    _times(_signed(codes, 32), step, out)


def _levels(bytes: Tensor) -> Tensor:
    """Levels (n, 2 m) of bytes (n, m): of each 16 first those of the lower halves."""
    both = look_up(constant(_level_pairs, bytes.device), bytes)
    runs = both.view(torch.int64).view(len(bytes), -1, 4)
    found = runs.new_empty(len(bytes), runs.shape[1], 2, 4)
    torch.bitwise_and(runs, LOWER, out=found[:, :, 0])
    torch.bitwise_and(runs >> 8, LOWER, out=found[:, :, 1])
    return found.view(torch.int16).view(len(bytes), -1).sub_(128)


def _level_pairs() -> Tensor:
    """(256,): the two levels of a byte, each plus 128, that of its lower half in the lower byte."""
    levels, byte = torch.tensor(IQ4, dtype=torch.int16) + 128, torch.arange(256)
    return (levels[byte >> 4] << 8) | levels[byte & 15]


def iq4_nl(blocks: Tensor, out: Tensor) -> None:
    _times(_levels(blocks[:, 2:]), _half(blocks, 0), out)


def iq4_xs(blocks: Tensor, out: Tensor) -> None:
    codes = halves(blocks[:, 4:8]).bitwise_or_(quarters(blocks[:, 2:4]))
    step = _half(blocks, 0) * codes.view(torch.int8).sub_(32)
    _times(_levels(blocks[:, 8:]), step, out)


# Type: weights in a block, bytes of a block, and its numbers. Names as the `gguf` library's.
TYPES: dict[str, tuple[int, int, Writer]] = {
    "Q4_0": (32, 18, q4_0), "Q4_1": (32, 20, q4_1), "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1), "Q8_0": (32, 34, q8_0), "Q2_K": (256, 84, q2_k),
    "Q3_K": (256, 110, q3_k), "Q4_K": (256, 144, q4_k), "Q5_K": (256, 176, q5_k),
    "Q6_K": (256, 210, q6_k), "IQ4_NL": (32, 18, iq4_nl), "IQ4_XS": (256, 136, iq4_xs),
}  # fmt: skip


class GGUF(Layout):
    """Rows of blocks of one type; the setting `type` says which."""

    format = "gguf"
    together = 1 << 19  # cut out of their words at a time, of which each call costs microseconds

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        kind = parts.setting("type", "")
        if kind not in TYPES:
            raise LayoutError(f"is of GGUF's type {kind}; readable are {', '.join(TYPES)}")
        self.block, self.size, self.numbers = TYPES[kind]
        parts.needs_multiple(self.block, "blocks of")
        width = self.shape[1] // self.block * self.size
        self.keep(stored=parts.weight(torch.uint8, width))

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        if out.dtype != torch.float32:
            return super().write(out, rows)
        blocks = self.stored[rows].reshape(-1, self.size)
        if blocks.storage_offset() % 8:  # words begin where words may
            blocks = blocks.clone()
        self.numbers(blocks, out.view(-1, self.block))


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
