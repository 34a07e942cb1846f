"""References: an ordered list of pictures with names, roles, strengths and masks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from torch import Tensor

from ..model_loaders.load import Loaded
from ..model_loaders.pictures import pixels_of, read_16_bit
from ..sampling import SamplingError
from ..sampling.composite import Edit
from ..sampling.cost import Cost, costs, vlm_tokens
from ..sampling.pipeline import with_margin
from ..sampling.task import MAX_VLM
from .runtime import runtime

MAX_REFERENCES = 14
MAX_SIDE = 16384  # pixels, as in ComfyUI
KEYS = ("image", "name", "role", "strength", "on", "size", "vlm_size", "mask")  # of an entry
SIZES = {"model": None, "1K": 1024, "2K": 2048, "own": 0}
ReferenceList = io.Custom("SEEDLING_REFERENCES")


@dataclass(frozen=True)
class Reference:
    """`image` (H, W, 3 or 4) in 0..1; `name` and `role` are for the prompt.

    It is brought to the area of a square of `side` pixels: 0 keeps its own, None is as the list is.
    The text encoder sees it in that of `vlm_side`, 0 being as ever.
    """

    image: Tensor
    name: str = ""
    role: str = ""
    side: int | None = None
    vlm_side: int = 0


@dataclass(frozen=True)
class References:
    """In their order, in the area of a square of `side` pixels unless one says otherwise.

    `edit` is the edit that the first one was prepared for.
    """

    items: tuple[Reference, ...]
    side: int
    edit: Edit | None = None

    def sized(self, family: Any) -> list[Tensor]:
        """The pictures in the sizes that the model reads."""
        return [
            (with_margin if family.pads and side == 0 else family.resize)(item.image, size)
            for item, side, size in zip(self.items, self.sides, self.sizes(family), strict=True)
        ]

    def sizes(self, family: Any) -> list[tuple[int, int]]:
        """Width and height of each, as the model reads it."""
        return [
            family.reference_size(item.image.shape[1], item.image.shape[0], side**2)
            for item, side in zip(self.items, self.sides, strict=True)
        ]

    @property
    def vlm_sides(self) -> list[int]:
        """Nothing where none has a size of its own for the text encoder."""
        sides = [item.vlm_side for item in self.items]
        return sides if any(sides) else []

    @property
    def sides(self) -> list[int]:
        return [self.side if item.side is None else item.side for item in self.items]


@dataclass(frozen=True)
class Entry:
    """A line of the list: a connected picture (`image_2`) or a file of the input folder.

    So is `mask`: "" is that of the input's number, "none" is none. `side` is of the square whose
    area it is brought to, None as the list's.
    """

    source: str
    name: str = ""
    role: str = ""
    strength: float = 1.0
    on: bool = True
    side: int | None = None
    mask: str = ""
    vlm_side: int = 0


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
                    '"style", "strength": 0.5, "size": "own", "on": false}], cat.png being in the '
                    'input folder. "vlm_size": 384 is the size in which the text encoder sees it.',
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
        text = listing(found, costs_of(found, model), loaded)
        runtime().tell(text)
        return io.NodeOutput(found, ui=ui.PreviewText(text))


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
    found = [entry(value, number) for number, value in enumerate(values, start=1)]
    names = [item.name for item in found if item.name and item.on and item.strength]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SamplingError(
            f"@{twice[0]} is the name of two references; give each a name of its own."
        )
    return found


def entry(value: Any, number: int) -> Entry:
    if isinstance(value, str):
        value = {"image": value}
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise SamplingError(f'entry {number} of the list is no file name and no {{"image": …}}.')
    if unknown := [key for key in value if key not in KEYS]:
        raise SamplingError(
            f"reference {number} of the list says '{unknown[0]}', which means nothing; it may say "
            f"{', '.join(KEYS)}."
        )
    if not isinstance(on := value.get("on", True), bool):
        raise SamplingError(f"'on' of reference {number} is {on!r}; give true or false.")
    strength = value.get("strength", 1.0)
    if type(strength) not in (int, float) or not 0 <= strength <= 1:
        raise SamplingError(
            f"the strength of reference {number} is {strength}; give a number between 0 and 1."
        )
    return Entry(
        source=value["image"],
        name=str(value.get("name", "")).strip(),
        role=str(value.get("role", "")).strip(),
        strength=float(strength),
        on=on,
        side=side_of(value.get("size", "model"), number),
        mask=str(value.get("mask", "")).strip(),
        vlm_side=side_of(value.get("vlm_size", "model"), number, "vlm_size") or 0,
    )


def side_of(value: Any, number: int, key: str = "size") -> int | None:
    """The side in pixels that a reference's own size means, for the model or its text encoder."""
    names, top = (SIZES, MAX_SIDE) if key == "size" else ({"model": 0}, MAX_VLM)
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, int) and not isinstance(value, bool) and 32 <= value <= top:
        return value
    raise SamplingError(
        f"the {key} of reference {number} is {value}; give one of {', '.join(names)}, or a number "
        f"of pixels from 32 to {top}, the side of a square of its area."
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
        mask = mask_of(item, masks)
        for picture in batch:
            seen = faded(picture, mask, item.strength)
            found.append(Reference(seen, item.name, item.role, item.side, item.vlm_side))
    if len(found) > MAX_REFERENCES:
        raise SamplingError(
            f"{len(found)} references are on; the model takes at most {MAX_REFERENCES}. Turn some "
            "off (a batch counts as several)."
        )
    return tuple(found)


def mask_of(item: Entry, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask (1, h, w) of an entry: the one that it names, else that of its input; "none"."""
    if item.mask == "none":
        return None
    if not item.mask:
        return masks.get(item.source.replace("image", "mask"))
    if not re.fullmatch(r"mask_[0-9]+", item.mask):
        return opened(item.mask)[..., :3].mean(dim=-1)[None]
    if masks.get(item.mask) is None:
        raise SamplingError(
            f"the list of references names {item.mask}, but nothing is connected there; connect a "
            "mask, or take it off the list."
        )
    return masks[item.mask]


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
    """(H, W, 3 or 4) in 0..1, sRGB, of a file in ComfyUI's input folder."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path_of(name)) as image:
            if max(image.size) > MAX_SIDE:
                raise SamplingError(
                    f"{name} is {image.size[0]} x {image.size[1]} pixels; at most {MAX_SIDE} a "
                    "side are read."
                )
            deep = read_16_bit(path_of(name))
            pixels = pixels_of(image) if deep is None else deep
            if pixels is None:
                raise OSError("nothing says what is white in it; save it as a 16-bit PNG.")
            return pixels
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise SamplingError(f"{name} cannot be read as a picture: {error}") from None


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
        named = [name for e in parse(strip) for name in (e.source, e.mask) if name]
        files = [name for name in named if not re.fullmatch(r"(image|mask)_[0-9]+|none", name)]
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


def costs_of(references: References, model: Any) -> list[Cost]:
    """What each costs a run of `model`; nothing without one of ours."""
    loaded = runtime().loaded(model)
    if loaded is None or not references.items:
        return []
    weight = next(loaded.module.parameters())
    device = getattr(model, "load_device", weight.device)  # of ComfyUI's MODEL
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kept = getattr(loaded.module, "stores", False)
    sizes = references.sizes(loaded.family)
    return costs(loaded.module, sizes, loaded.family.pixels_per_token, kept, device, dtype)


def listing(references: References, each: Sequence[Cost] = (), loaded: Loaded | None = None) -> str:
    """A line for each reference, and what all of them cost together."""
    if not references.items:
        return "no references"
    lines = [
        f"image {n}: {item.image.shape[1]} x {item.image.shape[0]}"
        + (f" @{item.name}" if item.name else "")
        + (f", {item.role}" if item.role else "")
        for n, item in enumerate(references.items, start=1)
    ]
    if each:
        lines = [f"{line}: {cost.text()}" for line, cost in zip(lines, each, strict=True)]
    if loaded and references.vlm_sides and loaded.family.own_size:
        given, sizes = [item.image for item in references.items], references.sizes(loaded.family)
        seen = vlm_tokens(loaded.family, given, sizes, references.vlm_sides)
        pairs = zip(lines, seen, strict=True)
        lines = [f"{line}; {tokens} tokens of the text encoder" for line, tokens in pairs]
    if len(each) > 1:
        total = Cost(*(sum(values) for values in zip(*map(astuple, each), strict=True)))
        lines.append(f"together {total.text()}")
    return "\n".join(lines)
