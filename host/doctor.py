"""`seedling doctor`: what works here, and what is missing.

Looks at packages, the device, the headers of model files and the example workflows. Reads no weight
and asks no other machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..model_loaders.checkpoint import CheckpointError
from ..model_loaders.detection import config_of, table_of
from ..model_loaders.family import Kind
from ..model_loaders.load import Loaded, find
from ..quant.operations import TORCH, has_bf16_products
from .download import offers
from .models import COMFYUI, KINDS, TITLES, files_in, folders, is_embedded, listed

WORKFLOWS = Path(__file__).resolve().parents[1] / "example_workflows"
# Package -> the version that is needed, and what for; None: it only makes something better.
NEEDED = {
    "torch": ("2.7", "everything"),
    "safetensors": ("0", "model files"),
    "tokenizers": ("0", "text encoders"),
    "transformers": ("5", "text encoders"),
    "numpy": ("0", "pictures"),
    "pillow": ("0", "pictures"),
    "tqdm": ("0", "the command line"),
    "aiohttp": ("0", "the studio"),
    "comfyui-frontend-package": ("0", "the studio"),
    "gguf": ("0", "GGUF files"),
    "kornia": ("0", "training"),
    "huggingface_hub": ("0.34", "seedling download"),
    "comfy-kitchen": ("0.2.31", "faster kernels for quantized weights; optional"),
    "bitsandbytes": ("0", "reading nf4 files; optional"),
}
# What cards of a compute capability multiply themselves (NVIDIA's tables), the newest first.
ABILITIES = (
    ((10, 0), "fp32, fp16, bf16, int8, fp8, nvfp4"),
    ((8, 9), "fp32, fp16, bf16, int8, fp8"),
    ((8, 0), "fp32, fp16, bf16, int8"),
    ((7, 5), "fp32, fp16, int8"),
    ((0, 0), "fp32, fp16"),
)


def examine(comfyui: Path | None = None) -> str:
    """The whole report. Raises ModelsError where ComfyUI is not where it was said to be."""
    files = Files.found(comfyui)
    sections = {
        "Packages": packages(),
        "Devices": devices(),
        "Models": models(files),
        "Example workflows": workflows(comfyui),
    }
    lines = []
    for title, content in sections.items():
        lines += [title, *(f"  {line}" for line in content)]
    return "\n".join(lines)


# ---- packages and devices ----------------------------------------------------------------------


def packages() -> Iterator[str]:
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name, (least, purpose) in NEEDED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{name} is missing: needed for {purpose}"
            continue
        old = _numbers(version) < _numbers(least)
        yield f"{name} {version}" + (f", too old: {least} is needed for {purpose}" if old else "")


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> 2, 13, 0."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(p) for p in parts if p.isdecimal())


def devices() -> Iterator[str]:
    import torch

    bf16 = "fp32 and bf16" if has_bf16_products() else "fp32; 16-bit weights are widened to it"
    yield f"cpu: {torch.get_num_threads()} threads, multiplies {bf16}"
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        able = next(words for least, words in ABILITIES if (seen.major, seen.minor) >= least)
        size = seen.total_memory / (1 << 30)
        yield f"cuda:{index}: {seen.name}, {size:.0f} GiB, multiplies {able}"
    if torch.backends.mps.is_available():
        yield "mps: multiplies fp32, fp16, bf16"


# ---- models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Usable files of each kind, and the others with what is wrong."""

    usable: dict[Kind, list[tuple[Path, Loaded]]]
    refused: list[tuple[Path, str]]

    @classmethod
    def found(cls, comfyui: Path | None) -> Files:
        usable: dict[Kind, list[tuple[Path, Loaded]]] = {kind: [] for kind in KINDS}
        refused: list[tuple[Path, str]] = []
        for kind, path, report in listed(comfyui):
            try:
                if not report.usable:
                    raise CheckpointError(report.problems[0])
                usable[kind].append((path, outlined(kind, path)))
            except ValueError as error:  # of a tokenizer too
                refused.append((path, str(error)))
        return cls(usable, refused)


def outlined(kind: Kind, path: Path) -> Loaded:
    """As the loader returns it, but without a weight: enough to ask what fits it.

    Raises ValueError for a file of another kind, and for an encoder without its tokenizer.
    """
    import torch

    found = find(kind, path)
    config, module = config_of(found), None
    if found.component.finish is not None:
        module = found.component.finish(table_of(found, config, TORCH), found.checkpoint.path)
    return Loaded(
        module=module,
        family=found.family,
        kind=kind,
        config=config,
        licence=found.family.licence_of(found.checkpoint),
        schedule=None,
        checkpoint=found.checkpoint,
        layout=found.layout.name,
        dtype=torch.float32,
    )


def models(files: Files) -> Iterator[str]:
    """Each diffusion model, and the VAEs and text encoders that go with it."""
    if not any(files.usable.values()) and not files.refused:
        yield "none; `seedling download` lists what can be fetched"
    for path, dit in files.usable["dit"]:
        yield shown(path)
        partners = list(fitting(dit, files))
        for place, kind in enumerate(("vae", "encoder")):
            names = dict.fromkeys(shown(pair[place]) for pair in partners)
            yield f"  {_title(kind)}: {', '.join(names) or missing(dit, kind, files)}"
    for kind in ("vae", "encoder"):
        for path, other in files.usable[kind]:
            if not any(other.family is dit.family for _, dit in files.usable["dit"]):
                yield f"{shown(path)}: a {_title(kind)} of {other.family.title}, without a model"
    for path, why in files.refused:
        yield f"{shown(path)} cannot be used: {why}"


def fitting(dit: Loaded, files: Files) -> Iterator[tuple[Path, Path]]:
    """VAE and text encoder of every complete set around `dit`."""
    for vae_path, vae in files.usable["vae"]:
        for encoder_path, encoder in files.usable["encoder"]:
            if dit.family is vae.family is encoder.family:
                try:
                    dit.family.check(dit, vae, encoder)
                except CheckpointError:
                    continue
                yield vae_path, encoder_path


def missing(dit: Loaded, kind: Kind, files: Files) -> str:
    """Why nothing of a kind is listed."""
    own = [path for path, other in files.usable[kind] if other.family is dit.family]
    if own:
        some = ", ".join(map(shown, own))
        return f"none that fits together with the rest (there is {some})"
    component = dit.family.component(kind)
    return f"missing, for example {component.example}" if component else "none"


def _title(kind: Kind) -> str:
    return TITLES[kind].removesuffix("s")


def shown(path: Path) -> str:
    return f"{path.stem} (embedded)" if is_embedded(path) else path.name


# ---- workflows ---------------------------------------------------------------------------------


def workflows(comfyui: Path | None) -> Iterator[str]:
    """Each example: whether it runs as it is, and which published files it also is made for."""
    present = {
        folder: {path.name for root in folders(kind, comfyui) for path in files_in(root)}
        for kind in KINDS
        for folder in COMFYUI[kind][:1]
    }
    found = sorted(WORKFLOWS.glob("*.json"))
    if not found:
        yield "none in this installation"
    for file in found:
        nodes = json.loads(file.read_text("utf-8"))["nodes"]
        wanted, published = wanted_by(nodes)
        lacking = [f"{folder}/{name}" for folder, name in wanted if name not in present[folder]]
        state = f"lacks {', '.join(lacking)}" if lacking else "ready, with the files it names"
        yield f"{file.stem}: {state}"
        absent = [name for folder, name in published if name not in present.get(folder, ())]
        if absent:
            names = {o.name for o in offers().values() if {f.name for f in o.files} >= set(absent)}
            how = f"; seedling download {' or '.join(sorted(names))}" if names else ""
            yield f"  for its published model: {', '.join(absent)}{how}"


def wanted_by(nodes: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(folder, file) that the loaders of a workflow name, and those that they offer to fetch."""
    wanted, published = [], []
    for node in nodes:
        offered = node.get("properties", {}).get("models") or []
        published += [(model["directory"], model["name"]) for model in offered]
        values = node.get("widgets_values")
        if offered and isinstance(values, list) and values:
            name = str(values[0])
            if name.endswith(" (embedded)"):
                name = f"{name.removesuffix(' (embedded)')}.safetensors"
            wanted.append((offered[0]["directory"], name))
    return list(dict.fromkeys(wanted)), list(dict.fromkeys(published))
