"""Quantized files of every container through the loader: what they hold, and LoRAs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import load_dit
from seedling.model_loaders.lora import load_lora
from seedling.quant.encode import BASES, WAYS, encode, possible
from seedling.quant.layouts import Parts, layout_of
from seedling.quant.linear import QuantizedLinear
from seedling.quant.lora import Adapters

LAYER = "transformer_blocks.0.img_mlp.gate_layer"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def marker(settings: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def state(tiny: Any) -> dict[str, Tensor]:
    return tiny._weights(torch.float32, True)["dit"]


def in_comfyui(state: dict[str, Tensor], way: str, prefix: str = "") -> dict[str, Tensor]:
    """Every linear layer in one of ComfyUI's formats, int8 where that does not take its width."""
    tensors: dict[str, Tensor] = {}
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2:
            tensors[prefix + name] = weight
            continue
        fits = possible(WAYS[way], (weight.shape[0], weight.shape[1]))
        made = encode(WAYS[way if fits else "int8"], weight)
        tensors |= {f"{prefix}{layer}.{part}": t for part, t in made.tensors.items()}
        tensors[f"{prefix}{layer}.comfy_quant"] = marker(made.settings)
    return tensors


def scene(dit: Any) -> Tensor:
    """The velocity of one step after a prefix of text."""
    with torch.no_grad():
        prefix = dit.prefix(draw(1, 6, dit.config.context_dim), torch.zeros(6, dtype=torch.bool))
        return dit(draw(1, dit.config.in_channels, 4, 4, seed=1), torch.tensor([0.7]), prefix)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("way", [way.name for way in BASES])
def test_a_file_of_comfyuis(tmp_path: Path, state: Any, way: str, prefix: str) -> None:
    """Runs like its weights in full precision, but for inputs rounded to int8."""
    path = tmp_path / "q.safetensors"
    save_file(in_comfyui(state, way, prefix), path)
    loaded, exact = load_dit(path), load_dit(path, dtype=torch.float32)
    assert isinstance(loaded.module.get_submodule(LAYER), QuantizedLinear)
    assert type(exact.module.get_submodule(LAYER)) is nn.Linear
    native = [m.layout for m in loaded.module.modules() if isinstance(m, QuantizedLinear)]
    limit = 2e-2 if any(layout.native for layout in native) else 1e-5
    assert distance(scene(loaded.module), scene(exact.module)) < limit
    assert WAYS[way].format in " ".join(loaded.notes) + str(inspect(path).quantization)
    assert "written out" in " ".join(exact.notes)


def test_the_formats_in_the_metadata(tmp_path: Path, state: Any) -> None:
    tensors = in_comfyui(state, "int8 rotated")
    layers = {
        name.removesuffix(".comfy_quant"): json.loads(bytes(tensors.pop(name).tolist()))
        for name in [n for n in tensors if n.endswith(".comfy_quant")]
    }
    save_file(in_comfyui(state, "int8 rotated"), tmp_path / "tensors.safetensors")
    text = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, tmp_path / "metadata.safetensors", {"_quantization_metadata": text})
    first, second = (load_dit(tmp_path / f"{n}.safetensors") for n in ("tensors", "metadata"))
    assert torch.equal(scene(first.module), scene(second.module))


@pytest.mark.parametrize("exact", [False, True])
def test_older_float8_files(tmp_path: Path, state: Any, exact: bool) -> None:
    tensors = {"scaled_fp8": torch.zeros(2 if exact else 0, dtype=torch.float8_e4m3fn)}
    for name, weight in state.items():
        if weight.ndim == 2:
            scale = weight.abs().max() / 448
            layer = name.removesuffix(".weight")
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        else:
            tensors[name] = weight
    save_file(tensors, tmp_path / "old.safetensors")
    loaded = load_dit(tmp_path / "old.safetensors")
    layer = loaded.module.get_submodule(LAYER)
    assert isinstance(layer, QuantizedLinear) and layer.layout.full == exact
    whole = tensors[f"{LAYER}.weight"].float() * tensors[f"{LAYER}.scale_weight"]
    assert torch.equal(layer.layout.weight(), whole)


def test_a_whole_file_cast_to_float8(tmp_path: Path, state: Any) -> None:
    """Norms too; they are small, and written out."""
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in state.items()}, tmp_path / "8.safetensors")
    loaded = load_dit(tmp_path / "8.safetensors")
    norm = loaded.module.get_submodule("transformer_blocks.0.attn.norm_q")
    assert norm.weight.dtype == torch.float32
    save_file(state, tmp_path / "32.safetensors")
    exact = load_dit(tmp_path / "32.safetensors")
    assert distance(scene(loaded.module), scene(exact.module)) < 0.1


def test_fused_layers_take_their_rows(tmp_path: Path, state: Any) -> None:
    """ComfyUI's `gate_up` is one quantized tensor, and two layers."""
    fused = {}
    for name, weight in state.items():
        if name.endswith("gate_layer.weight"):
            up = state[name.replace("gate_layer", "proj")]
            fused[name.replace("gate_layer", "gate_up")] = torch.cat((weight, up))
        elif not name.endswith("img_mlp.proj.weight"):
            fused[name] = weight
    save_file(in_comfyui(fused, "4 bits in groups"), tmp_path / "f.safetensors")
    loaded = load_dit(tmp_path / "f.safetensors")
    mlp = loaded.module.get_submodule("transformer_blocks.1.img_mlp")
    made = encode(WAYS["4 bits in groups"], fused["transformer_blocks.1.img_mlp.gate_up.weight"])
    whole = layout_of(made.format, Parts(made.tensors, (384, 64), settings=made.settings)).weight()
    assert torch.allclose(mlp.gate_layer.layout.weight(), whole[:192], atol=1e-6)
    assert torch.allclose(mlp.proj.layout.weight(), whole[192:], atol=1e-6)
    assert loaded.checkpoint.bytes == open_checkpoint(tmp_path / "f.safetensors").bytes


def test_a_file_of_bitsandbytes(tmp_path: Path, state: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    tensors, whole = {}, {}
    for name, weight in state.items():
        if weight.ndim == 2 and "attn" in name:
            q, quant = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            tensors[name] = q
            tensors |= {f"{name}.{k}": v for k, v in quant.as_dict(packed=True).items()}
            whole[name] = bnb.dequantize_4bit(q, quant)
        elif weight.ndim == 2 and "mlp" in name:
            q, scale, _ = bnb.int8_vectorwise_quant(weight.half())
            tensors |= {name: q, name.replace(".weight", ".SCB"): scale}
            whole[name] = bnb.int8_vectorwise_dequant(q, scale)
        else:
            tensors[name] = weight
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "b.safetensors")
    loaded = load_dit(tmp_path / "b.safetensors")
    for name, weight in whole.items():
        layer = loaded.module.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.layout.weight(), weight, rtol=1e-5, atol=1e-6)
    assert inspect(tmp_path / "b.safetensors").usable


# ---- LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", [way.name for way in BASES])
def test_a_lora_on_quantized_layers(tmp_path: Path, state: Any, way: str, dora: bool) -> None:
    """As on the same weights in full precision; no second copy, strength 0 is without."""
    save_file(in_comfyui(state, way), tmp_path / "q.safetensors")
    out, width = state[f"{LAYER}.weight"].shape
    lora = {
        f"transformer.{LAYER}.lora_A.weight": draw(4, width, seed=7),
        f"transformer.{LAYER}.lora_B.weight": draw(out, 4, seed=8) * 0.2,
    }
    if dora:
        lora[f"transformer.{LAYER}.lora_magnitude_vector"] = draw(out, seed=9).abs() + 0.5
    save_file(lora, tmp_path / "lora.safetensors")
    results = []
    for dtype in (None, torch.float32):
        loaded = load_dit(tmp_path / "q.safetensors", dtype=dtype)
        without = scene(loaded.module)
        sizes = {name: t.nbytes for name, t in loaded.module.named_buffers()}
        adapters = Adapters(loaded.module)
        found = load_lora(tmp_path / "lora.safetensors", loaded)
        assert found.unmatched is None
        adapters.add("a", found.branches, found.vectors, 0.8)
        results.append(scene(loaded.module))
        assert distance(results[-1], without) > 0.01
        assert sizes == {name: t.nbytes for name, t in loaded.module.named_buffers()}
        adapters.set_strength("a", 0.0)
        assert torch.equal(scene(loaded.module), without)
        adapters.remove("a")
    assert distance(*results) < 2e-2


# ---- what is wrong -----------------------------------------------------------------------------


def test_a_corrupt_layer_is_told_by_its_name(tmp_path: Path, state: Any) -> None:
    tensors = in_comfyui(state, "int8")
    tensors[f"{LAYER}.weight_scale"] = torch.ones(7)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=f"bad.safetensors: {LAYER}.weight has weight_scale"):
        load_dit(tmp_path / "bad.safetensors")
