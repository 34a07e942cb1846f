"""What an Image Set unfolds into: a node for each picture, and one that has them all; or one node,
where all are painted at once.

They are in no menu. As nodes that take lists they get every wired list whole, and take the item
that the set was called for: `call` is its number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.sets import FAILURES, MAX_SET, contact_sheet
from .kept import told, use
from .prompt import conditioning, reading, shown
from .references import Reference, ReferenceList, References, instruction, number_of
from .runtime import runtime
from .sampling import Settings, knobs, prepared, seed_input

PICTURES = [f"picture_{k}" for k in range(1, MAX_SET + 1)]


def wires() -> list[io.Input]:
    """What every node that paints takes from the set."""
    kinds = {"model": io.Model, "clip": io.Clip, "vae": io.Vae, "latent": io.Latent}
    return [kind.Input(name, tooltip="As the set has it.") for name, kind in kinds.items()]


def gathered(done: list[Tensor], output: str) -> tuple[list[Tensor], Tensor]:
    """Pictures (1, H, W, C) as a list, or one batch, and all of them small in a grid."""
    sheet = contact_sheet([picture[0] for picture in done])[None]
    return [torch.cat(alike(done))] if output == "batch" else done, sheet


class SeedlingSetPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingSetPicture",
            display_name="Picture of a Set",
            category="Seedling/inside",
            description="One picture of an Image Set, which makes these nodes itself.",
            is_dev_only=True,
            is_input_list=True,
            inputs=[
                *wires(),
                io.String.Input("prompt", tooltip="Of this picture."),
                io.String.Input("negative", tooltip="As the set has it."),
                seed_input(),
                *knobs(),
                io.Int.Input("number", default=1, tooltip="Which picture of the set, from 1."),
                io.Int.Input("count", default=1, tooltip="How many the set has."),
                ReferenceList.Input("references", optional=True, tooltip="As the set has it."),
                io.String.Input("cache", default="auto", optional=True, tooltip="As in the set."),
                io.Int.Input("call", default=0, optional=True, tooltip="Item of wired lists."),
                io.Image.Input("earlier", optional=True, tooltip="Pictures of another day."),
                io.Autogrow.Input("before", template=pictures(), tooltip="Those before it."),
            ],
            outputs=[io.Image.Output("image", "image", tooltip="The picture, as a batch of 1.")],
        )

    @classmethod
    def execute(cls, **lists: Any) -> io.NodeOutput:
        given = taken(lists)
        here, place = runtime(), f"picture {given['number']} of {given['count']}"
        seen = [*in_order(given.get("earlier"), given.get("before", {}))]
        try:
            pixels = painted(given, [picture[0] for picture in seen])
        except FAILURES:
            here.tell(f"{place} failed; those before it are kept. Queue again to go on with it.")
            raise
        loaded = here.loaded(given["model"])
        known = f"\n{told(loaded)}" if loaded is not None else ""
        here.tell(f"{place}, seed {given['seed']}{known}")
        return io.NodeOutput(pixels[None])


class SeedlingSetPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingSetPictures",
            display_name="Pictures of a Set",
            category="Seedling/inside",
            description="All pictures of an Image Set, which makes these nodes itself.",
            is_dev_only=True,
            is_input_list=True,
            inputs=[
                io.Combo.Input("output", options=["list", "batch"], tooltip="As the set has it."),
                io.Int.Input("call", default=0, optional=True, tooltip="Item of wired lists."),
                io.Image.Input("earlier", optional=True, tooltip="Pictures of another day."),
                io.Autogrow.Input("pictures", template=pictures(), tooltip="The new ones."),
            ],
            outputs=[
                # One value, a list: of the lists of a node that another one unfolded into ComfyUI
                # hands on the first item as the first output, the second one as the second, ...
                io.Image.Output("images", "images", tooltip="A list of all, in order."),
                io.Image.Output("sheet", "sheet", tooltip="All of them small in a grid."),
            ],
        )

    @classmethod
    def execute(cls, **lists: Any) -> io.NodeOutput:
        given = taken(lists)
        done = in_order(given.get("earlier"), given.get("pictures", {}))
        return io.NodeOutput(*gathered(done, given["output"]))


class SeedlingSetAtOnce(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingSetAtOnce",
            display_name="Set Painted at Once",
            category="Seedling/inside",
            description="All pictures of a joint Image Set, which makes this node itself.",
            is_dev_only=True,
            is_input_list=True,
            inputs=[
                *wires(),
                io.String.Input("members", tooltip="Prompt and seed of each, as JSON."),
                io.String.Input("negative", tooltip="As the set has it."),
                *knobs(),
                io.Combo.Input("output", options=["list", "batch"], tooltip="As the set has it."),
                ReferenceList.Input("references", optional=True, tooltip="As the set has it."),
                io.String.Input("cache", default="auto", optional=True, tooltip="As in the set."),
                io.Int.Input("call", default=0, optional=True, tooltip="Item of wired lists."),
            ],
            outputs=[
                io.Image.Output("images", "images", tooltip="A list of all, as one value."),
                io.Image.Output("sheet", "sheet", tooltip="All of them small in a grid."),
                io.Image.Output("each", "each", is_output_list=True, tooltip="Each of them."),
            ],
        )

    @classmethod
    def execute(cls, **lists: Any) -> io.NodeOutput:
        given = taken(lists)
        here = runtime()
        done = [pixels[None] for pixels in painted_at_once(given)]
        loaded = here.loaded(given["model"])
        known = f"\n{told(loaded)}" if loaded is not None else ""
        here.tell(f"{len(done)} pictures at once{known}")
        return io.NodeOutput(*gathered(done, given["output"]), done)


def pictures() -> Any:
    return io.Autogrow.TemplateNames(io.Image.Input("image"), names=PICTURES, min=0)


def taken(lists: Mapping[str, Any]) -> dict[str, Any]:
    """The one item of each list that a call is about, as a host takes it: the last if too few."""
    (call,) = lists.get("call") or (0,)

    def item(value: Any) -> Any:
        if isinstance(value, Mapping):  # of an input that grows
            return {key: item(inner) for key, inner in value.items() if inner}
        return value[min(call, len(value) - 1)] if value else None

    return {key: item(value) for key, value in lists.items()}


def in_order(earlier: Tensor | None, new: Mapping[str, Tensor]) -> list[Tensor]:
    """All pictures (1, H, W, C): those of a batch, then the new ones by their numbers."""
    old = [] if earlier is None else list(earlier.split(1))
    return [*old, *(new[name] for name in sorted(new, key=number_of))]


def painted(given: Mapping[str, Any], seen: Sequence[Tensor]) -> Tensor:
    """The pixels (H, W, C) of one picture, which sees the references and the pictures `seen`."""
    here = runtime()
    model, clip, vae = given["model"], given["clip"], given["vae"]
    loaded = here.loaded(model)
    use(loaded, given.get("cache") or "auto")
    side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
    own = given.get("references") or References((), side)
    more = tuple(Reference(picture, side=side) for picture in seen)
    all_seen = replace(own, items=(*own.items, *more))
    images, latents = shown(clip, vae, all_seen)
    how = reading(model, clip, all_seen)
    conditions = (
        conditioning(clip, instruction(given["prompt"], own), images, latents, how),
        conditioning(clip, given["negative"], images, latents, how),
    )
    one = {**given["latent"], "samples": given["latent"]["samples"][:1]}
    named = ("seed", "steps", "guidance", "sampler")
    run, _ = prepared(model, conditions, one, Settings(**{name: given[name] for name in named}))
    report = here.progress(max(1, len(run.sigmas) - 1))
    return here.decode(vae, here.sample(model, replace(run, report=report)))[0]


def painted_at_once(given: Mapping[str, Any]) -> list[Tensor]:
    """The pixels (H, W, C) of pictures that see each other while they are painted."""
    here = runtime()
    model, clip, vae = given["model"], given["clip"], given["vae"]
    loaded, members = here.loaded(model), json.loads(given["members"])
    if loaded is None or not hasattr(loaded.module, "joint"):
        title = loaded.family.title if loaded else "This model"
        raise SamplingError(
            f"{title} cannot paint pictures at once that see each other; let each see the pictures "
            "before it, or the references only."
        )
    use(loaded, given.get("cache") or "auto")
    own = given.get("references") or References((), 0)
    images, latents = shown(clip, vae, own)
    how = reading(model, clip, own)
    read = partial(conditioning, clip, images=images, latents=latents, how=how)
    each = [read(instruction(prompt, own))[0] for prompt, _ in members]
    (hidden, extra), other = each[0], read(given["negative"])[0]
    positive = [[hidden, {**extra, "members": each}]]
    negative = [[other[0], {**other[1], "members": [other] * len(members)}]]
    samples = given["latent"]["samples"][:1].repeat(len(members), 1, 1, 1)
    named = ("steps", "guidance", "sampler")
    settings = Settings(seed=members[0][1], **{name: given[name] for name in named})
    run, _ = prepared(
        model, (positive, negative), {**given["latent"], "samples": samples}, settings
    )
    report = here.progress(max(1, len(run.sigmas) - 1))
    run = replace(run, report=report, seeds=tuple(seed for _, seed in members))
    painted = here.sample(model, run)
    return [here.decode(vae, x[None])[0] for x in painted]


def alike(pictures: list[Tensor]) -> list[Tensor]:
    """With alpha, all of them, when one has it."""
    channels = max(picture.shape[-1] for picture in pictures)
    pad = torch.nn.functional.pad
    return [pad(p, (0, channels - p.shape[-1]), value=1.0) for p in pictures]
