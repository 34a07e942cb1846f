"""Decode a picture with the VAE of Qwen-Image-2.1: ours against diffusers, strips against whole.

The same random weights and latents on every side; a narrow decoder so that it ends soon (`--width
144` is the published one). Memory is the peak of the process above the resident weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from .protocol import arguments, difference, interleave, peak_memory, show

STRIPS = 8


def random_vaes(width: int) -> tuple[Any, VAE]:
    """Diffusers' VAE and ours over the same random weights, whose decoded values stay in -1..1."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21

    torch.manual_seed(0)
    config = VAEConfig(base_dim=8, decoder_base_dim=width)
    theirs = AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=width).eval()
    for name, weight in theirs.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(weight, 0.5, 1.5)
        elif weight.ndim > 1:
            nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    nn.init.normal_(theirs.decoder.conv_out.weight, std=0.2 / width**0.5)
    ours = VAE(config, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval()


def sides(theirs: Any, ours: VAE, latents: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The decoders, by name; the first one is what the others are compared with."""
    mean, std = torch.tensor([ours.config.latents_mean, ours.config.latents_std])[..., None, None]
    video = (latents * std + mean)[:, :, None]
    tiled, last = copy.copy(theirs), copy.deepcopy(theirs)
    tiled.enable_tiling()
    last.to(memory_format=torch.channels_last)

    def decode(vae: Any) -> Tensor:
        return vae.decode(video).sample[:, :, 0]

    return {
        "diffusers": partial(decode, theirs),
        "diffusers, channels last": partial(decode, last),
        "diffusers, tiles": partial(decode, tiled),
        "seedling, whole": partial(ours.decode, latents, 1),
        "seedling, strips": partial(ours.decode, latents, STRIPS),
    }


@torch.no_grad()
def measure(width: int, side: int, runs: int) -> tuple[list[dict[str, object]], list[str]]:
    """A row per decoder, and what to say below the table."""
    theirs, ours = random_vaes(width)
    latents = torch.randn(1, ours.config.z_dim, side // 16, side // 16)
    decoders = sides(theirs, ours, latents)
    pictures = {name: decode() for name, decode in decoders.items()}
    for name in ("seedling, whole", "seedling, strips"):
        difference(pictures[name], pictures["diffusers"], 1e-5)
    memory = {name: peak_memory(decode) for name, decode in decoders.items()}
    times = interleave(decoders, runs)
    base, expected = times["diffusers"], pictures["diffusers"]
    rows: list[dict[str, object]] = [
        {
            "decoder": name,
            "min s": t.shortest,
            "median s": t.median,
            "speed, min": base.shortest / t.shortest,
            "speed, median": base.median / t.median,
            "peak MB": None if (peak := memory[name]) is None else round(peak / 1e6),
            "max difference": float((pictures[name] - expected).abs().max()),
        }
        for name, t in times.items()
    ]
    same = torch.equal(pictures["seedling, whole"], pictures["seedling, strips"])
    clamped = float((expected.abs() == 1).float().mean())
    one, many = times["seedling, whole"], times["seedling, strips"]
    return rows, [
        f"{STRIPS} strips and whole: {'the same bits' if same else 'DIFFERENT bits'}, time of "
        f"strips / whole {many.shortest / one.shortest:.3f} (min), "
        f"{many.median / one.median:.3f} (median)",
        f"values at the clamp: {clamped:.1%}",
    ]


def main() -> None:
    args = arguments(__doc__, tiny={"width": 8, "side": 64}, width=24, side=512)
    rows, notes = measure(args.width, args.side, args.runs)
    title = f"VAE decode of {args.side} x {args.side} pixels, {args.width} base channels, fp32"
    show(title, rows, args.json, notes)


if __name__ == "__main__":
    main()
