"""Where model files are: the embedded model in assets/, ComfyUI's folders, or wherever you say."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..model_loaders.bundle import parts
from ..model_loaders.checkpoint import Checkpoint, open_checkpoint
from ..model_loaders.family import Kind
from ..model_loaders.inspect import Report, inspect
from ..model_loaders.load import FOLDERS

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = "seedling-tiny.safetensors"
KINDS: tuple[Kind, ...] = ("dit", "vae", "encoder")
Slot = Literal["dit", "vae", "encoder", "lora"]
TITLES: dict[Kind, str] = {
    "dit": "diffusion models",
    "vae": "VAEs",
    "encoder": "text encoders",
}
# ComfyUI's names under models/, today's first; assets/ has today's.
COMFYUI: dict[Slot, tuple[str, ...]] = {
    "dit": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "encoder": ("text_encoders", "clip"),
    "lora": ("loras",),
}
MAX_STRENGTH = 100  # of a LoRA, as in ComfyUI
CHECKPOINTS = "checkpoints"  # all-in-one files, of which each slot takes its part
SAMPLES, SAMPLE = 256, 4096  # of a weight file, for its fingerprint


class ModelsError(ValueError):
    """Model files that are not where they are looked for; the message says where to put them."""


@dataclass(frozen=True)
class Choice:
    """What the user said about weights: paths, or names in the folders of `comfyui`.

    `precision` is one of `cli.PRECISIONS`: how what is not quantized is kept.
    """

    dit: str | None = None
    vae: str | None = None
    encoder: str | None = None
    comfyui: Path | None = None
    precision: str = "stored"

    @property
    def dtype(self) -> Any:
        """`precision` as the loaders take it."""
        import torch

        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return {"stored": None, "auto": "auto", **kinds}[self.precision]

    def get(self, kind: Kind) -> str | None:
        return {"dit": self.dit, "vae": self.vae, "encoder": self.encoder}[kind]


def choose(choice: Choice) -> dict[Kind, Path]:
    """The three files to load. Raises ModelsError.

    Without any word it is the embedded model. A diffusers folder or an all-in-one file given as
    --dit brings its VAE and its encoder along; another file does not, because nothing in it says
    which ones it needs.
    """
    given: dict[Kind, str | None] = {kind: choice.get(kind) for kind in KINDS}
    if not any(given.values()):
        return embedded()
    found: dict[Kind, Path] = {
        kind: look_up(kind, name, choice.comfyui) for kind, name in given.items() if name
    }
    whole = _pipeline_around(found.get("dit"))
    for kind in KINDS:
        if kind not in found and whole and (whole / FOLDERS[kind]).is_dir():
            found[kind] = whole
    dit = found.get("dit")
    if dit and dit.is_file() and len(found) < len(KINDS):
        for kind in parts(open_checkpoint(dit)):
            found.setdefault(kind, dit)
    missing = [f"--{kind}" for kind in KINDS if kind not in found]
    if missing:
        words = " and ".join(f"--{kind} {name}" for kind, name in given.items() if name)
        raise ModelsError(
            f"{words} needs {' and '.join(missing)} too: the files that were published with it, or "
            f"{EMBEDDED} for the embedded one."
        )
    return found


def _pipeline_around(dit: Path | None) -> Path | None:
    """The diffusers folder that `dit` is, or is the transformer/ of."""
    places = [dit, dit.parent] if dit and dit.is_dir() else []
    return next((place for place in places if (place / "model_index.json").is_file()), None)


def embedded() -> dict[Kind, Path]:
    """The files of the embedded model; ModelsError when they are not there."""
    files: dict[Kind, Path] = {kind: ASSETS / COMFYUI[kind][0] / EMBEDDED for kind in KINDS}
    missing = [f"{file.parent.name}/{file.name}" for file in files.values() if not file.is_file()]
    if missing:
        raise ModelsError(
            f"The embedded model is not complete: assets/ lacks {', '.join(missing)}; get the "
            "whole repository, or name other weights with --dit, --vae and --encoder."
        )
    return files


def is_embedded(path: Path) -> bool:
    return path.resolve().is_relative_to(ASSETS)


def look_up(kind: Slot, name: str, comfyui: Path | None = None) -> Path:
    """The file or folder that `name` means: a path, or a name in one of the model folders."""
    return Path(name) if Path(name).exists() else named(kind, name, comfyui)


def named(kind: Slot, name: str, comfyui: Path | None = None) -> Path:
    """The file called `name` (its ending may be left out) in one of the model folders."""
    roots = folders(kind, comfyui)
    for root in roots:
        found = _named(root, name)
        if len(found) == 1:
            return found[0]
        if found:
            some = " and ".join(map(str, found[:4]))
            raise ModelsError(f"--{kind} {name} could be {some}; give the path of one of them.")
    places = ", ".join(map(str, roots))
    hint = "" if len(roots) > 1 else "; --comfyui DIR or COMFYUI_DIR adds ComfyUI's folders"
    raise ModelsError(f"--{kind} {name} is no file, and nothing in {places} is called so{hint}.")


def lora_of(word: str, comfyui: Path | None) -> tuple[Path, float]:
    """`style.safetensors:0.8` -> the file and 0.8; 1 where no number is said."""
    name, colon, tail = word.rpartition(":")
    try:
        strength = float(tail) if colon and name else None
    except ValueError:  # of a path with a colon in it, or no number
        strength = math.nan if Path(name).is_file() else None
    if strength is None or Path(word).exists():
        name, strength = word, 1.0
    if not abs(strength) <= MAX_STRENGTH:
        raise ModelsError(
            f"--lora {word}: the strength must be a number such as 0.8, from -{MAX_STRENGTH} to "
            f"{MAX_STRENGTH}."
        )
    return look_up("lora", name, comfyui), strength


def folders(kind: Slot, comfyui: Path | None = None) -> list[Path]:
    """Where files of one kind are looked for. `comfyui` wins over the variable COMFYUI_DIR."""
    roots, models = [ASSETS / COMFYUI[kind][0]], models_folder(comfyui)
    own = [models / name for name in COMFYUI[kind]] if models else []
    own += [models / CHECKPOINTS] if models and kind != "lora" else []
    return roots + [folder for folder in own if folder.is_dir()]


def models_folder(comfyui: Path | None = None) -> Path | None:
    """ComfyUI's models/, if anybody said where ComfyUI is. Raises ModelsError where it is not."""
    place = comfyui or (Path(os.environ["COMFYUI_DIR"]) if os.environ.get("COMFYUI_DIR") else None)
    if place is None:
        return None
    models = place / "models" if (place / "models").is_dir() else place
    if not any((models / name).is_dir() for names in COMFYUI.values() for name in names):
        raise ModelsError(
            f"{place} is not ComfyUI's folder: it has no models/diffusion_models; correct "
            f"{'--comfyui' if comfyui else 'COMFYUI_DIR'}."
        )
    return models


def _named(root: Path, name: str) -> list[Path]:
    """Files under `root` called `name`, with or without the ending, in subfolders too."""
    wanted = Path(name)
    if wanted.is_absolute() or ".." in wanted.parts:
        return []
    for candidate in (wanted, wanted.with_name(f"{wanted.name}.safetensors")):
        if (root / candidate).exists():
            return [root / candidate]
        below = [path for path in files_in(root) if path.parts[-len(candidate.parts) :] ==
                 candidate.parts]  # fmt: skip
        if below:
            return below
    return []


def files_in(root: Path) -> list[Path]:
    """All weight files under a folder, those behind links too, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if len(Path(folder).relative_to(root).parts) > 8:  # a link that leads back up
            subfolders.clear()
        found += [Path(folder) / name for name in names if _is_weights(name)]
    return sorted(found)


def _is_weights(name: str) -> bool:
    """Whether a file is a model; vision parts in GGUF come along with their language model."""
    return name.endswith((".safetensors", ".gguf")) and "mmproj" not in name.lower()


def listed(comfyui: Path | None = None) -> Iterator[tuple[Kind, Path, Report]]:
    """Every weight file that is found by its name, with what it is.

    Of the files in models/checkpoints only those that have the part: most are for others.
    """
    for kind in KINDS:
        for root in folders(kind, comfyui):
            for path in files_in(root):
                report = inspect(path).part(kind)
                if root.name != CHECKPOINTS or report.component == kind:
                    yield kind, path, report


def table(comfyui: Path | None = None) -> str:
    """What `seedling models` shows: name, family, size, licence; what cannot be used comes last."""
    lines, seen = [], list(listed(comfyui))
    for kind in KINDS:
        own = [(path, report) for k, path, report in seen if k == kind]
        lines.append(f"{TITLES[kind]} in {', '.join(map(str, folders(kind, comfyui)))}")
        lines += [_row(path, report) for path, report in own if report.usable]
        lines += [_row(path, report) for path, report in own if not report.usable]
        lines += [] if own else ["  none"]
    return "\n".join(lines)


def _row(path: Path, report: Report) -> str:
    size = f"{(report.bytes or 0) / 1e9:.3f} GB"
    if not report.usable:
        return f"  {path.stem:<40} cannot be used: {report.problems[0]}"
    terms = f"{report.licence}{'' if report.commercial else ', non-commercial'}"
    return f"  {path.stem:<40} {report.title:<18} {size:>10}  {report.dtype}  {terms}"


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of a checkpoint's header, its size and samples of its bytes: other weights differ.

    Fine-tuned weights have the header and the size of those they began as; so at most 1 MiB from
    everywhere in each file is read too, however large it is.
    """
    digest = hashlib.sha256()
    for file in sorted(checkpoint.files):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header))
            begin, last = 8 + header, max(size - SAMPLE, 8 + header)
            for i in range(SAMPLES):  # the first and the last bytes among them
                stream.seek(begin + (last - begin) * i // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
