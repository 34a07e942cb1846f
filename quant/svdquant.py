"""SVDQuant (arXiv:2411.05007) as Nunchaku's files have it: 4 bits and a branch of low rank.

    y = W4 (x / smooth) + up (down x)

The file's tensors lie as the tensor cores of its engine read them: tiles of 128 outputs by 64
inputs, dealt out to the 32 lanes of a warp (deepcompressor, backend/nunchaku). Here they are put
in order once, in as many bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .floats import E2M1, grouped
from .layouts import ALL, Layout, LayoutError, Parts, Rows
from .lookup import constant, look_up_pairs, numbers_of, pairs_table, signed_pairs

TILE = 128
SHIFT = 0.171875  # what the engine adds to GELU's outputs, so that none is below zero


def weight_in_order(packed: Tensor) -> Tensor:
    """Bytes (out, in / 2); two neighbouring inputs in a byte, the first in its lower half."""
    out, half = packed.shape
    tiles = packed.reshape(out // TILE, half // 32, 8, 8, 4, 2, 2, 4)
    return tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(out, half)


def scales_in_order(packed: Tensor, out: int) -> Tensor:
    """16-bit numbers for outputs and groups: (groups, out) in the file -> (out, groups)."""
    tiles = packed.reshape(out // TILE, -1, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(out, -1)


def small_scales_in_order(packed: Tensor, out: int) -> Tensor:
    """The float8 scales of nvfp4's groups of 16: -> (out, groups)."""
    tiles = packed.reshape(out // TILE, -1, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(out, -1)


def branch_in_order(packed: Tensor, down: bool) -> Tensor:
    """`proj_down` (in, rank) -> (rank, in), `proj_up` (out, rank) -> the same, in order."""
    sides, rank = packed.shape
    tiles = packed.reshape(sides // 16, rank // 16, 8, 4, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    tiles = tiles.reshape(sides // 16, rank // 16, 16, 16)
    if down:
        return tiles.permute(1, 2, 0, 3).reshape(rank, sides)
    return tiles.permute(0, 2, 1, 3).reshape(sides, rank)


class SVDQuant(Layout):
    format = "svdquant_int4"
    reorders = True
    group = 64
    smooth: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        width, out = self.shape[1], parts.out
        stored = parts.need("weight", torch.int8)
        down, up = parts.numbers("proj_down", 2), parts.numbers("proj_up", 2)
        smooth = parts.numbers("smooth_factor")
        if out % TILE or width % TILE or stored.shape != (out, width // 2):
            raise LayoutError(
                f"has a weight of {tuple(stored.shape)} for {out} x {width}, in tiles"
            )
        shapes = (down.shape[0], up.shape[0], down.shape[1] - up.shape[1], smooth.numel())
        if shapes != (width, out, 0, width) or down.shape[1] % 16:
            raise LayoutError(f"has branches of {tuple(down.shape)} and {tuple(up.shape)}")
        if not bool(smooth.all()):
            raise LayoutError("has a smooth_factor of zero, by which inputs would be divided")
        self.keep(
            stored=parts.cut(weight_in_order(stored)),
            smooth=scales_in_order(smooth, width).flatten(),
            down=branch_in_order(down, down=True),
            up=parts.cut(branch_in_order(up, down=False)),
            **self.read_scales(parts),
        )

    def read_scales(self, parts: Parts) -> dict[str, Tensor | None]:
        scale = parts.numbers("wscales")
        if scale.dtype.itemsize != 2 or scale.numel() * self.group != parts.out * self.shape[1]:
            raise LayoutError(f"has wscales of {tuple(scale.shape)}, for groups of {self.group}")
        return {"scale": parts.cut(scales_in_order(scale, parts.out))}

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        grouped(signed_pairs(self.stored[rows]), self.scale[rows].float(), out)

    def inputs(self, x: Tensor) -> Tensor:
        return x / self.smooth.to(x.dtype)

    def extra(self, x: Tensor, y: Tensor) -> Tensor:
        linear = torch.nn.functional.linear
        return y + linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def weight(self, rows: Rows = ALL) -> Tensor:
        return self.values(rows) / self.smooth.float() + self.up[rows].float() @ self.down.float()


class SVDQuantFP4(SVDQuant):
    format = "svdquant_nvfp4"
    group = 16
    whole: Tensor

    def read_scales(self, parts: Parts) -> dict[str, Tensor | None]:
        scale, out = parts.need("wscales", torch.float8_e4m3fn), parts.out
        if not torch.isfinite(scale.float()).all():
            raise LayoutError("has wscales that are no numbers")
        if scale.numel() * self.group != out * self.shape[1]:
            raise LayoutError(f"has wscales of {tuple(scale.shape)}, for groups of {self.group}")
        whole = torch.ones(out, 1)
        if parts.get("wcscales") is not None:
            channels = parts.numbers("wcscales")
            if channels.numel() != out:
                raise LayoutError(f"has wcscales of {tuple(channels.shape)}, needed are {out}")
            whole = scales_in_order(channels, out).float()
        if parts.get("wtscale") is not None:
            whole = whole * parts.scalar("wtscale")
        return {
            "scale": parts.cut(small_scales_in_order(scale.view(torch.uint8), out)).view(
                torch.float8_e4m3fn
            ),
            "whole": parts.cut(whole),
        }

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        stored = self.stored[rows].view(torch.uint8)
        levels = look_up_pairs(constant(_e2m1_pairs, stored.device), stored)
        grouped(levels, numbers_of(self.scale[rows]), levels)
        torch.mul(levels, self.whole[rows], out=out)


def _e2m1_pairs() -> Tensor:
    return pairs_table(torch.tensor((*E2M1, *(-v for v in E2M1))), upper_first=False)


class Vector(Layout):
    """A bias of such a layer, which lies in the order of its scales: (n, 1)."""

    format = "svdquant_vector"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        numbers = parts.need("weight")
        if parts.out % TILE or numbers.numel() != parts.out:
            raise LayoutError(f"has {numbers.numel()} numbers, needed are {parts.out} in tiles")
        self.keep(stored=parts.cut(scales_in_order(numbers.reshape(1, -1), parts.out)))

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows].float()


class ShiftedVector(Layout):
    """The bias of a layer behind GELU (int4 only), (n, 1), as its inputs come without a shift.

    The engine multiplies W4 by (x + SHIFT) / smooth, and the file has taken the product of the
    shift out of the bias; the branch sees x. (Nunchaku, `fused_gelu_mlp`.)
    """

    format = "svdquant_shifted_vector"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shape)
        tensors = {name: parts.need(name) for name in ("wscales", "smooth_factor")}
        codes, numbers = parts.need("codes"), Vector(parts)
        if codes.ndim != 2 or codes.shape[0] != parts.out:
            raise LayoutError(f"has {tuple(codes.shape)} codes for {parts.out} outputs")
        width = 2 * codes.shape[1]
        none = torch.zeros(width, 16), torch.zeros(parts.out, 16)
        tensors |= {"weight": codes, "proj_down": none[0], "proj_up": none[1]}
        layer = SVDQuant(Parts(tensors, (parts.shape[0], width), parts.rows, parts.out))
        moved = layer.inputs(torch.full((width,), SHIFT))
        product = [layer.values(slice(i, i + TILE)) @ moved for i in range(0, self.shape[0], TILE)]
        self.keep(stored=numbers.values() + torch.cat(product)[:, None])

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows]
