"""Pictures from files, upright and in sRGB; sizes of references, and bringing them there."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image, ImageCms
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


def pixels_of(image: Image.Image) -> Tensor | None:
    """(H, W, 3 or 4) in 0..1 of a picture that was opened, upright and in sRGB.

    None for 32-bit numbers, of which nobody says what is white. What Pillow raises for damaged
    files goes on. Pillow before 11 calls the 16 bits of a grey PNG "I".
    """
    import numpy as np
    import torch
    from PIL import ImageOps

    upright, form = ImageOps.exif_transpose(image), image.format
    if upright.mode.startswith("I;16") or (upright.mode, form) == ("I", "PNG"):
        grey = torch.from_numpy(np.array(upright).astype(np.float32) / 65535.0)
        return grey[..., None].expand(-1, -1, 3).contiguous()
    if upright.mode in ("I", "F"):
        return None
    plain = in_srgb(upright)
    mode = "RGBA" if plain.has_transparency_data else "RGB"
    return torch.from_numpy(np.array(plain.convert(mode))).float() / 255.0


def in_srgb(image: Image.Image) -> Image.Image:
    """A picture of 8 bits whose colours are those of its ICC profile, in sRGB's numbers.

    As it is without a profile, with a damaged one (as viewers show it), or where sRGB's numbers are
    the same: then every bit stays.
    """
    from PIL import ImageCms

    found = to_srgb(image)
    if found is None:
        return image
    transform, mode = found
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image if image.mode == mode else image.convert("RGB").convert(mode)
    done = ImageCms.applyTransform(plain, transform)
    assert done is not None
    if alpha is not None:
        done.putalpha(alpha)
    return done


def to_srgb(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform, str] | None:
    """What brings a picture's colours to sRGB, and the mode in which it takes them; None where
    nothing is to be done. Relative colorimetric, with black points compensated."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind, is_grey = own.profile.xcolor_space.strip(), image.mode in ("1", "L", "LA")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(kind)
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L") > is_grey:
            return None
        transform = ImageCms.buildTransform(
            own, ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else (transform, mode)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours come out as they were, to the step that rounding may make."""
    import numpy as np
    from PIL import Image, ImageCms

    steps = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        cube = np.repeat(steps[:, None], 3, axis=1)[None]
    else:
        cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3)
    given = Image.fromarray(np.ascontiguousarray(cube))
    found = ImageCms.applyTransform(given.convert(mode), transform)
    return bool((abs(np.array(found).astype(int) - cube) <= 1).all())


PNG_COLOURS = {0: "mono", 2: "rgb", 4: "grey and alpha", 6: "rgba"}  # what byte 25 of a PNG means


def read_16_bit(path: Path) -> Tensor | None:
    """(H, W, 3 or 4) in 0..1 of a PNG with 16 bits a channel, upright; None for any other file.

    Pillow reads only the upper 8 of them. Raises OSError for a file that cannot be read, and for a
    colour profile that is not sRGB, from which only 8 bits can be brought.
    """
    import numpy as np
    import torch
    from PIL import Image

    with path.open("rb") as file:
        head = file.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 26 or head[24] != 16:
        return None
    if head[25] not in PNG_COLOURS:
        return None
    with Image.open(path) as image:
        turned, clear = image.getexif().get(0x0112, 1), image.info.get("transparency")
        if to_srgb(image) is not None:
            raise OSError(
                "it has 16 bits and a colour profile that is not sRGB; convert it to sRGB first, "
                "or save it with 8 bits."
            )
    pixels = _grey_and_alpha(path) if head[25] == 4 else _by_reader(path, PNG_COLOURS[head[25]])
    if clear is not None:
        see = (pixels != np.array(clear, np.uint16)).any(axis=-1, keepdims=True)
        pixels = np.concatenate([_coloured(pixels), see * np.uint16(65535)], axis=-1)
    values = _upright(_coloured(pixels), turned).astype("float32")
    return torch.from_numpy(np.ascontiguousarray(values)) / 65535.0


def _by_reader(path: Path, colours: str) -> np.ndarray:
    import kornia_rs.io as reader  # pyright: ignore[reportMissingModuleSource]

    try:
        return reader.read_image_png_u16(str(path), colours)
    except Exception as error:  # noqa: BLE001 - it raises nothing narrower
        raise OSError(str(error)) from None


def _grey_and_alpha(path: Path) -> np.ndarray:
    """(H, W, 2), which the reader does not know. The four bytes of a pixel lie as those of a
    picture with 8 bits of red, green, blue and alpha would, so the header is made to say that."""
    import numpy as np
    from PIL import Image

    data = path.read_bytes()
    head = data[12:24] + bytes((8, 6)) + data[26:29]  # from "IHDR" to the end of what it holds
    check = struct.pack(">I", zlib.crc32(head))
    with Image.open(io.BytesIO(data[:12] + head + check + data[33:])) as image:
        return np.array(image).view(">u2").astype(np.uint16)


def _coloured(pixels: np.ndarray) -> np.ndarray:
    """Grey as red, green and blue."""
    import numpy as np

    grey = pixels[..., :1]
    if pixels.shape[-1] > 2:
        return pixels
    return np.concatenate([grey, grey, grey, pixels[..., 1:]], axis=-1)


def _upright(pixels: np.ndarray, turned: int) -> np.ndarray:
    """Pixels (H, W, C) whose camera was held as the orientation 1 to 8 of Exif says."""
    if turned in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if turned in (3, 4, 7, 8) else pixels
