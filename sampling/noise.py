"""The one rule for noise: image `index` of a run with seed `s` has the noise of seed `s + index`.

So a picture of a batch can be made again alone, with its own seed, from the same noise bit for bit,
on every device. The first picture's noise is also what ComfyUI draws for that seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import SamplingError

MAX_SEED = 2**64 - 1  # as in ComfyUI


def image_seed(seed: int, index: int) -> int:
    """The seed that makes image `index` of a run alone; after `MAX_SEED` comes 0.

    torch's CPU generator reads the lower 32 bits: seeds 2**32 apart give the same noise.
    """
    if not 0 <= seed <= MAX_SEED:
        raise SamplingError(f"the seed must lie between 0 and {MAX_SEED}, {seed} was given.")
    if index < 0:
        raise SamplingError(f"images are counted from 0, image {index} was asked for.")
    return (seed + index) % (MAX_SEED + 1)


def noise(
    seed: int,
    index: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` for one image.

    Drawn on the CPU in fp32 and then moved: a GPU's generator would make another picture.
    """
    generator = torch.Generator("cpu").manual_seed(image_seed(seed, index))
    drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return drawn.to(device=device, dtype=dtype)


def batch_noise(
    seed: int,
    start: int,
    count: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(count, *shape): the noise of images `start` to `start + count - 1` of a run."""
    if count < 1:
        raise SamplingError(f"a batch holds at least one image, {count} were asked for.")
    images = [noise(seed, start + i, shape, device, dtype) for i in range(count)]
    return torch.stack(images)


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The point of the flow at `sigma`, between latents and noise: where image-to-image starts."""
    return (1 - sigma) * latents + sigma * noise
