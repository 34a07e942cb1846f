"""Weights in 8 and 4 bit integers: int8_tensorwise, convrot_w4a4, asym_w4a8_int8.

int8: a scale for the weight or for each output. convrot_w4a4: packed pairs, a scale for each
output. asym_w4a8_int8: codes of 4 bits (6 where rows are longer), which a scale for each group
brings onto the int8 grid of the output, after a table of 16 levels or, without one, evenly spaced.
The latter two are always rotated (`rotation`), int8 on request.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import int8_product, kernels
from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import constant, halves, look_up_pairs, numbers_of, pairs_table, quarters, signed_pairs
from .rotation import GROUP, is_group, rotate


class _Rotated(Layout):
    """A weight that may be stored rotated, in groups of `group` inputs (0: not)."""

    group: int = 0

    def inputs(self, x: Tensor) -> Tensor:
        return rotate(x, self.group) if self.group else x

    def weight(self, rows: Rows = ALL) -> Tensor:
        values = self.values(rows)
        return rotate(values, self.group) if self.group else values

    def read_group(self, parts: Parts) -> None:
        group = parts.setting("convrot_groupsize", GROUP)
        if not is_group(group):
            raise LayoutError(f"has a rotation of {group}, which is no power of 4")
        parts.needs_multiple(group, "rotation's groups of")
        self.group = group


class Int8(_Rotated):
    format = "int8_tensorwise"
    reorders = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        self.full = parts.setting("full_precision_matrix_mult", False)
        if parts.setting("convrot", False):
            self.read_group(parts)
        self.keep(
            stored=parts.weight(torch.int8, self.shape[1]),
            scale=parts.scales("weight_scale").float().expand(self.shape[0], 1).contiguous(),
        )
        self.packed: int8_product.Packed | None = None

    def values(self, rows: Rows = ALL) -> Tensor:
        if self.packed is not None:
            return self.packed.matrix()[rows] * self.scale[rows]
        return self.stored[rows].float() * self.scale[rows]

    def _apply(self, fn: Callable, recurse: bool = True) -> Layout:  # type: ignore[override]
        if self.packed is not None and fn(self.scale).device.type != "cpu":
            self.keep(stored=self.packed.matrix().to(torch.int8))
            self.packed = None
        return super()._apply(fn, recurse)

    def multiply(self, function: str, x: Tensor) -> Tensor:
        if function == "comfy_kitchen.int8_linear":
            return kernels.int8(x, self.stored, self.scale, self.group)
        if function == "torch._int_mm":
            return kernels.int8_of_torch(self.inputs(x), self.stored, self.scale)
        if self.passing:
            return int8_product.Packed(self.stored)(self.inputs(x), self.scale)
        if self.packed is None:  # from now on it is kept as that product wants it, once
            self.packed = int8_product.Packed(self.stored)
            self.keep(stored=None)
        return self.packed(self.inputs(x), self.scale)

    @property
    def bytes(self) -> int:
        return super().bytes + (self.shape[0] * self.shape[1] if self.packed is not None else 0)


class Int4(_Rotated):
    format = "convrot_w4a4"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        parts.needs_multiple(2, "pairs of")
        self.full = parts.setting("full_precision_matrix_mult", False)
        self.read_group(parts)
        self.inputs_as = parts.setting("linear_dtype", "int4")  # what products round inputs to
        if self.inputs_as not in ("int4", "int8"):
            raise LayoutError(f"has inputs as {self.inputs_as!r}, needed are int4 or int8")
        self.keep(
            stored=parts.weight(torch.int8, self.shape[1] // 2),
            scale=parts.scales("weight_scale").float().expand(self.shape[0], 1).contiguous(),
        )

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        torch.mul(signed_pairs(self.stored[rows]), self.scale[rows], out=out)

    def multiply(self, function: str, x: Tensor) -> Tensor:
        return kernels.int4(x, self.stored, self.scale, self.group, self.inputs_as)


class GroupedInt4(_Rotated):
    format = "asym_w4a8_int8"
    whole: Tensor
    table: Tensor | None

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        self.full = parts.setting("full_precision_matrix_mult", False)
        self.read_group(parts)
        width = self.shape[1]
        self.size = parts.setting("group_size", 16)
        parts.needs_multiple(self.size, "groups of")
        scale = parts.scales("weight_s_rel", width // self.size)
        if scale.dtype == torch.uint8:
            scale = scale.contiguous().view(torch.float8_e4m3fn)
        table = None if parts.get("weight_codebook") is None else parts.numbers("weight_codebook")
        stored = parts.need("weight", torch.int8)
        self.bits = 6 if stored.shape[-1] * 8 == 6 * width else 4
        stored = parts.weight(torch.int8, width * self.bits // 8)
        if table is not None and (table.shape != (16,) or self.bits != 4):
            raise LayoutError(
                f"has a weight_codebook of {tuple(table.shape)}, needed are 16 levels"
            )
        self.keep(
            stored=stored,
            scale=scale.contiguous(),
            whole=parts.scales("weight_s_channel").float().expand(self.shape[0], 1).contiguous(),
            table=None if table is None else table.float(),
        )

    def integers(self, rows: Rows = ALL) -> Tensor:
        """Rows on the int8 grid, in fp32."""
        stored = self.stored[rows]
        if self.bits == 6:
            levels = codes_of(stored, self.shape[1], self.bits).view(torch.int8).sub_(32).float()
        elif self.table is None:
            levels = look_up_pairs(constant(_even_pairs, stored.device), stored.view(torch.uint8))
        else:
            table = pairs_table(self.table, upper_first=False)
            levels = look_up_pairs(table, stored.view(torch.uint8))
        levels.unflatten(-1, (-1, self.size)).mul_(numbers_of(self.scale[rows])[..., None])
        return levels.round_().clamp_(-127, 127)

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        torch.mul(self.integers(rows), self.whole[rows], out=out)

    @property
    def kind(self) -> str:
        return self.format if self.bits == 4 else "asym_w6a8_int8"

    def multiply(self, function: str, x: Tensor) -> Tensor:
        scales = self.scale, self.whole
        return kernels.grouped(x, self.stored, scales, self.table, self.group, self.size)


def _even_pairs() -> Tensor:
    return pairs_table(torch.arange(16) - 8, upper_first=False)


def codes_of(stored: Tensor, width: int, bits: int) -> Tensor:
    """Codes (n, width) of packed rows; of 6 bits, the upper two follow the lower four in a row."""
    stored = stored.view(torch.uint8)
    low = halves(stored[:, : width // 2])
    return low if bits == 4 else low.bitwise_or_(quarters(stored[:, width // 2 :]))
