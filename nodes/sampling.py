"""How large the picture is, and the way from noise to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..model_loaders.family import Schedule
from ..model_loaders.load import Loaded
from ..model_loaders.pictures import at_area
from ..sampling import SamplingError
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import sigmas_for
from ..sampling.sizes import described, grid, parse_size
from .kept import cache_input, told, use
from .references import ReferenceList, References
from .runtime import Conditioning, Run, runtime

PRESETS = {"model": None, "1K": 1024, "2K": 2048, "4K": 4096}
FACTOR = 16  # pixels per latent
CHANNELS = 64  # of an empty latent; samplers exchange it for what their model needs
STEP = 32  # sides of pictures, where no model says more
MAX_BATCH = 64


class SeedlingCanvasSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingCanvasSize",
            display_name="Canvas Size",
            category="Seedling",
            description="The size of the picture: from words, from a reference, or exactly.",
            search_aliases=["empty latent", "resolution", "aspect ratio", "画布尺寸", "空Latent"],
            has_intermediate_output=True,  # ComfyUI says its words again when it need not run
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="model",
                    tooltip="How many pixels: those of a square of this side. Four times as many "
                    "take more than four times as long. model: the size it was trained for.",
                ),
                io.String.Input(
                    "shape",
                    default="",
                    placeholder="16:9 · poster · 海报 · 1216x832 · empty: as the first reference",
                    tooltip="A ratio, a word (portrait, poster, wallpaper, 海报, …), or width x "
                    "height in pixels. Empty: the first reference's shape, else a square.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=MAX_BATCH,
                    tooltip="How many pictures. Each has its own seed: seed, seed + 1, …",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will paint, for its own size. Without it: 1K.",
                ),
                ReferenceList.Input(
                    "references",
                    optional=True,
                    tooltip="Gives the shape when none is written: with the preset model exactly "
                    "the size that the first reference is read in, so that an edit does not shift.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", "latent", tooltip="An empty latent, for a sampler."),
                io.Int.Output(
                    "width", "width", tooltip="Width in pixels, as asked for. For Finish Edit."
                ),
                io.Int.Output(
                    "height", "height", tooltip="Height in pixels, as asked for. For Finish Edit."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, preset: str, shape: str, batch_size: int, model: Any = None,
        references: References | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        loaded = runtime().loaded(model)
        width, height = canvas(preset, shape, loaded, references)
        # What is asked for in pixels may end between two steps: the picture is padded there.
        padded, _ = grid(width, height, loaded.family.step if loaded else STEP)
        rows, columns = -(-padded.height // FACTOR), -(-padded.width // FACTOR)
        samples = torch.zeros(batch_size, CHANNELS, rows, columns)
        latent = {"samples": samples, "downscale_ratio_spacial": FACTOR}
        token = loaded.family.pixels_per_token if loaded else FACTOR
        text = described(width, height, (padded.width, padded.height), token)
        runtime().tell(text)
        # The editor draws the canvas from these words: web/canvas_size.js.
        return io.NodeOutput(latent, width, height, ui=ui.PreviewText(text))


def canvas(
    preset: str, shape: str, loaded: Loaded | None, references: References | None
) -> tuple[int, int]:
    """Width and height in pixels: multiples of what the model can make, unless written so."""
    own = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
    side, step = PRESETS[preset] or own, loaded.family.step if loaded else STEP
    if not shape.strip() and references and references.items:
        if loaded is None:
            raise SamplingError(
                "to take the shape of a reference the model is needed: connect Load DiT to model."
            )
        if PRESETS[preset] is None:
            return references.sizes(loaded.family)[0]
        height, width = references.items[0].image.shape[:2]
        return at_area(width, height, side**2, step)
    size = parse_size(shape.strip() or "1:1", side**2, step)
    return size.width, size.height


class SeedlingFewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingFewStepSampler",
            display_name="Few-Step Sampler",
            category="Seedling",
            description="Paints the picture in as few steps as the model was made for.",
            search_aliases=["KSampler", "sampler", "euler", "turbo", "采样器"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DiT, or any flow model."),
                io.Conditioning.Input("positive", tooltip="From Encode Instruction."),
                io.Latent.Input("latent", tooltip="From Canvas Size, or VAE Encode of a picture."),
                seed_input(),
                *knobs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How much of the latent's picture is painted anew: 1 all, 0.5 keeps "
                    "its layout, 0 leaves it.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="From Encode Instruction. Needed when guidance is not 1.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="A schedule of your own. It replaces steps and denoise.",
                ),
                cache_input(),
            ],
            outputs=[
                io.Latent.Output("latent", "latent", tooltip="For VAE Decode."),
                io.Sigmas.Output("sigmas", "sigmas", tooltip="The schedule that was used."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Conditioning, latent: dict[str, Any],
        negative: Conditioning | None = None, sigmas: Tensor | None = None, cache: str = "auto",
        **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        here = runtime()
        loaded = here.loaded(model)
        use(loaded, cache)
        run, text = prepared(model, (positive, negative), latent, Settings(**settings), sigmas)
        steps = len(run.latents) * max(1, len(run.sigmas) - 1)
        run = replace(run, report=here.progress(steps))
        done = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        done["samples"] = here.sample(model, run)
        text = "\n".join([text, *([told(loaded)] if loaded else [])])
        here.tell(text)
        return io.NodeOutput(done, torch.tensor(run.sigmas), ui=ui.PreviewText(text))


def seed_input() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The noise to start from. The same seed makes the same picture, here and on the "
        "command line.",
    )


def knobs() -> list[Any]:
    """What every sampler of ours lets one change."""
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            tooltip="More steps, more detail, more time. 0: as many as the model was made for.",
        ),
        io.Float.Input(
            "guidance",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.1,
            round=0.01,
            tooltip="How strictly the instruction is followed, at twice the time. 1: off. 0: as "
            "the model was made for.",
        ),
        io.Combo.Input(
            "sampler",
            options=list(SAMPLERS),
            default="euler",
            advanced=True,
            tooltip="euler: what few-step models are trained for. dpmpp_2m: more detail for the "
            "same steps in models that take many.",
        ),
    ]


@dataclass(frozen=True)
class Settings:
    """The widgets of a sampler; 0 steps and a guidance of 0 are as the model likes it."""

    seed: int
    steps: int
    guidance: float
    sampler: str
    denoise: float = 1.0


def prepared(
    model: Any,
    conditions: tuple[Conditioning, Conditioning | None],
    latent: dict[str, Any],
    wanted: Settings,
    sigmas: Tensor | None = None,
) -> tuple[Run, str]:
    """A run as the widgets say, and the schedule in words, which is shown at once."""
    positive, negative = conditions
    here = runtime()
    samples = here.fit(model, latent)
    loaded = here.loaded(model)
    if loaded and loaded.family.accepts:
        loaded.family.accepts(loaded, len(positive[0][1].get("reference_latents") or ()))
    schedule = loaded.schedule if loaded else None
    scale = told = wanted.guidance or (schedule.guidance if schedule else 1.0)
    if schedule and schedule.embedded_guidance:  # the network reads it; one run for a step
        positive = [[hidden, {**extra, "guidance": scale}] for hidden, extra in positive]
        scale, negative = 1.0, []
    if scale != 1 and not negative:
        raise SamplingError(
            f"guidance {scale:g} needs something to steer away from; connect negative of Encode "
            "Instruction, or set guidance to 1."
        )
    tokens = samples.shape[-2] * samples.shape[-1]
    tokens //= loaded.family.latents_per_token if loaded else 1
    values, reason = chosen(schedule, wanted, sigmas, tokens)
    text = f"{len(values) - 1} steps, guidance {told:g} ({reason})"
    here.tell(text)
    run = Run(
        positive=positive,
        negative=[] if scale == 1 else negative or [],
        latents=samples,
        sigmas=values,
        seed=wanted.seed,
        guidance=scale,
        sampler=wanted.sampler,
        mask=latent.get("noise_mask"),
    )
    return run, text


def chosen(
    schedule: Schedule | None, wanted: Settings, sigmas: Tensor | None, tokens: int
) -> tuple[tuple[float, ...], str]:
    """The sigmas of a run and where they come from."""
    if sigmas is not None:
        values = tuple(float(sigma) for sigma in sigmas)
        if not values:
            raise SamplingError("the sigmas are empty; give at least one, 0 for no step at all.")
        return values, "the sigmas that are connected"
    if schedule is None:
        raise SamplingError(
            "this model does not say how it wants to be sampled; connect sigmas, for example from "
            "a scheduler node."
        )
    values = sigmas_for(schedule, wanted.steps or None, tokens, denoise=wanted.denoise)
    return tuple(values.tolist()), f"{schedule.name}: {schedule.reason}"
