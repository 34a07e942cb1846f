"""The VAE of Qwen-Image-2.1 against diffusers on the same random weights, fp32."""

from __future__ import annotations

import pytest
import torch

from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig

oracle_module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_qwenimage21")


def statistics(z: int) -> dict:
    return {
        "latents_mean": tuple(0.1 * i - 0.2 for i in range(z)),
        "latents_std": tuple(1.0 + 0.1 * i for i in range(z)),
    }


CONFIGS = {
    "published, narrow": VAEConfig(
        z_dim=8, base_dim=4, decoder_base_dim=6, num_res_blocks=2, **statistics(8)
    ),
    "time on every stage": VAEConfig(
        z_dim=6, base_dim=4, decoder_base_dim=4, dim_mult=(2, 4, 4), num_res_blocks=1,
        temporal_downsample=(True, True), **statistics(6),
    ),
    "four to one": VAEConfig(
        z_dim=4, base_dim=8, decoder_base_dim=8, dim_mult=(1, 4, 4), num_res_blocks=1,
        temporal_downsample=(True, False), **statistics(4),
    ),
    "patches of 2": VAEConfig(
        z_dim=4, base_dim=8, decoder_base_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1,
        temporal_downsample=(False, True), patch_size=2, **statistics(4),
    ),
    "one stage, patches of 16": VAEConfig(
        z_dim=8, base_dim=24, decoder_base_dim=16, dim_mult=(1,), num_res_blocks=1,
        temporal_downsample=(), patch_size=16, **statistics(8),
    ),
}  # fmt: skip


def oracle_of(config: VAEConfig) -> torch.nn.Module:
    c, p = config, config.patch_size or 1
    return oracle_module.AutoencoderKLQwenImage21(
        base_dim=c.base_dim,
        decoder_base_dim=c.decoder_base_dim,
        z_dim=c.z_dim,
        dim_mult=list(c.dim_mult),
        num_res_blocks=c.num_res_blocks,
        temperal_downsample=list(c.temporal_downsample),
        latents_mean=list(c.latents_mean),
        latents_std=list(c.latents_std),
        in_channels=c.in_channels * p * p,
        out_channels=c.in_channels * p * p,
        patch_size=c.patch_size,
    ).eval()


def oracle_and_ours(config: VAEConfig) -> tuple[torch.nn.Module, VAE]:
    torch.manual_seed(0)
    oracle = oracle_of(config)
    for name, p in oracle.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif p.ndim > 1:
            torch.nn.init.normal_(p, std=1.5 / p[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(p, std=0.1)
    ours = VAE(config)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, ours.eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest error as a share of the range of `b`."""
    return float((a - b).abs().max() / (b.max() - b.min()))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    config = CONFIGS[name]
    oracle, ours = oracle_and_ours(config)
    pixels = torch.rand(2, 4, *size) * 2 - 1
    mean, std = (torch.tensor(v)[None, :, None, None]
                 for v in (config.latents_mean, config.latents_std))  # fmt: skip

    theirs = (oracle.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    latents = ours.encode(pixels)
    assert latents.shape == theirs.shape
    assert difference(latents, theirs) < 1e-5

    z = torch.randn_like(theirs)
    theirs = oracle.decode((z * std + mean)[:, :, None]).sample[:, :, 0]
    decoded = ours.decode(z)
    assert decoded.shape == pixels.shape == theirs.shape
    assert (theirs.abs() < 1).float().mean() > 0.3, "the clamp hides the comparison"
    assert difference(decoded, theirs) < 1e-5


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        oracle = oracle_module.AutoencoderKLQwenImage21()
    theirs = {name: tuple(p.shape) for name, p in oracle.state_dict().items()}
    ours = {name: tuple(p.shape) for name, p in VAE(VAEConfig(), device="meta").state_dict().items()}
    assert ours == theirs
