"""Train the embedded VAE: its encoder is a projection, its decoder starts as the inverse of that.

The projection is written into the ordinary VAE class: identity residual blocks, SiLU made linear by
pairs (silu(x) - silu(-x) = x), the RMS norm held still by one large constant channel.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from ..model_loaders.load import load_vae
from ..quant.operations import has_bf16_products
from .projection import CHANNELS, PATCH, Projection, pictures
from .runs import Average, Budget, Run, warm_stable_decay
from .speed import autocast

ENCODER_DIM, DECODER_DIM = 144, 160
ENCODER_CONSTANT, DECODER_CONSTANT = 300.0, 32.0


def _still(norm: Any, constant: float, signal: int) -> None:
    """Make an RMS norm pass channels 0..signal through, given a channel of value `constant`."""
    gamma = norm.gamma.data
    gamma.fill_(constant / gamma.shape[0] ** 0.5)
    gamma[signal:].fill_(0.0)


@torch.no_grad()
def linear_vae(projection: Projection) -> Any:
    """A VAE that is the projection and its inverse, before any training."""
    mean, components, scale = projection.mean, projection.components, projection.scale
    config = VAEConfig(
        z_dim=CHANNELS, base_dim=ENCODER_DIM, decoder_base_dim=DECODER_DIM, dim_mult=(1,),
        num_res_blocks=1, temporal_downsample=(), patch_size=PATCH,
        latents_mean=(0.0,) * CHANNELS, latents_std=tuple(scale.tolist()),
    )  # fmt: skip
    vae: Any = VAE(config)
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "proj.weight", "proj.bias", "conv1.bias")):
            parameter.zero_()
    for name in ("quant_conv", "post_quant_conv"):
        conv = getattr(vae, name)
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[..., None, None])
        conv.bias.zero_()
    n, encoder, decoder = CHANNELS, vae.encoder, vae.decoder
    centre = (slice(None), slice(None), 1, 1)

    encoder.conv_in.weight.zero_()
    encoder.conv_in.bias.zero_()
    encoder.conv_in.weight[centre][:n] = components
    encoder.conv_in.weight[centre][n : 2 * n] = -components
    encoder.conv_in.bias[:n], encoder.conv_in.bias[n : 2 * n] = (
        -components @ mean,
        components @ mean,
    )
    encoder.conv_in.bias[2 * n] = ENCODER_CONSTANT
    _still(encoder.norm_out, ENCODER_CONSTANT, 2 * n)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    encoder.conv_out.weight[centre][:n, :n] = torch.eye(n)
    encoder.conv_out.weight[centre][:n, n : 2 * n] = -torch.eye(n)
    encoder.conv_out.bias[n:] = -10.0  # log variance: the encoder is certain

    decoder.conv_in.bias.zero_()
    decoder.conv_in.weight.mul_(0.1)
    decoder.conv_in.weight[: 2 * n + 1] = 0
    decoder.conv_in.weight[centre][:n] = torch.eye(n)
    decoder.conv_in.weight[centre][n : 2 * n] = -torch.eye(n)
    decoder.conv_in.bias[2 * n] = DECODER_CONSTANT
    for name, module in decoder.named_modules():
        if name.endswith(("norm1", "norm2", "norm")):
            module.gamma.fill_(
                1.0 if name.endswith("norm2") else DECODER_CONSTANT / DECODER_DIM**0.5
            )
            if not name.endswith("norm2"):
                module.gamma[2 * n] = DECODER_DIM**-0.5
    _still(decoder.norm_out, DECODER_CONSTANT, 2 * n)
    decoder.conv_out.weight.zero_()
    decoder.conv_out.weight[centre][:, :n] = components.T
    decoder.conv_out.weight[centre][:, n : 2 * n] = -components.T
    decoder.conv_out.bias.copy_(mean)
    return vae


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Per-picture PSNR in dB of pictures in -1..1."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 on pixels and on their differences (edges), plus a little L2 for PSNR."""
    loss = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (decoded.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean()
    return loss


def decode_for_training(vae: VAE, latents: Tensor) -> Tensor:
    """Decode without the clamp, whose gradient is zero outside."""
    return vae.decode(latents, clamp=False)


def start(folder: Path, exported: Path) -> dict[str, Any]:
    """A run's last checkpoint; the first time, the exported VAE or else the projection as a VAE."""
    run = Run(folder, "vae")
    state = run.load()
    if state is None:
        vae = load_vae(exported).module if exported.exists() else linear_vae(Projection(folder))
        weights = {key: value.float() for key, value in vae.state_dict().items()}
        state = {"config": asdict(vae.config), "weights": weights}
    return state


def train(
    folder: Path, minutes: float, exported: Path, batch: int = 16, rate: float = 4e-4
) -> None:
    """Train the decoder; the encoder stays the PCA, so latents made earlier stay valid."""
    run, state = Run(folder, "vae"), start(folder, exported)
    vae = VAE(VAEConfig(**state["config"]))
    vae.load_state_dict(state["weights"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(vae, 0.998)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
    budget, bf16 = Budget(minutes, state.get("minutes", 0.0)), has_bf16_products()
    rng = np.random.default_rng(100 + state.get("step", 0))
    test = pictures(np.random.default_rng(2), 64)

    def save(step: int) -> None:
        probe = VAE(vae.config)
        probe.load_state_dict(average.values)
        with torch.no_grad():
            quality = psnr(probe.decode(probe.encode(test)), test).mean()
        run.log(step=step, minutes=budget.spent, psnr=float(quality))
        run.save(config=asdict(vae.config), weights=vae.state_dict(), average=average.values,
                 optimizer=optimizer.state_dict(), step=step, minutes=budget.spent)  # fmt: skip

    step = first = state.get("step", 0)
    save(step)
    for step in budget.steps(first, "vae"):
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_stable_decay(step, budget.progress)
        pixels = pictures(rng, batch)
        with torch.no_grad():
            latents = vae.encode(pixels)
            latents = latents + torch.randn_like(latents) * 0.05 * torch.rand(batch, 1, 1, 1)
        with autocast(bf16):
            decoded = decode_for_training(vae, latents)
        loss = reconstruction_loss(decoded.float(), pixels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update(vae, step)
        if run.due(2):
            save(step)
    save(step)
