"""Products of int8 matrices: oneDNN's on a CPU, cuBLAS's through torch on a card.

Inputs are rounded for each row of x on its own. On a CPU they become unsigned, x = lo + s q, so
that W x = s (W q) + lo (W 1), which uses all levels also for inputs of one sign.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TEST = 64  # inputs of the product that is tried first


@lru_cache(maxsize=1)
def levels() -> int:
    """The largest code for inputs whose product is exact on this CPU; 0: it has no such product.

    Without VNNI pairs of products are added in 16 bits, which 255 x 127 x 2 does not fit into, but
    127 x 128 x 2 does. Tried rather than looked up, with the largest numbers that can occur.
    """
    weight = torch.full((16, TEST), 127, dtype=torch.int8)
    weight[::2] = -128
    wanted = weight.sum(dim=1, dtype=torch.int32)
    for most in (255, 127):
        codes = torch.full((2, TEST), most, dtype=torch.uint8)
        try:
            got = _linear(codes, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16))
        except (AttributeError, NotImplementedError, RuntimeError):
            return 0
        if torch.equal(got[0], (wanted * most).float()):
            return most
    return 0


def on_cpu() -> bool:
    return levels() > 0


def _linear(codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """scale * (W codes) in fp32; codes uint8 (n, in), W packed, scale (out,)."""
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


class Packed:
    """An int8 matrix (out, in) as oneDNN wants it; it takes the place of the plain one."""

    def __init__(self, matrix: Tensor) -> None:
        self.shape = matrix.shape
        self.packed = torch.ops.onednn.qlinear_prepack(matrix.contiguous(), None)
        self.sums = matrix.sum(dim=1, dtype=torch.int32).float()

    def __call__(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (..., in) in fp32 -> (..., out); scale (out, 1) of the weight."""
        flat = x.float().reshape(-1, x.shape[-1])
        low, high = flat.aminmax(dim=1, keepdim=True)
        step = ((high - low) / levels()).clamp_min(torch.finfo(torch.float32).tiny)
        codes = ((flat - low) / step).round_().to(torch.uint8)
        y = _linear(codes, self.packed, scale.flatten()).mul_(step)
        y.addmm_(low, (self.sums * scale.flatten())[None])
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def matrix(self) -> Tensor:
        """The plain matrix again, in fp32, by multiplying unit vectors: exact."""
        out, width = self.shape
        ones, parts = torch.ones(out), []
        for units in torch.eye(width, dtype=torch.uint8).split(256):
            parts.append(_linear(units.contiguous(), self.packed, ones))
        return torch.cat(parts).t()


def fits(out: int, width: int) -> bool:
    """Whether `on_card` can multiply a weight of this shape."""
    return out % 8 == 0 and width % 8 == 0


def on_card(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
    """W x for x (..., in) on a card, each row rounded to int8; cuBLAS wants more than 16 rows."""
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    step = (flat.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(1e-12)
    codes = (flat / step).round_().to(torch.int8)
    if rows < 17:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 17 - rows))
    y = torch._int_mm(codes, stored.t())[:rows]  # pyright: ignore[reportPrivateImportUsage]
    y = (y.float() * step * scale.flatten()).to(x.dtype)
    return y.reshape(*x.shape[:-1], -1)
