"""A step of ours and of core's own networks, in one process, on the same weights.

Where the two differ it is written down here: the cases of `DIFFERENT` are those in which core does
not do what the models were trained with (diffusers' way, which tests/ holds us to).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
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
EMBEDDER = "time_guidance_embed.guidance_embedder."
LAYERS = 3  # that Qwen-Image-Layered paints together
LAYERED_CASES = {"layers": [(6, 6), (6, 6)], "odd layers": [(3, 5), (3, 5)]}
GUIDANCE = 3.5
# Core centres an odd side the other way round, and lets the text begin behind the target's corner,
# not behind the farthest one of all pictures (comfy/ldm/qwen_image/model.py, `_forward`).
DIFFERENT = {"odd", "odd reference", "reference that is larger", "odd layers"}

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
                guided = {"guidance": %(guidance)s} if "dev" in file else {}
                mine = ours(x, time.expand(len(x)), ours.prefix(text, references=refs, **guided))
                if file.startswith("flux"):
                    guided = {k: torch.tensor([v]) for k, v in guided.items()}
                    theirs = core(x, time, text, ref_latents=refs or None, **guided)
                elif "layered" in file:
                    frames = x.movedim(0, 1)[None], [r[:, :, None] for r in refs]
                    theirs = core(frames[0], time, text, ref_latents=frames[1])[0].movedim(1, 0)
                else:
                    frames = [r[:, :, None] for r in refs]
                    theirs = core(x[:, :, None], time, text, ref_latents=frames or None)[:, :, 0]
                scale = float(theirs.max() - theirs.min())
                worst = max(worst, float((mine - theirs).abs().max()) / scale)
        errors[file][name] = worst
print(json.dumps(errors))
""".replace("%(guidance)s", str(GUIDANCE))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def weights_of(network: Any, config: Any) -> dict[str, Tensor]:
    table = network(config, device="meta").state_dict()
    return {name: draw(*t.shape) if t.ndim > 1 else 1 + draw(*t.shape) for name, t in table.items()}


def cases(folder: Path, grids: dict[str, Any], config: Any, frames: int = 1) -> Any:
    """Inputs of each case as a file."""
    channels, side = (16, 2) if isinstance(config, QwenImageConfig) else (config.in_channels, 1)
    found = {}
    for number, (name, sizes) in enumerate(grids.items()):
        target, *references = (torch.randn(1, channels, side * h, side * w) for h, w in sizes)
        x = target if frames == 1 else torch.randn(frames, *target.shape[1:])
        tensors = {"x": x, "text": torch.randn(1, WORDS, config.context_dim)}
        tensors |= {f"reference{i}": r for i, r in enumerate(references)}
        found[name] = f"{channels}-{frames}-{number}.safetensors"
        save_file(tensors, folder / found[name])
    return found


@pytest.fixture(scope="module")
def errors(comfyui: Any, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The largest error of each case, in parts of the output's range."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("families")
    for name, config in (("klein-4b", FLUX2), ("dev", replace(FLUX2, guided=True))):
        ours = weights_of(Flux2, config)
        known = {
            f"{n}.weight": [ours.pop(f"{own}.weight") for own in names]
            for n, names in layers.items()
        }
        known |= {
            k.replace(EMBEDDER, "guidance_in.").replace("linear_1", "in_layer")
            .replace("linear_2", "out_layer"): [t]
            for k, t in ours.items()
        }  # fmt: skip
        save_file(
            {k: torch.cat(t) for k, t in known.items()}, folder / f"flux-2-{name}.safetensors"
        )
    weights = weights_of(QwenImage, QWEN)
    save_file(weights, folder / "qwen_image_edit_2509.safetensors")
    marked = {**weights, "__index_timestep_zero__": torch.tensor([])}
    save_file(marked, folder / "qwen_image_edit_2511.safetensors")
    weights = weights_of(QwenImage, replace(QWEN, layered=True))
    save_file(weights, folder / "qwen_image_layered.safetensors")
    flux, qwen = cases(folder, FLUX2_CASES, FLUX2), cases(folder, QWEN_CASES, QWEN)
    wanted = {
        "flux-2-klein-4b.safetensors": flux,
        "flux-2-dev.safetensors": flux,
        "qwen_image_edit_2509.safetensors": qwen,
        "qwen_image_edit_2511.safetensors": qwen,
        "qwen_image_layered.safetensors": cases(folder, LAYERED_CASES, QWEN, LAYERS),
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


@pytest.mark.parametrize("variant", ["klein-4b", "dev"])
@pytest.mark.parametrize("name", FLUX2_CASES)
def test_a_step_of_flux2_is_that_of_core(errors: Any, name: str, variant: str) -> None:
    error = errors[f"flux-2-{variant}.safetensors"][name]
    logging.warning("error %.1e", error)
    assert error < 1e-3


@pytest.mark.parametrize(
    ("variant", "name"),
    [(v, name) for v in ("edit_2509", "edit_2511") for name in QWEN_CASES]
    + [("layered", name) for name in LAYERED_CASES],
)
def test_a_step_of_qwen_image_is_that_of_core_where_core_is_right(
    errors: Any, name: str, variant: str
) -> None:
    error = errors[f"qwen_image_{variant}.safetensors"][name]
    logging.warning("error %.1e", error)
    assert error > 1e-3 if name in DIFFERENT else error < 1e-3, error


def test_the_comparison_of_speeds_runs(comfyui: Any, root: Path) -> None:
    """Tiny: no figure means anything, but the outputs of both sides agree, with both flags."""
    done = subprocess.run(
        [sys.executable, "-m", "seedling.benchmarks.comfyui_step", "--tiny", "--json"],
        env={**comfyui.environment, "COMFYUI_PYTHON": comfyui.python},
        cwd=root.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tables = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["default" in t["title"] for t in tables] == [True, False]
    assert all(row["difference"] < 1e-5 for table in tables for row in table["rows"])
