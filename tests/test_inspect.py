"""`inspect`: what a file is, in words and as JSON, from its header alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from seedling.model_loaders.inspect import inspect

FIELDS = {
    "family", "variant", "component", "parameters", "dtype", "quantization", "licence", "problems",
}  # fmt: skip
DIT = DiTConfig(
    in_channels=8, layers=2, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)
VAE_CONFIG = VAEConfig(
    z_dim=8, base_dim=8, decoder_base_dim=12, dim_mult=(1,), num_res_blocks=1,
    temporal_downsample=(), patch_size=4, latents_mean=(0.5,) * 8, latents_std=(2.0,) * 8,
)  # fmt: skip


def dit_file(path: Path, dtype=torch.float32, **metadata: str) -> Path:
    save_file({k: v.to(dtype) for k, v in DiT(DIT).state_dict().items()}, path, metadata)
    return path


def test_a_usable_dit(tmp_path):
    path = dit_file(tmp_path / "anything.safetensors", torch.bfloat16)
    report = inspect(path)
    content = json.loads(report.json())
    assert content.keys() >= FIELDS
    parameters = sum(p.numel() for p in DiT(DIT, device="meta").parameters())
    expected = {
        "family": "qwen_image_21", "variant": "base", "component": "dit", "dtype": "bf16",
        "parameters": parameters, "quantization": None, "problems": [], "commercial": False,
        "licence": "Qwen Research Licence", "file": str(path), "bytes": 2 * parameters,
    }  # fmt: skip
    assert {key: content[key] for key in expected} == expected
    assert report.usable and report.exit_code == 0
    words = report.words()
    assert words.startswith(f"{path}\n  Qwen-Image-2.1 (qwen_image_21): diffusion model\n")
    assert "Sampled as base: nothing in or beside the file says that it is distilled." in words
    assert "parameters, bf16, 0.000" in words and words.endswith("  Usable.")


def test_a_vae_that_folds_pixels_and_brings_its_terms(tmp_path):
    path = tmp_path / "vae.safetensors"
    config = {
        "latents_mean": VAE_CONFIG.latents_mean, "latents_std": VAE_CONFIG.latents_std,
        "licence": "Apache-2.0",
    }  # fmt: skip
    save_file(VAE(VAE_CONFIG).state_dict(), path, {"config": json.dumps(config)})
    report = inspect(path)
    assert (report.component, report.variant, report.dtype) == ("vae", None, "fp32")
    assert report.problems == () and report.licence == "Apache-2.0" and report.commercial
    assert "Apache-2.0, commercial use allowed" in report.words()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "x.safetensors is a Git LFS pointer"),
        (b"<!doctype html>", "x.safetensors is a web page"),
        (b"", "x.safetensors is empty"),
        (b"GGUF\x03\0\0\0", "x.safetensors is a GGUF file by another name"),
        (None, "x.safetensors does not exist"),
    ],
)
def test_what_cannot_be_read_is_one_problem_with_the_files_name(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    report = inspect(path)
    assert len(report.problems) == 1 and message in report.problems[0]
    assert report.exit_code == 2 and not report.usable
    assert report.quantization is None
    assert f"  Refused: {report.problems[0]}" in report.words()
    assert json.loads(report.json())["problems"] == list(report.problems)


def test_a_cut_file(tmp_path):
    path = dit_file(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    (problem,) = inspect(path).problems
    assert "cut.safetensors is cut short at tensor" in problem and "bytes announced" in problem


def test_an_unknown_model_and_a_folder(tmp_path):
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    report = inspect(tmp_path / "other.safetensors")
    assert report.family is None and report.exit_code == 2 and report.parameters == 6
    assert "other.safetensors is no model that Seedling knows" in report.problems[0]
    assert inspect(tmp_path).parameters == 6  # the folder's only file


def test_missing_tensors_are_listed(tmp_path):
    tensors = DiT(DIT).state_dict()
    del tensors["norm_out.linear.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    report = inspect(tmp_path / "part.safetensors")
    assert (report.component, report.exit_code) == ("dit", 2)
    assert "norm_out.linear.weight: missing, expected (64, 64)" in report.problems[0]


def test_a_quantized_file_is_recognised(tmp_path):
    tensors = DiT(DIT).state_dict()
    key = "transformer_blocks.0.attn.to_q"
    tensors[f"{key}.weight"] = torch.ones(64, 64, dtype=torch.int8)
    tensors[f"{key}.weight_scale"] = torch.ones(64, 1)
    marker = b'{"format": "int8_tensorwise", "convrot": true}'
    tensors[f"{key}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    save_file(tensors, tmp_path / "q.safetensors")
    report = inspect(tmp_path / "q.safetensors")
    assert (report.component, report.quantization) == ("dit", "int8_tensorwise")
    assert report.parameters == sum(p.numel() for p in DiT(DIT, device="meta").parameters())
    assert report.usable and "quantized as int8_tensorwise" in report.words()


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    ],
)
def test_a_lora_is_known_by_its_layers(tmp_path, prefix, down, up):
    key = f"{prefix}transformer_blocks.3.img_mlp.gate_layer"
    pair = {f"{key}.{down}": torch.ones(4, 4096), f"{key}.{up}": torch.ones(12288, 4)}
    save_file(pair, tmp_path / "l.safetensors")
    report = inspect(tmp_path / "l.safetensors")
    assert (report.component, report.family, report.exit_code) == ("lora", "qwen_image_21", 0)
    pair = {f"unet.down.{down}": torch.ones(4, 320), f"unet.down.{up}": torch.ones(320, 4)}
    save_file(pair, tmp_path / "l.safetensors")
    report = inspect(tmp_path / "l.safetensors")
    assert (report.component, report.family, report.exit_code) == ("lora", None, 2)
    assert "l.safetensors is a LoRA for a model" in report.problems[0]


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path):
    save_file({"\x1b[31mred\n": torch.ones(2)}, tmp_path / "t.safetensors")
    words = inspect(tmp_path / "t.safetensors").words()
    assert "\x1b" not in words and "\\x1b[31mred\\n" in words


def test_metadata_decide_the_variant_and_say_why(tmp_path):
    sigmas = json.dumps([1.0, 0.6, 0.2])
    report = inspect(dit_file(tmp_path / "x.safetensors", sample_sigmas=sigmas))
    assert report.variant == "turbo" and "metadata" in str(report.reason)
    report = inspect(
        dit_file(tmp_path / "x.safetensors", config=json.dumps({"schedule": {"steps": 0}}))
    )
    assert report.exit_code == 2 and "has 0 steps" in report.problems[0]
    report = inspect(dit_file(tmp_path / "x.safetensors", config="{"))
    assert report.exit_code == 2 and "not valid JSON" in report.problems[0]
