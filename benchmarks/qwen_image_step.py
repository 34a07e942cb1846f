"""One step of Qwen-Image's DiT, and its VAE, in fp32: ours against diffusers on the same weights.

The published network cut down in depth and width, and one layer pair of the published width. Text
and references are embedded, and the modulation of the schedule computed, before, as in all steps of
a run. The last layer of ours computes what is read of it only, which is a larger share of a network
with few layers: with 60 it is a thirtieth of the saving that two layers show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.families.qwen_image.dit import DiT, DiTConfig, pack, unpack
from ..model_loaders.families.qwen_image.vae import VAE, VAEConfig
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range
WORDS = 64


def random_dits(config: DiTConfig) -> tuple[Any, DiT]:
    """Diffusers' DiT and ours over the same random weights."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(
        num_layers=config.layers,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_dim,
        zero_cond_t=config.zero_cond_t,
    ).eval()
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=(0.3 if "mod" in name else 1.0) / weight.shape[1] ** 0.5)
    ours = DiT(config, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval()


@torch.no_grad()
def measure_step(config: DiTConfig, side: int, references: int, runs: int) -> dict[str, object]:
    """One row: a target of side x side tokens, and as large references."""
    theirs, ours = random_dits(config)
    pictures = [torch.randn(1, 16, 2 * side, 2 * side) for _ in range(1 + references)]
    text, t = torch.randn(1, WORDS, config.context_dim), torch.tensor([0.6])
    tokens = torch.cat([pack(x) for x in pictures], dim=1)
    shapes = [[(1, side, side)] * len(pictures)]
    prefix = ours.prefix(text, references=pictures[1:])
    (table,) = ours.modulations([0.6], torch.float32)

    def their_step() -> Tensor:
        out = theirs(tokens, text, timestep=t, img_shapes=shapes, return_dict=False)[0]
        return unpack(out[:, : side * side], (side, side))

    step = partial(ours, pictures[0], t, prefix, table)
    alone = partial(ours, pictures[0], t, prefix)
    error = difference(step(), their_step(), LIMIT)
    sides = {"diffusers": their_step, "seedling": step, "own modulation": alone}
    times = interleave(sides, runs)
    base, own = times["diffusers"], times["seedling"]
    return {
        "network": f"{config.layers} layers x {config.dim}",
        "target": side * side,
        "references": references,
        "diffusers min s": base.shortest,
        "seedling min s": own.shortest,
        "speed, min": base.shortest / own.shortest,
        "speed, median": base.median / own.median,
        "without the schedule's modulation, min": base.shortest / times["own modulation"].shortest,
        "difference": error,
    }


@torch.no_grad()
def measure_vae(width: int, side: int, runs: int) -> list[dict[str, object]]:
    """A row each for decoding and encoding a picture of side x side pixels."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    torch.manual_seed(0)
    config = VAEConfig(base_dim=width)
    theirs: Any = AutoencoderKLQwenImage(base_dim=width).eval()
    ours = VAE(config)
    for name, weight in theirs.named_parameters():
        if not name.endswith("gamma") and weight.ndim > 1:
            nn.init.normal_(weight, std=1.2 / weight[0].numel() ** 0.5)
    nn.init.normal_(theirs.decoder.conv_out.weight, std=0.2 / width**0.5)
    weights = theirs.state_dict()
    ours.load_state_dict({k: w[:, :, -1] if w.ndim == 5 else w for k, w in weights.items()})
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
    pixels, latents = torch.rand(1, 3, side, side) * 2 - 1, torch.randn(1, 16, side // 8, side // 8)
    video = (latents * std + mean)[:, :, None]

    def their_encode() -> Tensor:
        return (theirs.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std

    def their_decode() -> Tensor:
        return theirs.decode(video).sample[:, :, 0]

    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "decode": (their_decode, partial(ours.decode, latents)),
        "encode": (their_encode, partial(ours.encode, pixels)),
    }
    rows = []
    for name, (base, own) in pairs.items():
        expected = base()
        error = float((own() - expected).abs().max() / (expected.max() - expected.min()))
        times = interleave({"diffusers": base, "seedling": own}, runs)
        a, b = times["diffusers"], times["seedling"]
        rows.append(
            {
                "VAE": f"{name} {side} x {side}, width {width}",
                "diffusers min s": a.shortest,
                "seedling min s": b.shortest,
                "speed, min": a.shortest / b.shortest,
                "speed, median": a.median / b.median,
                "difference": error,
            }
        )
    return rows


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "wide": 2, "side": 4, "width": 8, "pixels": 32}
    args = arguments(__doc__, tiny=tiny, layers=4, heads=8, wide=24, side=24, width=96, pixels=256)
    small = DiTConfig(layers=args.layers, heads=args.heads, mlp_dim=512 * args.heads)
    small = replace(small, context_dim=512)
    wide = DiTConfig(layers=2, heads=args.wide, mlp_dim=512 * args.wide)
    rows = [
        measure_step(small, args.side, 0, args.runs),
        measure_step(replace(small, zero_cond_t=True), args.side, 1, args.runs),
        measure_step(wide, args.side // 2, 0, args.runs),
    ]
    notes = [
        f"target in tokens, references as large, {WORDS} tokens of text; difference relative to "
        "the output's range"
    ]
    show("A step of Qwen-Image's DiT, fp32", rows, args.json, notes)
    rows = measure_vae(args.width, args.pixels, args.runs)
    notes = ["difference relative to the output's range"]
    show("Qwen-Image's VAE, fp32", rows, args.json, notes)


if __name__ == "__main__":
    main()
