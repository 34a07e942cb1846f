"""Work of a step that is not the network's: rotary positions, token tables, masks; 1K, references.

The layers of both networks are replaced by one that does nothing, and the widths around them are
tiny, so what remains of a step is what it does besides; the rotary tables have their published
width. Diffusers builds its tables in every step, ours are there after the first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ._dits import (
    Scene,
    config_of,
    diffusers_velocity,
    new_cache,
    random_dits,
    random_scene,
)
from .protocol import arguments, difference, interleave, show

PUBLISHED_LAYERS = 32
COUNTS = (0, 1, 3, 10)  # of references


class Idle(nn.Module):
    """A layer that does nothing, in both networks."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.img_norm1 = nn.Identity()
        self.attn = SimpleNamespace(
            processor=getattr(attention, "processor", None), keys_values=nothing_to_keep
        )

    def forward(self, x: Tensor | None = None, *_, hidden_states: Tensor | None = None, **__):
        return x if hidden_states is None else hidden_states


def nothing_to_keep(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(1, 1, x.shape[1], 0)
    return empty, empty


def idle_dits() -> tuple[Any, Any]:
    """Both networks without layers and as narrow as the published rotary tables allow."""
    networks = random_dits(replace(config_of(1, heads=1, context=8), in_channels=4))
    for network in networks:
        blocks = [Idle(block.attn) for block in network.transformer_blocks]
        network.transformer_blocks = nn.ModuleList(blocks)
    return networks


def besides(side: int, references: int, runs: int) -> dict[str, float]:
    """Milliseconds of a step besides the layers, and of what ours does once per run."""
    theirs, ours = idle_dits()
    scene = random_scene(ours.config, side, [side] * references)
    cache = new_cache(theirs)
    diffusers_velocity(theirs, scene, cache, "extract")
    prefix = ours.prefix(scene.text, scene.slots, scene.references)

    def once() -> None:
        """All that is not a step's: the tables of the prefix, and of the target."""
        ours(scene.x, scene.t, ours.prefix(scene.text, scene.slots, scene.references))

    step = partial(ours, scene.x, scene.t, prefix)
    their_step = partial(diffusers_velocity, theirs, scene, cache, "cached")
    once()
    difference(step(), their_step(), 1e-5)
    times = interleave({"diffusers": their_step, "seedling": step, "once": once}, runs)
    return {name: 1000 * t.shortest for name, t in times.items()}


def calls(runs: int) -> dict[str, float]:
    """Milliseconds that calling the operations of all published layers takes, on tiny tensors."""
    layers = {}
    for count in (4, 12):
        theirs, ours = random_dits(config_of(count, heads=1, head_dim=32, context=8))
        scene: Scene = random_scene(ours.config, side=2)
        cache = new_cache(theirs)
        diffusers_velocity(theirs, scene, cache, "extract")
        prefix = ours.prefix(scene.text, scene.slots, [], room=scene.tokens)
        sides: dict[str, Callable[[], object]] = {
            "diffusers": partial(diffusers_velocity, theirs, scene, cache, "cached"),
            "seedling": partial(ours, scene.x, scene.t, prefix),
        }
        layers[count] = interleave(sides, 10 * runs)
    return {
        name: 1000 * (layers[12][name].shortest - few.shortest) / 8 * PUBLISHED_LAYERS
        for name, few in layers[4].items()
    }


def layer_step(side: int, heads: int) -> float:
    """Milliseconds of a whole step of one layer without references: the cheapest step to share."""
    _, ours = random_dits(config_of(1, heads))
    scene = random_scene(ours.config, side)
    prefix = ours.prefix(scene.text, scene.slots, [], room=scene.tokens)
    ours(scene.x, scene.t, prefix)
    start = time.process_time()
    ours(scene.x, scene.t, prefix)
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def measure(side: int, heads: int, runs: int) -> tuple[list[dict[str, object]], list[str]]:
    """A row per number of references; what to say below."""
    step = layer_step(side, heads)
    rows: list[dict[str, object]] = []
    for count in COUNTS:
        spent = besides(side, count, runs)
        rows.append(
            {
                "references": count,
                "diffusers, ms a step": spent["diffusers"],
                "seedling, ms a step": spent["seedling"],
                "less by": spent["diffusers"] / spent["seedling"],
                "seedling, ms once": spent["once"] - spent["seedling"],
                "diffusers, share": f"{spent['diffusers'] / step:.2%}",
                "seedling, share": f"{spent['seedling'] / step:.2%}",
            }
        )
    called = calls(runs)
    return rows, [
        f"share: of a step of one layer x {heads * 128} without references, {step:.0f} ms here; "
        f"the published network has {PUBLISHED_LAYERS} layers x 4096",
        f"calling the operations of {PUBLISHED_LAYERS} layers, on tensors of no size: diffusers "
        f"{called['diffusers']:.1f} ms, seedling {called['seedling']:.1f} ms",
    ]


def main() -> None:
    args = arguments(__doc__, tiny={"side": 8, "heads": 1}, side=64, heads=8)
    rows, notes = measure(args.side, args.heads, args.runs)
    title = f"Work of a step besides the layers, target and references of {args.side**2} tokens"
    show(title, rows, args.json, notes)


if __name__ == "__main__":
    main()
