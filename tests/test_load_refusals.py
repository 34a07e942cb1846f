"""What loading refuses, before any weight is read, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from seedling.model_loaders.detection import detect
from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from seedling.model_loaders.load import load_dit, load_encoder, load_vae

DIT = DiTConfig(
    in_channels=8, layers=2, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)
VAE_CONFIG = VAEConfig(
    z_dim=8, base_dim=8, decoder_base_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1,
    temporal_downsample=(False, True), latents_mean=(0.5,) * 8, latents_std=(2.0,) * 8,
)  # fmt: skip


@pytest.fixture(scope="module")
def dit() -> DiT:
    return DiT(DIT)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(VAE_CONFIG)


def save(path: Path, tensors: dict, config: dict | None = None, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata |= {"config": json.dumps(config)} if config else {}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def save_dit(path: Path, dit: DiT, dtype=torch.float32, config=None, **metadata: str) -> Path:
    return save(path, {k: v.to(dtype) for k, v in dit.state_dict().items()}, config, **metadata)


def vae_metadata() -> dict:
    return {"latents_mean": VAE_CONFIG.latents_mean, "latents_std": VAE_CONFIG.latents_std}


@pytest.fixture
def unread(monkeypatch):
    """Make reading of any weight an error."""

    def forbidden(*_args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "tensor", forbidden)
    monkeypatch.setattr(Checkpoint, "copy_into", forbidden)


def refusal(load, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


def test_a_component_in_the_wrong_slot_is_named_with_what_fits(tmp_path, dit, vae, unread):
    path = save(tmp_path / "pretty.safetensors", vae.state_dict(), vae_metadata())
    assert refusal(load_dit, path).startswith(
        "pretty.safetensors is a VAE (qwen_image_21), but was given as diffusion model; needed is "
        "a diffusion model, for example qwen_image_2.1_bf16.safetensors from diffusion_models/ or "
    )
    assert "qwen3vl_8b_bf16.safetensors from text_encoders/" in refusal(load_encoder, path)
    path = save_dit(tmp_path / "dit.safetensors", dit)
    assert "qwen_image_2.1_vae_bf16.safetensors from vae/" in refusal(load_vae, path)


def test_something_else_is_refused(tmp_path, unread):
    path = save(tmp_path / "cat.safetensors", {"cat.weight": torch.ones(2)})
    text = refusal(load_dit, path)
    assert (
        "cat.safetensors is no model that Seedling knows (it holds cat.weight); needed is" in text
    )
    path = save(tmp_path / "l.safetensors", {"x.lora_A.weight": torch.ones(2, 2)})
    assert "l.safetensors is a LoRA, not a whole model; needed is" in refusal(load_dit, path)


def changed(dit: DiT, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {k: v.clone() for k, v in dit.state_dict().items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_out__linear__weight", None, r"norm_out.linear.weight: missing, expected \(64, 64\)"),
        ("img_in__weight", None, "img_in.weight is missing"),
        ("proj_out__weight", torch.ones(64, 8), r"found \(64, 8\), expected \(8, 64\)"),
        ("proj_out__weight", torch.ones(512), r"found \(512,\), expected \(8, 64\)"),
        ("proj_out__weight", torch.ones(8, 64).long(), "found I64, expected floating-point"),
        ("img_in__weight", torch.ones(63, 8), "63 channels, which is no multiple of 32"),
        ("img_in__weight", torch.ones(64), "has shape"),
        ("transformer_blocks__0__attn__norm_q__weight", torch.ones(0), "has shape"),
    ],
)
def test_what_is_missing_or_misshapen_is_refused_before_any_weight(
    tmp_path, dit, unread, key, value, message
):
    path = save(tmp_path / "bad.safetensors", changed(dit, **{key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dit(path)
    assert "bad.safetensors" in str(caught.value)
    assert "qwen_image_2.1_bf16.safetensors from diffusion_models/" in str(caught.value)


def test_a_long_list_of_differences_is_cut_at_ten_with_a_count(tmp_path, dit, unread):
    wrong = {k: v.T.contiguous() for k, v in dit.state_dict().items() if "img_mlp.proj" in k}
    keys = [k for k in dit.state_dict() if ".attn.to_" in k or "txt_in.out_layer" in k]
    tensors = {**changed(dit, **{k.replace(".", "__"): None for k in keys}), **wrong}
    text = refusal(load_dit, save(tmp_path / "many.safetensors", tensors))
    lines = text.split("\n")
    assert lines[0] == (
        "many.safetensors does not fit the diffusion model of Qwen-Image-2.1: 11 tensors differ."
    )
    assert len([x for x in lines if "expected" in x]) == 10 and lines[11] == "  and 1 more"
    assert lines[12].startswith("A file that fits: qwen_image_2.1_bf16.safetensors")


def test_tensors_that_are_not_used_are_told_not_refused(tmp_path, dit):
    tensors = changed(dit, **{f"extra_{i}": torch.ones(1) for i in range(12)})
    loaded = load_dit(save(tmp_path / "more.safetensors", tensors))
    assert loaded.notes[0].startswith("12 tensors are not used by this model: extra_0, ")
    assert loaded.notes[0].count("extra_") == 10
    assert loaded.module.state_dict().keys() == dit.state_dict().keys()


def test_poisonous_names_change_nothing(tmp_path, dit):
    names = ["forward", "__class__", "training", "transformer_blocks.0.__dict__", "config.layers"]
    names += ["state_dict", "_parameters.x", "transformer_blocks.0.attn.head_dim"]
    tensors = changed(dit, **{n.replace(".", "__"): torch.ones(1) for n in names[3:]})
    tensors |= {n: torch.ones(1) for n in names}
    loaded = load_dit(save(tmp_path / "poison.safetensors", tensors))
    assert loaded.config == DIT and type(loaded.module) is DiT
    first: Any = loaded.module.transformer_blocks[0]
    assert first.attn.head_dim == 32


@pytest.mark.parametrize(
    ("extra", "metadata", "what"),
    [
        ({"img_in.comfy_quant": b'{"format": "int5"}'}, {}, "img_in.weight is quantized as int5"),
        ({"img_in.comfy_quant": b"not json"}, {}, "img_in.comfy_quant that is not valid JSON"),
        ({"img_in.comfy_quant": b"{}"}, {}, "in which format img_in is"),
        ({"gone.comfy_quant": b'{"format": "nvfp4"}'}, {}, "gone is said to be quantized, but its"),
        ({"img_in.qweight": b"\0"}, {}, "a qweight of img_in of (1,)"),
        ({"img_in.comfy_quant": b'{"format": "nvfp4"}'}, {}, "proj_out.weight: found"),
        ({}, {"_quantization_metadata": "[]"}, "_quantization_metadata without layers"),
    ],
)
def test_what_is_wrong_with_a_quantized_file_is_told_with_the_layers_name(
    tmp_path, dit, extra, metadata, what
):
    bytes_of = {k: torch.tensor(list(v), dtype=torch.uint8) for k, v in extra.items()}
    path = save(tmp_path / "q.safetensors", {**dit.state_dict(), **bytes_of}, **metadata)
    text = refusal(load_dit, path)
    assert text.startswith("q.safetensors") and what in text


def test_integers_without_scales_are_refused(tmp_path, dit):
    path = save_dit(tmp_path / "q.safetensors", dit, torch.int8)
    assert "found I8, expected floating-point numbers" in refusal(load_dit, path)


def test_a_hostile_header_does_not_build_a_million_layers(tmp_path, dit, unread):
    names = {f"transformer_blocks.{i}.attn.norm_q.weight": torch.ones(1) for i in range(2000)}
    path = save(tmp_path / "tall.safetensors", {**names, **dit.state_dict()})
    assert "more than 1024" in refusal(load_dit, path)
    names = {f"x{i}": torch.ones(1) for i in range(20_000)}
    path = save(tmp_path / "wide.safetensors", {**names, **dit.state_dict()})
    assert "tensors are more than 20000" in refusal(load_dit, path)


@pytest.mark.parametrize(
    "config",
    [
        {"axes_dims_rope": [1, 2, 3]}, {"axes_dims_rope": "abc"}, {"schedule": {"steps": "many"}},
        {"axes_dims_rope": 7}, {"schedule": {"steps": 0}}, {"schedule": {"guidance": [1]}},
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(tmp_path, dit, config, unread):
    path = save_dit(tmp_path / "odd.safetensors", dit, config=config)
    assert "odd.safetensors looks like the diffusion model" in refusal(load_dit, path)


def test_detection_reads_no_weight(tmp_path, dit, unread):
    found = detect(open_checkpoint(save_dit(tmp_path / "x.safetensors", dit)))
    assert found is not None and found.component.kind == "dit"
