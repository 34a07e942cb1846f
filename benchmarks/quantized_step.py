"""A step of a quantized DiT on a CPU: speed beside diffusers in fp32 and bf16, and memory.

The DiT of Qwen-Image-2.1, two layers of the published width with random weights, in each format as
a file that is loaded as users do. Each is held against the same file written out in fp32: int8
products may differ by 1e-2 of the output's range, also for inputs whose products would overflow
sums of 16 bits; all others by 1e-5. The last row is one int8 layer beside comfy-kitchen's, which is
what ComfyUI runs on a CPU.

ONEDNN_MAX_CPU_ISA=AVX2 shows what a processor without VNNI does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model_loaders.load import load_dit
from ..quant.gguf import TYPES
from ..quant.integers import Int8
from ..quant.layouts import Parts
from ..quant.linear import Buffer, Holder, QuantizedLinear
from ._dits import (
    config_of,
    diffusers_dit,
    diffusers_velocity,
    new_cache,
    random_scene,
)
from .protocol import arguments, difference, interleave, resident_memory, show

EXACT, ROUNDED = 1e-5, 1e-2
Weights = Mapping[str, Tensor]


def int8(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, {"format": "int8_tensorwise"}


def float8(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    scale = weight.abs().max() / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return tensors, {"format": "float8_e4m3fn"}


def grouped4(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Codes at random: what they say does not matter here."""
    out, width = weight.shape
    tensors = {
        "weight": torch.randint(-128, 128, (out, width // 2), dtype=torch.int8),
        "weight_s_rel": torch.full((out, width // 16), 16.0).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.full((out,), width**-0.5 / 64),
    }
    return tensors, {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}


def in_comfyui(weights: Weights, folder: Path, make: Callable[[Tensor], Any]) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            tensors[name] = weight
            continue
        parts, settings = make(weight)
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        text = json.dumps(settings).encode()
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = folder / f"{make.__name__}.safetensors"
    save_file(tensors, path)
    return path


def in_gguf(weights: Weights, folder: Path, kind: str) -> Path:
    """Blocks of random codes under small scales."""
    import gguf

    block, size, _ = TYPES[kind]
    writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "qwen_image21")
    random = np.random.default_rng(0)
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] % block:
            writer.add_tensor(name, weight.numpy())
            continue
        shape = (weight.shape[0], weight.shape[1] // block)
        raw = random.integers(0, 256, (*shape, size), dtype=np.uint8)
        scale = weight.shape[1] ** -0.5 / {"Q8_0": 74, "Q4_K": 300}[kind]
        for place in (0, 2) if kind == "Q4_K" else (0,):
            raw[..., place : place + 2] = np.full((*shape, 1), scale, np.float16).view(np.uint8)
        writer.add_tensor(
            name, raw.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / f"{kind}.gguf"


@torch.no_grad()
def measure(layers: int, heads: int, side: int, runs: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    config = config_of(layers, heads)
    wide = diffusers_dit(config)
    scene = random_scene(config, side)
    rows, steps = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = wide.state_dict()
        files = {
            "int8_tensorwise": in_comfyui(weights, folder, int8),
            "float8_e4m3fn": in_comfyui(weights, folder, float8),
            "asym_w4a8_int8": in_comfyui(weights, folder, grouped4),
            "GGUF Q8_0": in_gguf(weights, folder, "Q8_0"),
            "GGUF Q4_K": in_gguf(weights, folder, "Q4_K"),
        }
        for kind, path in files.items():
            before = resident_memory()
            network = load_dit(path).module
            step = _step(network, scene)
            step()
            grown = resident_memory() - before
            held = sum(m.layout.bytes for m in network.modules() if isinstance(m, Holder))
            exact = load_dit(path, dtype=torch.float32).module
            limit = ROUNDED if kind.startswith("int8") else EXACT
            error = difference(step(), _step(exact, scene)(), limit)
            del exact
            steps[kind] = step
            rows.append({"weights as": kind, "of the file %": 100 * held / path.stat().st_size,
                         "grown GB": grown / 1e9, "difference": error})  # fmt: skip
        cache = new_cache(wide)
        diffusers_velocity(wide, scene, cache, "extract")
        steps["diffusers fp32"] = partial(diffusers_velocity, wide, scene, cache, "cached")
        narrow = nn.Module.to(diffusers_dit(config), torch.bfloat16)
        given, cache = scene.to(torch.bfloat16), new_cache(narrow)
        diffusers_velocity(narrow, given, cache, "extract")
        steps["diffusers bf16"] = partial(diffusers_velocity, narrow, given, cache, "cached")
        times = interleave(steps, runs)
    for row in rows:
        own = times[str(row["weights as"])]
        row["x diffusers fp32"] = times["diffusers fp32"].shortest / own.shortest
        row["x diffusers bf16"] = times["diffusers bf16"].shortest / own.shortest
    return rows


def _step(network: Any, scene: Any) -> Callable[[], Tensor]:
    prefix = network.prefix(scene.text, scene.slots, scene.references, room=scene.tokens)
    return partial(network, scene.x, scene.t, prefix)


@torch.no_grad()
def one_layer(width: int, runs: int) -> list[dict[str, object]]:
    """One int8 layer beside comfy-kitchen's, and its error on inputs made to overflow."""
    torch.manual_seed(1)
    weight = torch.randint(-128, 128, (width, width), dtype=torch.int8)
    scale = torch.full((width, 1), 0.01)
    layer = QuantizedLinear(
        Int8(Parts({"weight": weight.clone(), "weight_scale": scale}, (width, width))),
        None,
        Buffer(),
    )
    x = torch.randn(64, width)
    whole = weight.float() * scale
    extreme = torch.where(weight[:64] > 0, 3.0, -3.0)  # along a row: all products of one sign
    rows: list[dict[str, object]] = []
    for name, given in (("normal inputs", x), ("inputs along the weights' signs", extreme)):
        exact = given @ whole.T
        found = float((layer(given) - exact).norm() / exact.norm())
        rows.append({"one int8 layer": name, "relative error": found, "x comfy-kitchen": None})
    try:
        import comfy_kitchen as kitchen
    except ImportError:
        return rows
    times = interleave({
        "theirs": lambda: kitchen.int8_linear(x, weight, scale, None, torch.float32),
        "ours": lambda: layer(x),
    }, runs)  # fmt: skip
    rows[0]["x comfy-kitchen"] = times["theirs"].shortest / times["ours"].shortest
    return rows


def main() -> None:
    tiny = {"layers": 1, "heads": 2, "side": 4, "width": 64}
    args = arguments(__doc__, tiny=tiny, layers=2, heads=32, side=32, width=1024)
    notes = [
        "of the file: the weights in memory; grown: resident memory by loading and a step, with "
        "the buffer for the largest weight"
    ]
    rows = measure(args.layers, args.heads, args.side, args.runs)
    show("A step of a quantized DiT on a CPU", rows, args.json, notes)
    show("One int8 layer", one_layer(args.width, args.runs), args.json)


if __name__ == "__main__":
    main()
