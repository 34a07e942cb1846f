"""Sizes and resizing of references against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from seedling.model_loaders.families.qwen_image_21.sizes import (
    BUCKETS,
    reference_size,
    resize,
    target_size,
)

pipeline = pytest.importorskip("diffusers.pipelines.qwenimage21.pipeline_qwenimage21")


@given(st.integers(64, 8192), st.integers(64, 8192), st.sampled_from([512, 1024, 1536, 2048]))
def test_reference_size_is_that_of_diffusers(width: int, height: int, side: int) -> None:
    theirs = pipeline.calculate_dimensions(side * side, width / height)[:2]
    assert reference_size(width, height, side * side) == tuple(max(s, 32) for s in theirs)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([0, None, 128**2, 1024**2]))
def test_sides_are_multiples_of_32_and_settled(w: int, h: int, area: int | None) -> None:
    size = reference_size(w, h, area)
    assert all(side >= 32 and side % 32 == 0 for side in size)
    if not area:
        assert reference_size(*size, area) == size
        assert all(0 <= new - old < 32 for new, old in zip(size, (w, h), strict=True))


@pytest.mark.parametrize(
    "given, area, expected",
    [
        ((1024, 1024), 1024**2, (1024, 1024)),
        ((1920, 1080), 1024**2, (1376, 768)),
        ((1080, 1920), 1024**2, (768, 1376)),
        ((1920, 1080), 0, (1920, 1088)),
        ((1920, 1080), None, (1920, 1088)),
        ((10, 10), 0, (32, 32)),
    ],
)
def test_known_sizes(given: tuple[int, int], area: int | None, expected: tuple[int, int]) -> None:
    assert reference_size(*given, area) == expected


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        reference_size(0, 5)


def test_target_follows_one_reference() -> None:
    references = [(1920, 1080), (1000, 1000)]
    assert target_size(references) == (1024, 1024)
    assert target_size(references, like="first") == (1376, 768)
    assert target_size(references, 0, "first") == (1920, 1088)
    assert target_size([]) == (1024, 1024)
    assert target_size([], 2048**2) == (2048, 2048)


def test_buckets_are_sizes_of_the_model() -> None:
    assert len(set(BUCKETS)) == 7
    assert all(reference_size(*size, 0) == size for size in BUCKETS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(96, 64), (160, 224), (128, 96)])
def test_resize_is_that_of_diffusers(mode: str, size: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (96, 128, len(mode)), dtype=np.uint8)
    image = Image.fromarray(pixels, mode)
    processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=64)
    width, height = size
    theirs = np.array(processor.resize(image.convert("RGBA"), width=width, height=height))
    ours = resize(torch.from_numpy(pixels).float() / 255, size)
    assert np.array_equal((ours * 255).round().numpy().astype(np.uint8), theirs[..., : len(mode)])


def test_resize_keeps_what_fits_and_refuses_the_rest() -> None:
    image = torch.rand(32, 64, 4)
    assert resize(image, (64, 32)) is image
    with pytest.raises(ValueError, match="1 x 32 x 64 x 3"):
        resize(torch.zeros(1, 32, 64, 3), (64, 32))
