"""A step of a quantized DiT on a CPU: speed beside diffusers in fp32 and bf16.

The DiT of Qwen-Image-2.1, two layers of the published width with random weights, in each format as
a file that is loaded as users do. int8 weights are those of diffusers' network exactly, and the
step's outputs may differ by 1e-2 of their range, for inputs are rounded (by 2e-2 on processors
without VNNI, where inputs have 7 bits); every other format is held against the same file written
out in fp32, and may differ by 1e-5. One layer alone, with inputs that would overflow sums of 16
bits and beside ComfyUI's own layer, is `quantized_linear`; memory is `quantized_memory`.

`--formats "nvfp4,GGUF Q4_K"` chooses. ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ATEN_CPU_CAPABILITY=avx2 show a processor without units for bf16 and VNNI.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.dit import DiTConfig
from ..model_loaders.load import load_dit
from ..quant.int8_product import levels
from ..quant.operations import has_bf16_products
from ._dits import (
    config_of,
    diffusers_dit,
    diffusers_velocity,
    new_cache,
    random_scene,
    randomize,
)
from ._quantized_files import KINDS, write
from .protocol import arguments, chosen, difference, interleave, keep_freed_memory, show

EXACT = 1e-5
ROUNDED = {255: 1e-2, 127: 2e-2, 0: 1e-5}  # by the levels of inputs
PLAIN = "int8_tensorwise"
FEW = 8  # side of the picture whose output is compared


@torch.no_grad()
def measure(
    kinds: Sequence[str], layers: int, heads: int, side: int, runs: int
) -> list[dict[str, object]]:
    keep_freed_memory()
    torch.manual_seed(0)
    config = config_of(layers, heads)
    wide = _network(config)
    narrow = nn.Module.to(copy.deepcopy(wide), torch.bfloat16)
    scene, few = random_scene(config, side), random_scene(config, min(FEW, side))
    rows, steps, outputs = [], {}, {}
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            path = write(kind, wide.state_dict(), Path(name))
            loaded = load_dit(path)
            steps[kind] = _step(loaded.module, scene)
            error = None
            if not kind.startswith("int8"):
                exact = load_dit(path, dtype=torch.float32).module
                error = difference(_step(loaded.module, few)(), _step(exact, few)(), EXACT)
                del exact
            path.unlink()  # what is mapped stays
            rows.append({"weights as": kind, "difference": error})
        for name, network, given in [
            ("diffusers fp32", wide, scene),
            ("diffusers bf16", narrow, scene.to(torch.bfloat16)),
        ]:
            cache = new_cache(network)  # its first step is a whole one too
            outputs[name] = diffusers_velocity(network, given, cache, "extract")
            steps[name] = partial(diffusers_velocity, network, given, cache, "cached")
        for row in rows:
            y = steps[str(row["weights as"])]()
            if row["weights as"] == PLAIN:
                row["difference"] = difference(y, outputs["diffusers fp32"], ROUNDED[levels()])
        times = interleave(steps, runs)
    for row in rows:
        own = times[str(row["weights as"])]
        for peer in ("diffusers fp32", "diffusers bf16"):
            row[f"x {peer}, min"] = times[peer].shortest / own.shortest
            row[f"x {peer}, median"] = times[peer].median / own.median
    return rows


def _network(config: DiTConfig) -> Any:
    """Diffusers' network with random weights that int8 holds exactly: whole numbers times a scale.

    They repeat after a million: it takes longer to draw 436 million than to run a step.
    """
    pool = torch.randint(-127, 128, (1 << 20,)).float() / 73

    def fill(name: str, weight: Tensor) -> None:
        if weight.ndim != 2:
            randomize(name, weight)
            return
        for part in weight.view(-1).split(len(pool)):
            torch.mul(pool[: len(part)], weight.shape[1] ** -0.5, out=part)

    kept, nn.Linear.reset_parameters = nn.Linear.reset_parameters, lambda self: None
    try:
        return diffusers_dit(config, fill)
    finally:
        nn.Linear.reset_parameters = kept


def _step(network: Any, scene: Any) -> Callable[[], Tensor]:
    prefix = network.prefix(scene.text, scene.slots, scene.references, room=scene.tokens)
    return partial(network, scene.x, scene.t, prefix)


def main() -> None:
    tiny = {"layers": 1, "heads": 2, "side": 4}
    args = arguments(__doc__, tiny=tiny, layers=2, heads=32, side=32, formats="")
    kinds = chosen(args.formats, [*KINDS])
    rows = measure(kinds, args.layers, args.heads, args.side, args.runs)
    fast = f"processor with bf16 arithmetic: {has_bf16_products()}"
    size = f"{args.layers} layers x {128 * args.heads}, {args.side**2} tokens"
    show(f"A step of a quantized DiT on a CPU, {size}", rows, args.json, [fast])


if __name__ == "__main__":
    main()
