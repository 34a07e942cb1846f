"""The VAE of Qwen-Image-2.1 against diffusers on the same random weights, fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig, VAEError
from seedling.quant.operations import widened

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
    "narrower inside": VAEConfig(
        z_dim=4, base_dim=4, decoder_base_dim=4, dim_mult=(4, 2, 1), num_res_blocks=1,
        temporal_downsample=(True, False), **statistics(4),
    ),
    "one stage, patches of 16": VAEConfig(
        z_dim=8, base_dim=24, decoder_base_dim=16, dim_mult=(1,), num_res_blocks=1,
        temporal_downsample=(), patch_size=16, **statistics(8),
    ),
}  # fmt: skip


def oracle_of(config: VAEConfig) -> Any:
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


def oracle_and_ours(config: VAEConfig) -> tuple[Any, VAE]:
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
    ours = VAE(VAEConfig(), device="meta").state_dict()
    assert {name: tuple(p.shape) for name, p in ours.items()} == theirs


def test_published_statistics() -> None:
    with torch.device("meta"):
        theirs = oracle_module.AutoencoderKLQwenImage21().config
    assert list(VAEConfig().latents_mean) == list(theirs.latents_mean)
    assert list(VAEConfig().latents_std) == list(theirs.latents_std)


def test_gradients_equal_diffusers() -> None:
    """What the trainer of the embedded model relies on: in-place sums do not disturb autograd."""
    config = CONFIGS["published, narrow"]
    oracle, ours = oracle_and_ours(config)
    pixels = torch.rand(1, 4, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v)[None, :, None, None]
                 for v in (config.latents_mean, config.latents_std))  # fmt: skip
    latents = (oracle.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    theirs = oracle.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    (theirs - pixels).square().mean().backward()
    (ours.decode(ours.encode(pixels)) - pixels).square().mean().backward()
    expected = dict(oracle.named_parameters())
    for name, p in ours.named_parameters():
        want = expected[name].grad
        if want is None:
            assert "time_conv" in name and p.grad is None
        else:
            assert p.grad is not None
            assert (p.grad - want).abs().max() < 1e-3 * want.abs().max() + 1e-9, name


@torch.no_grad()
def test_strips_on_several_threads_differ_by_rounding_at_most() -> None:
    _, vae = oracle_and_ours(CONFIGS["published, narrow"])
    latents = vae.encode(torch.rand(1, 4, 272, 112) * 2 - 1, 1)
    whole = vae.decode(latents, 1)
    assert (vae.decode(latents, 7) - whole).abs().max() <= 1e-5 * (whole.max() - whole.min())


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [(272, 112), (176, 208)])
@pytest.mark.parametrize("batch", [1, 2])
def test_strips_are_the_same_bits(size: tuple[int, int], batch: int) -> None:
    _, vae = oracle_and_ours(CONFIGS["published, narrow"])
    pixels = torch.rand(batch, 4, *size) * 2 - 1
    latents = vae.encode(pixels, 1)
    picture = vae.decode(latents, 1)
    for strips in (2, 7):
        assert torch.equal(vae.encode(pixels, strips), latents)
        assert torch.equal(vae.decode(latents, strips), picture)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_strips_of_small_pictures_and_patches() -> None:
    """More strips than there are rows for: as many as make sense."""
    for name in ("patches of 2", "one stage, patches of 16"):
        _, vae = oracle_and_ours(CONFIGS[name])
        pixels = torch.rand(1, 4, 96, 32) * 2 - 1
        latents = vae.encode(pixels, 1)
        assert torch.equal(vae.encode(pixels, 50), latents)
        assert torch.equal(vae.decode(latents, 50), vae.decode(latents, 1))


@torch.no_grad()
def test_strips_bound_memory(peak: Any) -> None:
    """Full width at 1024 x 1024 on the meta device: shapes and lifetimes without arithmetic."""
    vae = VAE(VAEConfig(), device="meta")
    pixels, latents = (torch.empty(1, *s, device="meta") for s in ((4, 1024, 1024), (64, 64, 64)))
    whole = peak(vae.decode, latents, 1)
    assert peak(vae.decode, latents, 8) < 0.3 * whole
    assert peak(vae.decode, latents, memory=whole // 4) < 0.28 * whole
    assert peak(vae.encode, pixels, 8) < 0.2 * peak(vae.encode, pixels, 1)


@torch.no_grad()
def test_4096_pixels_need_less_than_4_gib(peak: Any) -> None:
    """By itself, even where attention makes all its scores, as it does on the meta device."""
    vae = VAE(VAEConfig(), device="meta")
    pixels, latents = (torch.empty(1, *s, device="meta") for s in ((4, 4096, 4096), (64, 256, 256)))
    assert peak(vae.decode, latents) < 4 << 30
    assert peak(vae.encode, pixels) < 4 << 30


@torch.no_grad()
def test_attention_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, vae = oracle_and_ours(CONFIGS["published, narrow"])
    latents = torch.randn(1, 8, 6, 7)
    whole = vae.decode(latents)
    monkeypatch.setattr("seedling.model_loaders.strips.SCORES", 5 * 42)
    assert torch.allclose(vae.decode(latents), whole, atol=1e-5)


@torch.no_grad()
def test_16_bit_weights_widened_are_the_rounded_weights() -> None:
    config = CONFIGS["published, narrow"]
    _, vae = oracle_and_ours(config)
    narrow = VAE(config, widened(), dtype=torch.bfloat16)
    narrow.load_state_dict(vae.state_dict())
    vae.load_state_dict(narrow.state_dict())
    pixels = torch.rand(1, 4, 32, 48) * 2 - 1
    assert torch.equal(narrow.encode(pixels), vae.encode(pixels))
    latents = torch.randn(1, 8, 2, 3)
    assert torch.equal(narrow.decode(latents), vae.decode(latents))


def test_wrong_inputs_are_named() -> None:
    vae = VAE(CONFIGS["published, narrow"], device="meta")
    for shape, words in (((1, 3, 32, 32), "alpha"), ((1, 4, 32, 40), "multiples of 16.*40x32"),
                         ((4, 32, 32), "batch"), ((1, 4, 0, 32), "32x0")):  # fmt: skip
        with pytest.raises(VAEError, match=words):
            vae.encode(torch.empty(shape, device="meta"))
    for shape in ((1, 16, 4, 4), (8, 4, 4), (1, 8, 0, 4)):
        with pytest.raises(VAEError, match="batch, 8, height, width"):
            vae.decode(torch.empty(shape, device="meta"))
    with pytest.raises(VAEError, match="told 0"):
        vae.decode(torch.empty(1, 8, 4, 4, device="meta"), 0)


def test_impossible_configs_are_named() -> None:
    config = CONFIGS["published, narrow"]
    for changes, words in (
        ({"dim_mult": (1, 3, 9, 9, 9)}, "from 1 to 3"),
        ({"dim_mult": (1, 2, 2, 2, 4)}, "from 2 to 4"),
        ({"temporal_downsample": (True,)}, "4 values of temporal_downsample"),
        ({"z_dim": 16}, "16 latent channels"),
    ):
        with pytest.raises(VAEError, match=words):
            replace(config, **changes)
