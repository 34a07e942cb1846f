"""Quantize DiT: a smaller file of a diffusion model, made for the user's own prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.pipeline import Pipeline, Task
from ..sampling.quantizing import Made, Wish, quantize
from .loaders import combo, path_of
from .runtime import runtime

INPUTS = {"8 bits": 8, "not rounded": 16, "4 bits": 4}


class SeedlingQuantizeDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingQuantizeDiT",
            display_name="Quantize DiT",
            category="Seedling/loaders",
            description="Makes a smaller file of a diffusion model, in ComfyUI's own formats, and "
            "chooses for each layer what costs least on your prompts. Stopped, it goes on later.",
            search_aliases=["quantize", "int8", "fp8", "4 bit", "compress", "量化"],
            is_output_node=True,
            inputs=[
                combo("dit", "The diffusion model, in 16 or 32 bits."),
                combo("encoder", "Its text encoder."),
                combo("vae", "Its VAE, for references and the comparison."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a red circle left of a blue square",
                    tooltip="One in each line, 8 to 32 that are like those you will use.",
                ),
                io.Float.Input(
                    "bits",
                    default=6.0,
                    min=4.1,
                    max=16.0,
                    step=0.25,
                    tooltip="For each weight on average. 8: no loss that could be measured. 5 to "
                    "6: good. Below 5: look at the comparison.",
                ),
                io.String.Input(
                    "name",
                    default="quantized",
                    tooltip="Of the new file in models/diffusion_models, without an ending.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip='Pictures that the prompts refer to as "image 1", "image 2", ...',
                ),
                io.Boolean.Input(
                    "six",
                    default=False,
                    optional=True,
                    advanced=True,
                    display_name="layers of 6 bits",
                    tooltip="Also layers of 6 bits: much better from 5 to 7 bits. Core's loader "
                    "reads them with a comfy-kitchen of 0.2.40 or later only, Load DiT always.",
                ),
                io.Combo.Input(
                    "inputs",
                    options=list(INPUTS),
                    default="8 bits",
                    optional=True,
                    advanced=True,
                    tooltip="What the inputs of quantized layers may be rounded to. 8 bits: fast "
                    "products. not rounded: loses least, slower. 4 bits: for cards that multiply "
                    "4 bits by 4 bits, costs quality.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "comparison",
                    "comparison",
                    tooltip="Pictures of the first prompts: full precision left, the new file "
                    "right.",
                ),
                io.String.Output("report", "report", tooltip="What was chosen for each layer."),
            ],
        )

    @classmethod
    def execute(
        cls, dit: str, encoder: str, vae: str, prompts: str, bits: float, name: str,
        references: Tensor | None = None, six: bool = False, inputs: str = "8 bits",
    ) -> io.NodeOutput:  # fmt: skip
        here, out = runtime(), file_of(name)
        shown = () if references is None else tuple(references)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        tasks = [Task(line, shown, seed=seed) for seed, line in enumerate(lines)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = Pipeline.load(
            path_of("dit", dit), path_of("vae", vae), path_of("encoder", encoder), device=device
        )
        bars: list[Any] = []

        def progress(done: int, of: int) -> None:
            bars.append(bars[-1] if bars else here.progress(of))
            bars[-1](done, of, None)

        wish = Wish(bits, six=six, inputs=INPUTS[inputs])
        made = quantize(pipeline, tasks, out, wish, progress)
        here.tell(made.words().splitlines()[-1])
        return io.NodeOutput(side_by_side(made), made.words(), ui=ui.PreviewText(made.words()))


def file_of(name: str) -> Path:
    """A new file in the folder for diffusion models. Raises SamplingError for an odd name."""
    import folder_paths

    plain = name.strip().removesuffix(".safetensors")
    if not plain or set(plain) & set('/\\:*?"<>|') or plain.startswith(".") or len(plain) > 100:
        raise SamplingError(f"{name!r} is no name for a file; use letters, digits, - and _.")
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    own = next((f for f in folders if f.name == "diffusion_models"), folders[0])  # not models/unet
    return own / f"{plain}.safetensors"


def side_by_side(made: Made) -> Tensor:
    """(B, H, 2 W, 3), over white; smaller pictures are filled up with white."""
    pairs = [
        torch.cat((_opaque(before), _opaque(after)), dim=1)
        for before, after in zip(made.before, made.after, strict=True)
    ]
    height, width = (max(p.shape[side] for p in pairs) for side in (0, 1))
    return torch.stack([
        F.pad(p, (0, 0, 0, width - p.shape[1], 0, height - p.shape[0]), value=1.0) for p in pairs
    ])  # fmt: skip


def _opaque(picture: Tensor) -> Tensor:
    if picture.shape[-1] == 3:
        return picture
    return picture[..., :3] * picture[..., 3:] + (1 - picture[..., 3:])
