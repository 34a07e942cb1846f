"""The VAE of Qwen-Image against diffusers on the same random weights, fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from seedling.model_loaders.families.qwen_image.vae import VAE, VAEConfig, VAEError
from seedling.quant.operations import widened

oracle_module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_qwenimage")


def statistics(z: int) -> dict[str, tuple[float, ...]]:
    return {
        "latents_mean": tuple(0.1 * i - 0.2 for i in range(z)),
        "latents_std": tuple(1.0 + 0.1 * i for i in range(z)),
    }


CONFIGS = {
    "published, narrow": VAEConfig(z_dim=6, base_dim=8, **statistics(6)),  # pyright: ignore[reportArgumentType]
    "with alpha": VAEConfig(z_dim=4, base_dim=8, in_channels=4, **statistics(4)),  # pyright: ignore[reportArgumentType]
    "two stages": VAEConfig(
        z_dim=4, base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,),
        **statistics(4),  # pyright: ignore[reportArgumentType]
    ),
}  # fmt: skip


def oracle_and_ours(config: VAEConfig) -> tuple[Any, VAE]:
    torch.manual_seed(0)
    oracle = oracle_module.AutoencoderKLQwenImage(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        input_channels=config.in_channels,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    ).eval()
    for name, p in oracle.named_parameters():
        around = 1.0 if name.endswith("gamma") else 0.0
        torch.nn.init.normal_(p, around, 0.1 if p.ndim < 4 else 1.2 / p[0].numel() ** 0.5)
    ours = VAE(config)
    ours.load_state_dict(one_tap(oracle.state_dict()), strict=True)
    return oracle, ours.eval()


def one_tap(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the loader takes of a causal convolution's kernel: its newest frame."""
    return {k: w[:, :, -1] if w.ndim == 5 else w for k, w in weights.items()}


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(name: str) -> None:
    config = CONFIGS[name]
    oracle, ours = oracle_and_ours(config)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in statistics(config.z_dim).values())
    pixels = torch.rand(2, config.in_channels, 32, 48) * 2 - 1
    theirs = oracle.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    latents = ours.encode(pixels)
    assert error(latents, (theirs - mean) / std) < 1e-5
    theirs = oracle.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert error(ours.decode(latents), theirs) < 1e-5


@pytest.mark.parametrize("size", [(256, 64), (192, 96)])
@pytest.mark.parametrize("strips", [2, 3, 7])
@torch.no_grad()
def test_strips_change_no_bit(strips: int, size: tuple[int, int]) -> None:
    _, ours = oracle_and_ours(CONFIGS["two stages"])
    height, width = size
    pixels = torch.rand(1, 3, height, width) * 2 - 1
    whole = ours.encode(pixels, 1)
    assert torch.equal(ours.encode(pixels, strips), whole)
    assert torch.equal(ours.decode(whole, strips), ours.decode(whole, 1))


@torch.no_grad()
def test_strips_of_the_published_shape_change_no_bit() -> None:
    _, ours = oracle_and_ours(replace(CONFIGS["with alpha"], base_dim=16))
    pixels = torch.rand(1, 4, 320, 64) * 2 - 1
    whole = ours.encode(pixels, 1)
    assert torch.equal(ours.encode(pixels, 4), whole)
    assert torch.equal(ours.decode(whole, 4), ours.decode(whole, 1))


@torch.no_grad()
def test_16_bit_weights_widened_are_the_fp32_network() -> None:
    _, ours = oracle_and_ours(CONFIGS["two stages"])
    half = {k: v.to(torch.bfloat16) for k, v in ours.state_dict().items()}
    ours.load_state_dict(half)
    wide = VAE(ours.config, widened(), dtype=torch.bfloat16)
    wide.load_state_dict(half)
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(wide.encode(pixels), ours.encode(pixels))
    assert torch.equal(wide.decode(ours.encode(pixels)), ours.decode(ours.encode(pixels)))


def test_what_does_not_fit_is_refused_in_words() -> None:
    _, ours = oracle_and_ours(CONFIGS["published, narrow"])
    with pytest.raises(VAEError, match=r"shape \(batch, 3, height, width\)"):
        ours.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(VAEError, match="multiples of 8, but was given 20x16"):
        ours.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(VAEError, match=r"shape \(batch, 6, height, width\)"):
        ours.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(VAEError, match="4 stages needs 3 values of temporal_downsample"):
        VAEConfig(temporal_downsample=(True,))
    with pytest.raises(VAEError, match="16 latent channels needs as many values"):
        VAEConfig(latents_mean=(0.0,))
