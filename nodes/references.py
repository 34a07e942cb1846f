"""References: an ordered list of pictures with names, roles, strengths and masks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.pipeline import with_margin
from .runtime import runtime

MAX_REFERENCES = 14
MAX_SIDE = 16384  # pixels, as in ComfyUI
SIZES = {"model": None, "1K": 1024, "2K": 2048, "own": 0}
ReferenceList = io.Custom("SEEDLING_REFERENCES")


@dataclass(frozen=True)
class Reference:
    """`image` (H, W, 3 or 4) in 0..1; `name` and `role` are for the prompt."""

    image: Tensor
    name: str = ""
    role: str = ""


@dataclass(frozen=True)
class References:
    """In their order. Each is brought to the area of a square of `side` pixels; 0 keeps its own."""

    items: tuple[Reference, ...]
    side: int

    def sized(self, family: Any) -> list[Tensor]:
        """The pictures in the sizes that the model reads."""
        resize = with_margin if family.pads and self.side == 0 else family.resize
        return [
            resize(item.image, size)
            for item, size in zip(self.items, self.sizes(family), strict=True)
        ]

    def sizes(self, family: Any) -> list[tuple[int, int]]:
        """Width and height of each, as the model reads it."""
        shapes = [item.image.shape for item in self.items]
        return [family.reference_size(s[1], s[0], self.side**2) for s in shapes]


@dataclass(frozen=True)
class Entry:
    """A line of the list: a connected picture (`image_2`) or a file of the input folder."""

    source: str
    name: str = ""
    role: str = ""
    strength: float = 1.0
    on: bool = True


class SeedlingReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [f"image_{i}" for i in range(1, MAX_REFERENCES + 1)]
        masks = [f"mask_{i}" for i in range(1, MAX_REFERENCES + 1)]
        return io.Schema(
            node_id="SeedlingReferences",
            display_name="References",
            category="Seedling",
            description="Puts up to 14 pictures in order: image 1, image 2, … of the instruction.",
            search_aliases=["reference images", "multi reference", "edit", "compose", "参考图"],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplateNames(io.Image.Input("image"), names=names, min=0),
                    tooltip="The pictures: image 1, image 2, … of the instruction. A batch "
                    "counts as several.",
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplateNames(io.Mask.Input("mask"), names=masks, min=0),
                    tooltip="mask_1 belongs to image_1: white is the part that counts, the rest "
                    "becomes transparent. An all-black mask is no mask.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default="model",
                    tooltip="How large the model sees each picture. Larger shows it more detail "
                    "and takes more time and memory. model: as it was trained. own: each as it is.",
                ),
                io.String.Input(
                    "strip",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="Order and settings as a JSON list. Empty: all connected pictures in "
                    'their order. Example: ["cat.png", {"image": "image_1", "name": "hat", "role": '
                    '"style", "strength": 0.5, "on": false}], cat.png being in the input folder.',
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will read them, for its own size. Without it: 1K.",
                ),
            ],
            outputs=[
                ReferenceList.Output(
                    "references",
                    "references",
                    tooltip="For Encode Instruction, Canvas Size and Image Set.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, strip: str = "", **others: Any) -> str:
        return fingerprint(strip)

    @classmethod
    def execute(
        cls,
        size: str,
        strip: str = "",
        images: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        loaded = runtime().loaded(model)
        side = SIZES[size]
        if side is None:
            side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
        found = References(gather(parse(strip), images or {}, masks or {}), side)
        return io.NodeOutput(found, ui=ui.PreviewText(listing(found)))


def parse(strip: str) -> list[Entry]:
    """The entries of the JSON list; SamplingError that names the one that is wrong."""
    if not strip.strip():
        return []
    try:
        values = json.loads(strip)
    except ValueError as error:
        raise SamplingError(
            f"the list of references is not JSON ({error}); empty it to use the connected pictures "
            "in their order."
        ) from None
    if not isinstance(values, list):
        raise SamplingError("the list of references must be a JSON list: put it in [ ].")
    return [entry(value, number) for number, value in enumerate(values, start=1)]


def entry(value: Any, number: int) -> Entry:
    if isinstance(value, str):
        value = {"image": value}
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise SamplingError(
            f'entry {number} of the list of references must be a file name or {{"image": …}}.'
        )
    strength = value.get("strength", 1.0)
    if (
        isinstance(strength, bool)
        or not isinstance(strength, int | float)
        or not 0 <= strength <= 1
    ):
        raise SamplingError(
            f"the strength of reference {number} is {strength}; give a number between 0 and 1."
        )
    return Entry(
        source=value["image"],
        name=str(value.get("name", "")).strip(),
        role=str(value.get("role", "")).strip(),
        strength=float(strength),
        on=bool(value.get("on", True)),
    )


def gather(
    entries: list[Entry], images: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[Reference, ...]:
    """The references that are on: those of the list in its order, then connected ones it lacks."""
    images = {name: image for name, image in images.items() if image is not None}
    listed = {item.source for item in entries}
    rest = [Entry(name) for name in sorted(images, key=number_of) if name not in listed]
    found: list[Reference] = []
    for item in [*entries, *rest]:
        if not item.on or item.strength == 0:
            continue
        connected = re.fullmatch(r"image_[0-9]+", item.source)
        if connected and item.source not in images:
            raise SamplingError(
                f"the list of references names {item.source}, but nothing is connected there; "
                "connect a picture, or take it off the list."
            )
        batch = images[item.source] if connected else opened(item.source)[None]
        mask = masks.get(item.source.replace("image", "mask")) if connected else None
        for picture in batch:
            found.append(Reference(faded(picture, mask, item.strength), item.name, item.role))
    if len(found) > MAX_REFERENCES:
        raise SamplingError(
            f"{len(found)} references are on; the model takes at most {MAX_REFERENCES}. Turn some "
            "off (a batch counts as several)."
        )
    return tuple(found)


def number_of(name: str) -> int:
    return int(name.rpartition("_")[2])


def faded(image: Tensor, mask: Tensor | None, strength: float) -> Tensor:
    """A picture (H, W, 3 or 4) with mask (1, h, w) and strength in its alpha, where they matter."""
    alpha = image[..., 3:] if image.shape[-1] == 4 else torch.ones_like(image[..., :1])
    if mask is not None and bool(mask.any()):
        height, width = image.shape[:2]
        shaped = mask[:1, None].to(image)
        alpha = alpha * F.interpolate(shaped, (height, width), mode="bilinear")[0, 0, :, :, None]
    elif strength == 1:
        return image
    return torch.cat([image[..., :3], alpha * strength], dim=-1)


def opened(name: str) -> Tensor:
    """(H, W, 3 or 4) in 0..1 of a file in ComfyUI's input folder."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path_of(name)) as image:
            if max(image.size) > MAX_SIDE:
                raise SamplingError(
                    f"{name} is {image.size[0]} x {image.size[1]} pixels; at most {MAX_SIDE} a "
                    "side are read."
                )
            upright = ImageOps.exif_transpose(image)
            has_alpha = "A" in upright.getbands() or "transparency" in upright.info
            pixels = np.array(upright.convert("RGBA" if has_alpha else "RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise SamplingError(f"{name} cannot be read as a picture: {error}") from None
    return torch.from_numpy(pixels).float() / 255.0


def path_of(name: str) -> Path:
    """A file of the input folder ("cat.png", "sub/cat.png [input]"), and of nowhere else."""
    import folder_paths

    plain = re.sub(r" \[(input|output|temp)\]$", "", name)
    kind = name.removeprefix(plain).strip(" []") or "input"
    folders = {
        "input": folder_paths.get_input_directory,
        "output": folder_paths.get_output_directory,
        "temp": folder_paths.get_temp_directory,
    }
    folder = Path(folders[kind]()).resolve()
    path = (folder / plain).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise SamplingError(f"there is no {plain} in the {kind} folder; upload it first.")
    return path


def fingerprint(strip: str) -> str:
    """Changes when a file of the list does; what is wrong with the list is said when it runs."""
    try:
        files = [e.source for e in parse(strip) if not re.fullmatch(r"image_[0-9]+", e.source)]
        stats = [(name, path_of(name).stat()) for name in files]
    except (SamplingError, OSError):
        return strip
    return json.dumps([strip, [[name, s.st_mtime_ns, s.st_size] for name, s in stats]])


def instruction(prompt: str, references: References | None) -> str:
    """The prompt with @names as "image N", and what references are for behind it."""
    items = references.items if references else ()
    named = {item.name: n for n, item in reversed(list(enumerate(items, start=1))) if item.name}
    for name in sorted(named, key=len, reverse=True):
        prompt = re.sub(rf"@{re.escape(name)}(?!\w)", f"image {named[name]}", prompt)
    roles = [f"Image {n}: {item.role}." for n, item in enumerate(items, start=1) if item.role]
    return " ".join([prompt, *roles])


def listing(references: References) -> str:
    if not references.items:
        return "no references"
    return "\n".join(
        f"image {n}: {item.image.shape[1]} x {item.image.shape[0]}"
        + (f" @{item.name}" if item.name else "")
        + (f", {item.role}" if item.role else "")
        for n, item in enumerate(references.items, start=1)
    )
