"""Pictures in and out: measured before they are decoded, and there only when they are whole."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, PngImagePlugin

from .paths import PathError, checked_parts, inside

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif",
           "BMP": "image/bmp"}  # fmt: skip
MOST_PIXELS = 64 * 2**20  # 8192 x 8192, all frames together: 805 MB as an IMAGE
MOST_FRAMES = 256


class PictureError(ValueError):
    """A file that is no picture, or one that is too large to open."""


class Header(NamedTuple):
    """What a picture file says of itself."""

    format: str
    width: int
    height: int
    frames: int


@contextmanager
def opened(file: Path | io.BytesIO) -> Iterator[tuple[Image.Image, Header]]:
    """A picture, checked and not yet decoded; PictureError for another file or too large a one."""
    label = file.name if isinstance(file, Path) else "The upload"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=tuple(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(
            f"{label} has more than {MOST_PIXELS // 2**20} million pixels; make it smaller first."
        ) from None
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, TypeError, EOFError):
        raise PictureError(
            f"{label} is not a picture that can be read here; give a PNG, JPEG, WebP, GIF or BMP."
        ) from None
    with image:
        width, height = image.size
        # Counting the frames of a GIF reads the whole file, so the first frame is judged before.
        frames = getattr(image, "n_frames", 1) if width * height <= MOST_PIXELS else 1
        if width * height * frames > MOST_PIXELS or frames > MOST_FRAMES:
            more = f" in {frames} frames" if frames > 1 else ""
            raise PictureError(
                f"{label} has {width} x {height} pixels{more}; at most {MOST_PIXELS // 2**20} "
                f"million pixels and {MOST_FRAMES} frames are opened, so make it smaller first."
            )
        yield image, Header(str(image.format), width, height, frames)


def header(file: Path | io.BytesIO) -> Header:
    """Format and size of a picture, from its first bytes."""
    with opened(file) as (_, found):
        return found


def load_picture(path: Path) -> tuple[Any, Any]:
    """IMAGE (B, H, W, 3) and MASK (B, H, W; or 64 x 64 zeros without alpha), as Load Image gives.

    An animation gives its frames as a batch. Orientation tags are applied.
    """
    import numpy
    import torch

    pictures, masks = [], []
    with opened(path) as (image, found):
        for frame in range(found.frames):
            try:
                image.seek(frame)
                upright = ImageOps.exif_transpose(image)
                has_alpha = "A" in upright.getbands() or "transparency" in upright.info
                pixels = numpy.asarray(upright.convert("RGBA" if has_alpha else "RGB"))
            except (OSError, ValueError, SyntaxError, EOFError) as error:
                raise PictureError(f"{path.name} is damaged: {error}.") from None
            values = torch.from_numpy(pixels.astype(numpy.float32) / 255.0)
            pictures.append(values[..., :3])
            masks.append(1.0 - values[..., 3] if has_alpha else torch.zeros(64, 64))
    return torch.stack(pictures), torch.stack(masks)


def to_pillow(image: Any) -> Image.Image:
    """A picture (H, W, C) in 0..1 with C 1, 3 or 4, in 8 bits; rounded down, as ComfyUI does."""
    import numpy

    values = numpy.clip(255.0 * image.float().cpu().numpy(), 0, 255).astype(numpy.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def png_16_bit(image: Any, text: Mapping[str, str]) -> bytes:
    """A PNG with 16 bits a channel of (H, W, C) in 0..1, C 1, 3 or 4; rounded down, as ComfyUI's.

    Pillow has no such colours. Each row is stored as its difference to the row above (filter 2 of
    the PNG specification, section 9), byte by byte.
    """
    import numpy

    values = numpy.clip(65535.0 * image.float().cpu().numpy(), 0, 65535).astype(">u2", order="C")
    height, width, channels = values.shape
    rows = values.view(numpy.uint8).reshape(height, -1)
    above = numpy.vstack([numpy.zeros_like(rows[:1]), rows[:-1]])
    filtered = numpy.hstack([numpy.full((height, 1), 2, numpy.uint8), rows - above])
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    words = [_words(key, value) for key, value in text.items()]
    data = (b"IDAT", zlib.compress(filtered.tobytes(), 4))
    parts = [(b"IHDR", head), *words, data, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def _words(key: str, value: str) -> tuple[bytes, bytes]:
    """A PNG's text: tEXt, which is Latin-1, or where that lacks letters iTXt, not compressed."""
    try:
        return b"tEXt", f"{key}\0{value}".encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", f"{key}\0\0\0\0\0{value}".encode()


def png_8_bit(image: Any, text: Mapping[str, str], compress: int = 4) -> bytes:
    """A PNG with 8 bits a channel of (H, W, C) in 0..1."""
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_text(key, value)
    to_pillow(image).save(data, "PNG", pnginfo=info, compress_level=compress)
    return data.getvalue()


def save_batch(
    root: Path, prefix: str, images: Any, recipe: Mapping[str, Any], durable: bool,
    encode: Callable[[Any, Mapping[str, str]], bytes] = png_8_bit, end: str = "_",
) -> list[tuple[str, str]]:  # fmt: skip
    """Save (B, H, W, C) as <prefix>_00001_.png, ...; returns (subfolder, file name) of each.

    `recipe` goes into the file as text, value by value in JSON. Two writers never get one name.
    `encode` makes the bytes of a file; `end` is what stands behind the number.
    """
    text = {str(key): json.dumps(value) for key, value in recipe.items()}
    folder, stem = target(root, prefix, images[0].shape[1], images[0].shape[0])
    folder.mkdir(parents=True, exist_ok=True)
    inner = folder.relative_to(root.resolve()).as_posix()
    saved, counter = [], next_number(folder, stem)
    for number, image in enumerate(images):
        name = stem.replace("%batch_num%", str(number))
        data = encode(image, text)
        while True:
            file = folder / f"{name}_{counter:05}{end}.png"
            counter += 1
            if write_new(file, data, durable):
                break
        saved.append(("" if inner == "." else inner, file.name))
    return saved


def target(root: Path, prefix: str, width: int, height: int) -> tuple[Path, str]:
    """The folder and the beginning of the name that a prefix stands for; PathError if outside."""
    now = time.localtime()
    known = {"width": width, "height": height, "year": now.tm_year} | {
        name: f"{value:02}"
        for name, value in zip(("month", "day", "hour", "minute", "second"), now[1:6], strict=True)
    }
    filled = re.sub(r"%(\w+)%", lambda m: str(known.get(m[1], m[0])), prefix)
    parts = checked_parts(filled)
    if not parts:
        raise PathError("filename_prefix is empty; give the saved pictures a name.")
    return inside(root, *parts[:-1]), parts[-1]


def next_number(folder: Path, stem: str) -> int:
    """One more than the highest counter of that name in a folder."""
    pattern = re.compile(re.escape(stem) + r"_(\d+)_?(?:\..*)?")
    numbers = [int(m[1]) for name in os.listdir(folder) if (m := pattern.fullmatch(name))]
    return max(numbers, default=0) + 1


def write_new(path: Path, data: bytes, durable: bool = True) -> bool:
    """Write a file that was not there, whole or not at all; False if the name is taken.

    OSError says the path and the size. `durable`: it survives a power cut from here on.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        try:
            os.link(part, path)  # fails when the name is taken: no other call does, atomically
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            os.replace(part, path)
        return True
    except OSError as error:
        raise OSError(
            error.errno, f"{path} ({len(data)} bytes) could not be written: {error.strerror}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_over(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, over an older one if there is one."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_old(root: Path, seconds: float) -> None:
    """Delete the files of a folder that are older than that."""
    for file in root.iterdir():
        if file.is_file() and time.time() - file.lstat().st_mtime > seconds:
            file.unlink(missing_ok=True)


def remove_parts(root: Path) -> None:
    """Delete what writers that were killed have left."""
    for folder, _, names in os.walk(root):
        for name in names:
            if re.fullmatch(r"\.[0-9a-f]{16}\.part", name):
                (Path(folder) / name).unlink(missing_ok=True)
