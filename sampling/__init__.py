"""From noise to a picture: sizes, noise, schedules, samplers, guidance. Knows torch, never ComfyUI.

Conventions of every file here: a flow runs from noise at sigma = 1 to the picture at sigma = 0
along `x = (1 - sigma) * x0 + sigma * noise`; a model is called as `model(x, sigma)` and returns the
velocity `v = noise - x0`, so that `x0 = x - sigma * v`.
"""

from __future__ import annotations


class SamplingError(ValueError):
    """What was asked for cannot be sampled; the text says what was given and what to do instead."""
