"""4-bit weights with offsets for 16-bit inputs (AWQ, arXiv:2306.00978), as Nunchaku's files have
them: the layers that turn the time of a step into scales, shifts and gates.

    W = code * scale + zero, with a scale and a zero for each output and 64 inputs

Codes lie as TinyChat's kernel reads them: four outputs together, and of 32 inputs those eight apart
share a 16-bit word (deepcompressor, backend/tinychat). Here they are put in order once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import halves

GROUP = 64
TOGETHER = 4  # outputs whose words follow each other


def codes_in_order(packed: Tensor) -> Tensor:
    """Words (out / 4, in / 2) of 32 bits -> bytes (out, in / 2), two neighbouring inputs in each,
    the first in its lower half."""
    rows, half = packed.shape
    out, width = TOGETHER * rows, 2 * half
    words = packed.contiguous().view(torch.uint8).reshape(rows, width // 64, TOGETHER, 2, 8, 2)
    # (..., output, 32 inputs, word, byte): a word's nibbles are the inputs word + 0, 8, 16, 24.
    nibbles = torch.stack((words & 15, words >> 4), dim=-1)  # (..., word, byte, half of it)
    codes = nibbles.permute(0, 2, 1, 3, 5, 6, 4).reshape(out, width)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def regrouped(rows: Tensor, splits: int) -> Tensor:
    """Rows that a file deals out in turn to `splits` results (all first rows, all second ones, ...)
    -> one result after the other."""
    return rows.unflatten(0, (-1, splits)).transpose(0, 1).flatten(0, 1)


class AWQ(Layout):
    """`splits` results of one layer that lie in the file in turn, row by row; 1: as they are."""

    format = "awq_w4a16"
    reorders = True
    zero: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        out, width = parts.out, self.shape[1]
        splits = parts.setting("splits", 1)
        stored = parts.need("weight")
        fits = out % TOGETHER == 0 and width % GROUP == 0 and splits > 0 and out % splits == 0
        if stored.is_floating_point() or stored.dtype.itemsize != 4:
            raise LayoutError(f"has a weight as {stored.dtype}, needed are words of 32 bits")
        if not fits or stored.shape != (out // TOGETHER, width // 2):
            raise LayoutError(f"has a weight of {tuple(stored.shape)} for {out} x {width}")

        def numbers(name: str) -> Tensor:
            tensor = parts.need(name)
            if tensor.shape != (width // GROUP, out) or not torch.isfinite(tensor.float()).all():
                raise LayoutError(f"has {name} of {tuple(tensor.shape)}, for groups of {GROUP}")
            return parts.cut(regrouped(tensor.t().contiguous(), splits)).contiguous()

        self.keep(
            stored=parts.cut(regrouped(codes_in_order(stored), splits)).contiguous(),
            scale=numbers("wscales"),
            zero=numbers("wzeros"),
        )

    def values(self, rows: Rows = ALL) -> Tensor:
        codes = halves(self.stored[rows]).float().unflatten(-1, (-1, GROUP))
        scale, zero = self.scale[rows].float(), self.zero[rows].float()
        return codes.mul_(scale[..., None]).add_(zero[..., None]).flatten(-2)


class AWQVector(Layout):
    """The bias of such a layer, (n, 1). Its engine multiplies by the scales as they come out, so
    the file has added the one to them: to the second result and the last but one."""

    format = "awq_vector"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        splits, numbers = parts.setting("splits", 3), parts.need("weight")
        if splits < 2 or parts.out % splits or numbers.numel() != parts.out:
            raise LayoutError(f"has {numbers.numel()} numbers for {splits} results")
        results = numbers.float().reshape(-1, splits).t().clone()
        results[1] -= 1
        if splits - 2 != 1:
            results[splits - 2] -= 1
        self.keep(stored=parts.cut(results.reshape(-1, 1)))

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows]
