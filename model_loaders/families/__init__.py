"""The registry: one line per family."""

from __future__ import annotations

from ..family import Family
from .flux2 import FAMILY as FLUX2
from .qwen_image import FAMILY as QWEN_IMAGE
from .qwen_image_21 import FAMILY as QWEN_IMAGE_21

FAMILIES: tuple[Family, ...] = (QWEN_IMAGE_21, FLUX2, QWEN_IMAGE)
