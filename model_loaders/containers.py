"""Quantized weights in safetensors files, by the marks that the tools leave which write them.

Several tensors and a few words of JSON make one weight. Here they become one `TensorInfo` with a
`Form`, under the weight's own name and with the weight's own shape, so that whoever looks at names
and shapes (families, LoRAs) needs to know nothing of it.

    ComfyUI           layer.comfy_quant (JSON as bytes), or `_quantization_metadata` for all layers
    older ComfyUI     scaled_fp8, and layer.scale_weight, layer.scale_input
    bitsandbytes      layer.weight.quant_state.bitsandbytes__nf4 (JSON as bytes), layer.SCB
    Nunchaku          layer.qweight, layer.wscales, ...
    nothing           weights in float8
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .header import CheckpointError, Form, TensorInfo, damaged, printable, shown

# Tensors beside layer.weight, and what they are called in a `Form`.
COMFYUI = {
    "weight_scale": "weight_scale", "weight_scale_2": "weight_scale_2",
    "scale_weight": "weight_scale", "pre_quant_scale": "pre_quant_scale",
    "weight_s_rel": "weight_s_rel", "weight_s_channel": "weight_s_channel",
    "weight_codebook": "weight_codebook",
}  # fmt: skip
UNUSED = ("input_scale", "scale_input", "weight_format")  # inputs are measured as they come
NUNCHAKU = ("wscales", "smooth_factor", "proj_down", "proj_up", "wcscales", "wtscale", "wzeros")
NUNCHAKU_UNUSED = ("smooth_factor_orig",)
FUSED = (".to_qkv", ".add_qkv_proj", ".qkv_proj", ".qkv_proj_context")
BEHIND_GELU = ".net.2"  # of diffusers' FeedForward; Nunchaku's engine shifts its inputs for int4
PACKED = ("nvfp4", "convrot_w4a4")  # two weights in a byte of "weight"
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FOUR_BIT = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)")
MOST_JSON = 4096  # bytes of a marker

Names = Mapping[str, TensorInfo]


def recognised(path: Path, names: Names, metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The names with quantized weights as one tensor each. Raises CheckpointError."""
    left = dict(names)
    for layer, settings in _comfyui(path, left, metadata).items():
        _take(path, left, layer, settings)
    for name in [name for name in left if FOUR_BIT.fullmatch(name)]:
        _four_bit(path, left, name)
    for name in [n for n in left if n.endswith(".SCB")]:
        layer = name.removesuffix(".SCB")
        if f"{layer}.weight" not in left:
            raise damaged(path, f"has {printable(name)} but no weight of that layer")
        _put(left, layer, "llm_int8", left[f"{layer}.weight"].shape, {"SCB": name})
    _nunchaku(path, left)
    for name, info in [*left.items()]:
        if info.form is None and info.dtype in FLOAT8:
            parts = {"weight": info}
            if scale := left.pop(f"{name}_scale", None):
                parts["weight_scale"] = scale
            left[name] = _quantized(info, FLOAT8[info.dtype], info.shape, parts)
    return left


def _quantized(
    info: TensorInfo, format: str, shape: tuple[int, ...], parts: Names, settings: Any = None
) -> TensorInfo:
    form = Form(format, parts, shape[0] if shape else 1, settings or {})
    return replace(info, dtype=format, shape=shape, form=form)


def _comfyui(path: Path, left: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict:
    """Layer -> settings, from any of ComfyUI's marks, which are taken out of `left`."""
    layers: dict[str, Any] = {}
    text = metadata.get("_quantization_metadata")
    if text is not None:
        content = _json(path, "_quantization_metadata", text)
        said = content.get("layers", {}) if isinstance(content, dict) else None
        if not isinstance(said, dict):
            raise damaged(path, "has _quantization_metadata without layers")
        layers |= said
    for name in [n for n in left if n.endswith(".comfy_quant")]:
        info = left.pop(name)
        if info.dtype not in ("U8", "I8") or info.numel > MOST_JSON:
            raise damaged(path, f"has a marker {printable(name)} that is no text")
        layers[name.removesuffix(".comfy_quant")] = _json(path, name, _read(info))
    whole = [n for n in left if n == "scaled_fp8" or n.endswith(".scaled_fp8")]
    exact = any(left[n].numel == 2 for n in whole)  # ComfyUI: multiplied in full precision
    for name in whole:
        del left[name]
    for name in [n for n in left if n.endswith(".scale_weight")]:
        layer = name.removesuffix(".scale_weight")
        stored = left[f"{layer}.weight"].dtype if f"{layer}.weight" in left else "F8_E4M3"
        settings = {"format": FLOAT8.get(stored, "scaled_fp8")}
        layers.setdefault(layer, settings | ({"full_precision_matrix_mult": True} if exact else {}))
    for layer, settings in layers.items():
        if not isinstance(settings, dict) or not isinstance(settings.get("format"), str):
            raise damaged(path, f"does not say in which format {printable(layer)} is")
    return layers


def _take(path: Path, left: dict[str, TensorInfo], layer: str, settings: dict[str, Any]) -> None:
    """Make layer.weight and what lies beside it one quantized weight."""
    weight = left.get(f"{layer}.weight")
    if weight is None:
        raise CheckpointError(
            f"{shown(path)}: {printable(layer)} is said to be quantized, but its weight is "
            "missing; download it again."
        )
    sides, format = weight.shape, settings["format"]
    if format in PACKED and len(sides) == 2:
        sides = (sides[0], 2 * sides[1])
    relative, size = left.get(f"{layer}.weight_s_rel"), settings.get("group_size", 16)
    if relative is not None and len(relative.shape) == 2 and isinstance(size, int):
        sides = (sides[0], relative.shape[1] * size)
    beside = {own: f"{layer}.{name}" for name, own in COMFYUI.items() if f"{layer}.{name}" in left}
    if format in FLOAT8.values() and "weight_scale" not in beside:  # only plain casts have none
        raise damaged(path, f"has {printable(layer)} as {format} without its weight_scale")
    _put(left, layer, format, sides, beside, settings)


def _put(
    left: dict[str, TensorInfo], layer: str, format: str, shape: tuple[int, ...],
    beside: Mapping[str, str], settings: Any = None,
) -> None:  # fmt: skip
    """Replace the tensors of a layer in `left` by one; `beside`: part -> name."""
    weight = left[f"{layer}.weight"]
    parts = {"weight": weight, **{part: left.pop(name) for part, name in beside.items()}}
    for name in UNUSED:
        left.pop(f"{layer}.{name}", None)
    left[f"{layer}.weight"] = _quantized(weight, format, shape, parts, settings)


def _four_bit(path: Path, left: dict[str, TensorInfo], name: str) -> None:
    found = FOUR_BIT.fullmatch(name)
    assert found
    layer, format = found.groups()
    settings = _json(path, name, _read(left.pop(name)))
    shape = settings.get("shape") if isinstance(settings, dict) else None
    if not (isinstance(shape, list) and shape and all(type(s) is int and s > 0 for s in shape)):
        raise damaged(path, f"has a quant_state of {printable(layer)} without a shape")
    if f"{layer}.weight" not in left:
        raise damaged(path, f"has a quant_state but no weight of {printable(layer)}")
    own = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    beside = {part: key for part in own if (key := f"{layer}.weight.{part}") in left}
    _put(left, layer, format, tuple(shape), beside, settings)


def _nunchaku(path: Path, left: dict[str, TensorInfo]) -> None:
    """Every layer of Nunchaku's. Files for its own engine fuse queries, keys and values, and have
    the habits of its kernels; those for diffusers ("Nunchaku Lite") hold each layer as it is."""
    layers = [n.removesuffix(".qweight") for n in left if n.endswith(".qweight")]
    own_engine = any(layer.endswith(FUSED) for layer in layers)
    for layer in layers:
        packed = left[f"{layer}.weight"] = left.pop(f"{layer}.qweight")
        beside = {part: key for part in NUNCHAKU if (key := f"{layer}.{part}") in left}
        for part in NUNCHAKU_UNUSED:
            left.pop(f"{layer}.{part}", None)
        if len(packed.shape) != 2:
            raise damaged(path, f"has a qweight of {printable(layer)} of {packed.shape}")
        if "wzeros" in beside:
            _awq(left, layer, beside, own_engine)
        else:
            _svdquant(left, layer, beside, own_engine)


def _svdquant(
    left: dict[str, TensorInfo], layer: str, beside: dict[str, str], own_engine: bool
) -> None:
    packed = left[f"{layer}.weight"]
    small = left[beside["wscales"]].dtype in ("F8_E4M3", "U8") if "wscales" in beside else False
    bias = left.get(f"{layer}.bias")
    if bias is not None and own_engine and not small and layer.endswith(BEHIND_GELU):
        parts = {key: left[beside[key]] for key in ("wscales", "smooth_factor") if key in beside}
        parts |= {"weight": bias, "codes": packed}
        left[f"{layer}.bias"] = _quantized(bias, "svdquant_shifted_vector", bias.shape, parts)
    elif bias is not None:
        left[f"{layer}.bias"] = _quantized(bias, "svdquant_vector", bias.shape, {"weight": bias})
    format = "svdquant_nvfp4" if small else "svdquant_int4"
    _put(left, layer, format, (packed.shape[0], 2 * packed.shape[1]), beside)


def _awq(left: dict[str, TensorInfo], layer: str, beside: dict[str, str], own_engine: bool) -> None:
    rows, half = left[f"{layer}.weight"].shape
    out, width = 4 * rows, 2 * half
    splits = out // width if own_engine and out in (3 * width, 6 * width) else 1
    _put(left, layer, "awq_w4a16", (out, width), beside, {"splits": splits})
    bias = left.get(f"{layer}.bias")
    if bias is not None and splits > 1:
        parts = {"weight": bias}
        left[f"{layer}.bias"] = _quantized(
            bias, "awq_vector", bias.shape, parts, {"splits": splits}
        )


def _read(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.begin)
        return file.read(min(info.end - info.begin, MOST_JSON))


def _json(path: Path, where: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, f"has {printable(where)} that is not valid JSON") from None
