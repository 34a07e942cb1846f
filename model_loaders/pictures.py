"""Sizes of references, and bringing them there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]  # width, height in pixels


def snap(side: float, step: int) -> int:
    """The nearest multiple of `step`, at least one; halves go to the even multiple (diffusers)."""
    return max(round(side / step), 1) * step


def at_area(width: int, height: int, area: int, step: int) -> Size:
    """About `area` pixels at the aspect of `width` x `height`, both sides multiples of `step`."""
    ratio = width / height
    wide = math.sqrt(area * ratio)  # the order of these operations decides ties: keep it
    return snap(wide, step), snap(wide / ratio, step)


def resize(image: Tensor, size: Size, bicubic: bool = False) -> Tensor:
    """Resize (H, W, 3 or 4) in 0..1 to `size` (width, height): Lanczos, weighted by alpha.

    In 8 bits and with Pillow, as published pipelines do it, so the pixels are the same. A picture
    that has the size already comes back untouched.
    """
    import numpy as np
    import torch
    from PIL import Image

    if image.ndim != 3 or image.shape[-1] not in (3, 4):
        given = " x ".join(map(str, image.shape))
        raise ValueError(
            f"A picture must be height x width x 3 or 4 channels; this one is {given}."
        )
    width, height = size
    if tuple(image.shape[:2]) == (height, width):
        return image
    pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().to("cpu", torch.uint8)
    filters = Image.Resampling
    method = filters.BICUBIC if bicubic else filters.LANCZOS
    resized = Image.fromarray(pixels.numpy()).resize((width, height), method)
    return torch.from_numpy(np.array(resized)).to(image.device, image.dtype) / 255.0
