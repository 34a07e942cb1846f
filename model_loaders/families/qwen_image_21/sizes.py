"""Sizes of references and pictures of Qwen-Image-2.1.

A reference is resized once; the same pixels go to the text encoder and to the VAE. Sides are
multiples of 32: one vision token of the encoder, 2 x 2 latent tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...pictures import Size, at_area, snap
from ...pictures import resize as resize  # re-exported: a reference is resized once, this way

STEP = 32
AREA = 1024 * 1024

# The sizes that the model was published with.
BUCKETS: tuple[Size, ...] = (
    (2048, 2048), (2400, 1792), (1792, 2400), (2528, 1696),
    (1696, 2528), (2752, 1536), (1536, 2752),
)  # fmt: skip


def reference_size(width: int, height: int, area: int | None = AREA) -> Size:
    """Size that a reference of `width` x `height` is resized to: `area` pixels at its own aspect.

    `area` 0 or None keeps every pixel in its place: the size is the next one that holds it, and
    the reference is padded, not resized.
    """
    if width < 1 or height < 1:
        raise ValueError(
            f"A reference of {width} x {height} pixels is empty; give one with pixels in it."
        )
    if not area:
        return -(-width // STEP) * STEP, -(-height // STEP) * STEP
    return at_area(width, height, area, STEP)


def target_size(
    references: Sequence[Size],
    area: int | None = AREA,
    like: Literal["first", "last"] = "last",
) -> Size:
    """Size of the picture to make when the user gave none: that of one of the references.

    diffusers takes the last, ComfyUI the first. Without references a square of `area`.
    """
    if not references:
        side = snap(math.sqrt(area or AREA), STEP)
        return side, side
    width, height = references[-1 if like == "last" else 0]
    return reference_size(width, height, area)
