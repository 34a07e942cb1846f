"""Pictures that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling.pipeline import Picture
from ..sampling.sets import MAX_SET, Failure, contact_sheet, in_turn, plan_set
from .kept import cache_input, told, use
from .prompt import conditioning, reading, shown
from .references import Reference, ReferenceList, References, instruction
from .runtime import runtime
from .sampling import Settings, knobs, prepared, seed_input

SEEING = {"references only": "independent", "the pictures before it": "sequential"}
SEEDS = ["each its own", "the same"]


class SeedlingImageSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingImageSet",
            display_name="Image Set",
            category="Seedling",
            description="Paints several pictures that belong together: a prompt each, the same "
            "references for all.",
            search_aliases=["batch", "story", "sequence", "grid", "组图", "批量"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DiT."),
                io.Clip.Input("clip", tooltip="From Load VLM Encoder."),
                io.Vae.Input("vae", tooltip="From Load VAE."),
                io.Latent.Input("latent", tooltip="The size of every picture, from Canvas Size."),
                *prompt_inputs(),
                seed_input(),
                *knobs(),
                io.Combo.Input(
                    "seeing",
                    options=[*SEEING],
                    default=[*SEEING][0],
                    tooltip="What each picture sees. The pictures before it: every finished one "
                    "becomes a further reference, which keeps figures alike and takes longer.",
                ),
                io.Combo.Input(
                    "output",
                    options=["list", "batch"],
                    default="list",
                    tooltip="list: for nodes that handle each alone. batch: all at once.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="What to steer away from. It counts only when guidance is not 1.",
                ),
                ReferenceList.Input(
                    "references", optional=True, tooltip="From References; every picture sees them."
                ),
                *more_inputs(),
                cache_input(),
            ],
            outputs=[
                io.Image.Output(
                    "images", "images", is_output_list=True, tooltip="The pictures, in order."
                ),
                io.Image.Output(
                    "sheet", "sheet", tooltip="All of them small in a grid: a contact sheet."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, vae: Any, latent: dict[str, Any], **widgets: Any
    ) -> io.NodeOutput:
        output = widgets.pop("output")
        named = ("seed", "steps", "guidance", "sampler")
        settings = Settings(**{name: widgets.pop(name) for name in named})
        here = runtime()
        loaded = here.loaded(model)
        use(loaded, widgets.pop("cache", "auto"))
        earlier = widgets.pop("earlier", None)
        done = [] if earlier is None else [picture[None] for picture in earlier]
        failed: list[Failure] = []
        for made in image_set(Parts(model, clip, vae), latent, settings, done, **widgets):
            if isinstance(made, Failure):
                failed.append(made)
            else:
                done.append(made.pixels[None])
        if failed and len(done) == (0 if earlier is None else len(earlier)):
            raise failed[0].error
        text = "\n".join([f"{len(done)} pictures, seeds from {settings.seed}", *told_of(failed)])
        if loaded is not None:
            text += f"\n{told(loaded)}"
        here.tell(text)
        sheet = contact_sheet([picture[0] for picture in done])[None]
        pictures = [torch.cat(alike(done))] if output == "batch" else done
        return io.NodeOutput(pictures, sheet, ui=ui.PreviewText(text))


def prompt_inputs() -> list[Any]:
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            dynamic_prompts=True,
            placeholder="one prompt a line, or a numbered list",
            tooltip="One prompt a line, or a numbered list, whose items may have several "
            "lines; what stands before its first item holds for all. With fewer prompts "
            "than pictures they start over.",
        ),
        io.Int.Input(
            "count",
            default=0,
            min=0,
            max=MAX_SET,
            tooltip="How many pictures. 0: one for each prompt, or as many as a single "
            "prompt says (four panels, 四格).",
        ),
    ]


def more_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "seeds",
            options=SEEDS,
            default=SEEDS[0],
            optional=True,
            advanced=True,
            tooltip="each its own: picture k has seed + k. the same: all begin with the same "
            "noise, which keeps layouts alike.",
        ),
        io.Int.Input(
            "start",
            default=1,
            min=1,
            max=MAX_SET,
            optional=True,
            advanced=True,
            tooltip="Begin with this picture: to go on where a set was stopped, or failed.",
        ),
        io.Image.Input(
            "earlier",
            optional=True,
            tooltip="The finished pictures before start, in order, as a batch. They come out again "
            "in front; pictures that see those before them need them.",
        ),
    ]


class Parts(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def image_set(
    parts: Parts, latent: dict[str, Any], settings: Settings, earlier: Sequence[Tensor] = (), *,
    prompts: str, negative: str = "", references: References | None = None, **chosen: Any,
) -> Iterator[Picture | Failure]:  # fmt: skip
    """Each picture as it is done; picture k is what its own seed makes alone.

    `chosen` are `count`, `seeing`, `seeds`, `start`. What cannot be made comes as a Failure;
    cancelling is none, and comes through.
    """
    here, (model, clip, vae) = runtime(), parts
    plan = plan_set(
        prompts,
        chosen.get("count", 0),
        SEEING[chosen.get("seeing", "references only")],
        seed=settings.seed,
        same_seed=chosen.get("seeds") == SEEDS[1],
        references=len(references.items) if references else 0,
        start=chosen.get("start", 1) - 1,
    )
    loaded = here.loaded(model)
    side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
    one = {**latent, "samples": latent["samples"][:1]}
    images, latents = shown(clip, vae, references)
    how, count = reading(model), len(plan)
    report = here.progress(count)
    known = len(images)

    def make(k: int, before: Sequence[Tensor]) -> Iterator[Picture]:
        for picture in before[len(images) - known :]:  # only new ones are encoded
            more = shown(clip, vae, References((Reference(picture),), side))
            images.extend(more[0])
            latents.extend(more[1])
        text = instruction(plan.prompts[k], references)
        conditions = (
            conditioning(clip, text, images, latents, how),
            conditioning(clip, negative, images, latents, how),
        )
        run, _ = prepared(model, conditions, one, replace(settings, seed=plan.seeds[k]))

        def step(done: int, total: int, preview: Tensor | None) -> None:
            report(k * total + done, count * total, preview)

        pixels = here.decode(vae, here.sample(model, replace(run, report=step)))[0]
        report(k + 1, count, pixels)
        yield Picture(k, plan.seeds[k], pixels)

    return in_turn(plan, make, [picture[0] for picture in earlier])


def told_of(failed: Sequence[Failure]) -> list[str]:
    """What failed, and how to go on."""
    if not failed:
        return []
    first = failed[0].index + 1
    rest = f"The others are kept: connect them to earlier and set start to {first} to go on."
    return [*(failure.text for failure in failed), rest]


def alike(pictures: list[Tensor]) -> list[Tensor]:
    """With alpha, all of them, when one has it."""
    channels = max(picture.shape[-1] for picture in pictures)
    pad = torch.nn.functional.pad
    return [pad(p, (0, channels - p.shape[-1]), value=1.0) for p in pictures]
