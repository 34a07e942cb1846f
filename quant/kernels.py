"""Products of quantized weights by other libraries' functions: comfy-kitchen's and torch's.

Each takes x (..., in) as the layer gets it, in any floating-point dtype, and returns (..., out) in
that dtype, without bias. Inputs are rounded to the format's own numbers. `machine.RULES` says where
each is used; the functions that run anywhere are tested on a CPU against full precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 1e-12  # so that rows of zeros have a scale


def _kitchen() -> Any:
    import comfy_kitchen

    return comfy_kitchen


def _by_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def int8(x: Tensor, codes: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """`codes` (out, in) int8, `scale` (out, 1); inputs are turned first in groups of `group`."""
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    y = _kitchen().int8_linear(_by_rows(x), codes, scale, None, x.dtype, **rotation)
    return y.unflatten(0, x.shape[:-1])


def int4(x: Tensor, codes: Tensor, scale: Tensor, group: int, inputs_as: str = "int4") -> Tensor:
    """`codes` (out, in / 2): pairs of 4 bits; `scale` (out, 1)."""
    y = _kitchen().convrot_w4a4_linear(
        _by_rows(x), codes, scale.flatten(), None, group, linear_dtype=inputs_as
    )
    return y.unflatten(0, x.shape[:-1])


def grouped(
    x: Tensor, codes: Tensor, scales: tuple[Tensor, Tensor], table: Tensor | None,
    group: int, size: int,
) -> Tensor:  # fmt: skip
    """`codes` of 4 or 6 bits, `scales` for each group of `size` (out, groups) and for each output
    (out, 1), a `table` of 16 levels or None."""
    relative, whole = scales
    y = _kitchen().w4a8_int8_linear(
        _by_rows(x), codes, relative, whole.flatten(), table, group_size=size,
        convrot_groupsize=group, out_dtype=x.dtype,
    )  # fmt: skip
    return y.unflatten(0, x.shape[:-1])


def nvfp4(x: Tensor, codes: Tensor, scale: Tensor, whole: Tensor) -> Tensor:
    """`codes` (out, in / 2), `scale` for each 16 inputs as bytes in tiles, `whole` () for all."""
    kitchen, rows = _kitchen(), _by_rows(x)
    most = (rows.abs().amax().float() / (448 * 6)).clamp_min(LEAST)
    narrow, own = kitchen.quantize_nvfp4(rows, most, pad_16x=True)
    weights = scale.view(torch.float8_e4m3fn)
    y = kitchen.scaled_mm_nvfp4(
        narrow, codes, most, whole, own, weights, out_dtype=torch.bfloat16
    )  # fmt: skip
    return y[: len(rows)].to(x.dtype).unflatten(0, x.shape[:-1])


def mxfp8(x: Tensor, codes: Tensor, exponent: Tensor) -> Tensor:
    """`codes` (out, in) in float8, `exponent` of two for each 32 inputs, biased, in tiles."""
    kitchen, rows = _kitchen(), _by_rows(x)
    narrow, own = kitchen.quantize_mxfp8(rows, pad_32x=True)
    weights = exponent.view(torch.float8_e8m0fnu)
    y = kitchen.scaled_mm_mxfp8(narrow, codes, own, weights, out_dtype=torch.bfloat16)
    return y[: len(rows)].to(x.dtype).unflatten(0, x.shape[:-1])


def float8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`codes` (out, in) in float8_e4m3fn, `scale` (1, 1) or (out, 1); inputs are scaled by rows."""
    rows = _by_rows(x)
    own = (rows.abs().amax(dim=1, keepdim=True).float() / 448).clamp_min(LEAST)
    narrow = (rows / own).clamp(-448, 448).to(codes.dtype)
    weights = scale.reshape(1, -1).expand(1, codes.shape[0]).contiguous()
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        narrow, codes.t(), scale_a=own, scale_b=weights, out_dtype=torch.bfloat16
    )
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def int8_of_torch(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`codes` (out, in) int8, `scale` (out, 1); cuBLAS wants more than 16 rows."""
    flat = _by_rows(x)
    rows = len(flat)
    step = (flat.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(LEAST)
    narrow = (flat / step).round_().to(torch.int8)
    if rows < 17:
        narrow = torch.nn.functional.pad(narrow, (0, 0, 0, 17 - rows))
    y = torch._int_mm(narrow, codes.t())[:rows]  # pyright: ignore[reportPrivateImportUsage]
    y = (y.float() * step * scale.flatten()).to(x.dtype)
    return y.unflatten(0, x.shape[:-1])
