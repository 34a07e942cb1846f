"""Weights in 8 and 4 bit floating-point numbers with scales: float8, mxfp8, nvfp4.

float8: one scale for the weight (or for each output). mxfp8: a power of two for each 32 inputs (OCP
Microscaling Formats 1.0). nvfp4: a float8 scale for each 16 inputs and one for all. Scales of the
last two lie in files in tiles of 128 x 4 (cuBLAS, "block scaling factors layout").
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import constant, look_up_pairs, numbers_of, pairs_table

# E2M1: the 8 magnitudes of a 4-bit number; the top bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Float8(Layout):
    format = "float8_e4m3fn"
    dtype = torch.float8_e4m3fn

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        scale = parts.scales("weight_scale").float() if parts.get("weight_scale") is not None else (
            torch.ones(1, 1)
        )  # fmt: skip
        self.full = parts.setting("full_precision_matrix_mult", False)
        self.keep(stored=parts.weight(self.dtype, self.shape[1]), scale=scale)

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        scale = self.scale if self.scale.numel() == 1 else self.scale[rows]
        torch.mul(numbers_of(self.stored[rows]), scale, out=out)

    def multiply(self, function: str, x: Tensor) -> Tensor:
        return kernels.float8(x, self.stored, self.scale)


class Float8E5M2(Float8):
    format = "float8_e5m2"
    dtype = torch.float8_e5m2


class MXFloat8(Layout):
    format = "mxfp8"
    reorders = True
    exponent: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        parts.needs_multiple(32, "groups of")
        self.full = parts.setting("full_precision_matrix_mult", False)
        scale = parts.need("weight_scale", torch.uint8)
        if bool((scale == 255).any()):  # what E8M0 has for NaN
            raise LayoutError("has weight_scale that are no numbers")
        self.keep(
            stored=parts.weight(torch.float8_e4m3fn, self.shape[1]),
            exponent=parts.cut(untiled(scale, parts.out, self.shape[1] // 32)).contiguous(),
        )

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        scale = torch.exp2(self.exponent[rows].float() - 127)
        grouped(numbers_of(self.stored[rows]), scale, out)

    def multiply(self, function: str, x: Tensor) -> Tensor:
        return kernels.mxfp8(x, self.stored, tiled(self.exponent))


class NVFloat4(Layout):
    """Two numbers in a byte, the first in its upper half. `smooth` (in,) multiplies the inputs."""

    format = "nvfp4"
    reorders = True
    whole: Tensor
    smooth: Tensor | None

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        parts.needs_multiple(16, "groups of")
        self.full = parts.setting("full_precision_matrix_mult", False)
        scale = parts.need("weight_scale", torch.float8_e4m3fn)
        if not torch.isfinite(scale.float()).all():
            raise LayoutError("has weight_scale that are no numbers")
        scale = untiled(scale.view(torch.uint8), parts.out, self.shape[1] // 16)
        smooth = None if parts.get("pre_quant_scale") is None else parts.numbers("pre_quant_scale")
        if smooth is not None and smooth.numel() != self.shape[1]:
            raise LayoutError(f"has pre_quant_scale of {tuple(smooth.shape)}")
        self.keep(
            stored=parts.weight(torch.uint8, self.shape[1] // 2),
            scale=parts.cut(scale).contiguous().view(torch.float8_e4m3fn),
            whole=parts.scalar("weight_scale_2"),
            smooth=None if smooth is None else smooth.flatten().float(),
        )

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        levels = look_up_pairs(constant(_e2m1_pairs, self.stored.device), self.stored[rows])
        grouped(levels, self.whole * numbers_of(self.scale[rows]), out)

    def inputs(self, x: Tensor) -> Tensor:
        return x if self.smooth is None else x * self.smooth.to(x.dtype)

    def weight(self, rows: Rows = ALL) -> Tensor:
        values = self.values(rows)
        return values if self.smooth is None else values * self.smooth

    def multiply(self, function: str, x: Tensor) -> Tensor:
        scale = tiled(self.scale.view(torch.uint8))
        return kernels.nvfp4(self.inputs(x), self.stored, scale, self.whole)


def grouped(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """`out` (n, in): values (n, in) times a scale for each group (n, groups)."""
    shape = (*scale.shape, -1)
    torch.mul(values.view(shape), scale[..., None], out=out.view(shape))


def _e2m1_pairs() -> Tensor:
    return pairs_table(torch.tensor((*E2M1, *(-v for v in E2M1))), upper_first=True)


def _padded(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def untiled(scale: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) of scales that lie in tiles of 128 x 4, each as 32 x (4 x 4)."""
    high, wide = _padded(rows, columns)
    if scale.numel() != high * wide:
        raise LayoutError(f"has scales of {tuple(scale.shape)}, needed are {high} x {wide}")
    tiles = scale.reshape(high // 128, wide // 4, 32, 4, 4)  # tile, row in 32, row // 32, column
    return tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :columns]


def tiled(scale: Tensor) -> Tensor:
    """The inverse of `untiled`: bytes (rows, columns), filled up with zeros, in tiles."""
    rows, columns = scale.shape
    high, wide = _padded(rows, columns)
    whole = scale.new_zeros(high, wide)
    whole[:rows, :columns] = scale
    tiles = whole.reshape(high // 128, 4, 32, wide // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high, wide)
