"""A step from a bf16 checkpoint of FLUX.2 and of Qwen-Image on a CPU: ours against diffusers.

Ours loads the file as a user does and widens each weight right before its use, or, asked for bf16,
multiplies in bf16 where the processor does; diffusers computes in bf16, and in fp32 on the same
values. On a processor with bf16 arithmetic, ONEDNN_MAX_CPU_ISA=AVX2 shows what one without does.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model_loaders.families.qwen_image.dit import DiTConfig, pack, unpack
from ..model_loaders.load import load_dit
from . import flux2_step, qwen_image_step
from .protocol import arguments, difference, interleave, show

LIMIT = 1e-5  # of the output's range: ours against diffusers in fp32
WORDS = 64
Sides = dict[str, Any]


@torch.no_grad()
def compare(name: str, theirs: Any, file: Path, inputs: Any, their: Any, runs: int) -> Any:
    """A row per program. `inputs(dtype)`: x, t, text; `their(network, x, t, text)`: the velocity.

    `theirs` is left in bf16.
    """
    narrow = nn.Module.to(theirs, torch.bfloat16)  # its own `to` warns of nothing
    save_file({k: v.contiguous() for k, v in narrow.state_dict().items()}, file)
    settings: dict[str, Any] = dict(theirs.config)
    wide: Any = type(theirs)(**settings).eval()
    wide.load_state_dict(narrow.state_dict())
    steps: Sides = {
        "diffusers, bf16": partial(their, narrow, *inputs(torch.bfloat16)),
        "diffusers, fp32": partial(their, wide, *inputs(torch.float32)),
    }
    x, t, text = inputs(torch.float32)
    for title, dtype in (("from bf16", None), ("bf16 asked for", torch.bfloat16)):
        dit = load_dit(file, dtype=dtype).module
        (known,) = dit.modulations(t.tolist(), torch.float32)
        steps[f"seedling, {title}"] = partial(dit, x, t, dit.prefix(text), known)
    outputs: dict[str, Tensor] = {title: step().float() for title, step in steps.items()}
    expected = outputs["diffusers, fp32"]
    difference(outputs["seedling, from bf16"], expected, LIMIT)
    times = interleave(steps, runs)
    base = times["diffusers, bf16"]
    return [
        {
            "network": name,
            "program": title,
            "min s": taken.shortest,
            "speed, min": base.shortest / taken.shortest,
            "speed, median": base.median / taken.median,
            "difference": difference(outputs[title], expected, 1.0),
        }
        for title, taken in times.items()
    ]


def flux2(folder: Path, heads: int, single: int, side: int, runs: int) -> Any:
    config = flux2_step.config_of(1, single, heads)
    theirs, _ = flux2_step.random_dits(config)
    text, _, x = flux2_step.random_scene(config, side, [])

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return x.to(dtype), torch.tensor([0.75]).to(dtype), text.to(dtype)

    def their(network: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return flux2_step.their_velocity(network, x, t, text, [])

    file, name = folder / "flux2-random.safetensors", f"FLUX.2, 1 + {single} blocks x {config.dim}"
    return compare(name, theirs, file, inputs, their, runs)


def qwen_image(folder: Path, heads: int, side: int, runs: int) -> Any:
    config = DiTConfig(layers=2, heads=heads, mlp_dim=512 * heads)
    theirs, _ = qwen_image_step.random_dits(config)
    text, x = torch.randn(1, WORDS, config.context_dim), torch.randn(1, 16, 2 * side, 2 * side)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return x.to(dtype), torch.tensor([0.75]).to(dtype), text.to(dtype)

    def their(network: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        shapes = [[(1, side, side)]]
        out = network(pack(x), text, timestep=t, img_shapes=shapes, return_dict=False)[0]
        return unpack(out, (side, side))

    file, name = folder / "qwen_image_random.safetensors", f"Qwen-Image, 2 layers x {config.dim}"
    return compare(name, theirs, file, inputs, their, runs)


def main() -> None:
    tiny = {"heads": 1, "single": 1, "side": 4}
    args = arguments(__doc__, tiny=tiny, heads=24, single=2, side=16)
    fast = f"processor with bf16 arithmetic: {torch.ops.mkldnn._is_mkldnn_bf16_supported()}"
    notes = [
        "base: diffusers in bf16; difference to diffusers in fp32, of the output's range",
        fast,
    ]
    with tempfile.TemporaryDirectory() as name:
        rows = flux2(Path(name), args.heads, args.single, args.side, args.runs)
        rows += qwen_image(Path(name), args.heads, args.side, args.runs)
        show("A step from a bf16 checkpoint", rows, args.json, notes)


if __name__ == "__main__":
    main()
