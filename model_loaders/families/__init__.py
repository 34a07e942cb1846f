"""The registry: one line per family."""

from __future__ import annotations

from ..family import Family
from .qwen_image_21 import FAMILY as QWEN_IMAGE_21

FAMILIES: tuple[Family, ...] = (QWEN_IMAGE_21,)
