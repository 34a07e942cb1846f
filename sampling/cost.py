"""What references cost a run, said before it: tokens, memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.family import Family

PROBE = 1e9  # multiplications and additions that are timed: a few milliseconds
SHARE = 0.6  # of a plain product's speed that a network reaches, about


@dataclass(frozen=True)
class Cost:
    """Of one reference: `bytes` of keys and values where they are kept, else 0; `seconds` about.

    Where nothing is kept the seconds are those of one step.
    """

    tokens: int
    bytes: int
    seconds: float

    def text(self) -> str:
        kept = f", {megabytes(self.bytes)}" if self.bytes else " in every step"
        return f"{self.tokens} tokens{kept}, about {brief(self.seconds)}"


def costs(
    dit: Any, sizes: Sequence[tuple[int, int]], pixels_per_token: int, kept: bool,
    device: torch.device, dtype: torch.dtype,
) -> list[Cost]:  # fmt: skip
    """The cost of references of `sizes` (width, height) that a DiT reads in their order.

    `dit.config` has `layers` and `dim`. The time is that of the DiT alone, from a product that is
    timed here: good to a factor of two or so.
    """
    layers, dim = dit.config.layers, dit.config.dim
    weights = sum(parameter.numel() for parameter in dit.parameters())
    pace = speed(dim, device, dtype) * SHARE
    found, before = [], 0
    for width, height in sizes:
        count = math.ceil(width / pixels_per_token) * math.ceil(height / pixels_per_token)
        before += count
        work = 2.0 * weights * count + 4.0 * layers * dim * count * before
        held = 2 * layers * dim * dtype.itemsize * count if kept else 0
        found.append(Cost(count, held, work / pace))
    return found


def vlm_tokens(
    family: Family, given: Sequence[Tensor], shown: Sequence[tuple[int, int]],
    sides: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """Tokens that a text encoder reads of references that it sees in sizes of their own.

    `given` (H, W, C) as they are, `shown` (width, height) as the diffusion model reads them.
    """
    own, found = family.own_size, []
    for image, (width, height), side in zip(given, shown, sides, strict=False):
        if side or family.encoder_resizes:
            height, width = image.shape[:2]
        found.append(own.tokens(width, height, side) if own else 0)
    return tuple(found)


@torch.no_grad()
def speed(dim: int, device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a product as a layer of that width does it."""
    rows = max(16, min(512, int(PROBE / (8 * dim * dim))))
    x = torch.ones(rows, dim, device=device, dtype=dtype)
    weight = torch.ones(4 * dim, dim, device=device, dtype=dtype)
    best = min(_timed(x, weight) for _ in range(3))
    return 2.0 * rows * weight.numel() / best


def _timed(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    float((x @ weight.T)[0, 0])  # reading a value waits for the device
    return max(time.perf_counter() - start, 1e-7)


def megabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def brief(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds * 1000:.0f} ms"
