"""The noise rule: alone or in a batch, the same bits."""

from __future__ import annotations

import pytest
import torch

from seedling.sampling import SamplingError
from seedling.sampling.noise import MAX_SEED, add_noise, batch_noise, image_seed, noise

SHAPE = (64, 8, 8)


def test_a_batch_is_its_images_one_by_one() -> None:
    batch = batch_noise(7, 3, 4, SHAPE)
    assert batch.shape == (4, *SHAPE)
    for i in range(4):
        assert torch.equal(batch[i], noise(7, 3 + i, SHAPE))
        assert torch.equal(batch[i], noise(image_seed(7, 3 + i), 0, SHAPE))
        assert torch.equal(batch[i : i + 1], batch_noise(7, 3 + i, 1, SHAPE))
    assert len({tuple(image.flatten().tolist()) for image in batch}) == 4


def test_the_first_image_has_the_noise_of_comfyui() -> None:
    theirs = torch.randn(
        (1, *SHAPE), dtype=torch.float32, generator=torch.manual_seed(42), device="cpu"
    )
    assert torch.equal(noise(42, 0, SHAPE), theirs[0])
    assert torch.equal(noise(42, 0, (1, *SHAPE)), theirs)


def test_stored_numbers() -> None:
    """torch may not change what a seed means; this says so if it ever does."""
    stored = torch.tensor([1.9269, 1.4873, 0.9007, -2.1055])
    torch.testing.assert_close(noise(42, 0, (64,))[:4], stored, rtol=0, atol=1e-4)


def test_other_precisions_are_the_same_noise_rounded() -> None:
    half = noise(1, 0, SHAPE, dtype=torch.bfloat16)
    assert torch.equal(half, noise(1, 0, SHAPE).bfloat16())
    assert batch_noise(1, 0, 2, SHAPE, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_generator_of_the_process_is_left_alone() -> None:
    before = torch.get_rng_state()
    noise(5, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_largest_seed_wraps_around() -> None:
    assert image_seed(MAX_SEED, 0) == 0xFFFFFFFFFFFFFFFF
    assert image_seed(MAX_SEED, 1) == 0
    batch = batch_noise(MAX_SEED, 0, 3, SHAPE)
    assert torch.equal(batch[1], noise(0, 0, SHAPE))
    assert torch.equal(batch[2], noise(1, 0, SHAPE))


def test_torch_reads_32_bits_of_a_seed() -> None:
    assert torch.equal(noise(5, 0, SHAPE), noise(5 + 2**32, 0, SHAPE))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_impossible_seeds(seed: int) -> None:
    with pytest.raises(SamplingError, match=f"between 0 and {MAX_SEED}, {seed} was given"):
        noise(seed, 0, SHAPE)


def test_impossible_counts() -> None:
    with pytest.raises(SamplingError, match="counted from 0, image -1"):
        noise(0, -1, SHAPE)
    with pytest.raises(SamplingError, match="at least one image, 0"):
        batch_noise(0, 0, 0, SHAPE)


def test_noise_is_added_along_the_flow() -> None:
    latents, drawn = noise(0, 0, SHAPE), noise(1, 0, SHAPE)
    assert torch.equal(add_noise(latents, drawn, 0), latents)
    assert torch.equal(add_noise(latents, drawn, 1), drawn)
    torch.testing.assert_close(add_noise(latents, drawn, 0.25), 0.75 * latents + 0.25 * drawn)
