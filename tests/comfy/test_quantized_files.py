"""Files that Seedling quantizes, read by core's own layers; and core's memory of them, by ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    if name == SIX and "convrot_groupsize" in done.stderr:
        pytest.skip("this ComfyUI's comfy-kitchen is too old for 6 bits, so `--six` is asked for")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "y.safetensors")
    parts = Parts(made.tensors, (OUT, IN), settings=made.settings)
    ours = layout_of(made.format, parts).weight()
    assert (theirs["whole"] - ours).norm() < 5e-3 * ours.norm()
    # On a CPU comfy-kitchen rounds the inputs of convrot_w4a4 to 4 bits, whatever the file says.
    limit = 0.2 if made.format == "convrot_w4a4" else 3e-2
    assert (theirs["y"] - x @ ours.T).norm() < limit * (x @ ours.T).norm()
