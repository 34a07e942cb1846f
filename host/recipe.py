"""What a picture was made from, as JSON in its PNG: enough to make it again, bit for bit.

Files are named by their path as seen from the picture, so a folder of work can be moved or sent;
hashes tell whether what is found there is still the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..model_loaders.checkpoint import CheckpointError, open_checkpoint
from ..model_loaders.family import Kind
from ..model_loaders.load import Loaded
from ..model_loaders.lora import Lora
from ..sampling.composite import Where
from ..sampling.task import Member
from . import models
from .pictures import PictureError, PictureFile, read_picture, read_text

KEY = "seedling"  # of the PNG's text; "prompt" and "workflow" are ComfyUI's
FORMAT = 1


class RecipeError(ValueError):
    """A picture without a recipe that can be followed; the message names it and what is missing."""


@dataclass(frozen=True)
class Source:
    """A file that a picture was made from. `path` is relative to the picture, with slashes; None:
    the embedded model, or a file on another drive. `hash` is a sha256 (of weights: a fingerprint).
    """

    file: str
    path: str | None
    hash: str


@dataclass(frozen=True)
class LoraSource(Source):
    strength: float


@dataclass(frozen=True)
class Recipe:
    """Everything that one picture depends on. `resolution` None: as the checkpoint likes it.

    `variant` was chosen where the file does not say it; `layers` are of one that paints in layers.
    `together` were painted at once, this one being number `place` of them, from 0.
    `vlm_resolution` is as in `Task`. `edit` and `mask` say where the first reference could change.
    """

    prompt: str
    negative: str
    references: tuple[Source, ...]
    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    sampler: str
    sigmas: tuple[float, ...]
    schedule: str
    resolution: int | None
    weights: Mapping[Kind, Source]
    made_with: Mapping[str, str]
    loras: tuple[LoraSource, ...] = ()
    variant: str | None = None
    layers: int | None = None
    together: tuple[Member, ...] = ()
    place: int | None = None
    vlm_resolution: tuple[int, ...] = ()
    edit: Where | None = None
    mask: Source | None = None

    def text(self) -> str:
        """As JSON; text stays readable, whatever its script."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps(content, ensure_ascii=False, indent=1)


def read_recipe(picture: Path) -> Recipe:
    """The recipe in a PNG. Raises RecipeError, and PictureError when it is no PNG."""
    text = read_text(picture).get(KEY)
    if text is None:
        raise RecipeError(
            f"{picture} carries no recipe; give a PNG as Seedling wrote it, not one saved again."
        )
    try:
        return _parsed(json.loads(text, parse_constant=_not_json))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RecipeError(f"The recipe in {picture} cannot be followed: {error}.") from error


def _not_json(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _parsed(content: Any) -> Recipe:
    """Every field checked: a picture comes from anywhere. Raises ValueError, TypeError."""
    if not isinstance(content, dict):
        raise TypeError("it is not a JSON object")
    if content.get("format") != FORMAT:
        raise ValueError(f"it has the format {content.get('format')!r}, readable is {FORMAT}")
    weights = _typed(content, "weights", dict)
    resolution = content.get("resolution")
    recipe = Recipe(
        prompt=_typed(content, "prompt", str),
        negative=_typed(content, "negative", str),
        references=tuple(_source(s) for s in _typed(content, "references", list)),
        size=_numbers(content, "size", int),
        steps=_typed(content, "steps", int),
        guidance=float(_typed(content, "guidance", (int, float))),
        seed=_typed(content, "seed", int),
        sampler=_typed(content, "sampler", str),
        sigmas=tuple(map(float, _numbers(content, "sigmas", (int, float)))),
        schedule=_typed(content, "schedule", str),
        resolution=None if resolution is None else _typed(content, "resolution", int),
        weights={kind: _source(weights.get(kind)) for kind in models.KINDS},
        made_with={str(k): str(v) for k, v in _typed(content, "made_with", dict).items()},
        loras=tuple(_lora(s) for s in _typed({"loras": [], **content}, "loras", list)),
        variant=None if content.get("variant") is None else _typed(content, "variant", str),
        layers=None if content.get("layers") is None else _typed(content, "layers", int),
        together=tuple(_member(s) for s in _typed({"together": [], **content}, "together", list)),
        vlm_resolution=_numbers({"vlm_resolution": [], **content}, "vlm_resolution", int),
        edit=None if content.get("edit") is None else _where(_typed(content, "edit", dict)),
        mask=None if content.get("mask") is None else _source(content["mask"]),
        place=None if content.get("place") is None else _typed(content, "place", int),
    )
    if recipe.together and recipe.place not in range(len(recipe.together)):
        raise ValueError("it does not say which of several pictures it is")
    if len(recipe.size) != 2 or len(recipe.sigmas) != recipe.steps + 1:
        raise ValueError("its size or its sigmas have the wrong length")
    return recipe


def _typed(content: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"its '{key}' is missing or is not what it should be")
    return value


def _numbers(content: Mapping[str, Any], key: str, kind: Any) -> Any:
    values = _typed(content, key, list)
    return tuple(_typed({key: value}, key, kind) for value in values)


def _source(content: Any) -> Source:
    if not isinstance(content, dict):
        raise TypeError("one of its files is not a JSON object")
    path = content.get("path")
    return Source(
        file=_typed(content, "file", str),
        path=None if path is None else _typed(content, "path", str),
        hash=_typed(content, "hash", str),
    )


def _member(content: Any) -> Member:
    if not isinstance(content, dict):
        raise TypeError("one of its pictures is not a JSON object")
    prompt = _typed(content, "prompt", str)
    return Member(prompt, _typed(content, "seed", int), _typed(content, "place", int))


def _where(content: Mapping[str, Any]) -> Where:
    words = {name: _typed(content, name, str) for name in ("boxes", "points")}
    widths = {name: _typed(content, name, int) for name in ("grow", "feather", "context")}
    return Where(**words, **widths, tolerance=float(_typed(content, "tolerance", (int, float))))


def _lora(content: Any) -> LoraSource:
    strength = float(_typed(content, "strength", (int, float)))
    return LoraSource(**vars(_source(content)), strength=strength)


def source(path: Path, hashed: str, folder: Path) -> Source:
    """A file as a picture in `folder` names it."""
    if models.is_embedded(path):
        return Source(path.name, None, hashed)
    try:
        seen = _text(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
    except ValueError:  # Windows: on another drive
        seen = None
    return Source(_text(path.name), seen, hashed)


def _text(name: str) -> str:
    """A file name as text; Unix allows names that are none."""
    return os.fsencode(name).decode("utf-8", "replace")


def weights(loaded: Sequence[Loaded], folder: Path) -> dict[Kind, Source]:
    """The loaded components as a picture in `folder` names them."""
    return {
        part.kind: source(part.checkpoint.path, models.fingerprint(part.checkpoint), folder)
        for part in loaded
    }


def loras(used: Mapping[Path, tuple[Lora, float]], folder: Path) -> tuple[LoraSource, ...]:
    """The LoRAs of a pipeline, in their order, as a picture in `folder` names them."""
    return tuple(
        LoraSource(
            **vars(source(path, models.fingerprint(lora.checkpoint), folder)), strength=strength
        )
        for path, (lora, strength) in used.items()
    )


def made_with(device: torch.device) -> dict[str, str]:
    """What else decides over the last bits of a picture."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {"seedling": version(), "torch": torch.__version__, "device": device.type, **threads}


def version() -> str:
    """Seedling's version; from beside the code where ComfyUI runs it and nobody installed it."""
    try:
        return installed("seedling")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        text = project.read_text("utf-8") if project.is_file() else ""
        found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
        return found[1] if found else "unknown"


def find_references(recipe: Recipe, picture: Path) -> tuple[PictureFile, ...]:
    """The references of a recipe again: where they were, as seen from the picture, or beside it."""
    anew = "the references anew with --reference"
    return tuple(_find_picture(wanted, picture, anew) for wanted in recipe.references)


def find_mask(recipe: Recipe, picture: Path) -> PictureFile | None:
    """The mask of a recipe again, if there was one; as `find_references`."""
    anew = "a region anew with --region, --point or --mask"
    return _find_picture(recipe.mask, picture, anew) if recipe.mask else None


def _find_picture(wanted: Source, picture: Path, anew: str) -> PictureFile:
    changed: Path | None = None
    for place in _places(wanted, picture):
        try:
            found = read_picture(place)
        except PictureError:
            changed = place
            continue
        if found.sha256 == wanted.hash:
            return found
        changed = place
    if changed:
        raise RecipeError(
            f"{picture} was made from {wanted.file}, but {changed} has changed since; bring the "
            f"old file back, or give {anew}."
        )
    raise RecipeError(
        f"{picture} was made from {wanted.file}, which is neither {_tried(wanted, picture)}; put "
        f"it beside the picture, or give {anew}."
    )


def _places(wanted: Source, picture: Path) -> list[Path]:
    """Existing files that may be the wanted one. A name from a recipe is reduced to a plain one."""
    there = [picture.parent / wanted.path] if wanted.path else []
    beside = PurePosixPath(wanted.file.replace("\\", "/")).name
    tried = [*there, picture.parent / beside]
    return [place for place in dict.fromkeys(tried) if beside and place.is_file()]


def _tried(wanted: Source, picture: Path) -> str:
    there = f"at {picture.parent / wanted.path} nor " if wanted.path else "on this drive nor "
    return f"{there}beside the picture"


def find_weights(
    recipe: Recipe, picture: Path, given: Sequence[Kind], comfyui: Path | None
) -> dict[Kind, Path]:
    """The weights of a recipe again, but for the kinds that were `given` anew.

    Looked for where they were, as seen from the picture, and by their name in the model folders.
    Raises RecipeError when they are missing, or are other weights than those.
    """
    return {
        kind: _find_part(kind, wanted, picture, comfyui)
        for kind, wanted in recipe.weights.items()
        if kind not in given
    }


def find_loras(
    recipe: Recipe, picture: Path, comfyui: Path | None
) -> tuple[tuple[Path, float], ...]:
    """The LoRAs of a recipe again, with their strengths; as `find_weights`."""
    return tuple(
        (_find_part("lora", wanted, picture, comfyui), wanted.strength) for wanted in recipe.loras
    )


def _find_part(kind: models.Slot, wanted: Source, picture: Path, comfyui: Path | None) -> Path:
    there = picture.parent / wanted.path if wanted.path else None
    places = [there] if there and there.exists() else []
    missing = ""
    try:
        places.append(models.named(kind, wanted.file, comfyui))
    except models.ModelsError as error:
        missing = str(error)
    for place in places:
        if is_same(wanted, place):
            return place
    if places:
        raise RecipeError(
            f"{picture} was made with other weights than {places[0]} has now; give the right file "
            f"with --{kind}, or --{kind} {places[0]} to use these."
        )
    raise RecipeError(
        f"{picture} was made with {wanted.file}, which is not there any more. {missing}"
    )


def is_same(wanted: Source, place: Path) -> bool:
    """Whether the weights at `place` are those that a recipe means."""
    try:
        return models.fingerprint(open_checkpoint(place)) == wanted.hash
    except CheckpointError:
        return False
