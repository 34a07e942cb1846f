"""Samplers against diffusers, and against a flow whose exact solution is known; guidance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seedling.sampling import SamplingError
from seedling.sampling.guidance import guided, norm_rescale
from seedling.sampling.samplers import SAMPLERS, Sampler, State, sampler
from seedling.sampling.schedules import flow_sigmas

MEAN, STD = 0.7, 0.4  # of the Gaussian data below
EVERY = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


def last(states: object) -> State:
    *_, state = states  # type: ignore[misc]
    return state


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity E[noise - x0 | x] where the data is a Gaussian with MEAN and STD."""
    alpha = 1 - sigma
    variance = (alpha * STD) ** 2 + sigma**2
    return (sigma - alpha * STD**2) / variance * (x - alpha * MEAN) - MEAN


def bent(x: Tensor, sigma: float) -> Tensor:
    """A velocity without meaning that depends on everything."""
    return torch.sin(3 * x) + sigma * x.roll(1, -1) - 0.5


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)


def order(sample: Sampler, steps: int) -> float:
    """The order of convergence between `steps` and twice as many, on the Gaussian flow."""
    x, end = noise(torch.float64), 0.02
    # The flow moves a Gaussian by its mean and scales it by its deviation.
    exact = (1 - end) * MEAN + math.hypot((1 - end) * STD, end) * x
    sigmas = [torch.linspace(1, end, n + 1, dtype=torch.float64) for n in (steps, 2 * steps)]
    coarse, fine = ((last(sample(gaussian, x, s)).x - exact).abs().max().item() for s in sigmas)
    return math.log2(coarse / fine)


def test_orders_of_convergence() -> None:
    assert order(sampler("euler"), 100) == pytest.approx(1, abs=0.1)
    assert order(sampler("dpmpp_2m"), 100) == pytest.approx(2, abs=0.1)


@EVERY
def test_the_default_schedule_ends_at_the_picture(sample: Sampler) -> None:
    """Down to sigma = 0, where lambda is infinite, the exact end is reached too."""
    x = noise(torch.float64)
    state = last(sample(gaussian, x, flow_sigmas(400, mu=0.7)))
    torch.testing.assert_close(state.x, MEAN + STD * x, rtol=0, atol=0.015)


def test_euler_is_that_of_diffusers() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    oracle = schedulers.FlowMatchEulerDiscreteScheduler()
    oracle.set_timesteps(sigmas=flow_sigmas(8, 0)[:-1].tolist())
    x = noise()
    for state in sampler("euler")(bent, noise(), oracle.sigmas):
        t = oracle.timesteps[state.step - 1]
        x = oracle.step(bent(x, state.sigma), t, x, return_dict=False)[0]
        torch.testing.assert_close(state.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [0.999, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_dpmpp_2m_is_that_of_diffusers(steps: int, first: float) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    oracle = schedulers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction", solver_order=2
    )
    oracle.set_timesteps(steps)
    oracle.sigmas[0] = first
    assert oracle.sigmas[-1] == 0
    x = noise()
    for state in sampler("dpmpp_2m")(bent, noise(), oracle.sigmas):
        t = oracle.timesteps[state.step - 1]
        x = oracle.step(bent(x, state.sigma), t, x, return_dict=False)[0]
        torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0, 0.9, 0.5, 0.0], [0.6, 0.2, 0.1]])
def test_a_certain_model_is_followed_exactly(sample: Sampler, sigmas: list[float]) -> None:
    """A model that always sees the same x0 moves x on the straight line to it, in any steps."""
    x, target = noise(torch.float64), torch.full((6, 6), 0.25, dtype=torch.float64)
    states = list(sample(lambda x, sigma: (x - target) / sigma, x, sigmas))
    for state in states:
        torch.testing.assert_close(state.denoised, target.expand_as(x))
        line = target + (x - target) * (state.sigma_next / sigmas[0])
        torch.testing.assert_close(state.x, line)
    if sigmas[-1] == 0:
        assert torch.equal(states[-1].x, states[-1].denoised)


@EVERY
def test_what_is_yielded(sample: Sampler) -> None:
    sigmas = flow_sigmas(5, 0.5, terminal=0.02)
    states = list(sample(bent, noise(), sigmas))
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    assert {state.total for state in states} == {5}
    assert [state.sigma for state in states] == sigmas[:-1].tolist()
    assert [state.sigma_next for state in states] == sigmas[1:].tolist()
    assert all(state.x.shape == noise().shape and state.x.isfinite().all() for state in states)


@EVERY
def test_nothing_of_the_caller_is_changed(sample: Sampler) -> None:
    x, sigmas = noise(), flow_sigmas(4, 0.5)
    states = []
    for state in sample(bent, x, sigmas):
        states.append((state, state.x.clone(), state.denoised.clone()))
    assert torch.equal(x, noise()) and torch.equal(sigmas, flow_sigmas(4, 0.5))
    for state, x_then, denoised_then in states:
        assert torch.equal(state.x, x_then) and torch.equal(state.denoised, denoised_then)


@EVERY
def test_stopping_midway(sample: Sampler) -> None:
    asked: list[float] = []

    def model(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return bent(x, sigma)

    states = sample(model, noise(), [1.0, 0.8, 0.5, 0.0])
    assert asked == [], "nothing runs before the first state is asked for"
    next(states)
    assert asked == [1.0]
    states.close()  # type: ignore[attr-defined]
    assert list(states) == [] and asked == [1.0]


@EVERY
def test_an_error_of_the_model_reaches_the_caller(sample: Sampler) -> None:
    def model(x: Tensor, sigma: float) -> Tensor:
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        next(sample(model, noise(), [1.0, 0.0]))


@EVERY
@pytest.mark.parametrize("sigmas", [[], [0.0], [0.7]])
def test_no_step_at_all(sample: Sampler, sigmas: list[float]) -> None:
    assert list(sample(bent, noise(), sigmas)) == []


@EVERY
@pytest.mark.parametrize(
    "sigmas", [[1.0, 0.5, 0.5, 0.0], [0.0, 1.0], [14.6, 1.0, 0.0], [1.0, -0.1], [math.nan, 0.0]]
)
def test_sigmas_that_are_not_a_flow(sample: Sampler, sigmas: list[float]) -> None:
    with pytest.raises(SamplingError, match="between 1 .* and 0 .* fall with every step; got"):
        next(sample(bent, noise(), sigmas))


def test_an_unknown_sampler() -> None:
    with pytest.raises(SamplingError, match="no sampler 'eular'; choose one of: euler, dpmpp_2m"):
        sampler("eular")


def test_guidance() -> None:
    positive, negative = noise(), noise().flip(0)
    assert guided(positive, negative, 1) is positive
    torch.testing.assert_close(guided(positive, negative, 0), negative)
    torch.testing.assert_close(guided(positive, negative, 4), 4 * positive - 3 * negative)


def test_rescaled_guidance_keeps_direction_and_takes_length() -> None:
    positive = noise()
    combined = guided(positive, noise().flip(0), 4)
    rescaled = norm_rescale(combined, positive)
    torch.testing.assert_close(rescaled.norm(dim=1), positive.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(rescaled, combined, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    packed = norm_rescale(combined.movedim(1, -1), positive.movedim(1, -1), dim=-1)
    torch.testing.assert_close(packed.movedim(-1, 1), rescaled)
    assert torch.equal(
        norm_rescale(torch.zeros(1, 4, 2, 2), positive[:1, :, :2, :2]), torch.zeros(1, 4, 2, 2)
    )
