"""Contact sheets: pictures side by side with words underneath."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE, TEXT = 256, 12, 18, 14  # pixels
LINES = 3  # of a caption
MAX_ACROSS = 6  # pictures side by side
STEP = SIDE + GAP
# Fonts with Chinese, Japanese and Korean that systems come with; Pillow knows where to look.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "STHeiti Medium.ttc",
    "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf", "simsun.ttc",
)  # fmt: skip
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """Pictures in a row: what was shown to the model, if anything, then what it made.

    `note` goes under the caption, and in its place where no font here can draw it.
    """

    pictures: tuple[Image.Image, ...]
    caption: str
    note: str = ""


def thumbnail(image: Image.Image) -> Image.Image:
    """A picture as a sheet shows it: its longer side is SIDE, transparency is a chequerboard."""
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, (255, 255, 255))
    pen = ImageDraw.Draw(ground)
    for y in range(0, height, 16):
        for x in range(y // 16 % 2 * 16, width, 32):
            pen.rectangle((x, y, x + 15, y + 15), fill=(222, 222, 222))
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def contact_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """All tiles in rows, about twice as wide as high."""
    assert tiles
    pictures = sum(len(tile.pictures) for tile in tiles)
    across = max(
        min(math.ceil(math.sqrt(2 * pictures)), MAX_ACROSS),
        *(len(tile.pictures) for tile in tiles),
    )
    rows: list[list[Tile]] = [[]]
    for tile in tiles:
        if sum(len(t.pictures) for t in rows[-1]) + len(tile.pictures) > across:
            rows.append([])
        rows[-1].append(tile)
    words = [[_lines(tile) for tile in row] for row in rows]
    heights = [SIDE + max(map(len, said)) * LINE + 2 * GAP for said in words]
    sheet = Image.new("RGB", (across * STEP + GAP, sum(heights) + GAP), "white")
    top = GAP
    for row, said, height in zip(rows, words, heights, strict=True):
        left = GAP
        for tile, lines in zip(row, said, strict=True):
            _place(sheet, tile, lines, left, top)
            left += len(tile.pictures) * STEP
        top += height
    return sheet


def _place(
    sheet: Image.Image, tile: Tile, lines: list[tuple[str, Font]], left: int, top: int
) -> None:
    pen, middle = ImageDraw.Draw(sheet), top + SIDE // 2
    for i, picture in enumerate(tile.pictures):
        x = left + i * STEP
        sheet.paste(picture, (x + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        if i and picture is tile.pictures[-1]:  # from what was shown to what was made
            pen.polygon([(x - GAP + 2, middle - 7), (x - GAP + 2, middle + 7), (x - 2, middle)], 0)
        elif i:  # one shown, and another
            pen.line([(x - GAP + 2, middle), (x - 2, middle)], 0, 2)
            pen.line([(x - GAP // 2, middle - 4), (x - GAP // 2, middle + 4)], 0, 2)
    for i, (line, font) in enumerate(lines):
        pen.text((left, top + SIDE + 3 + i * LINE), line, "black", font)


def _lines(tile: Tile) -> list[tuple[str, Font]]:
    """What stands under a tile, and in which font."""
    width = len(tile.pictures) * STEP - GAP
    font, plain = font_for(tile.caption), font_for(tile.note)
    lines = [(line, font) for line in wrapped(tile.caption, font, width)] if font else []
    if plain:
        lines += [(line, plain) for line in wrapped(tile.note, plain, width)[:1]]
    return lines


def font_for(text: str) -> Font | None:
    """A font that can draw `text`; None when there is none."""
    if all(letter < "\u0250" or letter in "–—‘’“”…→" for letter in text):  # Latin
        return ImageFont.load_default(TEXT)
    for name in WIDE_FONTS:
        try:
            return ImageFont.truetype(name, TEXT)
        except OSError:
            continue
    return None


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """At most LINES lines of at most `width` pixels, broken between words or Chinese characters."""
    if not text.strip():
        return []
    lines = [""]
    for word in re.findall(r"[!-~\u00a1-\u024f]{1,24}|.", " ".join(text.split())):
        if font.getlength(lines[-1] + word) > width and lines[-1].strip():
            lines.append("")
        if word != " " or lines[-1]:
            lines[-1] += word
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1].rstrip()} …"]
    return lines
