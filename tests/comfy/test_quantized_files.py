"""Files that Seedling quantizes, in core's own layers; and quantized files in our own nodes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedling.quant.encode import SIX, WAYS, encode
from seedling.quant.layouts import Parts, layout_of

pytestmark = pytest.mark.comfyui

OUT, IN = 128, 256

# Core's mixed-precision Linear, as its loaders make it: read, dequantize, multiply.
READ = """
import sys
sys.path.insert(0, sys.argv[1])
arguments, sys.argv = sys.argv[2:], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops, comfy.utils, torch
from safetensors.torch import load_file, save_file
state, x = load_file(arguments[0]), load_file(arguments[1])["x"]
state, _ = comfy.utils.convert_old_quants(state)
assert comfy.utils.detect_layer_quantization(state, "layer.") == {"mixed_ops": True}
ops = comfy.ops.mixed_precision_ops({}, torch.float32)
net = torch.nn.Module()
net.layer = ops.Linear(x.shape[1], 128, bias=False)
missing, unexpected = net.load_state_dict(state, strict=False)
assert not missing and not unexpected, (missing, unexpected)
with torch.no_grad():
    y = net.layer(x)
    whole = net.layer.weight.dequantize().float()
save_file({"y": y.float().contiguous(), "whole": whole.contiguous()}, arguments[2])
"""


@pytest.mark.parametrize("name", WAYS)
def test_core_reads_what_was_encoded(name: str, comfyui, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = encode(WAYS[name], torch.randn(OUT, IN))
    marker = torch.tensor(list(json.dumps(made.settings).encode()), dtype=torch.uint8)
    tensors = {f"layer.{part}": tensor for part, tensor in made.tensors.items()}
    save_file({**tensors, "layer.comfy_quant": marker}, tmp_path / "q.safetensors")
    x = torch.randn(32, IN)
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [comfyui.python, "-c", READ, str(comfyui.folder)]
    files = [str(tmp_path / f"{n}.safetensors") for n in ("q", "x", "y")]
    done = subprocess.run(
        [*command, *files], env=comfyui.environment, cwd=comfyui.folder, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    if SIX in name and "convrot_groupsize" in done.stderr:
        pytest.skip("this ComfyUI's comfy-kitchen is too old for 6 bits, so `--six` is asked for")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "y.safetensors")
    parts = Parts(made.tensors, (OUT, IN), settings=made.settings)
    ours = layout_of(made.format, parts).weight()
    assert (theirs["whole"] - ours).norm() < 5e-3 * ours.norm()
    # On a CPU comfy-kitchen rounds the inputs of convrot_w4a4 to 4 bits, whatever the file says.
    limit = 0.2 if made.format == "convrot_w4a4" else 3e-2
    assert (theirs["y"] - x @ ours.T).norm() < limit * (x @ ours.T).norm()


# ---- our nodes ---------------------------------------------------------------------------------


def marker(settings: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def in_safetensors(source: Path, path: Path, format: str) -> None:
    """The model of `source` with its matrices in int8 with ConvRot, or in scaled float8."""
    with safe_open(str(source), "pt") as file:
        metadata = file.metadata()
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source).items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or "blocks" not in name:
            tensors[name] = weight
        elif format == "int8":
            made = encode(WAYS["int8 rotated"], weight.float())
            tensors |= {f"{layer}.{part}": t for part, t in made.tensors.items()}
            tensors[f"{layer}.comfy_quant"] = marker(made.settings)
        else:
            scale = weight.abs().max().float() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{layer}.weight_scale"] = scale
            tensors[f"{layer}.comfy_quant"] = marker({"format": "float8_e4m3fn"})
    save_file(tensors, path, metadata)


def in_gguf(source: Path, path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image21")
    for name, weight in load_file(source).items():
        quantized = weight.ndim == 2 and "blocks" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=["int8", "float8", "gguf"])
def quantized(request: Any, server: Any) -> Path:
    """A quantized file among the server's diffusion models."""
    folder = server.base / "models" / "diffusion_models"
    path = folder / f"q-{request.param}.{'gguf' if request.param == 'gguf' else 'safetensors'}"
    if request.param == "gguf":
        in_gguf(folder / "tiny.safetensors", path)
    else:
        in_safetensors(folder / "tiny.safetensors", path, request.param)
    return path


def graph_of(root: Path, path: Path) -> dict[str, Any]:
    text = (root / "tests" / "workflows" / "text_to_image.api.json").read_text("utf-8")
    graph = json.loads(text.replace("seedling-tiny (embedded)", "tiny.safetensors"))
    graph["1"]["inputs"]["dit"] = path.name
    graph["6"]["inputs"]["steps"], graph["6"]["inputs"]["guidance"] = 4, 2.5  # GGUF keeps none
    graph["4"]["inputs"]["shape"] = "64x64"
    return graph


def test_our_nodes_paint_with_a_quantized_file(
    server: Any, root: Path, quantized: Path, tiny_model: Any
) -> None:
    """Load DiT on it gives the command line's picture, and one near that of the full precision."""
    from seedling.host.cli import main

    graph = graph_of(root, quantized)
    (save,) = [k for k, node in graph.items() if node["class_type"] == "SaveImage"]
    shown = server.run(graph)
    (picture,) = server.pictures(graph, save)
    assert "Weights stay as the file has them" in json.dumps(shown["1"])
    out = server.base / f"{quantized.name}.png"
    words = ["generate", "--dit", str(quantized), "--vae", str(tiny_model.vae), "--encoder",
             str(tiny_model.encoder), graph["5"]["inputs"]["prompt"], "--seed", "1",
             "--steps", "4", "--guidance", "2.5", "--size", "64x64", "--device", "cpu",
             "--out", str(out)]  # fmt: skip
    assert main(words) == 0
    from PIL import Image

    theirs = np.array(Image.open(out))
    assert picture.shape == theirs.shape
    assert np.abs(picture.astype(int) - theirs.astype(int)).max() <= 1
    graph["1"]["inputs"]["dit"] = "tiny.safetensors"
    (exact,) = server.pictures(graph, save)
    assert 0 < np.abs(picture.astype(float) - exact.astype(float)).mean() < 30


def test_cores_lora_loader_changes_it_and_lets_go(server: Any, root: Path, quantized: Path) -> None:
    graph = graph_of(root, quantized)
    (save,) = [k for k, node in graph.items() if node["class_type"] == "SaveImage"]
    (before,) = server.pictures(graph, save)
    patched = json.loads(json.dumps(graph))
    patched["20"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["1", 0], "lora_name": "turn.safetensors", "strength_model": 1.0},
    }
    patched["6"]["inputs"]["model"] = ["20", 0]
    assert not np.array_equal(server.pictures(patched, save)[0], before)
    graph["6"]["inputs"]["seed"] = 2
    server.run(graph)
    graph["6"]["inputs"]["seed"] = 1
    assert np.array_equal(server.pictures(graph, save)[0], before)


def test_quantize_dit_makes_a_file_that_load_dit_reads(server: Any, root: Path) -> None:
    """The node, on core's canvas: the comparison is shown, and the new file paints."""
    names = dict.fromkeys(("dit", "encoder", "vae"), "tiny.safetensors")
    graph = {
        "1": {
            "class_type": "SeedlingQuantizeDiT",
            "inputs": {**names, "prompts": "red", "bits": 8.0, "name": "made"},
        },
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    (both,) = server.pictures(graph, "2")
    assert both.shape == (64, 128, 3)
    made = server.base / "models" / "diffusion_models" / "made.safetensors"
    again = graph_of(root, made)
    (save,) = [k for k, node in again.items() if node["class_type"] == "SaveImage"]
    (picture,) = server.pictures(again, save)
    assert picture.std() > 1 and made.with_suffix(".report.txt").is_file()
