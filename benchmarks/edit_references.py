"""A whole edit with references in few steps: ours against diffusers without and with its cache.

Diffusers without its cache runs the references in every step; with it (its default) in the first.
Ours runs them once before the first step. Everything that the DiT does in a call is counted; the
text encoder and the VAE are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.families.qwen_image_21.dit import DiT
from ._dits import Scene, config_of, diffusers_velocity, new_cache, random_dits, random_scene
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range, after all steps


def times_of(steps: int) -> list[float]:
    """Evenly from 1, pure noise, to 0."""
    return [1 - step / steps for step in range(steps + 1)]


def euler(velocity: Callable[[Scene, int], Tensor], scene: Scene, steps: int) -> Tensor:
    """The picture's latents, from those of the scene; `velocity` also gets the step's number."""
    times = times_of(steps)
    x = scene.x
    for step in range(steps):
        v = velocity(scene.with_target(x, times[step]), step)
        x = x + (times[step + 1] - times[step]) * v
    return x


def without_cache(theirs: Any, scene: Scene, steps: int) -> Tensor:
    return euler(lambda now, _: diffusers_velocity(theirs, now), scene, steps)


def with_cache(theirs: Any, scene: Scene, steps: int) -> Tensor:
    cache = new_cache(theirs)

    def velocity(now: Scene, step: int) -> Tensor:
        return diffusers_velocity(theirs, now, cache, "cached" if step else "extract")

    return euler(velocity, scene, steps)


def with_prefix(ours: DiT, scene: Scene, steps: int) -> Tensor:
    prefix = ours.prefix(scene.text, scene.slots, scene.references, room=scene.tokens)
    return euler(lambda now, _: ours(now.x, now.t, prefix), scene, steps)


@torch.no_grad()
def measure(
    layers: int, heads: int, side: int, references: int, steps: int, runs: int
) -> list[dict[str, object]]:
    """A row per program: `references` square references as large as the target, `side` tokens."""
    theirs, ours = random_dits(config_of(layers, heads))
    scene = random_scene(ours.config, side, [side] * references)
    sides = {
        "diffusers, no cache": lambda: without_cache(theirs, scene, steps),
        "diffusers, its cache": lambda: with_cache(theirs, scene, steps),
        "seedling": lambda: with_prefix(ours, scene, steps),
    }
    expected = sides["diffusers, no cache"]()
    errors = {name: difference(run(), expected, LIMIT) for name, run in sides.items()}
    times = interleave(sides, runs)
    own = times["seedling"]
    return [
        {
            "program": name,
            "min s": t.shortest,
            "median s": t.median,
            "seedling is faster by, min": t.shortest / own.shortest,
            "median": t.median / own.median,
            "difference": errors[name],
        }
        for name, t in times.items()
    ]


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "side": 4, "references": 2}
    args = arguments(__doc__, tiny=tiny, layers=16, heads=4, side=16, references=4, steps=4)
    rows = measure(args.layers, args.heads, args.side, args.references, args.steps, args.runs)
    title = (
        f"An edit in {args.steps} steps with {args.references} references, target and references "
        f"of {args.side**2} tokens, {args.layers} layers x {args.heads * 128}, fp32"
    )
    show(title, rows, args.json, ["difference relative to the output's range, after all steps"])


if __name__ == "__main__":
    main()
