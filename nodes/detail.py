"""Detail Pass: from 2K to 4K."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.composite import with_alpha
from ..sampling.detail import enlarged, window_of
from .runtime import Conditioning, runtime
from .sampling import Settings, chosen, knobs, prepared, seed_input

OVERLAP = 0.25  # of a window


class SeedlingDetailPass(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingDetailPass",
            display_name="Detail Pass",
            category="Seedling",
            description="Enlarges a picture and paints its detail anew, window by window: from 2K "
            "to 4K without a seam.",
            search_aliases=["upscale", "4K", "tiled", "hires fix", "放大", "高清修复"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DiT."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Encode Instruction: what all of the picture shows, and its "
                    "references. It is read once for all windows.",
                ),
                io.Vae.Input("vae", tooltip="From Load VAE."),
                io.Image.Input("image", tooltip="The picture to enlarge."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=1.0,
                    max=4.0,
                    step=0.25,
                    tooltip="How many times as wide and high. Twice is four times the pixels, and "
                    "at least four times the time.",
                ),
                io.Float.Input(
                    "denoise",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is painted anew. More makes more detail, and above 0.5 new "
                    "things that were not there. 0: only enlarged.",
                ),
                seed_input(),
                *knobs(),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    advanced=True,
                    tooltip="The side of a window in pixels. Larger sees more at once and takes "
                    "more memory. 0: the size that the model was made for.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="From Encode Instruction. Needed when guidance is not 1.",
                ),
            ],
            outputs=[io.Image.Output("image", "image", tooltip="The enlarged picture.")],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Conditioning, vae: Any, image: Tensor,
        negative: Conditioning | None = None, scale: float = 2.0, window: int = 0, **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        if runtime().loaded(model) is None:
            raise SamplingError(
                "the detail pass needs a model from Load DiT, to know how large its windows are."
            )
        conditions = (positive, negative)
        done = [
            refined(model, vae, conditions, (picture, scale, window), Settings(**settings))
            for picture in image
        ]
        if any(picture.shape[-1] == 4 for picture in done):
            done = [with_alpha(picture) for picture in done]
        text = f"{done[0].shape[1]} x {done[0].shape[0]} pixels"
        return io.NodeOutput(torch.stack(done), ui=ui.PreviewText(text))


def refined(
    model: Any, vae: Any, conditions: tuple[Conditioning, Conditioning | None],
    what: tuple[Tensor, float, int], wanted: Settings,
) -> Tensor:  # fmt: skip
    """A picture (H, W, 3 or 4), enlarged and painted anew; `what`: picture, scale, window."""
    here, (image, scale, side) = runtime(), what
    loaded = here.loaded(model)
    assert loaded is not None
    family = loaded.family
    own = loaded.checkpoint.config.get("resolution", 1024)
    window = window_of(side or own, OVERLAP, family.step, family.pixels_per_latent)
    large, size = enlarged(image, scale, family.step)
    latents = here.encode(vae, large)
    seen = [min(a, b) for a, b in zip(window[0], latents.shape[-2:], strict=True)]
    tokens = seen[0] * seen[1] // family.latents_per_token
    # The schedule of one window: that is what the model paints.
    sigmas, _ = chosen(loaded.schedule, wanted, None, tokens)
    narrow = tuple(roomy(condition, seen[0] * seen[1]) for condition in conditions)
    run, text = prepared(
        model, (narrow[0] or [], narrow[1]), {"samples": latents}, wanted, torch.tensor(sigmas)
    )
    here.tell(f"{size.width} x {size.height} pixels, {text}")
    report = here.progress(max(1, len(run.sigmas) - 1))
    done = here.decode(vae, here.sample(model, replace(run, window=window, report=report)))[0]
    return done[: size.height, : size.width]


def roomy(conditioning: Conditioning | None, room: int) -> Conditioning | None:
    """With the room that a window needs, not the whole picture."""
    if conditioning is None:
        return None
    return [[hidden, {**extra, "room": room}] for hidden, extra in conditioning]
