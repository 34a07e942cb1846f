"""Sizes of references, and bringing them there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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


PNG_COLOURS = {0: "mono", 2: "rgb", 6: "rgba"}  # what byte 25 of a PNG means


def read_16_bit(path: Path) -> Tensor | None:
    """(H, W, 3 or 4) in 0..1 of a PNG with 16 bits a channel; None for any other file.

    Pillow reads only the upper 8 of them. Raises OSError for a file that cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 26 or head[24] != 16:
        return None
    if head[25] not in PNG_COLOURS:  # grey with alpha, which the reader does not know
        return None
    import kornia_rs.io as reader  # pyright: ignore[reportMissingModuleSource]
    import torch

    try:
        pixels = reader.read_image_png_u16(str(path), PNG_COLOURS[head[25]])
    except Exception as error:  # noqa: BLE001 - it raises nothing narrower
        raise OSError(str(error)) from None
    values = torch.from_numpy(pixels.astype("float32")) / 65535.0
    return values if values.shape[-1] > 1 else values.expand(-1, -1, 3).contiguous()
