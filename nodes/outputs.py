"""Pictures that belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.noise import image_seed
from .prompt import conditioning, reading, shown
from .references import Reference, ReferenceList, References, instruction
from .runtime import runtime
from .sampling import Settings, knobs, prepared, seed_input

SEEING = ["references only", "the pictures before it"]
MAX_PICTURES = 15  # references and pictures together, where each one sees those before it


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
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="one prompt a line",
                    tooltip="One prompt a line. With fewer lines than pictures they start over.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many pictures. 0: one for each line.",
                ),
                seed_input(),
                *knobs(),
                io.Combo.Input(
                    "seeing",
                    options=SEEING,
                    default=SEEING[0],
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
            ],
            outputs=[
                io.Image.Output(
                    "images", "images", is_output_list=True, tooltip="The pictures, in order."
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
        pictures = list(image_set(Parts(model, clip, vae), latent, settings, **widgets))
        if output == "batch":
            pictures = [torch.cat(alike(pictures))]
        text = f"{len(pictures)} pictures, seeds from {settings.seed}"
        return io.NodeOutput(pictures, ui=ui.PreviewText(text))


class Parts(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def image_set(
    parts: Parts, latent: dict[str, Any], settings: Settings, *, prompts: str, count: int,
    seeing: str, negative: str = "", references: References | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Each picture (1, H, W, 3 or 4) as it is done; picture k is what `seed` + k makes alone."""
    here, (model, clip, vae) = runtime(), parts
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not lines:
        raise SamplingError("there is no prompt; write one line for each picture.")
    count, chained = count or len(lines), seeing != SEEING[0]
    known = len(references.items) if references else 0
    if chained and count + known > MAX_PICTURES:
        raise SamplingError(
            f"{known} references and {count} pictures that see each other are more than "
            f"{MAX_PICTURES}; make fewer, or let them see the references only."
        )
    loaded = here.loaded(model)
    side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
    one = {**latent, "samples": latent["samples"][:1]}
    images, latents = shown(clip, vae, references)
    how = reading(model)
    report = here.progress(count)
    for k in range(count):
        text = instruction(lines[k % len(lines)], references)
        conditions = (
            conditioning(clip, text, images, latents, how),
            conditioning(clip, negative, images, latents, how),
        )
        wanted = replace(settings, seed=image_seed(settings.seed, k))
        run, _ = prepared(model, conditions, one, wanted)

        def step(done: int, total: int, preview: Tensor | None, k: int = k) -> None:
            report(k * total + done, count * total, preview)

        picture = here.decode(vae, here.sample(model, replace(run, report=step)))
        report(k + 1, count, picture[0])
        yield picture
        if chained and k + 1 < count:
            # Only the new one is encoded, the others stay as they are.
            more = shown(clip, vae, References((Reference(picture[0]),), side))
            images, latents = [*images, *more[0]], [*latents, *more[1]]


def alike(pictures: list[Tensor]) -> list[Tensor]:
    """With alpha, all of them, when one has it."""
    channels = max(picture.shape[-1] for picture in pictures)
    pad = torch.nn.functional.pad
    return [pad(p, (0, channels - p.shape[-1]), value=1.0) for p in pictures]
