"""An instruction and its references become CONDITIONING."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from .kept import encoded, told
from .references import ReferenceList, References, instruction
from .runtime import Conditioning, Prefix, runtime


class SeedlingEncodeInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingEncodeInstruction",
            display_name="Encode Instruction",
            category="Seedling",
            description="Reads what should happen, with the references that it speaks of.",
            search_aliases=[
                "prompt",
                "text encode",
                "edit",
                "CLIP Text Encode",
                "提示词",
                "编码指令",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load VLM Encoder."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="a red star left of a blue circle · make the hat of image 1 green",
                    tooltip="What you want to see, or what should change. References are image 1, "
                    "image 2, … or @name.",
                ),
                ReferenceList.Input(
                    "references", optional=True, tooltip="From References. None: text to image."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="From Load VAE. Needed when there are references."
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="What to steer away from. It counts only when the sampler's guidance "
                    "is not 1.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will paint, where the encoder serves several that each "
                    "want to be read to in their own way. Without it: the way that most use.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", "positive", tooltip="For the positive input of a sampler."
                ),
                io.Conditioning.Output("negative", "negative", tooltip="For its negative input."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, prompt: str, references: References | None = None, vae: Any = None,
        negative: str = "", model: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        start = time.perf_counter()
        images, latents = shown(clip, vae, references)
        how = reading(model, clip, references)
        positive = conditioning(clip, instruction(prompt, references), images, latents, how)
        other = conditioning(clip, negative, images, latents, how)
        here = runtime()
        known = told(here.loaded(clip), here.loaded(vae) if vae is not None else None)
        text = f"{cost(positive, time.perf_counter() - start)}\n{known}"
        here.tell(text)
        return io.NodeOutput(positive, other, ui=ui.PreviewText(text))


def reading(
    model: Any, clip: Any = None, references: References | None = None
) -> Mapping[str, Any]:
    """The arguments with which the encoder reads these references for this model."""
    loaded = runtime().loaded(model) if model is not None else None
    how = dict(loaded.family.reading(loaded)) if loaded and loaded.family.reading else {}
    encoder = runtime().loaded(clip) if clip is not None else None
    if references and references.vlm_sides and encoder and encoder.family.own_size:
        how |= encoder.family.own_size.how(references.vlm_sides)
    return how


def shown(clip: Any, vae: Any, references: References | None) -> tuple[list[Tensor], list[Tensor]]:
    """The references as the encoder takes them, and their latents (1, C, h, w)."""
    if references is None or not references.items:
        return [], []
    if vae is None:
        raise SamplingError("there are references, so the VAE is needed: connect Load VAE to vae.")
    here = runtime()
    loaded = here.loaded(clip)
    if loaded is None:
        raise SamplingError(
            "this CLIP cannot read references; connect the one from Load VLM Encoder."
        )
    images = references.sized(loaded.family)
    encode = partial(here.encode, vae)
    latents = [encoded(here.loaded(vae), image, encode) for image in images]
    given, sides = [item.image for item in references.items], references.vlm_sides
    seen = given if loaded.family.encoder_resizes else images
    if sides and loaded.family.own_size is None:
        raise SamplingError(
            f"the text encoder of {loaded.family.title} does not look at references; leave out the "
            "size in which it would see them (vlm_size)."
        )
    own = loaded.family.own_size
    return own.show(given, seen, sides) if sides and own else seen, latents


def conditioning(
    clip: Any, prompt: str, images: Sequence[Tensor], latents: Sequence[Tensor],
    how: Mapping[str, Any],
) -> Conditioning:  # fmt: skip
    here = runtime()
    loaded = here.loaded(clip)
    if loaded is None:
        raise SamplingError(
            "this CLIP is not one of Seedling's; connect Load VLM Encoder, or use CLIP Text Encode "
            "with a model of its own family."
        )
    hidden, slots = here.read(clip, prompt, list(images), how)
    if loaded.family.own_size:
        hidden, slots = loaded.family.own_size.fit(hidden, slots, latents)
    extra = {"pooled_output": None, "slots": slots, "reference_latents": list(latents)}
    extra["latents_per_token"] = loaded.family.latents_per_token
    return [[hidden, extra]]


def cost(positive: Conditioning, seconds: float) -> str:
    """How many tokens the model reads once for a run, and how long this took."""
    prefix = Prefix(positive[0], 0)
    words = int((~prefix.slots).sum())
    parts = [f"{words} tokens of text"]
    if prefix.references:
        parts.append(f"{prefix.tokens - words} of {len(prefix.references)} references")
    return f"{' + '.join(parts)}, read once for all steps; encoded in {seconds:.2f} s"
