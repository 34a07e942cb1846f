"""What `seedling generate` says before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from ..sampling.noise import image_seed
from ..sampling.pipeline import Pipeline, Plan, Task


def headline(pipeline: Pipeline, tasks: Sequence[Task], plan: Plan) -> str:
    """One line before the run: what will be made, how, and why so."""
    first, steps = tasks[0], len(plan.sigmas) - 1
    number = len(tasks) * (len(first.together) or first.count)
    what = "1 picture" if number == 1 else f"{number} pictures"
    start, last = first.seed, image_seed(tasks[-1].seed, first.count - 1)
    if first.together:
        start, last = first.together[0].seed, first.together[-1].seed
    seeds = f"seed {start}" if start == last else f"seeds {start} to {last}"
    shown = "".join(f", {words}" for words in plan.shown(pipeline.family.pixels_per_token))
    loras = "".join(
        f" + {lora.checkpoint.name} at {strength:g}" for lora, strength in pipeline.loras.values()
    )
    return (
        f"Making {what} of {plan.size[0]} x {plan.size[1]}{shown} with "
        f"{pipeline.dit.checkpoint.name}{loras} ({pipeline.family.title}) on {pipeline.device}: "
        f"{steps} {'step' if steps == 1 else 'steps'} of {first.sampler}, schedule {plan.schedule} "
        f"({plan.reason}), guidance {plan.guidance:g}, {seeds}."
    )
