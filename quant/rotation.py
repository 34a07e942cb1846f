"""ConvRot: weights and inputs turned by the same orthogonal matrix, which spreads outliers evenly.

The matrix is block-diagonal: the same R in each group of columns, a normalised Kronecker power of
a 4 x 4 Hadamard matrix (stable-diffusion.cpp, docs/int8_convrot.md; ComfyUI's int8 files). R is
symmetric and its own inverse, so one function turns there and back, and (W R)(R x) = W x.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
GROUP = 256


def is_group(size: int) -> bool:
    """Whether there is a rotation of this size: a power of 4."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


@lru_cache(maxsize=16)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        part = torch.tensor(H4, dtype=torch.float32)
        whole = part
        while len(whole) < size:
            whole = torch.kron(whole, part)
        return (whole / size**0.5).to(device, dtype)


def rotate(x: Tensor, group: int = GROUP) -> Tensor:
    """x (..., n) with each `group` of its last axis turned; n is a multiple of `group`."""
    return (x.unflatten(-1, (-1, group)) @ _matrix(group, x.dtype, x.device)).flatten(-2)


def largest_group(width: int, most: int = GROUP) -> int:
    """The largest rotation up to `most` that divides `width`, 0 for none."""
    sizes = (size for size in (4, 16, 64, 256, 1024) if size <= most and width % size == 0)
    return max(sizes, default=0)
