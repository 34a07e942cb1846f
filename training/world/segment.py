"""From pixels to soft object masks: which colour, how much of each pixel, which background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .vocabulary import COLOURS, GROUND_RGB, GROUNDS, OBJECT_RGB, PHOTO, TRANSPARENT

SIDE = 128  # everything is judged at this size
_MAIN = np.array([OBJECT_RGB[c][0] for c in COLOURS], np.float32)
_SECOND = np.array([OBJECT_RGB[c][1] for c in COLOURS], np.float32)
_GROUND = np.array([GROUND_RGB[g] for g in GROUNDS], np.float32)
_TONES = (0.66, 1.34)  # how dark and light a textured background gets
_NEAR = 46.0  # an object pixel is at most so far (RGB) from its colour's line
_NEAR_PHOTO = 36.0
# how far towards the second tone a pixel still counts as main tone: photographs have dark greys
_MAIN_PART = np.array([0.3 if c == "black" else 0.55 for c in COLOURS], np.float32)
_CORE = 9  # pixels that must be left of an object after one erosion


@dataclass(frozen=True)
class Blob:
    """One suspected object in its window: soft coverage (h, w) in 0..1 and how much that counts."""

    colour: str
    top: int
    left: int
    cover: np.ndarray
    weight: np.ndarray
    rgb: np.ndarray
    core: int


@dataclass(frozen=True)
class Ground:
    colour: str
    texture: str


def _along(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (n, k) of n pixels to k line segments, and the position 0..1 on each."""
    way = end - start
    length = (way * way).sum(1)
    at = np.clip((pixels @ way.T - (start * way).sum(1)) / length, 0, 1)
    square = (pixels * pixels).sum(1)[:, None] + (start * start).sum(1)
    square = square - 2 * (pixels @ start.T) - 2 * at * (pixels @ way.T - (start * way).sum(1))
    return np.sqrt(np.maximum(square + at * at * length, 0)), at


def object_distance(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (n, 10) to each colour's line from main to second tone, and the place on it."""
    return _along(pixels, np.minimum(_MAIN * 1.07, 255), _SECOND)


def second_share(pixels: np.ndarray, colour: str) -> np.ndarray:
    """How far each pixel has gone from the main to the second tone: about 0 to about 1."""
    index = COLOURS.index(colour)
    way = _SECOND[index] - _MAIN[index]
    return (pixels - _MAIN[index]) @ way / (way @ way)


def _ground_distance(pixels: np.ndarray) -> np.ndarray:
    return _along(pixels, _GROUND * _TONES[0], _GROUND * _TONES[1])[0]


def _drawn_ground(pixels: np.ndarray, near: np.ndarray, behind: np.ndarray) -> int:
    """Index of the background colour that explains what is no object; -1 for a photograph."""
    rest = (near > 30) | (behind.min(1) < 12)
    if rest.sum() < 0.3 * len(pixels):
        return -1
    share = (behind[rest] < 24).mean(0)
    away = np.sqrt(((pixels[rest].mean(0) - _GROUND) ** 2).sum(1))
    share = np.where(away < 45, share, 0)
    return int(share.argmax()) if share.max() > 0.85 else -1


def to_side(image: np.ndarray) -> np.ndarray:
    """The picture as float32 (128, 128, 4)."""
    if image.ndim != 3 or image.shape[2] not in (3, 4) or image.shape[0] != image.shape[1]:
        raise ValueError(
            f"The checker was given an array of shape {image.shape}; "
            "it needs a square uint8 picture (n, n, 3 or 4)."
        )
    pixels = image.astype(np.float32)
    if image.shape[2] == 3:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], 2)
    if image.shape[0] == SIDE:
        return pixels
    if image.shape[0] % SIDE == 0:
        step = image.shape[0] // SIDE
        return pixels.reshape(SIDE, step, SIDE, step, 4).mean((1, 3))
    zoom = SIDE / image.shape[0]
    return np.asarray(
        ndimage.zoom(pixels, (zoom, zoom, 1), order=1, grid_mode=True, mode="nearest")
    )


def _families(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(colour index, core mask) of each suspect: eroded patches of a colour, joined in a cell."""
    found: list[tuple[int, np.ndarray]] = []
    for index in range(len(COLOURS)):
        mask = labels == index
        if mask.sum() < 2 * _CORE:
            continue
        parts = np.zeros(mask.shape, np.int32)
        ndimage.label(ndimage.binary_erosion(mask), output=parts)
        numbers = np.arange(1, int(parts.max()) + 1)
        if not len(numbers):
            continue
        sizes = ndimage.sum_labels(parts > 0, parts, numbers)
        centres = np.array(ndimage.center_of_mass(parts > 0, parts, numbers))
        cells = (centres[:, 0] * 3 // SIDE * 3 + centres[:, 1] * 3 // SIDE).astype(int)
        for cell in np.unique(cells):
            mine = numbers[cells == cell]
            if sizes[cells == cell].sum() >= _CORE:
                found.append((index, np.isin(parts, mine)))
    return found


def _read_texture(tone: np.ndarray, free: np.ndarray) -> str:
    """The texture, from the brightness of the background where it is `free`."""
    weight = ndimage.gaussian_filter(free.astype(np.float32), 1.0)
    smooth = ndimage.gaussian_filter(np.where(free, tone, 0), 1.0) / np.maximum(weight, 1e-3)
    good = free & (weight > 0.6)
    values = smooth[good]
    if values.size < 500 or values.std() < 0.022:
        return "plain"
    y, x = np.nonzero(good)
    plane = np.stack([x / 64 - 1, y / 64 - 1, np.ones_like(x)], 1).astype(np.float32)
    solution = np.linalg.lstsq(plane.T @ plane, plane.T @ values, rcond=None)[0]
    rest = values - plane @ solution
    if rest.var() < 0.3 * values.var():
        return "gradient"
    gy, gx = np.asarray(np.gradient(ndimage.gaussian_filter(smooth, 0.7)))
    inside = ndimage.binary_erosion(good, iterations=2)
    if inside.sum() < 100:
        return "noisy"
    gy, gx = gy[inside], gx[inside]
    xx, yy, xy = (gx * gx).mean(), (gy * gy).mean(), (gx * gy).mean()
    coherence = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9)
    if coherence > 0.55:
        return "striped"
    spread = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    return "checked" if spread < 2.1 else "noisy"


def read_ground(pixels: np.ndarray, covered: np.ndarray, transparent: bool) -> Ground:
    """Colour and texture of the background; `covered` marks objects (with a margin)."""
    if transparent:
        return Ground("", TRANSPARENT)
    free = ~covered
    if free.sum() < 500:
        return Ground("", PHOTO)
    rgb = pixels[..., :3]
    middle = np.median(rgb[free], 0)
    mean = rgb[free].mean(0)
    index = int(np.argmin(((_GROUND - mean) ** 2).sum(1) + ((_GROUND - middle) ** 2).sum(1)))
    base = _GROUND[index]
    distance = _along(rgb[free], base[None] * 0.7, base[None] * 1.3)[0][:, 0]
    if np.mean(distance < 24) < 0.9 or np.sqrt(((mean - base) ** 2).sum()) > 40:
        return Ground("", PHOTO)
    return Ground(GROUNDS[index], _read_texture(rgb @ base / (base @ base), free))


def segment(pixels: np.ndarray) -> tuple[list[Blob], Ground]:
    """Suspected objects and the background of a float32 (128, 128, 4) picture."""
    clear = pixels[..., 3] < 128
    transparent = bool(clear.mean() > 0.3)
    flat = pixels[..., :3].reshape(-1, 3)
    near, at = object_distance(flat)
    behind = _ground_distance(flat)
    ground = -1 if transparent else _drawn_ground(flat, near.min(1), behind)
    synthetic = ground >= 0
    if transparent:
        back = np.where(clear, 0.0, 1000.0).reshape(-1)
    elif synthetic:
        back = behind[:, ground]
    else:
        back = np.full(len(flat), _NEAR_PHOTO, np.float32)
    best = near.argmin(1)
    distance = near[np.arange(len(flat)), best]
    limit = 90.0 if transparent else _NEAR if synthetic else _NEAR_PHOTO
    is_object = (distance < limit) & (distance < back)
    if not (transparent or synthetic):
        # photographs have many dull tones: start from main tones only
        is_object &= at[np.arange(len(flat)), best] < _MAIN_PART[best]
    labels = np.where(is_object, best, -1).reshape(SIDE, SIDE)
    families = _strongest(_families(labels))
    covered = np.zeros((SIDE, SIDE), bool)
    blobs = []
    grown = [ndimage.binary_dilation(core, iterations=2) for _, core in families]
    for number, (index, core) in enumerate(families):
        others = np.zeros((SIDE, SIDE), bool)
        for other, mask in enumerate(grown):
            if other != number:
                others |= mask
        if transparent:
            cover = pixels[..., 3] / 255.0
            weight = np.ones_like(cover)
        else:
            mine = near[:, index].reshape(SIDE, SIDE)
            mine = _own_distance(flat, mine, COLOURS[index], core)
            rear = back.reshape(SIDE, SIDE)
            total = mine + rear
            cover = np.clip(rear / np.maximum(total, 1e-3), 0, 1)
            if not synthetic:  # no line to measure from: a soft step around the limit
                around = ndimage.binary_dilation(labels == index, iterations=3)
                cover = np.clip(0.5 + (_NEAR_PHOTO - mine) / 40.0, 0, 1) * around
            weight = np.clip((total - 12.0) / 40.0, 0.05, 1)
        blobs.append(_cut(COLOURS[index], core, cover, np.where(others, 0, weight), pixels))
        covered |= ndimage.binary_dilation(core, iterations=4)
    covered |= ndimage.binary_dilation(ndimage.binary_opening(labels >= 0), iterations=2)
    return blobs, read_ground(pixels, covered, transparent)


def _own_distance(flat: np.ndarray, near: np.ndarray, colour: str, core: np.ndarray) -> np.ndarray:
    """Distance (128, 128) to the object's own tones; a plain one has only its main tone."""
    inner = ndimage.binary_closing(core, iterations=4)
    inner |= core  # closing eats what touches the border of the picture
    share = second_share(flat[inner.reshape(-1)], colour)
    if np.mean(share > 0.45) > 0.06:
        return near
    main = _MAIN[COLOURS.index(colour)][None]
    return _along(flat, np.minimum(main * 1.07, 255), main * 0.82)[0].reshape(SIDE, SIDE)


def _strongest(families: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    """Drop patches that lie inside or beside a much stronger one: mixed colours along its edge."""
    order = sorted(families, key=lambda family: -int(family[1].sum()))
    kept: list[tuple[int, np.ndarray]] = []
    for index, core in order:
        area = core.sum()
        weak = any(
            area < 0.4 * other.sum() and (ndimage.binary_dilation(other, iterations=5) & core).any()
            for _, other in kept
        )
        if not weak:
            kept.append((index, core))
    return kept


def _cut(
    colour: str, core: np.ndarray, cover: np.ndarray, weight: np.ndarray, pixels: np.ndarray
) -> Blob:
    rows, columns = np.nonzero(core.any(1))[0], np.nonzero(core.any(0))[0]
    top, bottom = max(rows[0] - 7, 0), min(rows[-1] + 8, SIDE)
    left, right = max(columns[0] - 7, 0), min(columns[-1] + 8, SIDE)
    window = slice(top, bottom), slice(left, right)
    return Blob(
        colour, int(top), int(left), cover[window].astype(np.float32),
        weight[window].astype(np.float32), pixels[window][..., :3], int(core.sum()),
    )  # fmt: skip
