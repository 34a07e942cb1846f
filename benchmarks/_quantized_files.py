"""Quantized files for benchmarks: the same random weights in every format, as users have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..quant.gguf import TYPES
from ..quant.layouts import Parts, layout_of
from ..quant.linear import Buffer, QuantizedLinear

Weights = Mapping[str, Tensor]
Made = tuple[dict[str, Tensor], dict[str, Any]]
# Of GGUF's random codes times their blocks' scales, and where in a block fp16 scales lie.
SPREAD = {
    "Q8_0": (74, 0), "Q6_K": (1900, 208), "Q5_K": (600, 0, 2), "Q4_K": (300, 0, 2),
    "Q3_K": (43, 108), "Q2_K": (15, 80, 82), "Q4_0": (5, 0), "Q4_1": (9, 0, 2), "Q5_0": (9, 0),
    "Q5_1": (18, 0, 2), "IQ4_NL": (66, 0), "IQ4_XS": (1200, 0),
}  # fmt: skip


def _int8(weight: Tensor, **settings: Any) -> Made:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round_().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, {"format": "int8_tensorwise", **settings}


def _convrot(weight: Tensor) -> Made:
    """What is said to be rotated is not: the numbers do not matter, the work does."""
    return _int8(weight, convrot=True, convrot_groupsize=64 if weight.shape[1] % 256 else 256)


def _float8(weight: Tensor, format: str) -> Made:
    dtype = getattr(torch, format)
    scale = weight.abs().max() / torch.finfo(dtype).max
    tensors = {"weight": (weight / scale).to(dtype), "weight_scale": scale}
    return tensors, {"format": format}


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _filled(rows: int, columns: int, value: float) -> Tensor:
    """float8 scales in tiles of 128 x 4, all alike."""
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    return torch.full((high, wide), value).to(torch.float8_e4m3fn)


def _mxfp8(weight: Tensor) -> Made:
    out, width = weight.shape
    high, wide = -(-out // 128) * 128, -(-width // 128) * 4
    exponent = 127 + round(np.log2(width**-0.5))
    scale = torch.full((high, wide), int(exponent), dtype=torch.uint8)
    codes = torch.randn(out, width).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, {"format": "mxfp8"}


def _nvfp4(weight: Tensor) -> Made:
    out, width = weight.shape
    tensors = {
        "weight": _bytes(out, width // 2),
        "weight_scale": _filled(out, width // 16, 1.0),
        "weight_scale_2": torch.tensor(width**-0.5 / 3),
    }
    return tensors, {"format": "nvfp4"}


def _rotated4(weight: Tensor) -> Made:
    out, width = weight.shape
    tensors = {
        "weight": _bytes(out, width // 2).view(torch.int8),
        "weight_scale": torch.full((out, 1), width**-0.5 / 4),
    }
    return tensors, {"format": "convrot_w4a4", "convrot_groupsize": 64}


def _grouped(weight: Tensor, bits: int) -> Made:
    out, width = weight.shape
    tensors = {
        "weight": _bytes(out, width * bits // 8).view(torch.int8),
        "weight_s_rel": torch.full((out, width // 16), 16.0 if bits == 4 else 3.0).to(
            torch.float8_e4m3fn
        ),
        "weight_s_channel": torch.full((out,), width**-0.5 / 64),
    }
    return tensors, {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}


MAKERS: dict[str, Callable[[Tensor], Made]] = {
    "int8_tensorwise": _int8,
    "int8 ConvRot": _convrot,
    "float8_e4m3fn": partial(_float8, format="float8_e4m3fn"),
    "float8_e5m2": partial(_float8, format="float8_e5m2"),
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "convrot_w4a4": _rotated4,
    "asym_w4a8_int8": partial(_grouped, bits=4),
    "asym_w6a8_int8": partial(_grouped, bits=6),
}
GGUFS = tuple(f"GGUF {kind}" for kind in SPREAD)
NF4 = "NF4"
KINDS = (*MAKERS, NF4, *GGUFS)


def write(kind: str, weights: Weights, folder: Path) -> Path:
    """A file with `weights` in this format; matrices only, the rest as it is."""
    path = folder / f"{kind.replace(' ', '_').replace(',', '')}.safetensors"
    if kind.startswith("GGUF "):
        return _gguf(weights, path.with_suffix(".gguf"), kind.removeprefix("GGUF "))
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            tensors[name] = weight
        elif kind == NF4:
            tensors |= _nf4(name, weight)
        else:
            parts, settings = MAKERS[kind](weight)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
            text = json.dumps(settings).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, path)
    return path


def layer(kind: str, weight: Tensor) -> QuantizedLinear:
    """One layer of this format, without a file."""
    out, width = shape = (weight.shape[0], weight.shape[1])
    if kind.startswith("GGUF "):
        name = kind.removeprefix("GGUF ")
        block, size, _ = TYPES[name]
        parts, settings = {"weight": _bytes(out, width // block * size)}, {"type": name}
        settings["format"] = "gguf"
    else:
        parts, settings = (MAKERS | LAYERS)[kind](weight)
    layout = layout_of(settings["format"], Parts(parts, shape, settings=settings))
    return QuantizedLinear(layout, None, Buffer())


def _four_bit(weight: Tensor, format: str) -> Made:
    count = weight.numel()
    parts = {
        "weight": _bytes(count // 2, 1),
        "absmax": torch.ones(count // 64),
        "quant_map": torch.linspace(-1, 1, 16),
    }
    return parts, {"format": format, "blocksize": 64}


def _llm_int8(weight: Tensor) -> Made:
    tensors, _ = _int8(weight)
    return {"weight": tensors["weight"], "SCB": tensors["weight_scale"] * 127}, {
        "format": "llm_int8"
    }


def _svdquant(weight: Tensor, format: str, rank: int = 32) -> Made:
    out, width = weight.shape
    parts = {
        "weight": _bytes(out, width // 2).view(torch.int8),
        "proj_down": torch.randn(width, rank).bfloat16(),
        "proj_up": torch.randn(out, rank).bfloat16(),
        "smooth_factor": torch.ones(width).bfloat16(),
    }
    if format == "svdquant_nvfp4":
        return {**parts, "wscales": torch.ones(width // 16, out).to(torch.float8_e4m3fn)}, {
            "format": format
        }
    return {**parts, "wscales": torch.ones(width // 64, out).bfloat16()}, {"format": format}


def _awq(weight: Tensor) -> Made:
    out, width = weight.shape
    numbers = torch.ones(width // 64, out).bfloat16()
    stored = _bytes(out // 4, 2 * width).view(torch.int32)
    return {"weight": stored, "wscales": numbers, "wzeros": numbers}, {"format": "awq_w4a16"}


# Of which `layer` makes one layer, but `write` no file.
LAYERS: dict[str, Callable[[Tensor], Made]] = {
    "NF4": partial(_four_bit, format="nf4"),
    "FP4": partial(_four_bit, format="fp4"),
    "int8 of bitsandbytes": _llm_int8,
    "SVDQuant int4": partial(_svdquant, format="svdquant_int4"),
    "SVDQuant nvfp4": partial(_svdquant, format="svdquant_nvfp4"),
    "AWQ int4": _awq,
}


def _nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    out, width = weight.shape
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, width]}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: _bytes(out * width // 2, 1),
        f"{name}.absmax": torch.full((out * width // 64,), 2 * width**-0.5),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": text,
    }


def _gguf(weights: Weights, path: Path, kind: str) -> Path:
    """Blocks of random codes under small scales."""
    import gguf

    block, size, _ = TYPES[kind]
    writer = gguf.GGUFWriter(path, "qwen_image21")
    random = np.random.default_rng(0)
    spread, *places = SPREAD[kind]
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] % block:
            writer.add_tensor(name, weight.numpy())
            continue
        shape = (weight.shape[0], weight.shape[1] // block)
        raw = random.integers(0, 256, (*shape, size), dtype=np.uint8)
        scale = weight.shape[1] ** -0.5 / spread
        for place in places:
            raw[..., place : place + 2] = np.full((*shape, 1), scale, np.float16).view(np.uint8)
        writer.add_tensor(
            name, raw.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
