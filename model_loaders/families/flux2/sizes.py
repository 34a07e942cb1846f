"""Sizes of references and pictures of FLUX.2.

A reference keeps its own size unless it has more pixels than asked for, and is never cropped: what
is missing to whole tokens is padded at the right and at the bottom, as the target is. So every
pixel of a reference of the target's size lies on the target's grid, whatever its size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...pictures import Size
from ...pictures import resize as resized

if TYPE_CHECKING:
    from torch import Tensor

STEP = 16  # pixels per side of a token
AREA = 1024 * 1024  # above which the published pipelines make a reference smaller


def reference_size(width: int, height: int, area: int | None = AREA) -> Size:
    """Size that a reference of `width` x `height` is resized to: its own, with at most `area`.

    `area` 0 or None keeps its own size at any number of pixels. Sides need not be whole tokens.
    """
    if width < 1 or height < 1:
        raise ValueError(
            f"A reference of {width} x {height} pixels is empty; give one with pixels in it."
        )
    if not area or width * height <= area:
        return width, height
    scale = math.sqrt(area / (width * height))  # the order of these operations decides ties
    return max(int(width * scale), 1), max(int(height * scale), 1)


def resize(image: Tensor, size: Size) -> Tensor:
    """(H, W, 3 or 4) in 0..1 brought to `size` (width, height), then padded to whole tokens.

    The last column and row are repeated, which disturbs the VAE least. Lanczos in 8 bits, as the
    published pipelines do it; a picture that has the size already keeps its pixels.
    """
    import torch.nn.functional as F

    image = resized(image, size)
    height, width = image.shape[:2]
    right, below = -width % STEP, -height % STEP
    if not right and not below:
        return image
    padded = F.pad(image.permute(2, 0, 1)[None], (0, right, 0, below), mode="replicate")
    return padded[0].permute(1, 2, 0)
