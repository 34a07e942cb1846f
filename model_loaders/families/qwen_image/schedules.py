"""How checkpoints of Qwen-Image want to be sampled: base, Lightning, Layered."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...family import Schedule
from .variants import EDITORS, LAYERED

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

# scheduler_config.json of every published pipeline but Layered's; steps and guidance as on the
# model cards.
BASE = Schedule(
    "base", steps=50, guidance=4.0, base_shift=0.5, max_shift=0.9, base_tokens=256, max_tokens=8192,
    terminal=0.02, norm_rescale=True, reason="nothing in or beside the file says it is distilled",
)  # fmt: skip
LIGHTNING = re.compile(r"lightning|rapid|turbo|distill|lightx2v")
STEPS = re.compile(r"(?<!\d)(4|8)[-_ ]?steps?")


def layered_shift(tokens: int, steps: int) -> float:
    """mu of Qwen-Image-Layered: the shift e^mu is the square root of the tokens over 256.

    Its scheduler shifts linearly, by a factor sqrt(N / 256), which is e^mu in sampling/schedules.py
    (diffusers: pipeline_qwenimage_layered.py, and its scheduler_config.json: time_shift_type).
    """
    return 0.5 * math.log(tokens / 256)


def lightning(steps: int, reason: str) -> Schedule:
    """Qwen-Image-Lightning: sigma = 3 t / (1 + 2 t), which is a shift of ln 3 at any size."""
    times = [(steps - i) / steps for i in range(steps + 1)]
    sigmas = tuple(3 * t / (1 + 2 * t) for t in times)
    return Schedule(f"lightning {steps}", steps=steps, sigmas=sigmas, reason=reason)


def schedule(checkpoint: Checkpoint) -> Schedule:
    """How this DiT wants to be sampled; its names cannot tell a distilled checkpoint from the base.

    In this order: `schedule` in the file's own config; "lightning" and its kin in the file's name
    or metadata, which is how checkpoints with a merged Lightning LoRA are published; the variant.
    """
    own = checkpoint.config.get("schedule")
    base = base_of(checkpoint.config["variant"])
    if isinstance(own, dict):
        return _own_schedule(base, own)
    told = " ".join([checkpoint.path.name, *map(str, checkpoint.metadata.values())])[:100_000]
    told = told.lower()
    if word := LIGHTNING.search(told):
        steps = STEPS.search(told)
        count = f"{steps[1]} steps" if steps else "no steps, so 4 are taken"
        reason = f'"{word[0]}" and {count} are in the file\'s name or metadata'
        return lightning(int(steps[1]) if steps else 4, reason)
    return base


def base_of(variant: str) -> Schedule:
    if variant == LAYERED:
        return replace(BASE, name="layered", mu=layered_shift, terminal=None, norm_rescale=False)
    return replace(BASE, steps=40) if variant in EDITORS else BASE


def _own_schedule(base: Schedule, own: dict[str, Any]) -> Schedule:
    """The base schedule with what the config changes. Raises ValueError for senseless values."""
    known = {"name": str, "steps": int, "guidance": float, "base_shift": float, "max_shift": float}
    changes: dict[str, Any] = {k: kind(own[k]) for k, kind in known.items() if k in own}
    if "terminal" in own:
        changes["terminal"] = None if own["terminal"] is None else float(own["terminal"])
    if changes.get("steps", 1) < 1:
        raise ValueError(f"the schedule in its config has {changes['steps']} steps")
    return replace(base, **changes, reason="the file's own config says so")
