"""A bf16 checkpoint of the DiT of Qwen-Image-2.1 on a CPU: speed of a step, and resident memory.

Speed: ours loads the file as a user does and widens each weight right before its use, or, asked for
bf16, multiplies in bf16; diffusers computes in bf16, and in fp32 on the same values. Memory: a
fresh process loads another, larger file and runs a prompt and a step; all that it grows by is
counted, mapped pages of the file too.

On a processor with bf16 arithmetic, ONEDNN_MAX_CPU_ISA=AVX2 shows what one without does.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.dit import DiT
from ..model_loaders.load import load_dit
from ..quant.operations import widened
from ._dits import (
    config_of,
    diffusers_dit,
    diffusers_velocity,
    new_cache,
    random_scene,
    randomize,
)
from .protocol import arguments, difference, interleave, peak_memory, resident_memory, show

FILE = "random-bf16.safetensors"
LIMIT = 1e-5  # of the output's range: ours against diffusers in fp32
BAR = 1.15


@torch.no_grad()
def speed(folder: Path, layers: int, heads: int, side: int, runs: int) -> list[dict[str, object]]:
    """A row per program that runs a step of the same checkpoint."""
    torch.manual_seed(0)
    config = config_of(layers, heads)
    narrow = nn.Module.to(diffusers_dit(config), torch.bfloat16)  # its own `to` warns of nothing
    save_file(narrow.state_dict(), folder / FILE)
    wide = diffusers_dit(config)
    wide.load_state_dict(narrow.state_dict())
    ours: DiT = load_dit(folder / FILE).module
    rounded: DiT = load_dit(folder / FILE, dtype=torch.bfloat16).module
    scene = random_scene(config, side)
    steps = {}
    for name, network, given in [
        ("diffusers, bf16", narrow, scene.to(torch.bfloat16)),
        ("diffusers, fp32", wide, scene),
    ]:
        cache = new_cache(network)
        diffusers_velocity(network, given, cache, "extract")
        steps[name] = partial(diffusers_velocity, network, given, cache, "cached")
    prefix = ours.prefix(scene.text, scene.slots, room=scene.tokens)
    steps["seedling, from bf16"] = partial(ours, scene.x, scene.t, prefix)
    prefix = rounded.prefix(scene.text, scene.slots, room=scene.tokens)
    steps["seedling, bf16 asked for"] = partial(rounded, scene.x, scene.t, prefix)
    outputs: dict[str, Tensor] = {name: step() for name, step in steps.items()}
    difference(outputs["seedling, from bf16"], outputs["diffusers, fp32"], LIMIT)
    times = interleave(steps, runs)
    base, expected = times["diffusers, bf16"], outputs["diffusers, fp32"]
    return [
        {
            "program": name,
            "min s": t.shortest,
            "median s": t.median,
            "speed, min": base.shortest / t.shortest,
            "speed, median": base.median / t.median,
            "difference": difference(outputs[name], expected, 1.0),
        }
        for name, t in times.items()
    ]


def write_random(file: Path, layers: int, heads: int) -> int:
    """Write a bf16 checkpoint of random weights; its bytes."""
    torch.manual_seed(0)
    weights = {}
    for name, like in DiT(config_of(layers, heads), device="meta").state_dict().items():
        weight = torch.empty(like.shape)
        randomize(name, weight)
        weights[name] = weight.to(torch.bfloat16)
    save_file(weights, file)
    return sum(w.numel() * w.element_size() for w in weights.values())


@torch.no_grad()
def footprint(file: Path, side: int, threads: int) -> dict[str, int]:
    """Bytes by which this process grows, to be run in a fresh one; prefix: keys and values."""
    torch.set_num_threads(threads)
    small = config_of(1, 1)  # libraries load their code and make their threads before we start
    warm = DiT(small, widened(), dtype=torch.bfloat16)
    scene = random_scene(small, side)
    warm(scene.x, scene.t, warm.prefix(scene.text, scene.slots))
    del warm

    start = resident_memory()
    loaded = []
    load = peak_memory(lambda: loaded.append(load_dit(file)))
    after_load = resident_memory()
    dit: DiT = loaded[0].module
    prefixes = []

    def run() -> None:
        prefixes.append(dit.prefix(scene.text, scene.slots, room=scene.tokens))
        dit(scene.x, scene.t, prefixes[0])

    first = peak_memory(run)
    stays = resident_memory()
    activations = peak_memory(lambda: dit(scene.x, scene.t, prefixes[0]))
    assert load is not None and first is not None and activations is not None
    return {
        "load, peak": load,
        "run, peak": after_load + first - start,
        "stays": stays - start,
        "prefix": 2 * sum(k.numel() * k.element_size() for k in prefixes[0].kept.keys),
        "activations": activations,
    }


def memory(
    folder: Path, layers: int, heads: int, side: int, threads: int
) -> tuple[list[dict[str, object]], list[str]]:
    """A row per quantity, in MB and in times of the file's weights."""
    weights = write_random(folder / FILE, layers, heads)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        seen = pool.submit(footprint, folder / FILE, side, threads).result()
    kept = seen["stays"] - seen["prefix"]
    peak = seen["run, peak"] - seen["prefix"] - seen["activations"]
    counted = {
        "bf16 weights in the file": weights,
        "peak while loading": seen["load, peak"],
        "peak of the run": seen["run, peak"],
        "of it keys and values of prompt and target": seen["prefix"],
        "of it activations (peak of a second step)": seen["activations"],
        "peak of the run without these two": peak,
        "stays after a step, without keys and values": kept,
    }
    verdict = max(seen["load, peak"], peak, kept) / weights
    note = f"weights and the fp32 buffer: {verdict:.3f} of the weights, at most {BAR}"
    return [
        {"resident memory": name, "MB": round(n / 1e6, 1), "of the weights": n / weights}
        for name, n in counted.items()
    ], [note]


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "side": 8, "file_layers": 2, "file_heads": 1}
    sizes = {"layers": 4, "heads": 8, "side": 16, "file_layers": 8, "file_heads": 16}
    args = arguments(__doc__, tiny=tiny, **sizes)
    fast = f"processor with bf16 arithmetic: {torch.ops.mkldnn._is_mkldnn_bf16_supported()}"
    side, width, file_width = args.side, args.heads * 128, args.file_heads * 128
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = speed(folder, args.layers, args.heads, side, args.runs)
        title = f"A step from a bf16 checkpoint, {args.layers} layers x {width}, {side**2} tokens"
        show(
            title, rows, args.json, ["difference to diffusers in fp32, of the output's range", fast]
        )
        rows, notes = memory(folder, args.file_layers, args.file_heads, side, args.threads)
        title = f"Memory with a bf16 checkpoint, {args.file_layers} layers x {file_width}"
        show(title, rows, args.json, notes)


if __name__ == "__main__":
    main()
