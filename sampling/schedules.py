"""Which sigmas a run visits: from 1 (noise) down to 0 (the picture), one more value than steps.

A checkpoint says through its `Schedule` how it wants to be sampled: by a formula of the step count
and the number of target tokens, or by the explicit list that a distilled checkpoint was trained on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_loaders.family import Schedule
from . import SamplingError

MIN_DENOISE = 0.001  # less would cut its few steps out of a schedule of a million


def sigmas_for(
    schedule: Schedule,
    steps: int | None,
    tokens: int,
    *,
    denoise: float = 1.0,
    resample: bool = False,
) -> Tensor:
    """(steps + 1,) sigmas for `tokens` target tokens; None: as many steps as the checkpoint likes.

    A list is used exactly as trained: another step count is a SamplingError, unless `resample`
    allows to interpolate. With `denoise` < 1 a formula still runs `steps` steps, over the tail of a
    longer schedule, as ComfyUI's KSampler does; a list keeps only its last values (`partial`).
    """
    check_denoise(denoise)
    if schedule.sigmas:
        return partial(trained_sigmas(schedule, steps, resample), denoise)
    steps = check_steps(schedule.steps if steps is None else steps)
    if denoise == 0:
        return torch.zeros(1)
    whole = int(steps / denoise)
    return flow_sigmas(whole, shift_of(schedule, tokens, whole), schedule.terminal)[-(steps + 1) :]


def shift_of(schedule: Schedule, tokens: int, steps: int) -> float:
    """mu of a schedule by a formula: the family's own, or the line over the tokens."""
    if tokens < 1:
        raise SamplingError(f"a picture has at least one token, {tokens} were given.")
    if schedule.mu is not None:
        return schedule.mu(tokens, steps)
    return resolution_shift(
        tokens,
        schedule.base_shift,
        schedule.max_shift,
        schedule.base_tokens,
        schedule.max_tokens,
    )


def flow_sigmas(steps: int, mu: float, terminal: float | None = None) -> Tensor:
    """(steps + 1,) sigmas: uniform times, shifted towards noise by `mu`, then 0.

    `terminal` stretches them so that the last one before 0 is that value; a single step stays at 1.
    The shift is eq. 23 of Stable Diffusion 3 (arXiv 2403.03206) with the factor e^mu, the stretch
    is LTX-Video's; both as in diffusers' FlowMatchEulerDiscreteScheduler.
    """
    t = torch.linspace(1, 1 / check_steps(steps), steps, dtype=torch.float64)
    sigmas = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    if terminal is not None and steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return F.pad(sigmas, (0, 1)).float()


def resolution_shift(
    tokens: int, base_shift: float, max_shift: float, base_tokens: int, max_tokens: int
) -> float:
    """mu for `tokens`: the line through (base_tokens, base_shift) and (max_tokens, max_shift).

    The same noise hides less of a larger picture, which so spends more of its steps near sigma = 1.
    The line goes on beyond `max_tokens`: 2048 x 2048 pixels are 16384 tokens of Qwen-Image-2.1,
    whose line is given up to 8192.
    """
    if tokens < 1:
        raise SamplingError(f"a picture has at least one token, {tokens} were given.")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def trained_sigmas(schedule: Schedule, steps: int | None, resample: bool) -> Tensor:
    """The list of a distilled checkpoint, for the number of steps that it was trained for."""
    sigmas = torch.tensor(schedule.sigmas)
    trained = len(sigmas) - 1
    if steps is None or steps == trained:
        return sigmas
    if resample:
        return interpolated(sigmas, steps)
    raise SamplingError(
        f"{steps} steps were asked for, but this checkpoint was distilled for the {trained} steps "
        f"of its own schedule, {schedule.name}: use {trained} steps, or allow it to be resampled."
    )


def interpolated(sigmas: Tensor, steps: int) -> Tensor:
    """(steps + 1,) values along the polygon of the given sigmas, the first and the last kept."""
    polygon = sigmas.double()[None, None]
    size = check_steps(steps) + 1
    return F.interpolate(polygon, size, mode="linear", align_corners=True).flatten().float()


def partial(sigmas: Tensor, denoise: float) -> Tensor:
    """The last `denoise` share of the steps, at least one: how image-to-image keeps its picture.

    1 keeps all steps; 0 leaves only the final sigma: no step, the picture comes back as it was.
    The same cut as ComfyUI's SplitSigmasDenoise.
    """
    check_denoise(denoise)
    steps = round((len(sigmas) - 1) * denoise)
    return sigmas[-1:] if denoise == 0 else sigmas[-1 - max(1, steps) :]


def check_steps(steps: int) -> int:
    if steps < 1:
        raise SamplingError(f"the number of steps must be at least 1, {steps} was given.")
    return steps


def check_denoise(denoise: float) -> None:
    if denoise != 0 and not MIN_DENOISE <= denoise <= 1:
        raise SamplingError(
            f"denoise must be 0, or lie between {MIN_DENOISE} and 1; {denoise} was given. "
            "1 makes a new picture, 0 leaves the given one as it is."
        )
