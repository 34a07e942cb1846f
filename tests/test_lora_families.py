"""LoRA on every linear layer of every family's network, in each publisher's names, against merging.

No layer may be read around its `forward`, where the branch would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seedling.model_loaders.families import FAMILIES
from seedling.model_loaders.families.flux2.dit import DiTConfig as Flux2Config
from seedling.model_loaders.families.qwen_image.dit import DiTConfig as QwenImageConfig
from seedling.model_loaders.families.qwen_image_21.dit import DiTConfig as QwenImage21Config
from seedling.model_loaders.lora import load_lora
from seedling.quant.lora import Adapters
from seedling.quant.operations import TORCH, widened

BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.1"
# Published layers that are called otherwise in our networks, and what they are there, in order.
BFL = {
    "double_blocks.1.img_attn.qkv": [f"{BLOCK}.attn.to_{x}" for x in "qkv"],
    "double_blocks.1.txt_attn.qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.1.img_attn.proj": [f"{BLOCK}.attn.to_out.0"],
    "double_blocks.1.txt_attn.proj": [f"{BLOCK}.attn.to_add_out"],
    "double_blocks.1.img_mlp.0": [f"{BLOCK}.ff.linear_in"],
    "double_blocks.1.img_mlp.2": [f"{BLOCK}.ff.linear_out"],
    "double_blocks.1.txt_mlp.0": [f"{BLOCK}.ff_context.linear_in"],
    "double_blocks.1.txt_mlp.2": [f"{BLOCK}.ff_context.linear_out"],
    "single_blocks.1.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": [f"{SINGLE}.attn.to_out"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.shift", "norm_out.scale"],
    "final_layer.linear": ["proj_out"],
}
DIFFUSERS = {
    "norm_out.linear": ["norm_out.scale", "norm_out.shift"],
    "transformer_blocks.1.attn.to_added_qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
}
GATE_UP = {
    "transformer_blocks.1.img_mlp.gate_up": [f"{BLOCK}.img_mlp.gate_layer", f"{BLOCK}.img_mlp.proj"]
}


@dataclass
class Case:
    """A tiny network of a family, how it is run, and published names that are not its own."""

    config: Any
    run: Callable[[Any], Tensor]
    renamed: tuple[dict[str, list[str]], ...] = ()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * shape[0] + shape[-1])
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def run_qwen_image_21(dit: Any) -> Tensor:
    slots = torch.tensor([False, True, False])
    prefix = dit.prefix(draw(1, 3, 24), slots, [draw(1, 8, 2, 2)], 4)
    return dit(draw(1, 8, 2, 2, seed=1), torch.tensor([0.7]), prefix)


def run_with_modulations(dit: Any) -> Tensor:
    """As the pipeline runs it: what depends on the time alone is computed ahead."""
    channels = getattr(dit.config, "out_channels", dit.config.in_channels)
    prefix = dit.prefix(draw(1, 5, 24), references=[draw(1, channels, 4, 2)])
    (known,) = dit.modulations([0.7], torch.float32)
    return dit(draw(1, channels, 2, 4, seed=1), torch.tensor([0.7]), prefix, known)


CASES = {
    "qwen_image_21": Case(
        QwenImage21Config(in_channels=8, layers=2, heads=2, head_dim=32, context_dim=24,
                          mlp_dim=192, axes=(4, 14, 14)),
        run_qwen_image_21, (GATE_UP,),
    ),
    "qwen_image": Case(
        QwenImageConfig(in_channels=16, out_channels=4, layers=2, heads=2, head_dim=32,
                        context_dim=24, mlp_dim=256, axes=(4, 14, 14), zero_cond_t=True),
        run_with_modulations,
    ),
    "flux2": Case(
        Flux2Config(in_channels=8, double=2, single=2, heads=2, head_dim=16, context_dim=24,
                    mlp_dim=96, axes=(4, 4, 4, 4)),
        run_with_modulations, (BFL, DIFFUSERS),
    ),
}  # fmt: skip


def network(
    name: str, operations: Any = TORCH, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """The tiny network of a family with random weights, and as `load_lora` wants it."""
    family = next(f for f in FAMILIES if f.name == name)
    component = family.component("dit")
    assert component is not None
    dit: Any = component.build(CASES[name].config, operations, "cpu", dtype)
    weights = {
        key: (1.0 if "norm" in key and t.ndim == 1 else 0.0) + draw(*t.shape) / (1 + (t.ndim == 1))
        for key, t in dit.state_dict().items()
    }
    dit.load_state_dict(weights)
    dit.requires_grad_(False).eval()
    return dit, SimpleNamespace(family=family, module=dit, checkpoint=SimpleNamespace(name="tiny"))


def layers(dit: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (layer.out_features, layer.in_features)  # type: ignore
        for name, layer in dit.named_modules()
        if hasattr(layer, "in_features")
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def compare(
    name: str, names: dict[str, list[str]], key: Callable, folder: Path, **kind: Any
) -> None:
    """A LoRA on the published layers `names` does what merging into our layers does."""
    dit, loaded = network(name, **kind)
    before, sizes = CASES[name].run(dit), layers(dit)
    tensors, total = {}, {k: t.float().clone() for k, t in dit.state_dict().items()}
    for published, ours in names.items():
        outs, ins = sum(sizes[n][0] for n in ours), sizes[ours[0]][1]
        down, up = draw(2, ins), 0.3 * draw(outs, 2)
        tensors |= dict(zip(key(published), (down, up), strict=True))
        for layer, part in zip(ours, (up @ down).split([sizes[n][0] for n in ours]), strict=True):
            total[f"{layer}.weight"] += part
    save_file(tensors, folder / "style.safetensors")
    lora = load_lora(folder / "style.safetensors", loaded)
    assert lora.unmatched is None
    adapters = Adapters(dit)
    adapters.add("style", lora.branches, lora.vectors)
    got = CASES[name].run(dit)
    adapters.remove("style")
    assert torch.equal(CASES[name].run(dit), before)
    merged, _ = network(name)
    merged.load_state_dict(total)
    theirs = CASES[name].run(merged)
    assert error(got, theirs) <= 1e-5 < 1e-2 < error(before, theirs)


STYLES: dict[str, Callable[[str], tuple[str, str]]] = {
    "kohya": lambda n: (f"lora_unet_{n.replace('.', '_')}.lora_down.weight",
                        f"lora_unet_{n.replace('.', '_')}.lora_up.weight"),
    "OneTrainer": lambda n: (f"lora_transformer_{n.replace('.', '_')}.lora_down.weight",
                             f"lora_transformer_{n.replace('.', '_')}.lora_up.weight"),
    "LyCORIS": lambda n: (f"lycoris_{n.replace('.', '_')}.lora_down.weight",
                          f"lycoris_{n.replace('.', '_')}.lora_up.weight"),
    "ComfyUI": lambda n: (f"diffusion_model.{n}.lora_A.weight",
                          f"diffusion_model.{n}.lora_B.weight"),
    "ComfyUI, down and up": lambda n: (f"diffusion_model.{n}.lora_down.weight",
                                       f"diffusion_model.{n}.lora_up.weight"),
    "diffusers": lambda n: (f"transformer.{n}.lora_A.weight", f"transformer.{n}.lora_B.weight"),
    "diffusers, older": lambda n: (f"transformer.{n}.lora.down.weight",
                                   f"transformer.{n}.lora.up.weight"),
    "diffusers, oldest": lambda n: (f"unet.{n}_lora.down.weight", f"unet.{n}_lora.up.weight"),
    "PEFT": lambda n: (f"base_model.model.{n}.lora_A.weight",
                       f"base_model.model.{n}.lora_B.weight"),
    "PEFT, with its adapter's name": lambda n: (f"{n}.lora_A.default.weight",
                                                f"{n}.lora_B.default.weight"),
    "bare": lambda n: (f"{n}.lora_A", f"{n}.lora_B"),
}  # fmt: skip


def test_there_is_a_case_for_every_family() -> None:
    assert {family.name for family in FAMILIES} == {*CASES}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CASES)
def test_on_every_layer(name: str, style: str, tmp_path: Path) -> None:
    dit, _ = network(name)
    compare(name, {layer: [layer] for layer in layers(dit)}, STYLES[style], tmp_path)


@pytest.mark.parametrize("style", ["kohya", "ComfyUI", "diffusers"])
@pytest.mark.parametrize(
    ("name", "renamed"), [(name, r) for name, case in CASES.items() for r in case.renamed]
)
def test_on_layers_under_other_names(name: str, renamed: dict, style: str, tmp_path: Path) -> None:
    compare(name, renamed, STYLES[style], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_on_16_bit_weights(name: str, tmp_path: Path) -> None:
    """They stay as they are; the sum is what fp32 makes of them and of the LoRA."""
    dit, _ = network(name)
    every = {layer: [layer] for layer in layers(dit)}
    compare(name, every, STYLES["ComfyUI"], tmp_path, operations=widened(), dtype=torch.bfloat16)
