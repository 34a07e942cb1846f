"""Pictures in and out: every usual kind of file, every way in which one can be broken."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seedling.host import pictures
from seedling.host.pictures import PictureError, png, read_picture, read_text, to_image, write_at
from seedling.host.sheet import SIDE, Tile, contact_sheet, thumbnail


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG from its bytes, so that no library decides over them."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def corner(path: Path) -> list[float]:
    """The first pixel, in 255ths."""
    return [round(v * 255, 3) for v in read_picture(path).pixels[0, 0].tolist()]


def test_modes_become_rgb_or_rgba(tmp_path: Path) -> None:
    rgb = Image.new("RGB", (5, 3), (200, 100, 50))
    assert read_picture(saved(tmp_path / "a.png", rgb)).pixels.shape == (3, 5, 3)
    assert corner(tmp_path / "a.png") == [200, 100, 50]
    assert corner(saved(tmp_path / "l.png", Image.new("L", (5, 3), 77))) == [77, 77, 77]
    assert corner(saved(tmp_path / "1.png", Image.new("1", (5, 3), 1))) == [255, 255, 255]
    rgba = Image.new("RGBA", (5, 3), (200, 100, 50, 7))
    assert corner(saved(tmp_path / "rgba.png", rgba)) == [200, 100, 50, 7]
    assert corner(saved(tmp_path / "la.png", Image.new("LA", (5, 3), (9, 8)))) == [9, 9, 9, 8]
    assert corner(saved(tmp_path / "p.png", rgb.quantize(4))) == [200, 100, 50]
    palette = saved(tmp_path / "p2.png", rgb.quantize(4), transparency=0)
    assert corner(palette) == [200, 100, 50, 0]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.allclose(corner(saved(tmp_path / "c.jpg", cmyk)), [255, 0, 0], atol=3)
    assert len(corner(saved(tmp_path / "w.webp", rgba, lossless=True))) == 4


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(raw_png(1, 1, 16, 0, b"\0\x12\x34"))
    assert read_picture(tmp_path / "a.png").pixels.tolist() == [
        [[pytest.approx(0x1234 / 65535)] * 3]
    ]
    (tmp_path / "b.png").write_bytes(raw_png(1, 1, 16, 2, b"\0" + b"\xff\xff\x80\x80\0\0"))
    assert corner(tmp_path / "b.png") == [255, 128, 0]


def test_the_camera_may_be_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right: turn it clockwise
    read = read_picture(saved(tmp_path / "a.png", image, exif=exif)).pixels
    assert read.shape == (8, 4, 3) and read[0, 3].sum() == 3


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_broken_files_are_refused_in_one_sentence(form: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / f"a.{form}", Image.effect_noise((64, 64), 50).convert("RGB"))
    data = whole.read_bytes()
    for cut in (0, 1, 5, 30, len(data) // 2):
        whole.write_bytes(data[:cut])
        with pytest.raises(PictureError) as caught:
            read_picture(whole)
        assert str(whole) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    data = png(Image.effect_noise((16, 16), 50).convert("P"), {"seedling": "{}"})
    path, generator = tmp_path / "a.png", np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        for place in generator.integers(len(data), size=3):
            broken[place] = generator.integers(256)
        path.write_bytes(bytes(broken))
        for read in (read_picture, read_text):
            try:
                read(path)
            except PictureError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("side", [9000, 15000, 60000])
def test_bombs_are_refused_before_they_are_decoded(side: int, tmp_path: Path) -> None:
    """A few hundred bytes that say they are 80 million pixels and more."""
    path = tmp_path / "bomb.png"
    path.write_bytes(raw_png(side, side, 8, 2, b"\0"))
    with pytest.raises(PictureError, match=r"bomb\.png.* more than 80 million pixels"):
        read_picture(path)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="does not exist"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="is not a file"):
        read_picture(tmp_path)
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(PictureError, match="not a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(PictureError, match="kind 'F'"):
        read_picture(saved(tmp_path / "f.tif", Image.new("F", (4, 4))))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PictureError, match="is not a file"):
            read_picture(tmp_path / "pipe")


@pytest.mark.parametrize("channels", [3, 4])
def test_png_keeps_pixels_and_unicode(channels: int, tmp_path: Path) -> None:
    pixels = torch.rand(7, 5, channels, generator=torch.Generator().manual_seed(0))
    text = "一颗红色的星星 ☃ 🌱 \u00e9"
    (tmp_path / "a.png").write_bytes(png(to_image(pixels), {"seedling": text}))
    assert read_text(tmp_path / "a.png") == {"seedling": text}
    read = read_picture(tmp_path / "a.png").pixels
    assert read.shape == pixels.shape and (read - pixels).abs().max() <= 0.5 / 255 + 1e-6
    (tmp_path / "b.png").write_bytes(png(to_image(read)))
    assert torch.equal(read_picture(tmp_path / "b.png").pixels, read)


def test_names_count_up_and_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert pictures.write_new(out, "seedling", b"1").name == "seedling_00001.png"
    assert pictures.write_new(out, "seedling", b"2").name == "seedling_00002.png"
    (out / "seedling_00041.PNG").touch()
    (out / "seedling_x.png").touch()
    assert pictures.write_new(out, "seedling", b"3").name == "seedling_00042.png"
    assert not write_at(out / "seedling_00001.png", b"other")
    assert (out / "seedling_00001.png").read_bytes() == b"1"
    assert write_at(out / "seedling_00001.png", b"other", replace=True)
    assert not [name for name in os.listdir(out) if "part" in name]


def test_a_stop_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", stop)
    with pytest.raises(KeyboardInterrupt):
        write_at(tmp_path / "a.png", b"half")
    assert os.listdir(tmp_path) == []


def test_file_systems_without_links_work_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert write_at(tmp_path / "a.png", b"1") and not write_at(tmp_path / "a.png", b"2")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"1"


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PictureError, match=r"file.* cannot be written"):
        pictures.write_new(tmp_path / "file" / "folder", "seedling", b"")
    with pytest.raises(PictureError, match=r"a\.png cannot be written"):
        write_at(tmp_path / "file" / "a.png", b"")


def test_contact_sheet() -> None:
    red = thumbnail(Image.new("RGB", (64, 32), "red"))
    clear = thumbnail(Image.new("RGBA", (32, 64), (0, 0, 255, 0)))
    assert red.size == (SIDE, SIDE // 2) and clear.size == (SIDE // 2, SIDE)
    assert {colour for _, colour in clear.getcolors() or []} == {(255,) * 3, (222,) * 3}
    tiles = [
        Tile((red,), "words " * 60, "note"),
        Tile((red, clear, red), "x" * 99),
        Tile((red,), "图"),
    ]
    sheet = contact_sheet(tiles)
    assert sheet.mode == "RGB" and sheet.width > 3 * SIDE and sheet.height > 2 * SIDE
    assert contact_sheet([Tile((red,), "")]).size[0] > SIDE


def test_what_is_no_numbers_is_not_saved_as_noise() -> None:
    pixels = torch.rand(4, 4, 3)
    pixels[1, 2, 0] = float("nan")
    with pytest.raises(PictureError, match="came out as no numbers"):
        to_image(pixels)
