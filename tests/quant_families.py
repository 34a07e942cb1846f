"""Tiny networks of all families with their published names, and what a quantized file of theirs has
to do: run as its weights in full precision do, with a LoRA and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.families.flux2.dit import DiT as Flux2
from seedling.model_loaders.families.flux2.dit import DiTConfig as Flux2Config
from seedling.model_loaders.families.qwen_image.dit import DiT as QwenImage
from seedling.model_loaders.families.qwen_image.dit import DiTConfig as QwenImageConfig
from seedling.model_loaders.families.qwen_image_21.dit import DiT as QwenImage21
from seedling.model_loaders.families.qwen_image_21.dit import DiTConfig as QwenImage21Config
from seedling.model_loaders.load import load_dit
from seedling.model_loaders.lora import load_lora
from seedling.quant.linear import QuantizedLinear
from seedling.quant.lora import Adapters

BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@dataclass
class Family:
    """A tiny network, its published layers that are called otherwise, and where a LoRA goes."""

    network: Any
    config: Any
    file: str
    run: Callable[[Any], Tensor]
    lora: tuple[str, ...]
    renamed: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_qwen_image_21(dit: Any) -> Tensor:
    slots = torch.tensor([False, True, False])
    prefix = dit.prefix(draw(1, 3, 256), slots, [draw(1, 16, 2, 2)], 4)
    return dit(draw(1, 16, 2, 2, seed=1), torch.tensor([0.7]), prefix)


def run_others(dit: Any) -> Tensor:
    channels = getattr(dit.config, "out_channels", dit.config.in_channels)
    prefix = dit.prefix(draw(1, 5, 256), references=[draw(1, channels, 4, 2)])
    return dit(draw(1, channels, 2, 4, seed=1), torch.tensor([0.7]), prefix)


BFL = {
    "img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "double_blocks.0.img_attn.qkv": [f"{BLOCK}.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{BLOCK}.attn.to_out.0"],
    "double_blocks.0.img_attn.norm.query_norm": [f"{BLOCK}.attn.norm_q"],
    "double_blocks.0.img_attn.norm.key_norm": [f"{BLOCK}.attn.norm_k"],
    "double_blocks.0.img_mlp.0": [f"{BLOCK}.ff.linear_in"],
    "double_blocks.0.img_mlp.2": [f"{BLOCK}.ff.linear_out"],
    "double_blocks.0.txt_attn.qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.txt_attn.proj": [f"{BLOCK}.attn.to_add_out"],
    "double_blocks.0.txt_attn.norm.query_norm": [f"{BLOCK}.attn.norm_added_q"],
    "double_blocks.0.txt_attn.norm.key_norm": [f"{BLOCK}.attn.norm_added_k"],
    "double_blocks.0.txt_mlp.0": [f"{BLOCK}.ff_context.linear_in"],
    "double_blocks.0.txt_mlp.2": [f"{BLOCK}.ff_context.linear_out"],
    "single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": [f"{SINGLE}.attn.to_out"],
    "single_blocks.0.norm.query_norm": [f"{SINGLE}.attn.norm_q"],
    "single_blocks.0.norm.key_norm": [f"{SINGLE}.attn.norm_k"],
    "final_layer.adaLN_modulation.1": ["norm_out.shift", "norm_out.scale"],
}  # fmt: skip
FAMILIES = {
    "qwen_image_21": Family(
        QwenImage21,
        QwenImage21Config(in_channels=16, layers=1, heads=8, head_dim=32, context_dim=256,
                          mlp_dim=256, axes=(4, 14, 14)),
        "qwen_image_2.1", run_qwen_image_21, (f"{BLOCK}.img_mlp.proj", f"{BLOCK}.attn.to_k"),
        {f"{BLOCK}.img_mlp.gate_up": [f"{BLOCK}.img_mlp.gate_layer", f"{BLOCK}.img_mlp.proj"]},
        {"axes_dims_rope": [4, 14, 14]},
    ),
    "flux2": Family(
        Flux2,
        Flux2Config(in_channels=16, double=1, single=1, heads=2, head_dim=128, context_dim=256,
                    mlp_dim=256),
        "flux-2-klein-4b", run_others, (f"{BLOCK}.attn.to_k", f"{SINGLE}.attn.to_out"), BFL,
    ),
    "qwen_image": Family(
        QwenImage,
        QwenImageConfig(in_channels=16, out_channels=4, layers=1, heads=2, context_dim=256,
                        mlp_dim=512),
        "qwen_image", run_others, (f"{BLOCK}.attn.to_k", f"{BLOCK}.img_mlp.net.2"),
    ),
}  # fmt: skip


@lru_cache
def state_of(name: str) -> dict[str, Tensor]:
    """Random weights in numbers that bf16 holds, under our names."""
    family = FAMILIES[name]
    table = family.network(family.config, device="meta").state_dict()
    return {
        key: (draw(*t.shape, seed=k) / t.shape[-1] ** 0.5 + ("norm" in key and t.ndim == 1))
        .bfloat16().float()
        for k, (key, t) in enumerate(table.items())
    }  # fmt: skip


def published(name: str, fuse: bool = True) -> dict[str, tuple[Tensor, list[str]]]:
    """Published name -> its tensor, and the names of ours that it holds, one below the other."""
    state, family = state_of(name), FAMILIES[name]
    found, left = {}, dict(state)
    for layer, parts in family.renamed.items() if fuse else ():
        for leaf in ("weight", "bias"):
            own = [f"{part}.{leaf}" for part in parts]
            if own[0] in left:
                leaf = "scale" if "_norm" in layer else leaf
                found[f"{layer}.{leaf}"] = torch.cat([left.pop(n) for n in own]), own
    return found | {key: (t, [key]) for key, t in left.items()}


def to_quantize(key: str, tensor: Tensor) -> bool:
    """The large layers of blocks, as published files have it."""
    inside = "blocks." in key and key.endswith(".weight") and tensor.ndim == 2
    return inside and tensor.shape[0] % 128 == 0 and tensor.shape[1] % 256 == 0


@dataclass
class File:
    path: Path
    whole: dict[str, Tensor]  # our weights as the tool reads them from the file
    error: float | None  # of the weights, None where their codes are random


def split(values: Tensor, own: list[str], name: str) -> dict[str, Tensor]:
    sizes = [len(state_of(name)[key]) for key in own]
    return dict(zip(own, values.split(sizes), strict=True))


def step(name: str, dit: Any) -> Tensor:
    with torch.no_grad():
        return FAMILIES[name].run(dit)


def full(name: str, weights: dict[str, Tensor]) -> Tensor:
    """The step of the network with these weights in full precision."""
    dit = FAMILIES[name].network(FAMILIES[name].config).eval()
    dit.load_state_dict(weights)
    return step(name, dit)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check(name: str, file: File, folder: Path) -> None:
    family = FAMILIES[name]
    loaded = load_dit(file.path, variant="qwen-image" if name == "qwen_image" else None)
    assert loaded.family.name == name
    held = [m.layout for m in loaded.module.modules() if isinstance(m, QuantizedLinear)]
    rounded = 3e-2 if any(layout.native for layout in held) else 1e-4  # inputs to 8 bits, or not
    assert held or file.path.stem.endswith(("BF16", "F16"))
    assert distance(step(name, loaded.module), full(name, file.whole)) < rounded
    if file.error is not None:
        original = full(name, state_of(name))
        assert distance(step(name, loaded.module), original) < 3 * file.error + rounded
    lora, merged = {}, dict(file.whole)
    for k, layer in enumerate(family.lora):
        out, width = file.whole[f"{layer}.weight"].shape
        a, b = draw(4, width, seed=k), 0.6 * draw(out, 4, seed=9 + k)
        lora |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        merged[f"{layer}.weight"] = file.whole[f"{layer}.weight"] + 0.8 * b @ a
    save_file(lora, folder / "lora.safetensors")
    without = step(name, loaded.module)
    found = load_lora(folder / "lora.safetensors", loaded)
    adapters = Adapters(loaded.module)
    adapters.add("a", found.branches, found.vectors, 0.8)
    with_it = step(name, loaded.module)
    assert distance(with_it, full(name, merged)) < rounded
    assert distance(with_it, without) > 2 * rounded
    adapters.set_strength("a", 0.0)
    assert torch.equal(step(name, loaded.module), without)
