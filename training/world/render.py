"""Scene -> pixels: anti-aliased signed distances in numpy, the same bytes every time."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import Background, Pose, Scene, Thing, class_ids, pose
from .shapes import FIELDS
from .vocabulary import GROUND_RGB, OBJECT_RGB, PHOTO, TRANSPARENT

_TABLE = 512  # side of the wrap-around noise tables
_PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png",
           "hubble_deep_field.jpg", "ihc.png")  # fmt: skip
CLEAR_RGB = 128.0  # colour under a fully transparent pixel: zero in -1..1


@lru_cache(maxsize=2)
def _noise_table(smooth: bool) -> np.ndarray:
    """A fixed wrap-around field of unit variance, (512, 512): white-ish grain or soft blots."""
    rng = np.random.Generator(np.random.PCG64(20250909 + smooth))
    spectrum = np.fft.rfft2(rng.standard_normal((_TABLE, _TABLE)))
    fy, fx = np.fft.fftfreq(_TABLE)[:, None], np.fft.rfftfreq(_TABLE)[None]
    square = fx * fx + fy * fy
    # blots: a band around one cycle per 17 table pixels (8 px at size 128); grain: slightly soft
    # noise
    gain = square * np.exp(-square / 0.0036) if smooth else np.exp(-square / 0.18)
    field = np.fft.irfft2(spectrum * gain, s=(_TABLE, _TABLE))
    return (field / field.std()).astype(np.float32)


@lru_cache(maxsize=1)
def photographs() -> tuple[Image.Image, ...]:
    """Photographs from inside scikit-image's wheel, toned down; () where it is missing."""
    try:
        import skimage
    except ImportError:
        return ()
    folder = Path(skimage.__file__).parent / "data"
    pictures = []
    for name in _PHOTOS:
        if (folder / name).is_file():
            rgb = np.asarray(Image.open(folder / name).convert("RGB"), np.float32)
            grey = rgb.mean(2, keepdims=True)
            toned = 122.0 + 0.55 * (grey - 122.0) + 0.5 * (rgb - grey)
            picture = Image.fromarray(np.clip(toned, 0, 255).astype(np.uint8))
            picture.thumbnail((420, 420), Image.Resampling.BOX)
            pictures.append(picture)
    return tuple(pictures)


@lru_cache(maxsize=4)
def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in 128ths of the picture: x (1, size), y (size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (128.0 / size)).astype(np.float32)
    return line[None, :], line[:, None]


def _photo(size: int, draws: np.ndarray) -> np.ndarray | None:
    pictures = photographs()
    if not pictures:
        return None
    picture = pictures[int(draws[0] * len(pictures))]
    width, height = picture.size
    side = min(width, height) * (0.5 + 0.5 * draws[1])
    left, top = (width - side) * draws[2], (height - side) * draws[3]
    crop = picture.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if draws[4] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop, np.float32)


def _tone(texture: str, size: int, draws: np.ndarray) -> np.ndarray | float:
    """The texture as a field of about -1..1, (size, size)."""
    x, y = _axes(size)
    angle = float(draws[4]) * 2 * math.pi
    if texture == "gradient":
        reach = 64.0 * (abs(math.cos(angle)) + abs(math.sin(angle)))
        return (x - 64) * (math.cos(angle) * 1.7 / reach) + (y - 64) * (
            math.sin(angle) * 1.7 / reach
        )
    if texture == "noisy":
        step = 256.0 / size
        rows = (int(draws[5] * _TABLE) + (np.arange(size) * step).astype(int)) % _TABLE
        columns = (int(draws[6] * _TABLE) + (np.arange(size) * step).astype(int)) % _TABLE
        return _noise_table(True)[rows][:, columns] * 0.85
    period = 13.0 + 8.0 * float(draws[5])
    turn = 2 * math.pi / period
    sharp = period / (2 * math.pi) * (size / 128.0) * 2.0
    u = np.sin((x * math.cos(angle) + y * math.sin(angle)) * turn + 6.28 * float(draws[6]))
    if texture == "striped":
        return np.clip(u * sharp, -1, 1)
    v = np.sin((y * math.cos(angle) - x * math.sin(angle)) * turn + 6.28 * float(draws[7]))
    return np.clip(u * sharp, -1, 1) * np.clip(v * sharp, -1, 1)


def _ground(background: Background, size: int) -> np.ndarray:
    """Float RGB canvas (size, size, 3), 0..255."""
    draws = np.random.Generator(np.random.PCG64(background.seed)).random(12)
    texture = background.texture
    if texture == TRANSPARENT:
        return np.full((size, size, 3), CLEAR_RGB, np.float32)
    if texture == PHOTO:
        photo = _photo(size, draws)
        if photo is not None:
            return photo
    base = np.array(GROUND_RGB.get(background.colour, GROUND_RGB["grey"]), np.float32)
    base = base + (draws[:3] * 10 - 5).astype(np.float32)
    if texture in ("plain", PHOTO):
        return np.broadcast_to(base, (size, size, 3)).copy()
    depth = {"gradient": 0.17, "noisy": 0.085}.get(texture, 0.1) * (1 + 0.3 * float(draws[3]))
    tone = np.asarray(_tone(texture, size, draws), np.float32)
    return (1 + np.float32(depth) * tone)[..., None] * base


def _window(place: Pose, size: int) -> tuple[slice, slice]:
    reach = place.radius * 1.08 + 1.5 / size
    left, right = int((place.x - reach) * size), math.ceil((place.x + reach) * size)
    top, bottom = int((place.y - reach) * size), math.ceil((place.y + reach) * size)
    return slice(max(top, 0), min(bottom, size)), slice(max(left, 0), min(right, size))


def _coverage(
    thing: Thing, place: Pose, size: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """The object's window, its alpha 0..1 there, and unrotated coordinates in its radius."""
    rows, columns = window = _window(place, size)
    x, y = _axes(size)
    radius = np.float32(place.radius * 128)
    u = (x[:, columns] - np.float32(place.x * 128)) / radius
    v = (y[rows] - np.float32(place.y * 128)) / radius
    u, v = np.broadcast_arrays(u, v)
    c, s = np.float32(math.cos(place.rotation)), np.float32(math.sin(place.rotation))
    p, q = c * u + s * v, c * v - s * u
    # a hand-drawn wobble: bend the plane a little (at most .6 px on a big object)
    d = place.draws.astype(np.float32)
    bend = 0.016 + 0.018 * d[0]
    p, q = (
        p + bend * np.sin((2.5 + 2 * d[1]) * q + 6.28 * d[2]),
        q + bend * np.sin((2.5 + 2 * d[3]) * p + 6.28 * d[4]),
    )
    distance = FIELDS[thing.shape](p, q) * (radius * np.float32(size / 128))
    return window, np.clip(0.5 - distance, 0, 1), u, v


def _pattern(thing: Thing, place: Pose, size: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the second tone (0..1) over the window."""
    d = place.draws.astype(np.float32)
    angle = 6.28 * float(d[5])
    pixels = np.float32(size / 128.0)
    radius = np.float32(place.radius * 128)
    a = (u * math.cos(angle) + v * math.sin(angle)) * radius
    if thing.fill == "striped":
        period = np.float32(6.0 + 1.6 * d[6])
        wave = np.sin(a * (2 * math.pi / period) + 6.28 * d[7])
        return np.clip(0.5 + (wave - 0.12) * (period * pixels / 6.28), 0, 1)
    b = (v * math.cos(angle) - u * math.sin(angle)) * radius
    period = np.float32(6.4 + 1.2 * d[6])
    a, b = a / period + d[7], b / period + d[8]
    a, b = (a - np.round(a)) * period, (b - np.round(b)) * period
    return np.clip(0.5 + (np.float32(2.15) - np.sqrt(a * a + b * b)) * pixels, 0, 1)


def _paint(thing: Thing, size: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Window, alpha (h, w) and float RGB (h, w, 3) of one object."""
    place = pose(thing)
    window, alpha, u, v = _coverage(thing, place, size)
    d = place.draws
    main, second = (np.array(rgb, np.float32) for rgb in OBJECT_RGB[thing.colour])
    shift = (d[9:12] * 12 - 6).astype(np.float32)
    light = 6.28 * float(d[12])
    strength = 0.05 + 0.09 * float(d[13])
    shade = 1 + strength * (u * math.cos(light) + v * math.sin(light))
    if thing.fill == "plain":
        rgb = shade[..., None] * (main + shift)
    else:
        share = _pattern(thing, place, size, u, v)[..., None]
        rgb = shade[..., None] * (main + shift + share * (second - main))
    return window, alpha, np.clip(rgb, 0, 255)


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """The picture, uint8 (size, size, 4); alpha is 255 unless the background is transparent."""
    clear = scene.background.texture == TRANSPARENT
    canvas = _ground(scene.background, size)
    mask = np.zeros((size, size), np.float32) if clear else None
    for thing in scene.objects:
        window, alpha, rgb = _paint(thing, size)
        if mask is not None:
            mask[window] = alpha
            canvas[window] = np.where(alpha[..., None] > 0, rgb, canvas[window])
        else:
            part = canvas[window]
            part += alpha[..., None] * (rgb - part)
    _add_grain(canvas, scene.grain, size)
    picture = np.empty((size, size, 4), np.uint8)
    picture[..., 3] = 255
    if mask is not None:
        canvas[mask == 0] = CLEAR_RGB
        picture[..., 3] = np.round(mask * 255)
    np.clip(canvas, 0, 255, out=canvas)
    canvas += 0.5
    picture[..., :3] = canvas
    return picture


def _add_grain(canvas: np.ndarray, seed: int, size: int) -> None:
    """Film grain, 1.2 to 3.6 grey levels, cut from a fixed table at an offset given by `seed`."""
    table = _noise_table(False)
    if size > _TABLE // 2:
        repeats = math.ceil(2 * size / _TABLE)
        table = np.tile(table, (repeats, repeats))
    top, left = seed % 251, (seed // 251) % 251
    strength = np.float32(1.2 + 2.4 * ((seed // 63001) % 101) / 100)
    canvas += (table[top : top + size, left : left + size] * strength)[..., None]


def object_map(
    scene: Scene, size: int = 128, tokens: int = 8, threshold: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """Which object lies on which token.

    Returns (map, classes): map (tokens, tokens) int64 with 0 = background, i + 1 =
    scene.objects[i] where that object covers at least `threshold` of the token (the best one
    wins); classes (objects, 4) int64, the 1-based ids of shape, colour, fill, size of each
    object.
    """
    found = np.zeros((tokens, tokens), np.int64)
    best = np.full((tokens, tokens), threshold, np.float32)
    step = size // tokens
    for index, thing in enumerate(scene.objects):
        window, alpha, _, _ = _coverage(thing, pose(thing), size)
        whole = np.zeros((size, size), np.float32)
        whole[window] = alpha
        share = whole.reshape(tokens, step, tokens, step).mean((1, 3))
        found[share >= best] = index + 1
        best = np.maximum(best, share)
    classes = np.array([class_ids(thing) for thing in scene.objects], np.int64).reshape(-1, 4)
    return found, classes


def object_mask(thing: Thing, size: int = 128) -> np.ndarray:
    """Alpha of one object over the whole picture, float32 (size, size)."""
    window, alpha, _, _ = _coverage(thing, pose(thing), size)
    whole = np.zeros((size, size), np.float32)
    whole[window] = alpha
    return whole
