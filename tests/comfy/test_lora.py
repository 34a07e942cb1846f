"""Core's LoRA loader on our MODEL: every naming, and layers that the file fuses, as if merged."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.families.flux2.dit import DiT, DiTConfig

pytestmark = pytest.mark.comfyui

WIDTH, MLP = 256, 768
CONFIG = DiTConfig(
    double=1, single=1, heads=2, head_dim=128, context_dim=96, mlp_dim=MLP, axes=(32, 32, 32, 32)
)
STRENGTH = 0.7
NAMES = {
    "kohya": lambda n: f"lora_unet_{n.replace('.', '_')}",
    "comfyui": lambda n: f"diffusion_model.{n}",
    "bare": lambda n: n,
    "diffusers": lambda n: f"transformer.{n}",
    "lycoris": lambda n: f"lycoris_{n.replace('.', '_')}",
}

# Runs in ComfyUI's folder: core loads each file onto our model; the patched weights are saved.
PATCH = """
import logging, os, sys
folder, strength = sys.argv[1], float(sys.argv[2])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.getcwd())
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, comfy.utils
from safetensors.torch import save_file
exec(os.environ["LOAD_PACK"])
from seedling.nodes.comfy_bridge import load_model

warned = []
logging.getLogger().addHandler(type("H", (logging.Handler,), {"emit": lambda s, r: warned.append(
    r.getMessage())})(logging.WARNING))
model = load_model(os.path.join(folder, "model.safetensors"), None)
size = model.model_size()
for name in sorted(os.listdir(folder)):
    if name.startswith("lora-"):
        file = comfy.utils.load_torch_file(os.path.join(folder, name))
        patched, _ = comfy.sd.load_lora_for_models(model, None, file, strength, 0)
        clone = patched.clone()
        assert clone.patches.keys() == patched.patches.keys() and not model.patches
        patch = lambda key: clone.patch_weight_to_device(key, return_weight=True).clone()
        done = {key: patch(key) for key in clone.patches}
        save_file(done, os.path.join(folder, name.replace("lora-", "done-")))
        model.unpatch_model()
assert not [w for w in warned if "NOT LOADED" in w or "not loaded" in w], warned
assert size == sum(t.nbytes for t in model.model_state_dict().values())
whole = dict(model.model.state_dict())["diffusion_model.double_blocks.0.img_attn.qkv.weight"]
assert whole.shape == (768, 256), whole.shape
print("patched")
"""


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * shape[0] + shape[-1])
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def test_every_naming_patches_the_same_weights(comfyui: Any, layers: Any, tmp_path: Path) -> None:
    weights = {name: draw(*t.shape) for name, t in DiT(CONFIG, device="meta").state_dict().items()}
    published = {
        f"{n}.weight": torch.cat([weights[f"{o}.weight"] for o in own]) for n, own in layers.items()
    }
    assert sum(len(own) for own in layers.values()) == len(weights)
    save_file(published, tmp_path / "model.safetensors")
    matrices = {n: t for n, t in published.items() if t.ndim == 2}
    forms: dict[str, dict[str, Tensor]] = {}
    expected: dict[str, dict[str, Tensor]] = {}
    for style, called in NAMES.items():
        for name, weight in matrices.items():
            (outs, ins), layer = weight.shape, name.removesuffix(".weight")
            own = layers[layer]
            if style == "lycoris":
                tensors = {"lokr_w1": draw(2, 4), "lokr_w2": draw(outs // 2, ins // 4)}
                delta = torch.kron(*tensors.values())
            else:
                tensors = {"lora_down.weight": draw(4, ins), "lora_up.weight": draw(outs, 4)}
                delta = draw(outs, 4) @ draw(4, ins)
            forms.setdefault(style, {}).update(
                {f"{called(layer)}.{k}": t for k, t in tensors.items()}
            )
            for o, part in zip(own, delta.chunk(len(own)), strict=True):
                total = weights[f"{o}.weight"] + STRENGTH * part
                expected.setdefault(style, {})[f"diffusion_model.{o}.weight"] = total
    for style, tensors in forms.items():
        save_file(
            {k: t.clone() for k, t in tensors.items()}, tmp_path / f"lora-{style}.safetensors"
        )
    done = subprocess.run(
        [comfyui.python, "-c", PATCH, str(tmp_path), str(STRENGTH)],
        cwd=comfyui.folder,
        env=comfyui.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip().endswith("patched"), done.stderr[-4000:]
    from safetensors.torch import load_file

    for style in NAMES:
        got = load_file(tmp_path / f"done-{style}.safetensors")
        assert got.keys() == expected[style].keys()
        assert all((got[k] - t).abs().max() < 1e-5 for k, t in expected[style].items())
