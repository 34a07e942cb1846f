"""Ways along the flow, from noise to the picture: generators that yield after every step.

The caller owns the loop: it shows progress and previews, and stops by asking for no more states.
Nothing runs between two states, and no tensor of the caller is ever written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from . import SamplingError

Sigmas: TypeAlias = Tensor | Sequence[float]
Model: TypeAlias = Callable[[Tensor, float], Tensor]  # (x, sigma) -> v = noise - x0
Sampler: TypeAlias = Callable[[Model, Tensor, Sigmas], Iterator["State"]]


@dataclass(frozen=True)
class State:
    """The run after `step` of its `total` steps."""

    step: int  # 1 after the first step, `total` after the last
    total: int
    sigma: float  # where the model was asked
    sigma_next: float  # where x is now
    x: Tensor  # the latents at sigma_next
    denoised: Tensor  # the finished latents, as the model guessed them at sigma


def euler(model: Model, x: Tensor, sigmas: Sigmas) -> Iterator[State]:
    """Go straight along the velocity to the next sigma: x' = x + (sigma' - sigma) v. First order.

    What distilled checkpoints are trained for. Liu et al., "Flow Straight and Fast",
    arXiv 2209.03003.
    """
    steps = steps_of(sigmas)
    for step, (sigma, sigma_next) in enumerate(steps, start=1):
        v = model(x, sigma)
        denoised = x - sigma * v
        x = x + (sigma_next - sigma) * v
        yield State(step, len(steps), sigma, sigma_next, x, denoised)


def dpmpp_2m(model: Model, x: Tensor, sigmas: Sigmas) -> Iterator[State]:
    """DPM-Solver++(2M): Euler towards an x0 extrapolated from the last two guesses. Second order.

    One model call a step, as Euler. Lu et al., arXiv 2211.01095, algorithm 2, with
    alpha = 1 - sigma and lambda = log(alpha / sigma).
    """
    steps = steps_of(sigmas)
    previous, last_h = None, math.inf
    for step, (sigma, sigma_next) in enumerate(steps, start=1):
        denoised = target = x - sigma * model(x, sigma)
        h = log_ratio(sigma_next) - log_ratio(sigma)
        # A guess made at sigma = 1, where lambda is -inf, is too far away to count: h / inf = 0.
        # The step to sigma = 0, where lambda is inf, is too long to extrapolate over.
        if previous is not None and sigma_next > 0:
            target = denoised + h / (2 * last_h) * (denoised - previous)
        keep = sigma_next / sigma
        x = keep * x + (1 - keep) * target
        previous, last_h = denoised, h
        yield State(step, len(steps), sigma, sigma_next, x, denoised)


SAMPLERS: dict[str, Sampler] = {"euler": euler, "dpmpp_2m": dpmpp_2m}


def sampler(name: str) -> Sampler:
    """The sampler called `name`; SamplingError with the names there are."""
    if name not in SAMPLERS:
        raise SamplingError(f"there is no sampler '{name}'; choose one of: {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]


def steps_of(sigmas: Sigmas) -> list[tuple[float, float]]:
    """(sigma, sigma_next) of every step; SamplingError unless they fall, between 1 and 0.

    Fewer than two sigmas are no step at all, as in image-to-image with denoise 0.
    """
    values: list[float] = torch.as_tensor(sigmas, dtype=torch.float64).flatten().tolist()
    steps = list(pairwise(values))
    if not all(0 <= value <= 1 for value in values) or not all(a > b for a, b in steps):
        raise SamplingError(
            "sigmas must lie between 1 (noise) and 0 (the picture) and fall with every step; got "
            f"{', '.join(f'{value:.4g}' for value in values)}."
        )
    return steps


def log_ratio(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), half the log signal-to-noise ratio, with both ends."""
    if sigma == 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
