"""Nunchaku's files: every tensor's order, and a whole Qwen-Image with all its engine's habits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.families.qwen_image.dit import DiT, DiTConfig
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import load_dit
from seedling.model_loaders.lora import load_lora
from seedling.quant.layouts import Parts, layout_of
from seedling.quant.linear import Buffer, QuantizedLinear
from seedling.quant.lora import Adapters
from seedling.quant.svdquant import weight_in_order

CONFIG = DiTConfig(
    in_channels=16, out_channels=4, layers=1, heads=2, head_dim=64, context_dim=64, mlp_dim=256,
    axes=(16, 24, 24), variant="qwen-image",
)  # fmt: skip
BLOCK = "transformer_blocks.0"
FUSED = {
    f"{BLOCK}.attn.to_qkv": [f"{BLOCK}.attn.to_{x}" for x in "qkv"],
    f"{BLOCK}.attn.add_qkv_proj": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
}


@pytest.fixture
def pack(nunchaku: Any) -> Any:
    return nunchaku


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# ---- one layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_scale", ["wcscales", "wtscale", "int4"])
def test_a_layer_is_put_in_order_and_multiplies(pack: Any, whole_scale: str) -> None:
    kind = "int4" if whole_scale == "int4" else "nvfp4"
    tensors, whole, _ = pack.svdquant(draw(256, 384), kind, whole_scale)
    tensors["weight"] = tensors.pop("qweight")
    layout = layout_of(f"svdquant_{kind}", Parts(tensors, (256, 384)))
    assert (layout.weight() - whole).abs().max() < 1e-5
    x = draw(3, 384, seed=5)
    assert distance(QuantizedLinear(layout, None, Buffer())(x), F.linear(x, whole)) < 1e-5
    half = layout_of(f"svdquant_{kind}", Parts(tensors, (100, 384), (60, 160), 256))
    assert torch.equal(half.weight(), layout.weight(slice(60, 160)))
    assert (layout.weight(torch.tensor([7, 200])) - whole[[7, 200]]).abs().max() < 1e-5
    needed = 256 * 384 * (4.25 if kind == "int4" else 4.5) / 8 + 2 * pack.RANK * (256 + 384)
    assert layout.bytes < 1.05 * needed


def test_an_awq_layer_is_put_in_order_and_multiplies(pack: Any) -> None:
    tensors, whole = pack.awq(draw(192, 128))
    tensors["weight"] = tensors.pop("qweight")
    layout = layout_of("awq_w4a16", Parts(tensors, (192, 128)))
    assert torch.equal(layout.weight(), whole)
    dealt = layout_of("awq_w4a16", Parts(tensors, (192, 128), settings={"splits": 6}))
    six = whole.view(32, 6, 128)  # the file's first six rows are the first of each result
    assert torch.equal(dealt.weight(), torch.cat([six[:, i] for i in range(6)]))
    assert layout.bytes == 192 * 128 / 2 + 2 * 2 * 192 * 2


# ---- a whole file ------------------------------------------------------------------------------


def weights() -> dict[str, Tensor]:
    """Of the network, in numbers that bf16 holds."""
    table = DiT(CONFIG, device="meta").state_dict()
    return {
        name: (draw(*t.shape, seed=k) / t.shape[-1] ** 0.5 + ("norm" in name and t.ndim == 1))
        .bfloat16().float()
        for k, (name, t) in enumerate(table.items())
    }  # fmt: skip


def file_of_its_engine(
    pack: Any, state: dict[str, Tensor], kind: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What Nunchaku's engine reads, and the weights and biases that it thereby computes with."""
    tensors, whole = {}, dict(state)
    own = {name.rpartition(".")[0] for name, t in state.items() if t.ndim == 2 and BLOCK in name}
    fused = {part: name for name, parts in FUSED.items() for part in parts}
    for layer in sorted({fused.get(name, name) for name in own}):
        parts = FUSED.get(layer, [layer])
        weight = torch.cat([state[f"{part}.weight"] for part in parts])
        bias = torch.cat([state[f"{part}.bias"] for part in parts])
        if "_mod.1" in layer:
            dim = weight.shape[1]
            dealt = weight.view(6, dim, dim).transpose(0, 1).reshape(6 * dim, dim)
            packed, made = pack.awq(dealt)
            made = made.view(dim, 6, dim).transpose(0, 1).reshape(6 * dim, dim)
            ones = torch.tensor([0.0, 1, 0, 0, 1, 0])  # shift, scale, gate, shift, scale, gate
            stored = (bias.view(6, dim).T + ones).bfloat16()
            packed["bias"] = stored.flatten()
            bias = (stored.float() - ones).T.flatten()
        else:
            packed, made, core = pack.svdquant(weight, kind)
            if layer.endswith(".net.2") and kind == "int4":
                moved = core @ (pack.SHIFT / pack.smoothing(weight.shape[1]).float())
                bias = (bias - moved).bfloat16().float()
                packed["bias"], bias = pack.pack_vector(bias.bfloat16()), bias + moved
            else:
                packed["bias"] = pack.pack_vector(bias.bfloat16())
        tensors |= {f"{layer}.{name}": t for name, t in packed.items()}
        sizes = [len(state[f"{part}.bias"]) for part in parts]
        for part, w, b in zip(parts, made.split(sizes), bias.split(sizes), strict=True):
            whole |= {f"{part}.weight": w, f"{part}.bias": b}
    rest = {n: t.bfloat16() for n, t in state.items() if n.rpartition(".")[0] not in own}
    return {**tensors, **rest}, whole


def step(dit: Any) -> Tensor:
    with torch.no_grad():
        prefix = dit.prefix(draw(1, 5, CONFIG.context_dim), references=[draw(1, 4, 4, 2)])
        return dit(draw(1, 4, 2, 4, seed=1), torch.tensor([0.7]), prefix)


@pytest.fixture(params=["int4", "nvfp4"])
def made(request: Any, pack: Any, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors, whole = file_of_its_engine(pack, weights(), request.param)
    path = tmp_path / f"svdq-{request.param}_r32-qwen-image.safetensors"
    config = {"axes_dims_rope": list(CONFIG.axes), "_class_name": "QwenImageTransformer2DModel"}
    quant = {"method": "svdquant", "weight": {"dtype": request.param}, "rank": 32}
    metadata = {"config": json.dumps(config), "quantization_config": json.dumps(quant)}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path, whole


def test_a_whole_qwen_image(made: Any) -> None:
    """What a step gives is what the engine's own weights give, habits taken out again."""
    path, whole = made
    loaded = load_dit(path)
    assert loaded.family.name == "qwen_image" and loaded.layout == "Nunchaku"
    exact = DiT(CONFIG).eval()
    exact.load_state_dict(whole)
    assert distance(step(loaded.module), step(exact)) < 1e-4
    written = load_dit(path, dtype=torch.float32).module.state_dict()
    for name, values in whole.items():
        assert (written[name] - values).abs().max() < 1e-5, name
    exact.load_state_dict(weights())
    assert distance(step(loaded.module), step(exact)) < 0.5  # 4 bits of random numbers
    report = inspect(path)
    assert report.usable and "awq_w4a16" in str(report.quantization)


def test_a_lora_on_it(made: Any, tmp_path: Path) -> None:
    """On a third of a fused layer and on the layer whose rows the file deals out."""
    path, whole = made
    lora, merged = {}, dict(whole)
    for k, layer in enumerate(
        (f"{BLOCK}.attn.to_k", f"{BLOCK}.img_mod.1", f"{BLOCK}.img_mlp.net.2")
    ):
        out, width = whole[f"{layer}.weight"].shape
        a, b = draw(4, width, seed=k), 0.05 * draw(out, 4, seed=9 + k)
        lora |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        merged[f"{layer}.weight"] = whole[f"{layer}.weight"] + b @ a
    save_file(lora, tmp_path / "lora.safetensors")
    loaded, exact = load_dit(path), DiT(CONFIG).eval()
    found = load_lora(tmp_path / "lora.safetensors", loaded)
    Adapters(loaded.module).add("a", found.branches, found.vectors, 1.0)
    exact.load_state_dict(merged)
    assert distance(step(loaded.module), step(exact)) < 1e-4
    exact.load_state_dict(whole)
    assert distance(step(loaded.module), step(exact)) > 1e-2


def test_layers_that_are_not_fused_are_what_they_are(pack: Any, tmp_path: Path) -> None:
    """As diffusers' own loader ("Nunchaku Lite") wants them: nothing is dealt out or shifted."""
    state, tensors = weights(), {}
    whole = dict(state)
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or BLOCK not in name:
            tensors.setdefault(name, weight.bfloat16())
            continue
        bias = state[f"{layer}.bias"].bfloat16()
        if "_mod.1" in layer:
            packed, whole[name] = pack.awq(weight)
        else:
            packed, whole[name], _ = pack.svdquant(weight, "int4")
            bias = pack.pack_vector(bias)
        tensors |= {f"{layer}.{part}": t for part, t in packed.items()}
        tensors[f"{layer}.bias"] = bias
    path = tmp_path / "qwen-image-lite.safetensors"
    config = {"axes_dims_rope": list(CONFIG.axes)}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"config": json.dumps(config)})
    exact = DiT(CONFIG).eval()
    exact.load_state_dict(whole)
    assert distance(step(load_dit(path).module), step(exact)) < 1e-4


@pytest.mark.parametrize(("beside", "splits"), [("a.to_qkv_mlp_proj", 1), ("a.to_qkv", 6)])
def test_whose_habits_a_file_has_is_seen_by_what_is_fused(
    pack: Any, tmp_path: Path, beside: str, splits: int
) -> None:
    """FLUX.2's own layer of all four projections is none of Nunchaku's making."""
    layers = {"modulation.linear": pack.awq(draw(384, 64))[0], beside: pack.awq(draw(64, 64))[0]}
    tensors = {f"{layer}.{k}": t for layer, own in layers.items() for k, t in own.items()}
    save_file(tensors, tmp_path / "f.safetensors")
    form = open_checkpoint(tmp_path / "f.safetensors").names["modulation.linear.weight"].form
    assert form is not None and form.settings["splits"] == splits


@pytest.mark.parametrize("part", ["wscales", "proj_down", "smooth_factor", "wzeros"])
def test_what_is_missing_or_misfits_is_told_with_the_layer(
    pack: Any, tmp_path: Path, part: str
) -> None:
    tensors, _ = file_of_its_engine(pack, weights(), "int4")
    layer = f"{BLOCK}.img_mod.1" if part == "wzeros" else f"{BLOCK}.attn.to_add_out"
    for change in (None, torch.ones(3, 5)):
        changed = {k: t.contiguous() for k, t in tensors.items() if k != f"{layer}.{part}"}
        changed |= {} if change is None else {f"{layer}.{part}": change}
        save_file(changed, tmp_path / "qwen-image-bad.safetensors")
        with pytest.raises(CheckpointError, match=rf"{layer}"):
            load_dit(tmp_path / "qwen-image-bad.safetensors")


def test_the_order_is_the_same_in_the_other_direction(pack: Any) -> None:
    """The whole of a tile comes back: no code is read twice."""
    codes = torch.randint(0, 16, (128, 128))
    bytes = weight_in_order(pack.pack_weight(codes)).view(torch.uint8)
    assert torch.equal(torch.stack((bytes & 15, bytes >> 4), -1).flatten(1), codes.to(torch.uint8))
