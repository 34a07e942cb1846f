"""Where a step of the DiT of Qwen-Image-2.1 spends its time, ours and diffusers', fp32.

Shares of the time inside torch's operations, by kind, from torch's profiler. It only knows wall
time: on a busy machine the shares mean something, the seconds do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from ._dits import config_of, diffusers_velocity, new_cache, random_dits, random_scene
from .protocol import arguments, show

# Kind by the name of the operation itself, or of one that it is a part of; the first that fits.
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "norms": ("layer_norm", "rms_norm", "pow", "mean", "rsqrt"),
    "matmul": ("aten::mm", "addmm", "bmm", "aten::linear", "aten::matmul"),
    "activations": ("silu", "gelu", "tanh"),
    "copies, tables": ("copy_", "cat", "index", "repeat_interleave", "nonzero", "fill_", "clone"),
    "scale, gate, rotate": ("mul", "aten::add", "addcmul", "where"),
}


def kind_of(event) -> str:
    """The kind of an operation; a part of a norm is a norm's."""
    while event is not None:
        for kind, names in KINDS.items():
            if any(name in event.name for name in names):
                return kind
        event = event.cpu_parent
    return "the rest"


@torch.no_grad()
def shares(step: Callable[[], object], runs: int) -> dict[str, float]:
    """Share of each kind in the time of `step`, over `runs` runs."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            step()
    spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.events() or []:
        spent[kind_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()}


@torch.no_grad()
def measure(layers: int, heads: int, side: int, references: list[int], runs: int):
    """A row per kind of operation."""
    config = config_of(layers, heads)
    theirs, ours = random_dits(config)
    scene = random_scene(config, side, references)
    cache = new_cache(theirs)
    diffusers_velocity(theirs, scene, cache, "extract")
    prefix = ours.prefix(scene.text, scene.slots, scene.references, room=scene.tokens)
    own = shares(partial(ours, scene.x, scene.t, prefix), runs)
    base = shares(partial(diffusers_velocity, theirs, scene, cache, "cached"), runs)
    return [
        {"kind": kind, "seedling": f"{own[kind]:.1%}", "diffusers": f"{base[kind]:.1%}"}
        for kind in own
    ]


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "side": 8}
    args = arguments(__doc__, tiny=tiny, layers=4, heads=8, side=32, references=0)
    references = [args.side] * args.references
    rows = measure(args.layers, args.heads, args.side, references, args.runs // 2)
    title = (
        f"A step of {args.layers} layers x {args.heads * 128}, {args.side**2} target tokens, "
        f"{args.references} references as large, fp32"
    )
    show(title, rows, args.json)


if __name__ == "__main__":
    main()
