"""Resident memory with quantized files on a CPU: what stays, and the peak while loading.

The DiT of Qwen-Image-2.1, cut down, with random weights, in each format. For each a fresh process
loads the file as users do and runs a prompt and a step. All that it grows by is counted, mapped
pages of the file too; three parts are told apart, because they do not grow with the number of
layers: the buffer for the largest weight in full precision, keys and values, activations.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..model_loaders.families.qwen_image_21.dit import DiT
from ..model_loaders.load import load_dit
from ..quant.linear import Holder, QuantizedLinear
from ._dits import config_of, random_scene, randomize
from ._quantized_files import KINDS, write
from .protocol import arguments, chosen, peak_memory, resident_memory, show

STAYS, PEAK = 1.05, 1.15


@torch.no_grad()
def footprint(file: Path, warm: Path, side: int, threads: int) -> dict[str, int]:
    """Bytes by which this process grows, to be run in a fresh one."""
    torch.set_num_threads(threads)
    _run(load_dit(warm).module, side)  # libraries load their code and make their threads
    start, loaded, kept = resident_memory(), [], []
    load = peak_memory(lambda: loaded.append(load_dit(file).module))
    between = resident_memory() - start
    run = peak_memory(lambda: kept.append(_run(loaded[0], side)))
    dit, (scene, prefix) = loaded[0], kept[0]
    stays = resident_memory() - start
    activations = peak_memory(lambda: dit(scene.x, scene.t, prefix))
    assert load is not None and run is not None and activations is not None
    buffers = {id(m.buffer): m.buffer for m in dit.modules() if isinstance(m, QuantizedLinear)}
    room = sum(b._room.nbytes for b in buffers.values() if b._room is not None)
    prefix_bytes = 2 * sum(k.numel() * k.element_size() for k in prefix.kept.keys)
    return {
        "loading": load,
        "running": between + run - room - prefix_bytes - activations,
        "stays": stays - room - prefix_bytes,
        "buffer": room,
        "layers": sum(m.layout.bytes for m in dit.modules() if isinstance(m, Holder)),
    }


def _run(dit: Any, side: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    scene = random_scene(dit.config, side)
    prefix = dit.prefix(scene.text, scene.slots, room=scene.tokens)
    dit(scene.x, scene.t, prefix)
    return scene, prefix


def measure(
    kinds: Sequence[str], layers: int, heads: int, side: int, threads: int
) -> list[dict[str, object]]:
    torch.manual_seed(0)
    weights = {}
    for size, into in (((1, 2), "small"), ((layers, heads), "large")):
        weights[into] = {
            name: torch.empty(like.shape)
            for name, like in DiT(config_of(*size), device="meta").state_dict().items()
        }
        for name, weight in weights[into].items():
            randomize(name, weight)
    rows, fresh = [], multiprocessing.get_context("spawn")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "warm").mkdir()
            warm = write(kind, weights["small"], Path(folder) / "warm")
            file = write(kind, weights["large"], Path(folder))
            with ProcessPoolExecutor(1, mp_context=fresh) as pool:
                seen = pool.submit(footprint, file, warm, side, threads).result()
            size = file.stat().st_size
        peak = max(seen["loading"], seen["running"])
        rows.append({
            "weights as": kind, "file MB": size / 1e6, "layers, of the file": seen["layers"] / size,
            "stays": seen["stays"] / size, "peak": peak / size,
            "of it loading": seen["loading"] / size,
            "buffer MB": seen["buffer"] / 1e6,
            "met": seen["stays"] <= STAYS * size and peak <= PEAK * size,
        })  # fmt: skip
    return rows


def main() -> None:
    tiny = {"layers": 2, "heads": 2, "side": 4}
    args = arguments(__doc__, tiny=tiny, layers=8, heads=12, side=16, formats="")
    kinds = chosen(args.formats, [*KINDS])
    rows = measure(kinds, args.layers, args.heads, args.side, args.threads)
    note = f"of the file's size; bars: stays {STAYS}, peak {PEAK}, without the buffer, keys and "
    title = f"Memory with quantized files, {args.layers} layers x {128 * args.heads}"
    show(title, rows, args.json, [f"{note}values, and activations"])


if __name__ == "__main__":
    main()
