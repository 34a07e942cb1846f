"""Every family's VAE in strips against whole: time, memory and whether the bits are the same.

Random weights, and narrow networks so that it ends soon (`--width` is of the layers at full size).
Memory is the peak of the process above the resident weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.families.flux2.vae import VAE as Flux2VAE
from ..model_loaders.families.flux2.vae import VAEConfig as Flux2Config
from ..model_loaders.families.qwen_image.vae import VAE as QwenImageVAE
from ..model_loaders.families.qwen_image.vae import VAEConfig as QwenImageConfig
from ..model_loaders.families.qwen_image_21.vae import VAE as QwenImage21VAE
from ..model_loaders.families.qwen_image_21.vae import VAEConfig as QwenImage21Config
from .protocol import arguments, interleave, peak_memory, show

FAMILIES = ("qwen_image_21", "qwen_image", "flux2")


def random_vae(family: str, width: int) -> Any:
    """The family's VAE, narrow, with random weights that keep values near 1."""
    torch.manual_seed(0)
    vae: Any
    if family == "flux2":
        widths = (width, 2 * width, 4 * width, 4 * width)
        vae = Flux2VAE(Flux2Config(widths=widths, decoder_widths=widths, groups=width // 4))
    elif family == "qwen_image":
        vae = QwenImageVAE(QwenImageConfig(base_dim=width))
    else:
        vae = QwenImage21VAE(QwenImage21Config(base_dim=width, decoder_base_dim=width))
    for weight in vae.parameters():
        if weight.ndim > 1 and weight.shape[1] > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return vae.eval()


def row(name: str, run: Any, x: Tensor, strips: int, runs: int) -> dict[str, object]:
    """One direction of one VAE, in so many strips and whole."""
    sides = {"whole": partial(run, x, 1), "strips": partial(run, x, strips)}
    whole, cut = (side() for side in sides.values())
    memory = {name: peak_memory(side) for name, side in sides.items()}
    times = interleave(sides, runs)
    peaks = memory["whole"], memory["strips"]
    return {
        "VAE": name,
        "whole, min s": times["whole"].shortest,
        "time, min": times["strips"].shortest / times["whole"].shortest,
        "time, median": times["strips"].median / times["whole"].median,
        "whole, peak MB": None if peaks[0] is None else round(peaks[0] / 1e6),
        "memory": peaks[1] / peaks[0] if peaks[0] and peaks[1] is not None else None,
        "same bits": torch.equal(whole, cut),
        "max difference": float((whole - cut).abs().max()),
    }


@torch.no_grad()
def main() -> None:
    tiny = {"width": 8, "side": 64}
    args = arguments(__doc__, tiny=tiny, family="", width=24, side=512, strips=8)
    rows = []
    for family in FAMILIES:
        if args.family not in ("", family):
            continue
        vae = random_vae(family, args.width)
        c = vae.config
        pixels = torch.rand(1, c.in_channels, args.side, args.side) * 2 - 1
        latents = torch.randn(1, c.z_dim, args.side // c.factor, args.side // c.factor)
        for name, run, x in (("decode", vae.decode, latents), ("encode", vae.encode, pixels)):
            rows.append(row(f"{family}, {name}", run, x, args.strips, args.runs))
    title = f"{args.strips} strips / whole, {args.side} x {args.side} pixels, width {args.width}"
    show(title, rows, args.json)


if __name__ == "__main__":
    main()
