"""What quantization costs in pictures: the embedded model in every format, beside full precision.

Prompts and edits of the training world, held out from training, are painted by the model in full
precision and by each quantized one, from the same noise. Reported are the distance to the pictures
in full precision (PSNR, and the relative distance of the VAE's latents, which weigh what is seen)
and how many are right by the world's checker, with 95 % intervals.

Formats are compared by bits for each weight, scales included. "rounded, groups of 64" is plain
rounding to b bits with a 16-bit scale for each 64 weights; ours gets the same bytes, its trials
and calibration (8 prompts and 8 edits, none of which is measured) from `seedling quantize`.
SVDQuant is without calibration, its branch in proportion to the published ones (32 of 3,072).

`--rows ours,NF4` measures those whose names hold one of these words, beside full precision.
Weights that would be widened at every step are widened once, which changes no number; formats whose
products round their inputs keep them. `--work FOLDER` keeps what `seedling quantize` tried.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..host.models import embedded
from ..model_loaders.load import load_dit
from ..quant.encode import WAYS, encode, possible
from ..quant.floats import tiled
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
RANK = 2  # of SVDQuant's branch
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


def mxfp8(weight: Tensor) -> tuple[Layout, float]:
    groups = weight.unflatten(1, (-1, 32))
    power = groups.abs().amax(dim=2).clamp_min(1e-30).log2().floor() - 8  # e4m3fn ends at 1.75 2^8
    codes = (groups / power.exp2()[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": codes.flatten(1), "weight_scale": tiled((power + 127).to(torch.uint8))}
    return layout_of("mxfp8", Parts(tensors, _shape(weight))), weight.numel() * 33 / 32


def svdquant(weight: Tensor) -> tuple[Layout, float]:
    """As SVDQuant's int4 stores it, written out: its tiles do not fit a model this small."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    branch = (u[:, :RANK] * s[:RANK]).bfloat16().float() @ v[:RANK].bfloat16().float()
    rest, size = rounded(4)(weight - branch)
    return Plain(rest.weight() + branch), size + 2 * RANK * sum(weight.shape)


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
    "mxfp8": mxfp8,
    "SVDQuant int4": svdquant,
}


def stored(path: Path, units: Sequence[Unit], store: Store) -> tuple[nn.Module, float]:
    """The network with every unit stored so, and its bits for each weight."""
    network, buffer, size = load_dit(path, dtype=torch.float32).module, Buffer(), 0.0
    for unit in units:
        made, taken = store(unit.weight())
        size += taken
        (layer,) = unit.layers  # the embedded model's file fuses none
        network.set_submodule(layer, QuantizedLinear(made, None, buffer))
    return widened_once(network), 8 * size / sum(unit.weights for unit in units)


def widened_once(network: nn.Module) -> nn.Module:
    """Layers whose inputs are not rounded as plain ones."""
    for path, layer in [*network.named_modules()]:
        if isinstance(layer, QuantizedLinear) and not layer.layout.native:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.layout.weight().float(), requires_grad=False)
            plain.bias = layer.bias  # type: ignore[assignment]
            network.set_submodule(path, plain)
    return network


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
    out = folder / f"{bits}-{six}.safetensors"
    out.unlink(missing_ok=True)
    made = quantize(pipeline, tasks, out, wish)
    return widened_once(load_dit(made.out).module), made.bits


def _picture(scene: Any) -> Tensor:
    return torch.from_numpy(world.render(scene, SIZE)).float() / 255


def suites(count: int) -> dict[str, list[Case]]:
    return {"prompts": text_cases(count, 1, 93), "edits": edit_cases(count, 94)}


class Measured:
    """Paints every network's pictures, and compares them with those of the first one."""

    def __init__(self, model: Model, count: int, steps: int) -> None:
        self.model, self.cases, self.steps = model, suites(count), steps or model.schedule.steps
        self.exact: dict[str, tuple[list[np.ndarray], Tensor]] = {}

    def row(self, name: str, network: nn.Module, bits: float) -> dict[str, object]:
        model = replace(self.model, dit=network)
        result: dict[str, object] = {"weights as": name, "bits": round(bits, 2)}
        for suite, own in self.cases.items():
            guidance = model.schedule.guidance
            pictures, shown = paint(model, own, steps=self.steps, guidance=guidance)
            latents = self._latents(pictures)
            first, wanted = self.exact.setdefault(suite, (pictures, latents))
            right = [c.judge(p, s)["right"] for c, p, s in zip(own, pictures, shown, strict=True)]
            low, high = wilson(float(np.mean(right)), len(own))
            error = float(np.mean([_squared(p, q) for p, q in zip(pictures, first, strict=True)]))
            result[f"{suite}: dB"] = round(-10 * math.log10(error), 1) if error else "exact"
            lost = (latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            result[f"{suite}: latents %"] = round(100 * float(lost.mean()), 2)
            result[f"{suite}: right %"] = (
                f"{100 * np.mean(right):.1f} ({100 * low:.1f}-{100 * high:.1f})"
            )
        return result

    def _latents(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """What the VAE sees in them, which weighs errors as they are seen."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        parts = [self.model.vae.encode(part.float() / 127.5 - 1) for part in pixels.split(32)]
        return torch.cat(parts)


def _squared(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a[..., :3] / 255 - b[..., :3] / 255).mean())


def makers(path: Path, folder: Path) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, float]]]]:
    """Every row but the first: its name, and what makes the network and its bits."""
    units = units_of(load_dit(path))
    for bits in BUDGETS:
        yield f"ours, within {bits:g} bits", partial(ours, folder, bits, six=False)
        also = f"ours, within {bits:g} bits, also layers of 6"
        yield also, partial(ours, folder, bits, six=True)
    for name, store in SIDES.items():
        yield name, partial(stored, path, units, store)


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, tiny={"count": 1, "steps": 2, "rows": "4.25,NF4,SVDQuant,mxfp8"},
                     count=200, steps=0, rows="", work="")  # fmt: skip
    path, rows = embedded()["dit"], []
    title = f"Pictures of the embedded model, {args.count} prompts and {args.count} edits"
    measured = Measured(from_assets(path.parents[1]), args.count, args.steps)

    def measure(name: str, network: nn.Module, bits: float) -> None:
        rows.append(measured.row(name, network, bits))
        if args.json:
            return
        if len(rows) == 1:
            print(f"{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)

    measure("bf16, full precision", load_dit(path, dtype=torch.float32).module, 16)
    words = [word.strip().lower() for word in args.rows.split(",") if word.strip()]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(args.work or kept)
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in makers(path, folder):
            if not words or any(word in name.lower() for word in words):
                measure(name, *make())
    if args.json:
        show(title, rows, as_json=True)


if __name__ == "__main__":
    main()
