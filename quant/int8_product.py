"""Products of int8 matrices on a CPU, by oneDNN.

Inputs are rounded for each row of x on its own. They become unsigned, x = lo + s q, so
that W x = s (W q) + lo (W 1), which uses all levels also for inputs of one sign.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CACHED = 1 << 18  # inputs that are rounded at a time
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


def _rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, in) as codes (n, in), with low and step (n, 1) of each row: x = low + step codes.

    As many rows at a time as stay in the cache, and two reductions: `aminmax` of a dimension takes
    eight times as long as `amin` and `amax` together.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8)
    low, step = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
    rows = max(1, CACHED // max(x.shape[1], 1))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        own = x[part]
        torch.amin(own, dim=1, keepdim=True, out=low[part])
        span = torch.amax(own, dim=1, keepdim=True) - low[part]
        step[part] = (span / levels()).clamp_min_(torch.finfo(torch.float32).tiny)
        codes[part] = (own - low[part]).div_(step[part]).round_()
    return codes, low, step


class Packed:
    """An int8 matrix (out, in) as oneDNN wants it; it takes the place of the plain one."""

    def __init__(self, matrix: Tensor) -> None:
        self.shape = matrix.shape
        self.packed = torch.ops.onednn.qlinear_prepack(matrix.contiguous(), None)
        # A few rows at a time, for torch sums a copy in 32 bits: four times the matrix.
        rows = matrix.split(max(1, CACHED // max(matrix.shape[1], 1)))
        self.sums = torch.cat([part.sum(dim=1, dtype=torch.int32) for part in rows]).float()

    def __call__(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (..., in) in fp32 -> (..., out); scale (out, 1) of the weight."""
        codes, low, step = _rounded(x.detach().float().reshape(-1, x.shape[-1]))
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
