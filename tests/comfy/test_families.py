"""A step of ours and of core's own networks, in one process, on the same weights.

Where the two differ it is written down here: the cases of `DIFFERENT` are those in which core does
not do what the models were trained with (diffusers' way, which tests/ holds us to).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.families.flux2.dit import DiT as Flux2
from seedling.model_loaders.families.flux2.dit import DiTConfig as Flux2Config
from seedling.model_loaders.families.qwen_image.dit import DiT as QwenImage
from seedling.model_loaders.families.qwen_image.dit import DiTConfig as QwenImageConfig

pytestmark = pytest.mark.comfyui

FLUX2 = Flux2Config(
    double=1, single=1, heads=2, head_dim=128, context_dim=96, mlp_dim=768, axes=(32, 32, 32, 32)
)
QWEN = QwenImageConfig(layers=2, heads=2, context_dim=64, mlp_dim=1024)
WORDS = 5
# Tokens (rows, columns) of the target, then of each reference.
FLUX2_CASES = {
    "text": [(4, 6)], "odd": [(3, 5)], "one": [(4, 6), (4, 6)],
    "three, of other sizes": [(4, 4), (2, 6), (5, 3), (7, 7)],
}  # fmt: skip
QWEN_CASES = {
    "text": [(4, 6)], "one": [(4, 6), (4, 6)], "two, smaller": [(6, 6), (2, 4), (4, 4)],
    "odd": [(3, 5)], "odd reference": [(4, 4), (3, 3)],
    "reference that is larger": [(4, 4), (8, 6)],
}  # fmt: skip
# Core centres an odd side the other way round, and lets the text begin behind the target's corner,
# not behind the farthest one of all pictures (comfy/ldm/qwen_image/model.py, `_forward`).
DIFFERENT = {"odd", "odd reference", "reference that is larger"}

STEP = """
import json, os, sys
folder = sys.argv[1]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.getcwd())
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.ops, comfy.model_detection
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from safetensors.torch import load_file
exec(os.environ["LOAD_PACK"])
from seedling.model_loaders.load import load_dit

cases, errors = json.load(open(os.path.join(folder, "cases.json"))), {}
layer = comfy.ops.disable_weight_init
place = {"dtype": torch.float32, "device": "cpu", "operations": layer}
widths = {"num_attention_heads": 2, "joint_attention_dim": 64}
for file, kinds in cases.items():
    path = os.path.join(folder, file)
    weights = load_file(path)
    config = comfy.model_detection.detect_unet_config(weights, "")
    config.pop("image_model")
    if file.startswith("flux"):
        core = Flux(**config, **place)
    else:
        core = QwenImageTransformer2DModel(**widths, **config, **place)
    missing = core.load_state_dict(weights, strict=False)
    assert not missing.missing_keys, missing
    ours = load_dit(path).module
    errors[file] = {}
    for name, tensors in kinds.items():
        inputs = load_file(os.path.join(folder, tensors))
        x, text = inputs.pop("x"), inputs.pop("text")
        refs = [inputs[k] for k in sorted(inputs)]
        with torch.no_grad():
            worst = 0.0
            for t in (1.0, 0.62, 0.05):
                time = torch.tensor([t])
                mine = ours(x, time, ours.prefix(text, references=refs))
                if file.startswith("flux"):
                    theirs = core(x, time, text, ref_latents=refs or None)
                else:
                    frames = [r[:, :, None] for r in refs]
                    theirs = core(x[:, :, None], time, text, ref_latents=frames or None)[:, :, 0]
                scale = float(theirs.max() - theirs.min())
                worst = max(worst, float((mine - theirs).abs().max()) / scale)
        errors[file][name] = worst
print(json.dumps(errors))
"""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def weights_of(network: Any, config: Any) -> dict[str, Tensor]:
    table = network(config, device="meta").state_dict()
    return {name: draw(*t.shape) if t.ndim > 1 else 1 + draw(*t.shape) for name, t in table.items()}


def cases(folder: Path, grids: dict[str, Any], channels: int, side: int, width: int) -> Any:
    """Inputs of each case as a file; `side` latents per side of a token."""
    found = {}
    for number, (name, sizes) in enumerate(grids.items()):
        target, *references = (torch.randn(1, channels, side * h, side * w) for h, w in sizes)
        tensors = {"x": target, "text": torch.randn(1, WORDS, width)}
        tensors |= {f"reference{i}": r for i, r in enumerate(references)}
        found[name] = f"{channels}-{number}.safetensors"
        save_file(tensors, folder / found[name])
    return found


@pytest.fixture(scope="module")
def errors(comfyui: Any, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The largest error of each case, in parts of the output's range."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("families")
    ours = weights_of(Flux2, FLUX2)
    published = {
        f"{n}.weight": torch.cat([ours[f"{o}.weight"] for o in own]) for n, own in layers.items()
    }
    save_file(published, folder / "flux-2-klein-4b.safetensors")
    weights = weights_of(QwenImage, QWEN)
    save_file(weights, folder / "qwen_image_edit_2509.safetensors")
    marked = {**weights, "__index_timestep_zero__": torch.tensor([])}
    save_file(marked, folder / "qwen_image_edit_2511.safetensors")
    qwen = cases(folder, QWEN_CASES, 16, 2, QWEN.context_dim)
    wanted = {
        "flux-2-klein-4b.safetensors": cases(folder, FLUX2_CASES, 128, 1, FLUX2.context_dim),
        "qwen_image_edit_2509.safetensors": qwen,
        "qwen_image_edit_2511.safetensors": qwen,
    }
    (folder / "cases.json").write_text(json.dumps(wanted))
    done = subprocess.run(
        [comfyui.python, "-c", STEP, str(folder)],
        cwd=comfyui.folder,
        env=comfyui.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", FLUX2_CASES)
def test_a_step_of_klein_is_that_of_core(errors: Any, name: str) -> None:
    assert errors["flux-2-klein-4b.safetensors"][name] < 1e-3


@pytest.mark.parametrize("variant", ["2509", "2511"])
@pytest.mark.parametrize("name", QWEN_CASES)
def test_a_step_of_qwen_edit_is_that_of_core_where_core_is_right(
    errors: Any, name: str, variant: str
) -> None:
    error = errors[f"qwen_image_edit_{variant}.safetensors"][name]
    assert error > 1e-3 if name in DIFFERENT else error < 1e-3, error
