"""What quantization costs in pictures: the embedded model in every format, beside full precision.

Prompts and edits of the training world, held out from training, are painted by the model in full
precision and by each quantized one, from the same noise. Reported are the distance to the pictures
in full precision (PSNR, and the relative distance of the VAE's latents, which weigh what is seen)
and how many are right by the world's checker, with 95 % intervals.

Formats are compared by bits for each weight, scales included. "rounded, groups of 64" is plain
rounding to b bits with a 16-bit scale for each 64 weights; ours gets the same bytes, its trials
and calibration (8 prompts and 8 edits, none of which is measured) from `seedling quantize`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..host.models import embedded
from ..model_loaders.load import load_dit
from ..quant.encode import WAYS, encode, possible
from ..quant.layouts import Layout, Parts, Plain, layout_of
from ..quant.linear import Buffer, QuantizedLinear
from ..quant.quantizer import Unit
from ..sampling.pipeline import Pipeline, Task
from ..sampling.quantizing import Wish, quantize, units_of
from ..training import world
from ..training.data import SIZE
from ..training.evaluate import Case, Model, edit_cases, from_assets, paint, text_cases, wilson
from .protocol import arguments, show

BUDGETS = (4.25, 5.25, 6.25, 8.25)
CALIBRATION = 8  # prompts, and as many edits
ROUNDED = 64  # weights in a group of plain rounding
Store = Callable[[Tensor], tuple[Layout, float]]  # a weight -> its layout, its bytes


def by_way(name: str) -> Store:
    """As `encode` stores it without having seen any input: round to nearest."""

    def store(weight: Tensor) -> tuple[Layout, float]:
        way = WAYS[name]
        if not possible(way, (weight.shape[0], weight.shape[1])):
            way = WAYS["int8"]
        made = encode(way, weight)
        shape = (weight.shape[0], weight.shape[1])
        return layout_of(
            made.format, Parts(made.tensors, shape, settings=made.settings)
        ), made.bytes

    return store


def by_gguf(kind: str) -> Store:
    def store(weight: Tensor) -> tuple[Layout, float]:
        import gguf

        data = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        parts = Parts(
            {"weight": torch.from_numpy(data)},
            (weight.shape[0], weight.shape[1]),
            settings={"type": kind},
        )
        return layout_of("gguf", parts), data.nbytes

    return store


def float8(weight: Tensor) -> tuple[Layout, float]:
    scale = weight.abs().max() / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return layout_of("float8_e4m3fn", Parts(tensors, _shape(weight))), weight.numel()


def nf4(weight: Tensor) -> tuple[Layout, float]:
    import bitsandbytes.functional as library

    codes, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    tensors = {"weight": codes, "absmax": state.absmax, "quant_map": state.code}
    made = layout_of("nf4", Parts(tensors, _shape(weight), settings={"blocksize": 64}))
    return made, codes.nbytes + state.absmax.nbytes


def rounded(bits: int) -> Store:
    def store(weight: Tensor) -> tuple[Layout, float]:
        groups = weight.unflatten(1, (-1, min(ROUNDED, weight.shape[1])))
        top = 2 ** (bits - 1) - 1
        scale = (groups.abs().amax(dim=2, keepdim=True) / top).half().float().clamp_min(1e-12)
        nearest = (groups / scale).round().clamp(-top - 1, top) * scale
        return Plain(nearest.flatten(1)), weight.numel() * bits / 8 + scale.numel() * 2

    return store


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


SIDES: dict[str, Store] = {
    **{f"rounded, groups of 64, {b:g} bits": rounded(int(b)) for b in BUDGETS},
    "NF4, blocks of 64": nf4,
    "GGUF Q4_0": by_gguf("Q4_0"),
    "GGUF Q5_0 (Q4_K for rows that are no multiple of 256)": by_gguf("Q5_0"),
    "GGUF Q8_0": by_gguf("Q8_0"),
    "float8, one scale": float8,
    "int8 rows": by_way("int8"),
    "int8 rows, ConvRot": by_way("int8 rotated"),
    "asym_w4a8_int8 of 6 bits": by_way("6 bits"),
    "asym_w4a8_int8": by_way("4 bits in groups"),
    "nvfp4": by_way("nvfp4 smoothed"),
    "convrot_w4a4": by_way("4 bits"),
}


def stored(path: Path, units: Sequence[Unit], store: Store) -> tuple[nn.Module, float]:
    """The network with every unit stored so, and its bits for each weight."""
    network, buffer, size = load_dit(path, dtype=torch.float32).module, Buffer(), 0.0
    for unit in units:
        made, taken = store(unit.weight())
        size += taken
        (layer,) = unit.layers  # the embedded model's file fuses none
        network.set_submodule(layer, QuantizedLinear(made, None, buffer))
    return network, 8 * size / sum(unit.weights for unit in units)


def ours(folder: Path, bits: float, six: bool) -> tuple[nn.Module, float]:
    """The network of the file that `seedling quantize` makes; trials are made once."""
    files = embedded()
    pipeline = Pipeline.load(files["dit"], files["vae"], files["encoder"])
    cases = [*text_cases(CALIBRATION, 1, 91), *edit_cases(CALIBRATION, 92)]
    tasks = [
        Task(case.prompt, tuple(_picture(scene) for scene in case.references), seed=k)
        for k, case in enumerate(cases)
    ]
    wish = Wish(bits, trials=folder / "trials", six=six)
    made = quantize(pipeline, tasks, folder / f"{bits}-{six}.safetensors", wish)
    return load_dit(made.out).module, made.bits


def _picture(scene: Any) -> Tensor:
    return torch.from_numpy(world.render(scene, SIZE)).float() / 255


def suites(count: int) -> dict[str, list[Case]]:
    return {"prompts": text_cases(count, 1, 93), "edits": edit_cases(count, 94)}


def row(
    name: str, bits: float, model: Model, cases: dict[str, list[Case]], exact: dict[str, Any]
) -> dict[str, object]:
    """Paint and measure. `exact` are the pictures in full precision, filled by the first row."""
    result: dict[str, object] = {"weights as": name, "bits": round(bits, 2)}
    for suite, own in cases.items():
        pictures, shown = paint(model, own, steps=16, guidance=model.schedule.guidance)
        first = exact.setdefault(suite, pictures)
        right = [case.judge(p, s)["right"] for case, p, s in zip(own, pictures, shown, strict=True)]
        low, high = wilson(float(np.mean(right)), len(own))
        error = [np.square(p[..., :3] / 255 - q[..., :3] / 255).mean() for p, q in
                 zip(pictures, first, strict=True)]  # fmt: skip
        mean = float(np.mean(error))
        result[f"{suite}: dB"] = round(-10 * math.log10(mean), 1) if mean else "exact"
        result[f"{suite}: latents %"] = round(100 * _distance(model, pictures, first), 2)
        result[f"{suite}: right %"] = (
            f"{100 * np.mean(right):.1f} ({100 * low:.1f}-{100 * high:.1f})"
        )
    return result


@torch.no_grad()
def _distance(model: Model, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """|a - b| / |b| of the VAE's latents, on average."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        both = torch.from_numpy(np.stack((a, b))).permute(0, 3, 1, 2).float() / 127.5 - 1
        x, y = model.vae.encode(both)
        found.append(float((x - y).norm() / y.norm()))
    return float(np.mean(found))


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, tiny={"count": 1, "sides": 2, "budgets": 1}, count=200, sides=99,
                     budgets=99)  # fmt: skip
    path = embedded()["dit"]
    model = from_assets(path.parents[1])
    cases, exact, rows = suites(args.count), {}, []
    title = f"Pictures of the embedded model, {args.count} prompts and {args.count} edits"

    def measure(name: str, network: nn.Module, bits: float) -> None:
        rows.append(row(name, bits, replace(model, dit=network), cases, exact))
        if args.json:
            return
        if len(rows) == 1:
            print(f"{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)

    measure("bf16, full precision", load_dit(path, dtype=torch.float32).module, 16)
    units = units_of(load_dit(path))
    with tempfile.TemporaryDirectory() as folder:
        for bits in BUDGETS[: args.budgets]:
            measure(f"ours, within {bits:g} bits", *ours(Path(folder), bits, six=False))
            also = ours(Path(folder), bits, six=True)
            measure(f"ours, within {bits:g} bits, also layers of 6", *also)
    for name, store in [*SIDES.items()][: args.sides]:
        measure(name, *stored(path, units, store))
    if args.json:
        show(title, rows, as_json=True)


if __name__ == "__main__":
    main()
