"""The VAE of FLUX.2 against diffusers on the same random weights, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.families.flux2.vae import VAE, VAEConfig, VAEError

diffusers = pytest.importorskip("diffusers")

CONFIG = VAEConfig(channels=4, widths=(8, 16, 16), decoder_widths=(8, 8, 16), blocks=1, groups=4)


def oracle_and_ours(config: VAEConfig = CONFIG) -> tuple[torch.nn.Module, VAE]:
    torch.manual_seed(0)
    stages = len(config.widths)
    oracle = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages, block_out_channels=config.widths,
        decoder_block_out_channels=config.decoder_widths, layers_per_block=config.blocks,
        latent_channels=config.channels, norm_num_groups=config.groups,
        use_quant_conv=config.quant_conv, use_post_quant_conv=config.post_quant_conv,
    ).eval()  # fmt: skip
    for name, p in oracle.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and p.ndim == 1), std=0.2)
    oracle.bn.running_mean.normal_()
    oracle.bn.running_var.uniform_(0.5, 3.0)
    weights = {k: v for k, v in oracle.state_dict().items() if k != "bn.num_batches_tracked"}
    ours = VAE(config)
    ours.load_state_dict(weights, strict=True)
    return oracle, ours.eval()


def published_latents(oracle, pixels: Tensor) -> Tensor:
    """As the published pipelines make them of a reference."""
    z = diffusers.Flux2KleinPipeline._patchify_latents(oracle.encode(pixels).latent_dist.mode())
    mean = oracle.bn.running_mean.view(1, -1, 1, 1)
    return (z - mean) / torch.sqrt(oracle.bn.running_var.view(1, -1, 1, 1) + 1e-4)


def published_pixels(oracle, latents: Tensor) -> Tensor:
    std = torch.sqrt(oracle.bn.running_var.view(1, -1, 1, 1) + 1e-4)
    z = latents * std + oracle.bn.running_mean.view(1, -1, 1, 1)
    return oracle.decode(diffusers.Flux2KleinPipeline._unpatchify_latents(z)).sample


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (8, 56)])
@pytest.mark.parametrize("convolutions", [True, False])
@torch.no_grad()
def test_it_equals_diffusers(size, convolutions):
    """Also as the small decoder, and without the 1x1 convolutions around the latents."""
    from dataclasses import replace

    oracle, ours = oracle_and_ours(
        replace(CONFIG, quant_conv=convolutions, post_quant_conv=convolutions)
    )
    pixels = torch.rand(2, 3, *size) * 2 - 1
    latents = published_latents(oracle, pixels)
    assert error(ours.encode(pixels), latents) < 1e-4
    assert ours.encode(pixels).shape == (2, CONFIG.z_dim, *(s // CONFIG.factor for s in size))
    z = torch.randn_like(latents)
    assert error(ours.decode(z, clamp=False), published_pixels(oracle, z)) < 1e-4
    assert ours.decode(z * 100).abs().max() <= 1


@torch.no_grad()
def test_what_it_cannot_take_is_refused_in_words():
    _, ours = oracle_and_ours()
    with pytest.raises(VAEError, match="without alpha"):
        ours.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(VAEError, match="multiples of 8, but was given 20x16"):
        ours.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(VAEError, match="same model family"):
        ours.decode(torch.zeros(1, 64, 4, 4))
    with pytest.raises(VAEError, match="norm_num_groups"):
        VAEConfig(widths=(24, 32), decoder_widths=(32, 32))


def test_gradients_reach_every_weight():
    _, ours = oracle_and_ours()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    ours.decode(ours.encode(pixels), clamp=False).square().mean().backward()
    log_variance = {"encoder.conv_out.weight", "encoder.conv_out.bias"}
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0 or name in log_variance or name.endswith("to_k.bias"), name


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 496, 128), (2, 104, 40)])
def test_strips_change_no_bit(batch: int, height: int, width: int) -> None:
    """Not even those of uneven heights: 3 and 7 divide neither 62 nor 13 rows of latents."""
    _, ours = oracle_and_ours()
    pixels = torch.rand(batch, 3, height, width) * 2 - 1
    latents = ours.encode(pixels, 1)
    picture = ours.decode(latents, 1, clamp=False)
    for strips in (2, 3, 7):
        assert torch.equal(ours.encode(pixels, strips), latents)
        assert torch.equal(ours.decode(latents, strips, clamp=False), picture)
    assert torch.equal(ours.decode(latents, memory=1 << 20, clamp=False), picture)


@torch.no_grad()
def test_strips_on_several_threads_differ_by_rounding_at_most() -> None:
    _, ours = oracle_and_ours()
    pixels = torch.rand(1, 3, 496, 128) * 2 - 1
    latents = ours.encode(pixels, 1)
    assert error(ours.encode(pixels, 3), latents) < 1e-5
    whole = ours.decode(latents, 1, clamp=False)
    assert error(ours.decode(latents, 3, clamp=False), whole) < 1e-5


@torch.no_grad()
def test_strips_of_a_picture_far_from_grey_equal_diffusers() -> None:
    """Norms that read sums of squares lose digits where the mean is large; here it is 20 times the
    deviation."""
    oracle, ours = oracle_and_ours()
    pixels = 1 + 0.05 * torch.randn(1, 3, 496, 128)
    assert error(ours.encode(pixels, 3), published_latents(oracle, pixels)) < 1e-4


@torch.no_grad()
def test_strips_save_memory(peak: Any) -> None:
    """At full width on the meta device: shapes and lifetimes without arithmetic."""
    vae = VAE(device="meta")
    pixels, latents = (torch.empty(1, *s, device="meta") for s in ((3, 512, 512), (128, 32, 32)))
    whole = peak(vae.decode, latents, 1)
    assert whole > 640 * 512 * 512 * 4  # values per pixel, in fp32
    assert peak(vae.decode, latents, 32) < 0.5 * whole
    assert peak(vae.encode, pixels, 32) < 0.6 * peak(vae.encode, pixels, 1)
    # By itself: what layers hold, and an eighth of the memory that it was told or somewhat more.
    held = vae.held * 512 * 512 * 4
    assert held < peak(vae.decode, latents, memory=whole // 2) < held + whole // 8
    assert peak(vae.decode, latents, memory=2 * whole) == whole


def test_no_strip_at_all_is_refused() -> None:
    with pytest.raises(VAEError, match="told 0"):
        VAE(CONFIG, device="meta").decode(torch.empty(1, 16, 4, 4, device="meta"), 0)
