"""Load Seedling's networks from ComfyUI's own folders, or the model that ships with the pack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..model_loaders.checkpoint import CheckpointError
from ..model_loaders.detection import model_title
from ..model_loaders.families import FAMILIES
from ..model_loaders.load import Loaded, Precision
from .runtime import runtime

EMBEDDED = "seedling-tiny (embedded)"
ASSETS = Path(__file__).resolve().parents[1] / "assets"
FOLDERS = {"dit": "diffusion_models", "encoder": "text_encoders", "vae": "vae"}
PRECISIONS: dict[str, Precision] = {
    "as stored": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "auto": "auto",
}
PRECISION = (
    "How exactly the weights are kept. as stored: as in the file, quantized ones too. auto: the "
    "same, but plain numbers as this machine multiplies them fastest, which the node tells. fp32: "
    "twice the memory of 16 bits, for a CPU or to compare. bf16: half the memory of 32 bits."
)

SAID = "as the file says"
VARIANT = (
    "Which of several published models of one architecture this is, when the file does not say or "
    "lost its marker. The node tells what it is taken for, and why."
)


class SeedlingLoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingLoadDiT",
            display_name="Load DiT",
            category="Seedling/loaders",
            description="Loads a diffusion model of a family that Seedling knows, and says which.",
            search_aliases=["load diffusion model", "unet", "checkpoint", "Qwen-Image", "加载模型"],
            inputs=[
                combo("dit", "The diffusion model: a file of models/diffusion_models, or the small "
                      "model that is part of Seedling."),
                precision(),
                io.Combo.Input("variant", options=variants(), default=SAID, optional=True,
                               advanced=True, tooltip=VARIANT),
            ],
            outputs=[
                io.Model.Output("model", "model", tooltip="For samplers, LoRA loaders and others."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: str, precision: str, variant: str = SAID) -> io.NodeOutput:
        return load("dit", dit, precision, None if variant == SAID else variant)


class SeedlingLoadEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingLoadEncoder",
            display_name="Load VLM Encoder",
            category="Seedling/loaders",
            description="Loads the vision-language model that reads instruction and references.",
            search_aliases=["load clip", "text encoder", "Qwen3-VL", "加载文本编码器"],
            inputs=[
                combo("encoder", "The text encoder: a file of models/text_encoders with its "
                      "tokenizer.json beside it, or the small one that is part of Seedling."),
                precision(),
            ],
            outputs=[
                io.Clip.Output("clip", "clip", tooltip="For Encode Instruction, CLIP Text Encode."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, encoder: str, precision: str) -> io.NodeOutput:
        return load("encoder", encoder, precision)


class SeedlingLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingLoadVAE",
            display_name="Load VAE",
            category="Seedling/loaders",
            description="Loads the VAE that turns latents into pictures, alpha too, and back.",
            search_aliases=["vae loader", "autoencoder", "加载VAE"],
            inputs=[
                combo("vae", "The VAE: a file of models/vae, or the small one that is part of "
                      "Seedling. It must belong to the diffusion model."),
                precision(),
            ],
            outputs=[
                io.Vae.Output("vae", "vae", tooltip="For VAE Decode and Encode Instruction."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae: str, precision: str) -> io.NodeOutput:
        return load("vae", vae, precision)


def combo(kind: str, tooltip: str) -> Any:
    """The embedded model, which is always there, the files of a kind's folder, then all-in-one
    checkpoints, of which each loader takes its part."""
    import folder_paths

    lists = (folder_paths.get_filename_list(folder) for folder in (FOLDERS[kind], "checkpoints"))
    found = [name for names in lists for name in names] + ggufs(FOLDERS[kind])
    names = list(dict.fromkeys([EMBEDDED, *(n for n in found if "mmproj" not in n.lower())]))
    return io.Combo.Input(kind, options=names, default=EMBEDDED, tooltip=tooltip)


def ggufs(folder: str) -> list[str]:
    """GGUF files of a kind's folder, which ComfyUI itself does not list."""
    import folder_paths

    roots = [Path(root) for root in folder_paths.get_folder_paths(folder)]
    found = ((root, file) for root in roots for file in root.rglob("*.gguf"))
    return sorted(str(file.relative_to(root)) for root, file in found)


def variants() -> list[str]:
    """What a file may be, where one architecture has been published as several models."""
    return [SAID, *(name for family in FAMILIES for name in family.variants)]


def precision() -> Any:
    return io.Combo.Input(
        "precision", options=list(PRECISIONS), default="as stored", tooltip=PRECISION, advanced=True
    )


def load(kind: str, name: str, precision: str, variant: str | None = None) -> io.NodeOutput:
    """The network, with what it is shown on the node."""
    here = runtime()
    thing = here.load(kind, str(path_of(kind, name)), PRECISIONS[precision], variant)
    text = facts(here.loaded(thing))
    here.tell(text)
    return io.NodeOutput(thing, ui=ui.PreviewText(text))


def path_of(kind: str, name: str) -> Path:
    import folder_paths

    if name != EMBEDDED:
        own = folder_paths.get_full_path(FOLDERS[kind], name)
        return Path(own or folder_paths.get_full_path_or_raise("checkpoints", name))
    path = ASSETS / FOLDERS[kind] / "seedling-tiny.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"the embedded model's file {path.name} is missing from assets/{FOLDERS[kind]}; "
            "install the pack again, with its assets."
        )
    return path


def facts(loaded: Loaded | None) -> str:
    """Family, size, licence, and how a DiT wants to be sampled."""
    assert loaded is not None
    count = sum(math.prod(info.shape) for info in loaded.checkpoint.names.values())
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    kept = str(loaded.dtype).removeprefix("torch.")
    title = model_title(loaded.family, loaded.checkpoint)
    lines = [f"{title}, {size} parameters, {kept}"]
    lines.append(f"{loaded.licence.name}. {loaded.licence.notice}")
    if schedule := loaded.schedule:
        guidance = f", guidance {schedule.guidance:g}" if schedule.guidance != 1 else ""
        lines.append(f"{schedule.name}: {schedule.steps} steps{guidance} ({schedule.reason})")
    return "\n".join([*lines, *loaded.notes])
