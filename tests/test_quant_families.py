"""Every layout in a file of every family: made by the tools that make such files, loaded, run.

What those tools read back from the file is the truth: a step must be that of the same network with
these weights in full precision, with and without a LoRA, and as near to the network that was
quantized as the weights are. Files have the names that are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.load import load_dit

Made = tuple[dict[str, Tensor], Tensor]  # tensors beside a layer's name, and its weight read back
NAMES = ("qwen_image_21", "flux2", "qwen_image")


# ---- the tools that make such layers -----------------------------------------------------------


def marked(tensors: dict[str, Tensor], format: str, **settings: Any) -> dict[str, Tensor]:
    words = json.dumps({"format": format, **settings}).encode()
    return {**tensors, "comfy_quant": torch.tensor(list(words), dtype=torch.uint8)}


def kitchen() -> Any:
    return pytest.importorskip("comfy_kitchen")


def float8(w: Tensor, kind: str = "float8_e4m3fn", names: str = "weight_scale") -> Made:
    ck, dtype = kitchen(), getattr(torch, kind)
    scale = w.abs().max() / torch.finfo(dtype).max
    q = ck.quantize_per_tensor_fp8(w, scale, dtype)
    whole = ck.dequantize_per_tensor_fp8(q, scale, torch.float32)
    if names == "scale_weight":
        return {"weight": q, "scale_weight": scale, "scale_input": torch.ones(())}, whole
    return marked({"weight": q, "weight_scale": scale}, kind), whole


def mxfp8(w: Tensor) -> Made:
    q, scale = kitchen().quantize_mxfp8(w)
    whole = kitchen().dequantize_mxfp8(q, scale, torch.float32)
    return marked({"weight": q, "weight_scale": scale}, "mxfp8"), whole


def nvfp4(w: Tensor) -> Made:
    top = w.abs().max() / (448 * 6)
    q, scale = kitchen().quantize_nvfp4(w, top)
    whole = kitchen().dequantize_nvfp4(q, top, scale, torch.float32)
    return marked({"weight": q, "weight_scale": scale, "weight_scale_2": top}, "nvfp4"), whole


def int8(w: Tensor) -> Made:
    q, scale = kitchen().quantize_int8_rowwise(w)
    whole = kitchen().dequantize_int8_simple(q, scale)
    return marked({"weight": q, "weight_scale": scale}, "int8_tensorwise"), whole


def int8_convrot(w: Tensor) -> Made:
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    q, scale = eager.quantize_int8_convrot_weight(w, 256)
    whole = eager.dequantize_int8_convrot_weight(q, scale, 256)
    tensors = {"weight": q, "weight_scale": scale}
    return marked(tensors, "int8_tensorwise", convrot=True, convrot_groupsize=256), whole


def convrot_w4a4(w: Tensor) -> Made:
    q, scale = kitchen().quantize_convrot_w4a4_weight(w)
    whole = kitchen().dequantize_convrot_w4a4_weight(q, scale, output_dtype=torch.float32)
    return marked({"weight": q, "weight_scale": scale}, "convrot_w4a4"), whole


def w4a8(w: Tensor, bits: int = 4) -> Made:
    ck = kitchen()
    q, rel, channel, _, table = ck.quantize_w4a8_int8_weight(w, bits=bits, codebook=bits == 4)
    whole = ck.dequantize_w4a8_int8_weight(q, rel, channel, table, output_dtype=torch.float32)
    tensors = {"weight": q, "weight_s_rel": rel, "weight_s_channel": channel}
    tensors |= {} if table is None else {"weight_codebook": table}
    return marked(tensors, "asym_w4a8_int8", group_size=16, convrot_groupsize=256), whole


def four_bits(w: Tensor, kind: str) -> Made:
    bnb = pytest.importorskip("bitsandbytes.functional")
    q, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=True)
    beside = {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    return {"weight": q, **beside}, bnb.dequantize_4bit(q, state)


def llm_int8(w: Tensor) -> Made:
    bnb = pytest.importorskip("bitsandbytes.functional")
    q, scale, _ = bnb.int8_vectorwise_quant(w.half())
    return {"weight": q, "SCB": scale}, bnb.int8_vectorwise_dequant(q, scale).float()


def svdquant(w: Tensor, kind: str, nunchaku: Any) -> Made:
    tensors, whole, _ = nunchaku.svdquant(w, kind)
    return tensors, whole


LAYERS: dict[str, Callable[[Tensor, Any], Made]] = {
    "float8_e4m3fn": lambda w, _: float8(w),
    "float8_e5m2": lambda w, _: float8(w, "float8_e5m2"),
    "scaled_fp8": lambda w, _: float8(w, names="scale_weight"),
    "mxfp8": lambda w, _: mxfp8(w),
    "nvfp4": lambda w, _: nvfp4(w),
    "int8_tensorwise": lambda w, _: int8(w),
    "int8_tensorwise, ConvRot": lambda w, _: int8_convrot(w),
    "convrot_w4a4": lambda w, _: convrot_w4a4(w),
    "asym_w4a8_int8": lambda w, _: w4a8(w),
    "asym_w4a8_int8, 6 bits": lambda w, _: w4a8(w, 6),
    "nf4": lambda w, _: four_bits(w, "nf4"),
    "fp4": lambda w, _: four_bits(w, "fp4"),
    "llm_int8": lambda w, _: llm_int8(w),
    "svdquant_int4": lambda w, tools: svdquant(w, "int4", tools),
    "svdquant_nvfp4": lambda w, tools: svdquant(w, "nvfp4", tools),
    "awq_w4a16": lambda w, tools: tools.awq(w),
}
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL",
        "IQ4_XS", "BF16", "F16")  # fmt: skip
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")  # what the library quantizes to
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
ARCHITECTURES = {"qwen_image_21": "qwen_image21", "flux2": "flux", "qwen_image": "qwen_image"}


def safetensors_file(name: str, layout: str, tools: Any, networks: Any, folder: Path) -> Any:
    nunchaku = layout.startswith(("svdquant", "awq"))
    tensors: dict[str, Tensor] = {}
    whole, errors = {}, [0.0]
    for key, (tensor, own) in networks.published(name, fuse=not nunchaku).items():
        layer = key.removesuffix(".weight")
        if not networks.to_quantize(key, tensor):
            tensors.setdefault(key, tensor)
            whole |= networks.split(tensor, own, name)
            continue
        made, values = LAYERS[layout](tensor, tools)
        tensors |= {f"{layer}.{part}": t for part, t in made.items()}
        whole |= networks.split(values, own, name)
        errors.append(float((values - tensor).norm() / tensor.norm()))
        bias = networks.state_of(name).get(f"{layer}.bias")
        if layout.startswith("svdquant") and bias is not None:
            tensors[f"{layer}.bias"] = tools.pack_vector(bias.bfloat16())
    if layout == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    path = (
        folder
        / f"{networks.FAMILIES[name].file}_{layout.replace(' ', '').replace(',', '_')}.safetensors"
    )
    metadata = {"config": json.dumps(networks.FAMILIES[name].settings)}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return networks.File(path, whole, max(errors))


def blocks_of(tensor: Tensor, kind: Any) -> np.ndarray:
    """As the library quantizes, or random codes with small scales in types that it only reads."""
    if kind.name in WRITABLE:
        return gguf.quantize(tensor.numpy(), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = tensor.shape
    raw = np.random.default_rng(1).integers(0, 256, (rows, width // block, size), dtype=np.uint8)

    def scaled(by: float) -> np.ndarray:
        scale = np.full((rows, width // block), by, dtype=np.float16)
        for place in SCALES.get(kind.name, (0,)):
            raw[:, :, place : place + 2] = scale[..., None].view(np.uint8)
        return raw.reshape(rows, -1)

    spread = gguf.dequantize(scaled(1e-3), kind).std()
    return scaled(1e-3 * float(tensor.std()) / spread)  # as large as the weights were


def gguf_file(name: str, layout: str, networks: Any, folder: Path) -> Any:
    kind, writable = gguf.GGMLQuantizationType[layout], layout in WRITABLE
    path = folder / f"{networks.FAMILIES[name].file}-{layout}.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURES[name])
    whole, errors = {}, [0.0]
    for key, (tensor, own) in networks.published(name).items():
        if not networks.to_quantize(key, tensor):
            writer.add_tensor(key, tensor.numpy())
            whole |= networks.split(tensor, own, name)
            continue
        data = blocks_of(tensor, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
        values = torch.from_numpy(gguf.dequantize(data, kind)).float().view(tensor.shape)
        whole |= networks.split(values, own, name)
        errors.append(float((values - tensor).norm() / tensor.norm()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return networks.File(path, whole, max(errors) if writable else None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYERS)
def test_a_safetensors_file(
    layout: str, name: str, nunchaku: Any, quant_families: Any, tmp_path: Path
) -> None:
    made = safetensors_file(name, layout, nunchaku, quant_families, tmp_path)
    quant_families.check(name, made, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", GGUF)
def test_a_gguf_file(layout: str, name: str, quant_families: Any, tmp_path: Path) -> None:
    quant_families.check(name, gguf_file(name, layout, quant_families, tmp_path), tmp_path)


# ---- what is damaged ---------------------------------------------------------------------------

# Parts that a layer can do without: what the engine does not use, and marks whose absence is seen.
SPARE = {"smooth_factor_orig", "scale_input", "weight_codebook", "wcscales"}
LAYER = "transformer_blocks.0.attn.to_k"


def refused(tensors: dict[str, Tensor], path: Path) -> str:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}(.|\n)*{LAYER}") as caught:
        load_dit(path)
    return str(caught.value)


def is_plain_cast(layout: str, missing: str) -> bool:
    """Whether what is left is a weight that was cast to float8, which needs no scale or mark."""
    return missing == ("scale_weight" if layout == "scaled_fp8" else "comfy_quant") and (
        layout.startswith(("float8", "scaled"))
    )


@pytest.mark.parametrize("layout", LAYERS)
def test_a_damaged_layer_is_told_by_its_name(
    layout: str, nunchaku: Any, quant_families: Any, tmp_path: Path
) -> None:
    """Every part of it missing, or of another shape; and a format that nobody knows."""
    whole = quant_families.state_of("qwen_image_21")
    state = {k: t for k, t in whole.items() if k != f"{LAYER}.weight"}
    made, _ = LAYERS[layout](whole[f"{LAYER}.weight"], nunchaku)
    named = {f"{LAYER}.{part}": t for part, t in made.items()}
    for part, tensor in made.items():
        name, rest = f"{LAYER}.{part}", {**state, **named}
        del rest[name]
        if part not in SPARE:
            if not is_plain_cast(layout, part):
                refused(rest, tmp_path / "missing.safetensors")
            if part != "comfy_quant" and "quant_state" not in part:
                other = torch.zeros(3, 5).to(tensor.dtype)
                refused({**rest, name: other}, tmp_path / "shape.safetensors")
        if part == "comfy_quant":
            for words in (b"{", b"[]", b'{"format": "int9"}', b'{"format": 3}'):
                mark = torch.tensor(list(words), dtype=torch.uint8)
                refused({**rest, name: mark}, tmp_path / "mark.safetensors")


NUMBERS = ("absmax", "quant_map", "codebook", "smooth_factor", "proj_", "scale", "s_rel", "channel",
           "SCB", "wzeros")  # fmt: skip


def spoiled(tensor: Tensor, number: float) -> Tensor:
    whole = tensor.float()
    whole.view(-1)[0] = number
    return whole.to(tensor.dtype)


@pytest.mark.parametrize("layout", LAYERS)
def test_parts_that_are_no_numbers_or_of_another_kind_are_told(
    layout: str, nunchaku: Any, quant_families: Any, tmp_path: Path
) -> None:
    """NaN in scales: attention would turn it into zeros, and the picture be quietly wrong."""
    whole = quant_families.state_of("qwen_image_21")
    state = {k: t for k, t in whole.items() if k != f"{LAYER}.weight"}
    made, _ = LAYERS[layout](whole[f"{LAYER}.weight"], nunchaku)
    rest = {**state, **{f"{LAYER}.{part}": t for part, t in made.items()}}
    for part, tensor in made.items():
        if part in SPARE - {"wcscales", "weight_codebook"} or "quant_state" in part:
            continue
        name, empty = f"{LAYER}.{part}", tensor.reshape(-1)[:0]
        if part != "comfy_quant" and tensor.ndim:
            refused({**rest, name: empty}, tmp_path / "empty.safetensors")
        if part == "qweight":
            refused({**rest, name: tensor.float()}, tmp_path / "kind.safetensors")
        if tensor.is_floating_point() and any(word in part for word in NUMBERS):
            refused({**rest, name: spoiled(tensor, float("nan"))}, tmp_path / "nan.safetensors")
        if part == "smooth_factor":
            refused({**rest, name: spoiled(tensor, 0.0)}, tmp_path / "zero.safetensors")
