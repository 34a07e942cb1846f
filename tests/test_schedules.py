"""Schedules against stored numbers and against diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from seedling.model_loaders.family import Schedule
from seedling.sampling import SamplingError
from seedling.sampling.schedules import flow_sigmas, partial, resolution_shift, sigmas_for

# Qwen-Image-2.1 and its Turbo, as published.
BASE = Schedule(name="base", steps=40, terminal=0.02)
TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0)
TURBO = Schedule(name="Turbo", steps=8, sigmas=TURBO_SIGMAS)


def tokens(width: int, height: int) -> int:
    return (width // 16) * (height // 16)


@pytest.mark.parametrize(
    ("size", "mu"),
    [
        ((1024, 1024), 0.6935),
        ((1536, 1536), 0.9516),
        ((2048, 2048), 1.3129),
        ((2752, 1536), 1.3194),
    ],
)
def test_mu_of_the_published_sizes(size: tuple[int, int], mu: float) -> None:
    assert resolution_shift(tokens(*size), 0.5, 0.9, 256, 8192) == pytest.approx(mu, abs=5e-5)


def test_eight_steps_at_2k() -> None:
    stored = [1.0, 0.9445, 0.8765, 0.7915, 0.6819, 0.5355, 0.3299, 0.02, 0.0]
    sigmas = sigmas_for(BASE, 8, tokens(2048, 2048))
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(stored, abs=5e-5)


@pytest.mark.parametrize(
    ("mu", "stored"),
    [
        (2.2912, [1.0, 0.9674, 0.9081, 0.7672, 0.0]),  # FLUX.2 klein at 1024 x 1024
        (math.log(3), [1.0, 0.9, 0.75, 0.5, 0.0]),  # Qwen-Image-Lightning
    ],
)
def test_four_steps_without_a_terminal(mu: float, stored: list[float]) -> None:
    assert flow_sigmas(4, mu).tolist() == pytest.approx(stored, abs=5e-5)


@pytest.mark.parametrize("size", [(128, 128), (1024, 1024), (2752, 1536), (4096, 4096)])
@pytest.mark.parametrize("steps", [2, 4, 8, 40, 100])
@pytest.mark.parametrize("terminal", [0.02, None])
def test_the_formula_is_that_of_diffusers(
    size: tuple[int, int], steps: int, terminal: float | None
) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    oracle = schedulers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=terminal, time_shift_type="exponential"
    )
    mu = 0.5 + 0.4 * (tokens(*size) - 256) / (8192 - 256)
    times = torch.linspace(1, 1 / steps, steps).tolist()
    oracle.set_timesteps(sigmas=times, mu=mu)
    ours = sigmas_for(Schedule(name="", steps=steps, terminal=terminal), None, tokens(*size))
    torch.testing.assert_close(ours, oracle.sigmas, rtol=0, atol=1e-6)


def test_a_single_step_starts_from_noise() -> None:
    assert sigmas_for(BASE, 1, 4096).tolist() == [1.0, 0.0]


def test_a_trained_list_is_used_as_it_is() -> None:
    for steps in (None, 8):
        assert torch.equal(sigmas_for(TURBO, steps, 4096), torch.tensor(TURBO_SIGMAS))
    with pytest.raises(SamplingError, match="20 steps were asked for.* 8 steps .*Turbo.*resampled"):
        sigmas_for(TURBO, 20, 4096)


def test_a_trained_list_can_be_resampled() -> None:
    half = sigmas_for(TURBO, 4, 4096, resample=True)
    assert half.tolist() == pytest.approx(TURBO_SIGMAS[::2])
    assert torch.equal(sigmas_for(TURBO, 8, 4096, resample=True), torch.tensor(TURBO_SIGMAS))
    for steps in (1, 3, 50):
        sigmas = sigmas_for(TURBO, steps, 4096, resample=True)
        assert len(sigmas) == steps + 1
        assert (sigmas[0], sigmas[-1]) == (1, 0) and (sigmas.diff() < 0).all()


def test_partial_keeps_the_last_steps() -> None:
    sigmas = torch.linspace(1, 0, 11)
    assert torch.equal(partial(sigmas, 1), sigmas)
    assert torch.equal(partial(sigmas, 0.7), sigmas[3:])
    assert torch.equal(partial(sigmas, 0.001), sigmas[-2:])
    assert torch.equal(partial(sigmas, 0), sigmas[-1:])


def test_denoise_keeps_the_steps_of_a_formula_and_shortens_a_list() -> None:
    whole = sigmas_for(BASE, 20, 4096)
    assert torch.equal(sigmas_for(BASE, 20, 4096, denoise=1.0), whole)
    assert torch.equal(sigmas_for(BASE, 10, 4096, denoise=0.5), whole[-11:])
    assert torch.equal(sigmas_for(TURBO, 8, 4096, denoise=0.5), torch.tensor(TURBO_SIGMAS[-5:]))
    for schedule in (BASE, TURBO):
        assert sigmas_for(schedule, None, 4096, denoise=0).tolist() == [0]


@pytest.mark.parametrize("denoise", [-0.5, 1e-9, 1.01, math.nan])
def test_denoise_out_of_range(denoise: float) -> None:
    with pytest.raises(SamplingError, match="denoise must be 0, or lie between"):
        sigmas_for(BASE, 8, 4096, denoise=denoise)


def test_impossible_numbers() -> None:
    for schedule in (BASE, TURBO):
        with pytest.raises(SamplingError, match="at least 1, 0 was given"):
            sigmas_for(schedule, 0, 4096, resample=True)
    with pytest.raises(SamplingError, match="at least one token"):
        sigmas_for(BASE, 8, 0)
