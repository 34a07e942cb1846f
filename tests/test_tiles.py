"""Large pictures: windows that blend without a seam, the detail pass, and the VAE in strips."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.sampling import SamplingError
from seedling.sampling.detail import enlarged, window_of, windowed
from seedling.sampling.tiles import in_tiles, starts, weights


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 64, 257])
@pytest.mark.parametrize(("window", "overlap"), [(8, 2), (8, 0), (16, 8), (16, 15), (64, 16)])
def test_windows_cover_everything(length: int, window: int, overlap: int) -> None:
    begin = starts(length, window, overlap)
    assert begin[0] == 0 and begin[-1] + min(window, length) == length
    for a, b in itertools.pairwise(begin):
        assert 0 < b - a <= window - overlap
    total = torch.zeros(length)
    for start, weight in zip(begin, weights(length, window, overlap), strict=True):
        assert len(weight) == min(window, length) and float(weight.min()) > 0
        total[start : start + len(weight)] += weight
    assert torch.allclose(total, torch.ones(length), atol=1e-6)


def test_a_window_that_cannot_overlap_so_is_refused() -> None:
    with pytest.raises(SamplingError, match="overlap must be smaller"):
        starts(30, 8, 8)


def test_what_needs_no_neighbours_is_exact() -> None:
    x = torch.randn(1, 3, 50, 41)
    done = in_tiles(lambda tile: tile.sin(), x, (16, 12), (5, 3))
    assert torch.allclose(done, x.sin(), atol=1e-6)


def test_tiles_that_disagree_make_a_slope_and_no_step() -> None:
    """Every tile answers with another number: neighbours differ by at most 1 / overlap of it."""
    counter = itertools.count()

    def answer(tile: Tensor) -> Tensor:
        return torch.full_like(tile, float(next(counter) % 2))

    done = in_tiles(answer, torch.zeros(1, 1, 16, 100), (16, 32), (0, 16))[0, 0, 0]
    assert float(done.min()) == 0 and float(done.max()) == 1
    assert float(done.diff().abs().max()) <= 1 / 16


def test_the_model_sees_windows_and_nothing_larger() -> None:
    sizes = []

    def model(x: Tensor, sigma: float) -> Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return x * sigma

    x = torch.randn(1, 4, 24, 20)
    done = windowed(model, (8, 8), (2, 2))(x, 0.5)
    assert torch.allclose(done, x * 0.5, atol=1e-6) and set(sizes) == {(8, 8)}
    sizes.clear()
    windowed(model, (64, 64), (16, 16))(x, 0.5)
    assert sizes == [(24, 20)]


def test_windows_are_whole_steps() -> None:
    assert window_of(1024, 0.25, 32, 16) == ((64, 64), (16, 16))
    assert window_of(128, 0.25, 32, 16) == ((8, 8), (2, 2))
    assert window_of(1000, 0.25, 16, 8) == ((124, 124), (32, 32))
    assert window_of(1, 0.5, 32, 16) == ((4, 4), (2, 2))
    with pytest.raises(SamplingError, match="overlap is 0"):
        window_of(1024, 0, 32, 16)


def test_enlarging_pads_to_the_grid() -> None:
    image = torch.rand(30, 50, 4)
    large, size = enlarged(image, 2, 32)
    assert (size.width, size.height) == (100, 60) and large.shape == (64, 128, 4)
    same, _ = enlarged(image, 1, 2)
    assert torch.equal(same, image)
    with pytest.raises(SamplingError, match="between 1 and 4"):
        enlarged(image, 5, 32)


# ---- on the embedded model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(nodes: Any) -> dict[str, Any]:
    return nodes.loaded()


def smooth(height: int, width: int) -> Tensor:
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(2))
    shape = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return shape[0].permute(1, 2, 0).clamp(0, 1)


def test_a_detail_pass_over_one_prefix(
    nodes: Any, loaded: dict[str, Any], monkeypatch: Any
) -> None:
    """Twice as large to the pixel, in windows of the model's size, each text read once."""
    model, vae = loaded["model"], loaded["vae"]
    positive, negative = nodes("EncodeInstruction", clip=loaded["clip"], prompt="a red star")
    seen: list[tuple[int, ...]] = []
    read: list[int] = []
    forward, prefix = model.module.forward, model.module.prefix

    def counted(x: Tensor, *more: Any, **named: Any) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return forward(x, *more, **named)

    def reading(*given: Any, **named: Any) -> Any:
        read.append(1)
        return prefix(*given, **named)

    monkeypatch.setattr(model.module, "forward", counted)
    monkeypatch.setattr(model.module, "prefix", reading)
    image = smooth(96, 112)[None]
    given = {"model": model, "positive": positive, "negative": negative, "vae": vae}
    (done,) = nodes("DetailPass", **given, image=image, steps=8, denoise=0.25, guidance=2.0)
    assert done.shape[1:3] == (192, 224)
    assert set(seen) == {(8, 8)} and len(read) == 2
    windows = len(starts(12, 8, 2)) * len(starts(14, 8, 2))
    assert len(seen) == 8 * 2 * windows  # steps, branches
    (again,) = nodes("DetailPass", **given, image=image, steps=8, denoise=0.25, guidance=2.0)
    assert torch.equal(done, again)


def test_without_denoise_a_picture_is_only_enlarged(nodes: Any, loaded: dict[str, Any]) -> None:
    from seedling.nodes.runtime import runtime

    model, vae = loaded["model"], loaded["vae"]
    positive, _ = nodes("EncodeInstruction", clip=loaded["clip"], prompt="x")
    image = smooth(64, 64)
    (done,) = nodes(
        "DetailPass", model=model, positive=positive, vae=vae, image=image[None], denoise=0.0,
        guidance=1.0,
    )  # fmt: skip
    large, _ = enlarged(image, 2, 32)
    wanted = runtime().decode(vae, runtime().encode(vae, large))
    assert torch.allclose(done, wanted, atol=1e-5)


def strips_and_whole(vae: Any, pixels: Tensor, strips: int) -> tuple[float, float]:
    """The largest difference of pictures in 0..1, and of latents, between strips and no strips."""
    with torch.no_grad():
        latents = vae.encode(pixels, 1)
        there = float((vae.encode(pixels, strips) - latents).abs().max())
        back = vae.decode(latents, strips) - vae.decode(latents, 1)
    return float(back.abs().max()) / 2, there


def test_the_embedded_vae_in_strips(loaded: dict[str, Any]) -> None:
    """Far below 1/255, the most that could be seen."""
    image = torch.cat([smooth(512, 384), torch.ones(512, 384, 1)], dim=-1)
    pixels = (image * 2 - 1).permute(2, 0, 1)[None]
    back, there = strips_and_whole(loaded["vae"].module.float(), pixels, 4)
    assert back < 1e-5 and there < 1e-4


@pytest.mark.slow
def test_the_full_size_vae_in_strips_at_512() -> None:
    """The published widths with random weights."""
    from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig

    torch.manual_seed(0)
    vae = VAE(VAEConfig()).eval()
    pixels = torch.rand(1, 4, 512, 512) * 2 - 1
    back, there = strips_and_whole(vae, pixels, 4)
    assert back < 1 / 255 / 100 and there < 1e-4
