"""What a picture says about another one to be made: its edges, lines, colours or layout.

Each is a picture again, (H, W, 3) in 0..1 from (H, W, 3 or 4), and goes to the model as a
reference. kornia does the filtering; it is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import SamplingError
from .preservation import on_white

Signal: TypeAlias = Callable[[Tensor, float], Tensor]  # (1, 3, H, W) and detail 0..1
LEAST = 8  # pixels a side
GRAIN = 0.02  # what is darker than its surroundings by no more is no line, without detail


def canny(x: Tensor, detail: float) -> Tensor:
    """White edges one pixel wide on black; Canny 1986. More detail finds weaker ones."""
    from kornia.filters import canny as edges

    high = 0.5 - 0.42 * detail
    return edges(x, low_threshold=high / 2, high_threshold=high)[1]


def soft_edge(x: Tensor, detail: float) -> Tensor:
    """White on black, as strong as the edge is; more detail blurs less before looking."""
    from kornia.filters import sobel

    strength = sobel(blurred(x, 3.0 - 2.5 * detail)).amax(dim=1, keepdim=True)
    return (strength / strength.amax().clamp_min(1e-3)).sqrt()


def line_art(x: Tensor, detail: float) -> Tensor:
    """Dark lines on white where a pixel is darker than its surroundings; more finds fainter ones.

    Difference of Gaussians: Winnemoeller, Kyprianidis and Olsen 2012.
    """
    luma = x.mul(x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    inner, outer = blurred(luma, 0.8), blurred(luma, 2.0)
    difference = (inner - outer + GRAIN * (1 - detail)).clamp_max(0)
    return 1 + torch.tanh((10 + 30 * detail) * difference)


def blur(x: Tensor, detail: float) -> Tensor:
    """Light, colour and layout without shapes; more detail blurs less."""
    return blurred(x, max(x.shape[-2:]) * (0.06 - 0.055 * detail))


def colour_blocks(x: Tensor, detail: float) -> Tensor:
    """Squares of one colour each; more detail makes them smaller, 8 to 48 along the long side."""
    long = max(x.shape[-2:])
    count = 8 + 40 * detail
    size = [max(1, round(side * count / long)) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[-2:], mode="nearest")


def tile(x: Tensor, detail: float) -> Tensor:
    """The picture without its finest detail, to paint it anew; more keeps finer detail."""
    factor = 8 - 6 * detail
    size = [max(1, round(side / factor)) for side in x.shape[-2:]]
    small = F.interpolate(x, size, mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic").clamp(0, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur that repeats the picture's edge."""
    from kornia.filters import gaussian_blur2d

    # 3 sigmas to a side are all of it; a kernel may not be larger than the padded picture.
    side = min(2 * max(1, round(3 * sigma)) + 1, 2 * min(x.shape[-2:]) - 1)
    return gaussian_blur2d(x, (side, side), (sigma, sigma), border_type="replicate")


# Name -> how it is made, and what it is there for, in the instruction's words.
SIGNALS: dict[str, tuple[Signal, str]] = {
    "canny": (canny, "the edges to follow"),
    "soft edge": (soft_edge, "the edges to follow"),
    "line art": (line_art, "the drawing to follow"),
    "blur": (blur, "the light and layout to follow"),
    "colour blocks": (colour_blocks, "the colours and their places"),
    "tile": (tile, "the picture to add detail to"),
}


def signal(image: Tensor, kind: str, detail: float = 0.5) -> Tensor:
    """The control picture (H, W, 3) of a picture (H, W, 3 or 4), which is laid on white."""
    if kind not in SIGNALS:
        raise SamplingError(f"there is no signal '{kind}'; choose one of: {', '.join(SIGNALS)}.")
    if not 0 <= detail <= 1:
        raise SamplingError(f"the detail of a signal is {detail}; give a number between 0 and 1.")
    if min(image.shape[:2]) < LEAST:
        raise SamplingError(
            f"a picture of {image.shape[1]} x {image.shape[0]} pixels has no signal; give one with "
            f"at least {LEAST} a side."
        )
    x = on_white(image).permute(2, 0, 1)[None]
    made = SIGNALS[kind][0](x, detail).clamp(0, 1)
    return made[0].expand(3, -1, -1).permute(1, 2, 0).contiguous()
