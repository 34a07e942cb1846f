"""Pictures in and out: any usual file becomes a tensor, a tensor becomes a PNG that carries text.

A picture is read once, from bytes that are hashed too, and its size is checked before anything is
decoded. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ..model_loaders.pictures import pixels_of

MAX_PIXELS = 80_000_000  # below what Pillow itself calls a bomb
MAX_BYTES = 1 << 29
# No format that runs a program (EPS) or is a document (PDF). MPO is what many cameras call JPEG.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
# What Pillow raises for files that are damaged, beside its own errors, which are OSErrors.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, zlib.error)


class PictureError(ValueError):
    """A picture that cannot be read or written. The message is for the user and names the file."""


@dataclass(frozen=True)
class PictureFile:
    """A picture that was read: pixels (H, W, 3 or 4) in 0..1, and the hash of the file's bytes."""

    path: Path
    sha256: str
    pixels: Tensor


def read_picture(path: Path | str) -> PictureFile:
    """Read a picture, turned the way its camera was held. Raises PictureError.

    Palettes, greys, CMYK and 16 bits become RGB; transparency of any kind becomes alpha; a colour
    profile is followed, to sRGB. Of an animation this is the first frame.
    """
    path = Path(path)
    data = _bytes(path)
    with _opened(path, data, FORMATS) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about small damages
        try:
            pixels = pixels_of(image)
        except DAMAGED as error:
            raise _damaged(path, error) from error
    if pixels is None:
        raise PictureError(
            f"{path} has pixels of the kind '{image.mode}', which have no clear colour; save it as "
            "an 8-bit or 16-bit PNG."
        )
    return PictureFile(path, hashlib.sha256(data).hexdigest(), pixels)


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # before opening: a pipe would wait for ever
            what = "is not a file" if path.exists() else "does not exist"
            raise PictureError(f"The picture {path} {what}; check the path.")
        if path.stat().st_size > MAX_BYTES:
            raise PictureError(f"{path} is larger than {MAX_BYTES >> 20} MiB; give a smaller file.")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror or error}.") from error


def _opened(path: Path, data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The picture with its size checked, nothing decoded yet."""
    Image.init()
    known = [name for name in formats if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below
            image = Image.open(io.BytesIO(data), formats=known)
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large(str(path))) from error
    except Image.UnidentifiedImageError as error:
        names = ", ".join(name for name in known if name != "MPO")
        raise PictureError(
            f"{path} is not a picture that can be read, or is cut short; give a {names} file."
        ) from error
    except DAMAGED as error:
        raise _damaged(path, error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(_too_large(f"{path}, {width} x {height} pixels,"))
    return image


def _too_large(what: str) -> str:
    return f"{what} has more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller first."


def _damaged(path: Path, error: Exception) -> PictureError:
    why = " ".join(str(error).split()).rstrip(".")
    return PictureError(f"{path} is damaged or cut short ({why}); save or download it again.")


def to_image(pixels: Tensor) -> Image.Image:
    """(H, W, 3 or 4) in 0..1 -> an 8-bit picture, each value rounded to the nearest.

    PictureError for one that is no numbers, which would be saved as noise.
    """
    if not bool(pixels.isfinite().all()):
        raise PictureError(
            "the picture came out as no numbers (NaN): a LoRA is too strong, or weights are "
            "damaged or too large for 16 bits; it was not saved."
        )
    values = (pixels.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.numpy())


def png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file with `text` (Unicode, iTXt) in front of its pixels."""
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def read_text(path: Path | str) -> dict[str, str]:
    """The text that a PNG carries in front of its pixels, which are not decoded."""
    path = Path(path)
    with _opened(path, _bytes(path), ("PNG",)) as image:
        return {str(k): str(v) for k, v in image.info.items() if isinstance(v, str)}


def write_new(folder: Path, stem: str, data: bytes) -> Path:
    """Write `data` to the next free name, seedling_00001.png, seedling_00002.png, ...; return it.

    Numbers count up from the highest there is, so pictures stay in the order they were made in.
    """
    numbered = re.compile(re.escape(stem) + r"_(\d{5,9})\.png", re.IGNORECASE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for name in os.listdir(folder) if (m := numbered.fullmatch(name))]
    except OSError as error:
        raise _unwritable(folder, error) from error
    number = max(taken, default=0) + 1
    while not write_at(folder / f"{stem}_{number:05d}.png", data):
        number += 1  # another run was faster
    return folder / f"{stem}_{number:05d}.png"


def write_at(path: Path, data: bytes, replace: bool = False) -> bool:
    """Write the whole file or nothing. False when it exists already and is not to be replaced."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        if replace:
            os.replace(part, path)
            return True
        return _renamed(part, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _renamed(part: Path, path: Path) -> bool:
    """Give a finished file its name, unless somebody else has it."""
    try:
        os.link(part, path)  # fails where the name is taken, in one step
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():  # a file system without hard links: nearly as good
            return False
        os.replace(part, path)
    return True


def _unwritable(path: Path, error: OSError) -> PictureError:
    return PictureError(
        f"{path} cannot be written: {error.strerror or error}; choose another place with --out."
    )
