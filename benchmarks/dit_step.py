"""One step of the DiT of Qwen-Image-2.1 in fp32: ours against diffusers, whose prefix cache is on.

The published network cut down in depth and width, and two layers of the published width. The prefix
(prompt, references) is computed before on both sides, as it is in all steps of a run but the first.
"""

from __future__ import annotations

from functools import partial

import torch

from ._dits import config_of, diffusers_velocity, new_cache, random_dits, random_scene
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range


@torch.no_grad()
def measure(
    layers: int, heads: int, side: int, references: list[int], runs: int
) -> dict[str, object]:
    """One row: a target of side x side latent tokens, square references with these sides."""
    config = config_of(layers, heads)
    theirs, ours = random_dits(config)
    scene = random_scene(config, side, references)
    cache = new_cache(theirs)
    diffusers_velocity(theirs, scene, cache, "extract")
    prefix = ours.prefix(scene.text, scene.slots, scene.references, room=scene.tokens)
    step = partial(ours, scene.x, scene.t, prefix)
    their_step = partial(diffusers_velocity, theirs, scene, cache, "cached")
    error = difference(step(), their_step(), LIMIT)
    times = interleave({"diffusers": their_step, "seedling": step}, runs)
    base, own = times["diffusers"], times["seedling"]
    return {
        "network": f"{layers} layers x {config.dim}",
        "target": scene.tokens,
        "prefix": prefix.kept.length,
        "diffusers min s": base.shortest,
        "seedling min s": own.shortest,
        "speed, min": base.shortest / own.shortest,
        "speed, median": base.median / own.median,
        "difference": error,
    }


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "wide": 2, "side": 8}
    args = arguments(__doc__, tiny=tiny, layers=4, heads=8, wide=32, side=32)
    rows = [
        measure(args.layers, args.heads, args.side, [], args.runs),
        measure(args.layers, args.heads, args.side, [args.side], args.runs),
        measure(2, args.wide, args.side // 2, [], args.runs),
    ]
    notes = ["target and prefix in tokens; difference relative to the output's range"]
    show("A step of the DiT, fp32", rows, args.json, notes)


if __name__ == "__main__":
    main()
