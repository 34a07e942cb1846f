"""A step of a DiT whose blocks are streamed, beside the same DiT wholly on the device.

On a card: milliseconds per step and the peak of its memory, streamed in the least memory and within
budgets. On a CPU there is nothing to stream from, so times mean nothing there; bytes and equal
outputs do. The DiT of Qwen-Image-2.1 with random weights, `--layers` of the published width, 32 of
which are the published network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from ..quant.streaming import stream
from ._dits import config_of, random_scene, randomize
from .protocol import arguments, difference, show


def network(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """On the CPU, the same weights every time."""
    torch.manual_seed(0)
    dit = DiT(config, dtype=dtype)
    for name, weight in dit.named_parameters():
        randomize(name, weight.data)
    return dit.requires_grad_(False).eval()


def clock(step: Callable[[], Tensor], device: torch.device, runs: int) -> float:
    """The median of seconds per step; three before are not counted."""
    seconds = []
    for run in range(runs + 3):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if run >= 3:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def measure(layers: int, heads: int, side: int, runs: int) -> list[dict[str, object]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(layers, heads)
    rows: list[dict[str, object]] = []
    expected, whole, resident = None, 0, 0.0
    for share in (1.0, 0.8, 0.0):
        dit: Any = network(config, dtype)
        whole = sum(t.nbytes for t in (*dit.parameters(), *dit.buffers()))
        budget = int(share * whole) or None
        streamer = stream(dit, device, budget)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        torch.manual_seed(1)
        scene = random_scene(config, side).to(dtype)
        scene = type(scene)(scene.text.to(device), scene.slots, [], scene.x.to(device),
                            scene.t.to(device))  # fmt: skip
        prefix = dit.prefix(scene.text, scene.slots, room=scene.tokens)
        step = partial(dit, scene.x, scene.t, prefix)
        y = step().float().cpu()
        expected = y if expected is None else expected
        seconds = clock(step, device, runs)
        resident = resident or seconds
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        held = whole if streamer is None else streamer.bytes
        rows.append({
            "weights on the device": f"{held / whole:.0%}", "MB": held / 1e6, "ms": 1e3 * seconds,
            "x resident": seconds / resident, "peak MB": peak / 1e6,
            "difference": difference(y, expected, 0.0),
        })  # fmt: skip
        del dit, step, prefix, streamer
    return rows


def main() -> None:
    tiny = {"layers": 8, "heads": 2, "side": 4}
    args = arguments(__doc__, tiny=tiny, layers=32, heads=32, side=64)
    rows = measure(args.layers, args.heads, args.side, args.runs)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: bytes only"
    show(f"A step, {args.layers} layers x {128 * args.heads}, {place}", rows, args.json)


if __name__ == "__main__":
    main()
