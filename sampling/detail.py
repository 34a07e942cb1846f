"""A detail pass: a finished picture, enlarged, painted a little anew in overlapping windows.

The model sees one window at a time, in the size that it was made for, over the one prefix of
prompt and references. Windows are blended at every step, so that they agree before details form
(MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113): no seam is left to hide.
"""

from __future__ import annotations

from torch import Tensor

from ..model_loaders.pictures import resize
from . import SamplingError
from .pipeline import with_margin
from .samplers import Model
from .sizes import Size, grid
from .tiles import Size as Window
from .tiles import in_tiles


def windowed(model: Model, window: Window, overlap: Window) -> Model:
    """`model` on x (1, C, h, w) of any size, asked in windows of (height, width) latents."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return in_tiles(lambda tile: model(tile, sigma), x, window, overlap)

    return velocity


def enlarged(image: Tensor, scale: float, step: int) -> tuple[Tensor, Size]:
    """A picture (H, W, 3 or 4) `scale` times as large and padded to whole steps; its own size.

    Lanczos. SamplingError for sizes that no model makes.
    """
    if not 1 <= scale <= 4:
        raise SamplingError(
            f"a picture cannot be enlarged {scale:g} times in one pass; give a number between 1 "
            "and 4."
        )
    width, height = round(image.shape[1] * scale), round(image.shape[0] * scale)
    padded, _ = grid(width, height, step)
    large = resize(image, (width, height))
    return with_margin(large, (padded.width, padded.height)), Size(width, height)


def window_of(
    side: int, overlap: float, step: int, pixels_per_latent: int
) -> tuple[Window, Window]:
    """A square window of `side` pixels, and its overlap, a share of it: both in latents.

    Both are whole steps, so that tokens of more than one latent are not cut.
    """
    if not 0 < overlap <= 0.5:
        raise SamplingError(f"the overlap is {overlap:g}; give a share above 0, at most 0.5.")
    unit = step // pixels_per_latent
    latents = max(2, side // step) * unit
    shared = min(max(unit, round(latents * overlap / unit) * unit), latents - unit)
    return (latents, latents), (shared, shared)
