"""How large a picture is: from an artist's words to pixels, and from pixels to a grid of tokens.

`parse_size("poster@2K")` reads words; `snap` moves a size to the nearest one on a grid; `grid`
keeps the size, and says how far to pad before generating and what to crop afterwards.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from . import SamplingError

MAX_RATIO = 16  # long side to short side
MAX_SIDE = 16384  # pixels, as in ComfyUI

# What people call a shape -> width:height.
WORDS: dict[str, str] = {
    "square": "1:1", "avatar": "1:1", "album cover": "1:1", "icon": "1:1", "sticker": "1:1",
    "方图": "1:1", "方形": "1:1", "正方形": "1:1", "头像": "1:1", "专辑封面": "1:1",
    "图标": "1:1", "贴纸": "1:1",
    "portrait": "3:4", "vertical": "3:4", "竖图": "3:4", "竖版": "3:4",
    "landscape": "4:3", "horizontal": "4:3", "横图": "4:3", "横版": "4:3",
    "feed": "4:5", "greeting card": "5:7", "贺卡": "5:7",
    "photo": "3:2", "postcard": "3:2", "照片": "3:2", "明信片": "3:2",
    "poster": "2:3", "book cover": "2:3", "海报": "2:3", "书籍封面": "2:3",
    "a4": "210:297",
    "widescreen": "16:9", "slide": "16:9", "thumbnail": "16:9", "宽屏": "16:9", "幻灯片": "16:9",
    "wallpaper": "16:9", "desktop wallpaper": "16:9",
    "壁纸": "16:9", "电脑壁纸": "16:9", "桌面壁纸": "16:9",
    "phone wallpaper": "9:16", "story": "9:16", "reel": "9:16", "手机壁纸": "9:16", "竖屏": "9:16",
    "cinema": "21:9", "ultrawide": "21:9", "电影": "21:9", "超宽屏": "21:9",
    "panorama": "2:1", "全景": "2:1", "全景图": "2:1",
    "banner": "3:1", "横幅": "3:1",
}  # fmt: skip

# The sizes that the hosted Seedream recommends (2K to 4K: 4.0 and later, 1K: 5.0 Pro), lying down.
SEEDREAM: tuple[tuple[int, int], ...] = (
    (1024, 1024), (1152, 864), (1248, 832), (1424, 800), (1568, 672),
    (2048, 2048), (2304, 1728), (2496, 1664), (2848, 1600), (3136, 1344),
    (3072, 3072), (3456, 2592), (3744, 2496), (4096, 2304), (4704, 2016),
    (4096, 4096), (4704, 3520), (4992, 3328), (5504, 3040), (6240, 2656),
)  # fmt: skip

EXACT = re.compile(r"([0-9]{1,6}) ?[x×*] ?([0-9]{1,6})(?: ?px)?")
RATIO = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?: ?([0-9]{1,6}(?:\.[0-9]{1,6})?)")
TIER = re.compile(r"(?<![0-9a-z.])([0-9]{1,2}(?:\.[0-9]{1,2})?)k(?![0-9a-z])")


@dataclass(frozen=True)
class Size:
    """Width and height in pixels; `label` is what the size was called, and can be parsed again."""

    width: int
    height: int
    label: str = ""

    def __post_init__(self) -> None:
        check_sides(self.width, self.height)


def parse_size(
    words: str,
    area: int = 1024 * 1024,
    multiple: int = 16,
    buckets: Sequence[tuple[int, int]] = SEEDREAM,
) -> Size:
    """The size that `words` mean; SamplingError with examples when they mean none.

    "1000x750" is exactly that. A shape ("16:9", "2.35:1", "poster", "海报") has about `area`
    pixels, or as many as 2048 x 2048 in "16:9@2K" and "2K poster"; "2K" alone is that square.
    A shape becomes the nearest of `buckets`, sizes that a model knows well, if there is one near.
    """
    text = unicodedata.normalize("NFKC", words).casefold()  # full-width ：＠Ｋ become plain :@k
    tier = TIER.search(text)
    shape = " ".join(re.sub(r"[@,、_]", " ", TIER.sub(" ", text, count=1)).split())
    if exact := EXACT.fullmatch(shape):
        if tier:
            raise SamplingError(f"'{words}' gives two sizes; keep {shape} or {tier[1]}K, not both.")
        return Size(int(exact[1]), int(exact[2]), f"{exact[1]}x{exact[2]}")

    sides = RATIO.fullmatch(WORDS.get(shape, shape) or ("1:1" if tier else ""))
    if not sides:
        raise SamplingError(
            f"'{words}' is not a size. Write pixels such as 1024x768, a shape such as 16:9 or "
            f"16:9@2K, or a word: {', '.join(word for word in WORDS if word.isascii())}."
        )
    width, height = Fraction(sides[1]), Fraction(sides[2])
    if not 0 < height <= MAX_RATIO * width or not width <= MAX_RATIO * height:
        raise SamplingError(f"'{words}': a shape must lie between 1:{MAX_RATIO} and {MAX_RATIO}:1.")
    if tier:
        area = round((1024 * float(tier[1])) ** 2)
        shape = f"{shape}@{tier[1]}K".lstrip("@")
    return shaped(float(width / height), area, multiple, buckets, shape)


def shaped(
    ratio: float, area: int, multiple: int, buckets: Sequence[tuple[int, int]], label: str
) -> Size:
    """A bucket within 2 % of the ratio and 10 % of the area, turned if need be; else computed."""
    if area < 1:
        raise SamplingError(f"'{label}': a picture of {area} pixels cannot be made.")
    near: list[tuple[float, int, int]] = []
    for width, height in [*buckets, *((h, w) for w, h in buckets)]:
        shape_error = abs(math.log(width / height / ratio))
        area_error = abs(math.log(width * height / area))
        on_grid = width % multiple == 0 and height % multiple == 0
        if on_grid and shape_error < 0.02 and area_error < 0.1:
            near.append((shape_error + area_error, width, height))
    if near:
        _, width, height = min(near)
        return Size(width, height, label)
    width = math.sqrt(area * ratio)
    return snap(width, width / ratio, multiple, label)


def snap(width: float, height: float, multiple: int, label: str = "") -> Size:
    """The nearest size whose sides are multiples of `multiple`: the same area and shape, almost."""
    check_sides(width, height)
    choices = [
        (w, h)
        for w in neighbours(width, multiple)
        for h in neighbours(height, multiple)
        if max(w, h) <= MAX_RATIO * min(w, h)
    ]
    # Hypotenuse of the relative errors of the sides, which is that of area and shape too.
    w, h = min(choices, key=lambda s: math.hypot(math.log(s[0] / width), math.log(s[1] / height)))
    return Size(w, h, label)


def grid(width: int, height: int, multiple: int) -> tuple[Size, tuple[int, int, int, int]]:
    """The smallest size on the grid that holds width x height, and the box to crop back afterwards.

    The box is (left, top, right, bottom). The padding is at the right and at the bottom: each pixel
    keeps its place, so an edit does not shift against a reference that was padded the same way.
    """
    check_sides(width, height)
    padded = Size(-(-width // multiple) * multiple, -(-height // multiple) * multiple)
    return padded, (0, 0, width, height)


def described(width: int, height: int, padded: tuple[int, int], pixels_per_token: int) -> str:
    """A size in words: pixels, shape, how many there are, and what the model paints for it."""
    ratio = width / height
    known = [Fraction(*map(int, shape.split(":"))) for shape in WORDS.values()]
    near = min({*known, *(1 / k for k in known)}, key=lambda k: abs(math.log(k / ratio)))
    shape = f"{near.numerator}:{near.denominator}"
    if abs(math.log(near / ratio)) > 0.04:
        shape = f"{ratio:.3g}:1" if ratio >= 1 else f"1:{1 / ratio:.3g}"
    tokens = padded[0] * padded[1] // pixels_per_token**2
    parts = [f"{width} x {height} pixels", shape, f"{width * height / 1e6:.1f} MP"]
    if padded != (width, height):
        parts.append(f"painted as {padded[0]} x {padded[1]}")
    return " · ".join([*parts, f"{tokens} tokens"])


def neighbours(length: float, multiple: int) -> tuple[int, int]:
    """The multiples below and above `length`, at least one times `multiple`."""
    below, above = math.floor(length / multiple), math.ceil(length / multiple)
    return max(1, below) * multiple, max(1, above) * multiple


def check_sides(width: float, height: float) -> None:
    short, long = sorted((width, height))
    if not 0 < short <= long <= MAX_SIDE:
        raise SamplingError(
            f"{width:g}x{height:g}: both sides must lie between 1 and {MAX_SIDE} pixels."
        )
    if long > MAX_RATIO * short:
        raise SamplingError(
            f"{width:g}x{height:g}: one side is {long / short:.3g} times the other; "
            f"at most {MAX_RATIO} times is possible."
        )
