"""Contact sheet of the world: `python -m seedling.training.world --out sheet.png`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .captions import sample_caption
from .compositions import sample_composition
from .edits import sample_edit
from .render import render
from .scenes import Scene, sample_scene

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Example = tuple[tuple[Scene, ...], str]
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallback.ttf",
    "simhei.ttf",
    "msyh.ttc",
)
_GAP = 8
_LINES = 4


def _font() -> tuple[Font, bool]:
    """A font and whether it can draw Chinese."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, 11), True
        except OSError:
            continue
    return ImageFont.load_default(11), False


def _on_checks(pixels: np.ndarray) -> Image.Image:
    """The picture over a light chequerboard, as picture viewers show transparency."""
    line = np.arange(pixels.shape[0]) // 8
    checks = np.where((line[:, None] + line[None]) % 2, 255, 225)[..., None]
    alpha = pixels[..., 3:] / 255.0
    return Image.fromarray((pixels[..., :3] * alpha + checks * (1 - alpha)).astype(np.uint8))


def _panel(scenes: tuple[Scene, ...], text: str, size: int, font: Font) -> Image.Image:
    width = len(scenes) * (size + 4) - 4
    panel = Image.new("RGB", (width, size + 13 * _LINES + 2), "white")
    for index, scene in enumerate(scenes):
        panel.paste(_on_checks(render(scene, size)), (index * (size + 4), 0))
    wide = any(ord(letter) > 0x2E80 for letter in text)
    lines = textwrap.wrap(text, int(width / (11 if wide else 5.6)))[:_LINES]
    ImageDraw.Draw(panel).multiline_text((0, size + 1), "\n".join(lines), "black", font, spacing=1)
    return panel


def _examples(kind: str, rng: np.random.Generator, language: str | None) -> Iterator[Example]:
    while True:
        if kind == "scene":
            scene = sample_scene(rng)
            yield (scene,), sample_caption(scene, rng, language=language)[0].text
        elif kind == "edit":
            edit = sample_edit(rng, language=language)
            yield (edit.before, edit.after), f"{edit.kind}: {edit.instruction.text}"
        else:
            mix = sample_composition(rng, language=language)
            yield (*mix.references, mix.target), mix.instruction.text


def contact_sheet(rows: int, seed: int, size: int) -> Image.Image:
    """`rows` rows each of scenes, edits (before, after) and compositions (references, target)."""
    rng = np.random.default_rng(seed)
    font, chinese = _font()
    width, step = max(1120, 4 * (size + 4)), size + 13 * _LINES + _GAP
    sheet = Image.new("RGB", (width, 3 * rows * step), "white")
    y = 0
    for kind in ("scene", "edit", "composition"):
        examples = _examples(kind, rng, None if chinese else "en")
        for _ in range(rows):
            x = 0
            while True:
                panel = _panel(*next(examples), size, font)
                if x + panel.width > width:
                    break
                sheet.paste(panel, (x, y))
                x += panel.width + 2 * _GAP
            y += step
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--rows", type=int, default=3, help="rows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="pixels per side of a picture")
    given = parser.parse_args()
    contact_sheet(given.rows, given.seed, given.size).save(given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
