"""Sizes of references and pictures of Qwen-Image.

A picture's sides are multiples of 16: a token of the DiT. A reference is brought to the area that
the model was trained on, at its own aspect; the text encoder makes its own, smaller copy.
"""

from __future__ import annotations

from ...pictures import Size, at_area, snap

STEP = 16  # pixels per token
REFERENCE_STEP = 32
AREA = 1024 * 1024
SLOT = 28  # pixels per side of a vision token of the encoder
AREA_VLM = 384 * 384  # pixels of what the encoder sees of a reference


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
    return at_area(width, height, area, REFERENCE_STEP)


def vlm_size(width: int, height: int, area: int) -> Size:
    """How large the encoder sees a reference: at about `area` pixels, in whole vision tokens.

    Snapped twice, as the published pipelines do it.
    """
    width, height = at_area(width, height, area, REFERENCE_STEP)
    return snap(width, SLOT), snap(height, SLOT)
