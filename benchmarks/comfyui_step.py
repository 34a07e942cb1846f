"""One step of a DiT in fp32, in ComfyUI's process: ours against ComfyUI's own class.

COMFYUI_DIR names a checkout of ComfyUI, COMFYUI_PYTHON a Python with its requirements (default:
this one). Each set of ComfyUI's flags gets a process of its own; there its class and ours, as our
loader node builds it, run on the same weights. Prompt, references and what a step's time does are
computed before on our side, as in all steps of a run.

Without `--wide` networks have a sixth of the published width, and pictures a sixth of the tokens of
1024 x 1024, so that attention has the share that it has there. The last layer of ours computes only
what is read of it, so a column says what networks of full depth would gain: the time of a layer is
what two depths differ by. `--wide 24 --large 64` measures one layer (of each kind) of the published
width, on a picture of 1024 x 1024.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model_loaders.load import load_dit
from ..quant.operations import Operations
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range
TIME = 0.7672
FLAGS = {"default": [], "best": ["--use-pytorch-cross-attention"]}
HEAD = 128
WORDS = 512  # of klein, always
ROOT = Path(__file__).resolve().parents[1]

# Runs in ComfyUI's Python: the package is this checkout, as ComfyUI would load it.
CHILD = f"""
import importlib.util, json, os, sys
flags, cases, runs, threads = json.loads(sys.argv[1])
sys.argv = ["main.py", "--cpu", *flags]
sys.path.insert(0, os.getcwd())
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops
spec = importlib.util.spec_from_file_location("seedling", {str(ROOT / "__init__.py")!r})
sys.modules["seedling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["seedling"])
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from seedling.benchmarks.comfyui_step import Classes, measure
from seedling.nodes.comfy_codecs import operations
torch.set_num_threads(threads)
layers = comfy.ops.pick_operations(torch.float32, torch.float32)
known = Classes(Flux, QwenImageTransformer2DModel, layers, operations(None))
print(json.dumps(measure(cases, runs, known)))
"""


class Classes(NamedTuple):
    """What ComfyUI's process has: its networks, and the layers of its and of ours."""

    flux: Any
    qwen: Any
    layers: Any  # that it takes for an fp32 file on a CPU
    ours: Operations


class Case(NamedTuple):
    """A network, cut down, and what it paints."""

    name: str
    heads: int
    depths: list[int]  # two numbers of layers
    side: int  # of the target, and of each reference, in tokens
    references: int
    words: int

    @property
    def is_flux(self) -> bool:
        return "klein" in self.name


def cases(args: Any) -> list[Case]:
    """At a sixth of everything by default, or at the published width."""
    if args.wide:
        return [
            Case("klein 4B", args.wide, [1], args.large, 0, WORDS),
            Case("Qwen-Image-Edit-2509", args.wide, [1], args.large, 0, WORDS // 5),
        ]
    depths, words = [args.few, args.many], args.words
    rows = [("klein 4B", 0), ("klein 4B", 1), ("klein 4B", 3)]
    rows += [("Qwen-Image-Edit-2509", n) for n in (0, 2)] + [("Qwen-Image-Edit-2511", 1)]
    return [
        Case(f"{name}, 1/6", args.narrow, depths, args.side, count,
             words if "klein" in name else words // 5)
        for name, count in rows
    ]  # fmt: skip


# ---- in ComfyUI's process ----------------------------------------------------------------------


def measure(given: Sequence[Any], runs: int, known: Classes) -> list[dict[str, object]]:
    """A row for each case."""
    return [row(Case(*case), runs, known) for case in given]


@torch.no_grad()
def row(case: Case, runs: int, known: Classes) -> dict[str, object]:
    errors, shortest, median = [], [], []
    for depth in case.depths:
        theirs, ours = sides_of(case, depth, known)
        errors.append(difference(ours(), theirs(), LIMIT))
        times = interleave({"core": theirs, "ours": ours}, runs)
        shortest.append([times[side].shortest for side in ("core", "ours")])
        median.append(times["core"].median / times["ours"].median)
    layer = [b - a for a, b in zip(shortest[0], shortest[-1], strict=True)]
    return {
        "network": f"{case.name}, {case.depths[-1]} x {case.heads * HEAD}",
        "target": case.side**2,
        "references": case.references,
        "core min s": shortest[-1][0],
        "speed, min": shortest[-1][0] / shortest[-1][1],
        "speed, median": median[-1],
        "one layer": layer[0] / layer[1] if len(case.depths) > 1 else None,
        "difference": max(errors),
    }


def sides_of(case: Case, depth: int, known: Classes) -> tuple[Any, Any]:
    """A step of ComfyUI's class and one of ours, over the same random weights and inputs."""
    torch.manual_seed(0)
    core = (core_flux if case.is_flux else core_qwen)(case, depth, known)
    for weight in core.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
        else:
            nn.init.normal_(weight, mean=1.0, std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        ours = load_dit(written(core, case, Path(folder)), operations=known.ours).module
    channels, side = (128, case.side) if case.is_flux else (16, 2 * case.side)
    x, *given = (torch.randn(1, channels, side, side) for _ in range(1 + case.references))
    width = core.txt_in.weight.shape[1]
    text, t = torch.randn(1, case.words, width), torch.tensor([TIME])
    prefix, (known,) = ours.prefix(text, references=given), ours.modulations([TIME], x.dtype)

    def their_step() -> Tensor:
        if case.is_flux:
            return core(x, t, text, ref_latents=given or None)
        frames = [r[:, :, None] for r in given]
        return core(x[:, :, None], t, text, ref_latents=frames or None)[:, :, 0]

    return their_step, partial(ours, x, t, prefix, known)


def written(core: nn.Module, case: Case, folder: Path) -> Path:
    """ComfyUI's weights as a file, named so that ours knows which model it is."""
    from safetensors.torch import save_file

    name = case.name.partition(",")[0].lower().replace(" ", "-")
    path = folder / f"{'flux-2-' if case.is_flux else ''}{name}.safetensors"
    save_file(core.state_dict(), path)
    return path


def core_flux(case: Case, depth: int, known: Classes) -> Any:
    width = case.heads * HEAD
    return known.flux(
        in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=min(7680, 3 * width),
        hidden_size=width, mlp_ratio=3.0, num_heads=case.heads, depth=1,
        depth_single_blocks=depth, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1,
        qkv_bias=False, guidance_embed=False, txt_ids_dims=[3], global_modulation=True,
        mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
        dtype=torch.float32, device="cpu", operations=known.layers,
    )  # fmt: skip


def core_qwen(case: Case, depth: int, known: Classes) -> Any:
    return known.qwen(
        num_layers=depth, num_attention_heads=case.heads, joint_attention_dim=128 * case.heads,
        default_ref_method="index_timestep_zero" if "2511" in case.name else "index",
        dtype=torch.float32, device="cpu", operations=known.layers,
    )  # fmt: skip


# ---- here --------------------------------------------------------------------------------------


def with_flags(flags: Sequence[str], given: Sequence[Case], args: Any) -> list[dict[str, object]]:
    """The rows of a ComfyUI with these flags."""
    said = json.dumps([flags, given, args.runs, args.threads])
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), "-c", CHILD, said],
        cwd=os.environ["COMFYUI_DIR"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"ComfyUI's Python ended with {done.returncode}; its words are above.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    tiny = {"narrow": 1, "few": 1, "many": 2, "side": 4, "words": 10}
    sizes = {"narrow": 4, "few": 2, "many": 6, "side": 26, "words": 85}
    sizes |= {"wide": 0, "large": 64, "flags": 0}  # flags: 1 the default ones, 2 the best, 0 both
    args = arguments(__doc__, tiny=tiny, **sizes)
    if not os.environ.get("COMFYUI_DIR"):
        print(
            "This compares with ComfyUI: set COMFYUI_DIR to a checkout of it (0.33 or later), and "
            "COMFYUI_PYTHON to a Python with its requirements."
        )
        return
    notes = [
        "target in tokens, references as large; one layer: what each further layer gains; "
        "difference relative to the output's range"
    ]
    chosen = list(FLAGS.items())[max(0, args.flags - 1) : args.flags or None]
    for name, flags in chosen:
        rows = with_flags(flags, cases(args), args)
        show(
            f"A step, fp32, base: ComfyUI with its {name} flags {' '.join(flags)}".rstrip(),
            rows, args.json, notes,
        )  # fmt: skip


if __name__ == "__main__":
    main()
