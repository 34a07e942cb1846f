"""Colours of pictures that say what their numbers mean, and what 16-bit PNGs hold."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from seedling.host.pictures import read_picture
from seedling.model_loaders.pictures import read_16_bit


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(gamma: float, *colorants: tuple[float, float, float], space: bytes = b"RGB ") -> bytes:
    """An ICC profile (ICC.1:2001-04) of a gamma and the colorants' XYZ; none: grey."""
    xyz = [b"XYZ \0\0\0\0" + b"".join(map(s15, c)) for c in colorants]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    words = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    white = b"XYZ \0\0\0\0" + s15(0.9642) + s15(1.0) + s15(0.8249)
    tags = {b"desc": words + b"\0" * (-len(words) % 4), b"wtpt": white}
    if colorants:
        tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True))
        tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    else:
        tags |= {b"kTRC": curve}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642) + s15(1.0) + s15(0.8249)
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


# Adobe RGB (1998): its primaries brought to D50 (Lindbloom).
ADOBE = profile(
    2.2, (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def adobe_as_srgb(values: np.ndarray) -> np.ndarray:
    """By the numbers of both standards, white at D65 (Adobe RGB 1998, 4.3; IEC 61966-2-1)."""
    to_xyz = np.array(
        [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    )
    from_xyz = np.array(
        [[3.24045, -1.53714, -0.49853], [-0.96927, 1.87601, 0.04156], [0.05564, -0.20403, 1.05723]]
    )
    linear = ((values**2.19921875) @ to_xyz.T @ from_xyz.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:12, 0:16]
    rgb = np.stack([x * 16, y * 20, 255 - x * 8], -1).astype(np.uint8)
    alpha = (x * 15).astype(np.uint8)[..., None]
    return Image.fromarray(np.concatenate([rgb, alpha], -1)).convert(mode)


def test_a_profile_is_followed_to_srgb(tmp_path: Path) -> None:
    for mode in ("RGB", "RGBA"):
        path, image = tmp_path / f"{mode}.png", picture(mode)
        image.save(path, icc_profile=ADOBE)
        found = read_picture(path).pixels.numpy()
        stored = np.array(image) / 255.0
        assert abs(found[..., :3] - adobe_as_srgb(stored[..., :3])).max() < 2 / 255
        assert abs(found[..., :3] - stored[..., :3]).max() > 0.1, "colours would have moved"
        assert (found[..., 3:] == stored[..., 3:].astype(np.float32)).all()


@pytest.mark.parametrize("icc", [None, SRGB, b"no profile", ADOBE[:150]])
def test_without_a_profile_that_says_otherwise_every_bit_stays(
    icc: bytes | None, tmp_path: Path
) -> None:
    for mode in ("RGB", "RGBA", "L", "LA", "P"):
        image = picture("RGB").convert("P") if mode == "P" else picture(mode)
        image.save(tmp_path / "a.png", icc_profile=icc)
        wide = "RGBA" if "A" in mode else "RGB"
        wanted = np.array(image.convert(wide)).astype(np.float32) / 255
        assert torch.equal(read_picture(tmp_path / "a.png").pixels, torch.from_numpy(wanted)), mode


def test_grey_of_another_gamma(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(2, 0))
    ramp.save(tmp_path / "grey.png", icc_profile=profile(1.8, space=b"GRAY"))
    found = read_picture(tmp_path / "grey.png").pixels
    linear = (np.arange(256) / 255) ** 1.8
    wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(found[0].numpy() - wanted[:, None]).max() < 3 / 255
    assert abs(found[:, :, 0] - torch.arange(256) / 255).max() > 0.03


def test_a_turned_picture_with_a_profile_and_of_another_kind(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture().save(tmp_path / "a.png", icc_profile=ADOBE, exif=turned)
    picture().save(tmp_path / "b.png", icc_profile=ADOBE)
    upright = read_picture(tmp_path / "b.png").pixels.transpose(0, 1).flip(1)
    assert torch.equal(read_picture(tmp_path / "a.png").pixels, upright)
    picture().save(tmp_path / "c.png", icc_profile=profile(1.0, space=b"GRAY"))
    plain = torch.from_numpy(np.array(picture())).float() / 255
    assert torch.equal(read_picture(tmp_path / "c.png").pixels, plain), "grey, it says, but is not"


# ---- 16 bits -----------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep(path: Path, values: np.ndarray, *more: bytes) -> np.ndarray:
    """A PNG of (H, W, C) 16-bit numbers, rows filtered as encoders do; `more` are chunks."""
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    left = np.pad(rows, ((0, 0), (2 * channels, 0)))[:, : rows.shape[1]]
    data = np.hstack([np.full((height, 1), 1, np.uint8), rows - left])
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(data.tobytes()))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b""))
    return values


def numbers(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (7, 11, channels), dtype=np.uint16)


def back(path: Path) -> np.ndarray:
    found = read_16_bit(path)
    assert isinstance(found, Tensor)
    return (found.double() * 65535).round().numpy().astype(np.uint16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_16_bits_of_every_kind(channels: int, tmp_path: Path) -> None:
    stored = deep(tmp_path / "a.png", numbers(channels))
    found = back(tmp_path / "a.png")
    grey = channels < 3
    assert (found[..., :3] == (stored[..., :1] if grey else stored[..., :3])).all()
    assert found.shape[-1] == (4 if channels in (2, 4) else 3)
    assert channels not in (2, 4) or (found[..., 3] == stored[..., -1]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_one_colour_of_16_bits_may_be_clear(channels: int, tmp_path: Path) -> None:
    stored = numbers(channels)
    stored[2, 3] = stored[5, 1] = (7, 8, 9)[:channels]
    deep(tmp_path / "a.png", stored, chunk(b"tRNS", struct.pack(f">{channels}H", *stored[2, 3])))
    found = back(tmp_path / "a.png")
    clear = (stored == stored[2, 3]).all(axis=-1)
    assert clear.sum() >= 2 and (found[..., 3] == np.where(clear, 0, 65535)).all()


@pytest.mark.parametrize("turned", range(1, 9))
def test_16_bits_are_upright_as_8_are(turned: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    high = numbers(3) >> 8
    deep(tmp_path / "a.png", high * 257, chunk(b"eXIf", body))
    with io.BytesIO() as file:
        Image.fromarray(high.astype(np.uint8)).save(file, "PNG", exif=exif)
        with Image.open(file) as image:
            wanted = np.array(ImageOps.exif_transpose(image))
    assert (back(tmp_path / "a.png") >> 8 == wanted).all()


def test_16_bits_of_other_colours_are_refused(tmp_path: Path) -> None:
    """Only 8 could be brought to sRGB; read as they are, all colours would move."""
    for icc, refused in ((ADOBE, True), (SRGB, False)):
        deep(tmp_path / "a.png", numbers(3), chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)))
        if refused:
            with pytest.raises(OSError, match="profile that is not sRGB; convert it"):
                read_16_bit(tmp_path / "a.png")
        else:
            assert (back(tmp_path / "a.png") == numbers(3)).all()
