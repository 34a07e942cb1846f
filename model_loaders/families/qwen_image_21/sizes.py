"""Sizes of references and pictures of Qwen-Image-2.1.

A reference is resized once; the same pixels go to the text encoder and to the VAE. Sides are
multiples of 32: one vision token of the encoder, 2 x 2 latent tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

STEP = 32
AREA = 1024 * 1024

Size = tuple[int, int]  # width, height in pixels

# The sizes that the model was published with.
BUCKETS: tuple[Size, ...] = (
    (2048, 2048), (2400, 1792), (1792, 2400), (2528, 1696),
    (1696, 2528), (2752, 1536), (1536, 2752),
)  # fmt: skip


def snap(side: float) -> int:
    """The nearest multiple of 32, at least 32; halves go to the even multiple (diffusers)."""
    return max(round(side / STEP), 1) * STEP


def reference_size(width: int, height: int, area: int | None = AREA) -> Size:
    """Size that a reference of `width` x `height` is resized to: `area` pixels at its own aspect.

    `area` 0 or None keeps its own size but for the snapping, which keeps an edit in register.
    """
    if width < 1 or height < 1:
        raise ValueError(
            f"A reference of {width} x {height} pixels is empty; give one with pixels in it."
        )
    if not area:
        return snap(width), snap(height)
    ratio = width / height
    wide = math.sqrt(area * ratio)  # the order of these operations decides ties: keep it
    return snap(wide), snap(wide / ratio)


def target_size(
    references: Sequence[Size],
    area: int | None = AREA,
    like: Literal["first", "last"] = "last",
) -> Size:
    """Size of the picture to make when the user gave none: that of one of the references.

    diffusers takes the last, ComfyUI the first. Without references a square of `area`.
    """
    if not references:
        side = snap(math.sqrt(area or AREA))
        return side, side
    width, height = references[-1 if like == "last" else 0]
    return reference_size(width, height, area)


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize (H, W, 3 or 4) in 0..1 to `size` (width, height): Lanczos, weighted by alpha.

    In 8 bits and with Pillow, as the published pipeline does it, so the pixels are the same. A
    picture that has the size already comes back untouched.
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
    resized = Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).to(image.device, image.dtype) / 255.0
