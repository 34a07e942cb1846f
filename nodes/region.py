"""Edits that leave the rest alone: what may change, the way back to the exact size, and proof."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.composite import Edit, Where, with_alpha
from ..sampling.preservation import preservation
from .references import MAX_SIDE, Reference, ReferenceList, References, fingerprint, opened
from .runtime import runtime
from .sampling import CHANNELS, FACTOR, STEP


class SeedlingEditRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingEditRegion",
            display_name="Edit Region",
            category="Seedling",
            description="Prepares a picture for an edit: what may change, and what stays as it is. "
            "Nothing is resized.",
            search_aliases=["inpaint", "mask", "crop and stitch", "lock", "局部重绘", "区域编辑"],
            inputs=[
                io.Image.Input(
                    "image", optional=True, tooltip="The picture to edit. It becomes image 1."
                ),
                io.Vae.Input("vae", tooltip="From Load VAE: what is locked goes through it."),
                *where(),
                io.Boolean.Input(
                    "lock",
                    default=True,
                    tooltip="On: outside of the region not a bit changes, and what is painted "
                    "fits it. Off: the model may change everything; only the size is kept.",
                ),
                *edges(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White may change, for example from the mask editor of Load Image. An "
                    "all-black mask is no mask. Joined with boxes and points.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will paint, for its grid and size. Without it: 32 "
                    "pixels and 1K.",
                ),
                ReferenceList.Input(
                    "references",
                    optional=True,
                    tooltip="Further pictures, from References: they become image 2, image 3, …",
                ),
                io.String.Input(
                    "file",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="In place of image: a file of the input folder, read with its alpha "
                    "and with all 16 bits of a 16-bit PNG, which Load Image does not keep.",
                ),
            ],
            outputs=[
                ReferenceList.Output(
                    "references",
                    "references",
                    tooltip="For Encode Instruction, and for Finish Edit.",
                ),
                io.Latent.Output("latent", "latent", tooltip="For a sampler."),
                io.Mask.Output(
                    "region",
                    "region",
                    tooltip="How much of each pixel is painted anew, as large as the picture. For "
                    "Preservation Report.",
                ),
                io.Image.Output("original", "original", tooltip="The picture as it was."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = "", **others: Any) -> str:
        return fingerprint(json.dumps([file.strip()])) if file.strip() else ""

    @classmethod
    def execute(
        cls, vae: Any, image: Tensor | None = None, mask: Tensor | None = None, model: Any = None,
        references: References | None = None, file: str = "", **widgets: Any,
    ) -> io.NodeOutput:  # fmt: skip
        if (image is None) == (not file.strip()):
            raise SamplingError(
                "one picture is edited: connect image, or name a file of the input folder, not "
                "both."
            )
        image = opened(file.strip())[None] if image is None else image
        here, loaded = runtime(), runtime().loaded(model)
        edit = edit_of(image, mask, widgets, loaded)
        seen, (width, height) = edit.seen(), edit.padded
        latent: dict[str, Any] = {"downscale_ratio_spacial": FACTOR}
        latent["samples"] = torch.zeros(1, CHANNELS, -(-height // FACTOR), -(-width // FACTOR))
        if edit.alpha is not None:
            samples = here.encode(vae, seen)
            latent = {"samples": samples, "noise_mask": edit.free(width // samples.shape[-1])[None]}
        side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
        before = references or References((), side)
        items = (Reference(seen, side=0), *before.items)
        alpha = torch.ones(image.shape[1:3]) if edit.alpha is None else edit.alpha
        text = told(edit)
        here.tell(text)
        made = replace(before, items=items, edit=edit)
        return io.NodeOutput(made, latent, alpha[None], image, ui=ui.PreviewText(text))


def where() -> list[Any]:
    """The ways of saying where, as widgets."""
    return [
        io.String.Input(
            "boxes",
            default="",
            multiline=True,
            placeholder="x, y, width, height · one a line · in pixels or %",
            tooltip="Rectangles that may change: x, y, width, height, one a line, in pixels or in "
            "percent of the picture. Example: 25%, 25%, 50%, 50%",
        ),
        io.String.Input(
            "points",
            default="",
            placeholder="x, y",
            tooltip="Points inside of what may change: x, y, with ; between several. Each takes "
            "what is joined to it in about its colour.",
        ),
        io.Float.Input(
            "tolerance",
            default=Where.tolerance,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="How far a colour may be from that of a point. Higher takes more around it.",
        ),
    ]


def edges() -> list[Any]:
    """What happens at the edge of a region, and around it."""
    return [
        io.Int.Input(
            "grow",
            default=Where.grow,
            min=-512,
            max=512,
            tooltip="Makes the region larger by so many pixels on every side, or smaller below 0. "
            "Larger gives a new shape room beyond the old one.",
        ),
        io.Int.Input(
            "feather",
            default=Where.feather,
            min=0,
            max=512,
            tooltip="Over so many pixels inside the region's edge the new picture fades in. More "
            "hides the seam, and leaves less that is all new. 0: a hard edge.",
        ),
        io.Int.Input(
            "context",
            default=Where.context,
            min=0,
            max=MAX_SIDE,
            advanced=True,
            tooltip="The model sees the region and so many pixels around it, and at least its own "
            "size: less to paint in a large picture. More lets it see more of what it has to fit. "
            "0: the whole picture.",
        ),
    ]


def edit_of(image: Tensor, mask: Tensor | None, widgets: dict[str, Any], loaded: Any) -> Edit:
    """The edit that the widgets describe."""
    if len(image) != 1:
        raise SamplingError(
            f"a batch of {len(image)} pictures was given; one is edited at a time, so choose one "
            "of them first."
        )
    lock = widgets["lock"]
    where = Where(**{key: value for key, value in widgets.items() if key != "lock"})
    picture = image[0].cpu().float()
    drawn = None  # an unconnected mask is black
    if mask is not None and bool(mask.any()):
        drawn = mask.reshape(-1, *mask.shape[-2:])[0].cpu()
    region = where.region(picture, drawn)
    region = region if lock or where.context else None
    own = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
    edit = where.edit(picture, region, loaded.family.step if loaded else STEP, own)
    return edit if lock else replace(edit, alpha=None)


def told(edit: Edit) -> str:
    """What the model sees and may change, in words."""
    height, width = edit.original.shape[:2]
    left, top, wide, high = edit.box
    seen = f"the model sees {edit.padded[0]} x {edit.padded[1]}"
    if (wide, high) != (width, height):
        seen += f" at {left}, {top}"
    free = "everything may change"
    if edit.alpha is not None:
        free = f"{float((edit.alpha > 0).float().mean()):.1%} may change"
    return f"{width} x {height} pixels; {seen}; {free}"


class SeedlingFinishEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingFinishEdit",
            display_name="Finish Edit",
            category="Seedling",
            description="Gives a painted picture its exact size back, and puts it into the "
            "original where that was locked.",
            search_aliases=["stitch", "composite", "paste back", "crop", "贴回", "裁剪"],
            inputs=[
                io.Image.Input("image", tooltip="The painted picture, from VAE Decode."),
                ReferenceList.Input(
                    "references",
                    optional=True,
                    tooltip="From Edit Region, which knows the original.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    advanced=True,
                    tooltip="Without an edit: cut to this width, for example that of Canvas Size. "
                    "0: as it is.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    advanced=True,
                    tooltip="Without an edit: cut to this height. 0: as it is.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", "image", tooltip="As large as the picture that was edited."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, references: References | None = None, width: int = 0, height: int = 0
    ) -> io.NodeOutput:
        if references is None:
            return io.NodeOutput(cut(image, width, height))
        if references.edit is None:
            raise SamplingError(
                "these references were not prepared for an edit; connect those from Edit Region."
            )
        done = [references.edit.finished(picture) for picture in image.cpu().float()]
        if any(picture.shape[-1] == 4 for picture in done):
            done = [with_alpha(picture) for picture in done]
        return io.NodeOutput(torch.stack(done))


def cut(image: Tensor, width: int, height: int) -> Tensor:
    """The top left of pictures (B, H, W, C); 0 keeps a side."""
    if width > image.shape[2] or height > image.shape[1]:
        raise SamplingError(
            f"the picture is {image.shape[2]} x {image.shape[1]} pixels and cannot be cut to "
            f"{width} x {height}; ask Canvas Size for that size."
        )
    return image[:, : height or None, : width or None]


class SeedlingPreservationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingPreservationReport",
            display_name="Preservation Report",
            category="Seedling",
            description="Measures what an edit did to the part that it should not touch.",
            search_aliases=["compare", "PSNR", "SSIM", "difference", "delta E", "保真度", "对比"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The edited picture, from Finish Edit."),
                io.Image.Input("original", tooltip="What it was before, of the same size."),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="What was meant to change is left out. From Edit Region. None: all "
                    "of the picture is judged.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    "report",
                    tooltip="PSNR, SSIM, colour difference (delta E 2000) and shift, in words.",
                ),
                io.Image.Output(
                    "map", "map", tooltip="The original in grey, and red where it differs."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, original: Tensor, region: Tensor | None = None
    ) -> io.NodeOutput:
        free = None if region is None else region.reshape(-1, *region.shape[-2:])[0].cpu().float()
        if free is not None and free.shape != original.shape[1:3]:
            raise SamplingError(
                f"the region is {free.shape[1]} x {free.shape[0]} pixels, the original "
                f"{original.shape[2]} x {original.shape[1]}; connect the region of Edit Region."
            )
        found = preservation(image[0].cpu(), original[0].cpu(), free)
        runtime().tell(found.text())
        return io.NodeOutput(found.text(), found.map[None], ui=ui.PreviewText(found.text()))
