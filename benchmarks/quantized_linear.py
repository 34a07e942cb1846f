"""One quantized layer on a CPU: every format beside fp32; int8 beside ComfyUI's own layer.

Every format: the time of a product with everything that it takes (numbers from codes, rounded
inputs), beside torch's fp32 product of the same size. int8: the error, also with inputs made to
overflow. `--formats "nvfp4,GGUF Q4_K"` chooses; `--wide 0` leaves this out.

Inputs along the signs of a row of weights make all products of one sign, so that sums of 16 bits
would overflow; others are all positive, have one large channel, or one huge token. The error may be
1e-2, 2e-2 on processors without VNNI, whose inputs have 7 bits; a large channel costs what rounding
costs, whatever the product, and rotation (ConvRot) is there for it. ComfyUI's layer
is what core makes of the same tensors with `--cpu`: COMFYUI_DIR names a checkout of ComfyUI,
COMFYUI_PYTHON a Python with its requirements (default: this one); it runs in a process of its own,
before ours, one thread each, processor time. Without COMFYUI_DIR only errors are shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quant.int8_product import levels
from ..quant.integers import Int8
from ..quant.layouts import Parts
from ..quant.linear import Buffer, QuantizedLinear
from ._quantized_files import KINDS, LAYERS, layer
from .protocol import arguments, chosen, interleave, keep_freed_memory, show

LIMIT = {255: 1e-2, 127: 2e-2, 0: 1e-5}  # by the levels of inputs
LARGE = "one channel 10 times as large"
ROUNDED_BY = ("float32", "bfloat16")
# Runs in ComfyUI's Python, in its folder.
CHILD = """
import json, sys, time
folder, runs, threads = json.loads(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.ops, comfyui_version
from safetensors.torch import load_file, save_file
torch.set_num_threads(threads)
given = load_file(folder + "/layer.safetensors")
x = given.pop("x")
out, width = given["weight"].shape
clock = time.process_time if threads == 1 else time.perf_counter
seconds, outputs = {}, {}
with torch.inference_mode():
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        made = comfy.ops.mixed_precision_ops({}, dtype)
        layer = made.Linear(width, out, bias=False, device="cpu", dtype=dtype)
        left = layer.load_state_dict(dict(given), strict=False)
        assert not left.missing_keys and type(layer.weight.data).__name__ == "QuantizedTensor"
        narrow, times = x.to(dtype), []
        for _ in range(runs):
            start = clock()
            outputs[name] = layer(narrow)
            times.append(clock() - start)
        seconds[name] = min(times)
save_file({n: y.float().contiguous() for n, y in outputs.items()}, folder + "/outputs.safetensors")
print(json.dumps([comfyui_version.__version__, seconds]))
"""


def random_layer(width: int) -> tuple[QuantizedLinear, dict[str, Tensor], Tensor]:
    """An int8 layer, the tensors of its file, and its weight in fp32."""
    torch.manual_seed(1)
    weight = torch.randint(-128, 128, (width, width), dtype=torch.int8)
    scale = torch.full((width, 1), 0.01)
    tensors = {"weight": weight, "weight_scale": scale}
    own = Parts({name: t.clone() for name, t in tensors.items()}, (width, width))
    return QuantizedLinear(Int8(own), None, Buffer()), tensors, weight.float() * scale


def kinds_of_inputs(tokens: int, weight: Tensor) -> dict[str, Tensor]:
    normal = torch.randn(tokens, weight.shape[1])
    signs = weight[:tokens].sign()
    channel, token = normal.clone(), normal.clone()
    channel[:, 7] *= 10
    token[3] *= 1000
    return {
        "normal": normal,
        "along the weights' signs": 3 * signs,
        "against them": -3 * signs,
        "all positive": normal.abs() + 5,
        "one token 1,000 times as large": token,
        LARGE: channel,
    }


@torch.inference_mode()
def formats(kinds: Sequence[str], wide: int, tokens: int, runs: int) -> list[dict[str, object]]:
    """The speed of a layer (wide, wide) in each format, beside fp32."""
    keep_freed_memory()
    torch.manual_seed(1)
    weight, x = torch.randn(wide, wide) * wide**-0.5, torch.randn(tokens, wide)
    sides: dict[str, Callable[[], Tensor]] = {
        "fp32": partial(torch.nn.functional.linear, x, weight)
    }
    for kind in kinds:
        sides[kind] = partial(layer(kind, weight), x)
    for side in sides.values():
        side()
    times = interleave(sides, runs)
    base = times["fp32"]
    return [
        {"layer as": kind, "x fp32, min": base.shortest / own.shortest,
         "x fp32, median": base.median / own.median}
        for kind, own in times.items() if kind != "fp32"
    ]  # fmt: skip


@torch.inference_mode()
def errors(width: int, tokens: int) -> list[dict[str, object]]:
    """The relative error of the layer's outputs, of the worst token; ends the run if too large."""
    layer, _, weight = random_layer(width)
    limit = LIMIT[levels()]
    rows: list[dict[str, object]] = []
    for name, x in kinds_of_inputs(tokens, weight).items():
        exact = x.double() @ weight.double().T
        found = layer(x).double()
        whole = float((found - exact).norm() / exact.norm())
        worst = float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())
        if not whole <= limit and name != LARGE:
            sys.exit(f"Inputs {name}: the error is {whole:.2g}, at most {limit} is allowed.")
        rows.append({"inputs": name, "relative error": whole, "of the worst token": worst})
    return rows


@torch.inference_mode()
def beside_comfyui(
    comfyui: Path, width: int, tokens: int, runs: int
) -> tuple[str, list[dict[str, object]]]:
    """ComfyUI's version, and a row for each dtype that core may compute in."""
    layer, tensors, weight = random_layer(width)
    x = torch.randn(tokens, width)
    settings = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        save_file({**tensors, "comfy_quant": settings, "x": x}, Path(folder) / "layer.safetensors")
        task = json.dumps([folder, 2, torch.get_num_threads()])
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        done = subprocess.run(
            [python, "-W", "ignore", "-c", CHILD, task], cwd=comfyui, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"ComfyUI's layer did not run:\n{done.stderr[-2000:]}")
        outputs = load_file(Path(folder) / "outputs.safetensors")
    version, theirs = json.loads(done.stdout.splitlines()[-1])
    layer(x)
    ours = interleave({"ours": lambda: layer(x)}, max(runs, 10))["ours"].shortest
    exact = x @ weight.T
    rows: list[dict[str, object]] = []
    for name in ROUNDED_BY:
        off = float((outputs[name] - exact).norm() / exact.norm())
        work = 2e-9 * tokens * width * width
        rows.append({
            "ComfyUI computes in": name, "its GFLOP/s": work / theirs[name],
            "ours": work / ours, "ratio": theirs[name] / ours, "its error": off,
            "our error": float((layer(x) - exact).norm() / exact.norm()),
        })  # fmt: skip
    return version, rows


def main() -> None:
    tiny = {"wide": 256, "long": 32, "width": 128, "tokens": 32}
    numbers = {"wide": 4096, "long": 1024, "width": 2048, "tokens": 256}
    args = arguments(__doc__, tiny=tiny, **numbers, formats="")
    if args.wide:
        kinds = chosen(args.formats, [*dict.fromkeys((*KINDS, *LAYERS))])
        rows = formats(kinds, args.wide, args.long, args.runs)
        show(f"One layer of {args.wide}, {args.long} tokens", rows, args.json)
    show(f"One int8 layer of {args.width}", errors(args.width, args.tokens), args.json)
    if folder := os.environ.get("COMFYUI_DIR"):
        version, rows = beside_comfyui(Path(folder), args.width, args.tokens, args.runs)
        title = f"The same layer in ComfyUI {version}, {args.tokens} tokens"
        show(title, rows, args.json)


if __name__ == "__main__":
    main()
