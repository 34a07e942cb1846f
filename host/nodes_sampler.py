"""Core's KSampler for models of ours, with the samplers and the schedule that we can match."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .standin import io
from .standin.api import set_progress

if TYPE_CHECKING:
    from torch import Tensor

SAMPLERS, SCHEDULERS = ["euler", "dpmpp_2m"], ["simple"]
TABLE = 10_000  # sigmas that core's "simple" picks from, for a flow model


def simple_sigmas(mu: float, steps: int, denoise: float = 1.0) -> list[float]:
    """(steps + 1) sigmas as core's scheduler "simple" picks them for a flow shifted by e^mu.

    Evenly spaced entries of a table of 10,000 shifted times, from the noisiest on, then 0. With
    `denoise` < 1 the last `steps` of int(steps / denoise).
    """
    if denoise <= 0:
        return []
    total = steps if denoise > 0.9999 else int(steps / denoise)
    times = [(TABLE - int(k * TABLE / total)) / TABLE for k in range(total)]
    sigmas = [1.0 if t == 1 else math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in times]
    return [*sigmas, 0.0][-(steps + 1) :]


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSampler",
            display_name="KSampler",
            category="model/sampling",
            description="Denoises the latent image with the model and the conditionings.",
            search_aliases=["sampler", "sample", "generate", "denoise", "txt2img", "img2img"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising the input latent."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                    tooltip="The random seed used for creating the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10_000),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", SAMPLERS),
                io.Combo.Input("scheduler", SCHEDULERS),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, sampler_name: str | None, scheduler: str | None) -> bool | str:
        """Workflows of ComfyUI name many more; none of them is exchanged for another silently."""
        asked = ((sampler_name, SAMPLERS, "sampler"), (scheduler, SCHEDULERS, "scheduler"))
        for name, known, what in asked:
            if name is not None and name not in known:
                return (
                    f"The studio's KSampler has no {what} '{name[:60]}', only {', '.join(known)}. "
                    "Choose one of these, use Few-Step Sampler, or run the workflow in ComfyUI."
                )
        return True

    @classmethod
    def execute(cls, model: Any, latent_image: dict[str, Any], **options: Any) -> io.NodeOutput:
        from ..nodes.plain import Plain

        start = Plain().fit(model, latent_image)
        sigmas = simple_sigmas(shift_of(model), options["steps"], options["denoise"])
        kept = {k: v for k, v in latent_image.items() if not k.startswith("downscale_ratio")}
        options["mask"] = latent_image.get("noise_mask")
        return io.NodeOutput(kept | {"samples": sampled(model, start, sigmas, options)})


def shift_of(model: Any) -> float:
    """mu of the checkpoint's schedule at its own resolution, as the ComfyUI bridge sets it."""
    from ..sampling.schedules import shift_of as mu_of

    side = model.checkpoint.config.get("resolution", 1024) // model.family.pixels_per_token
    return mu_of(model.schedule, side * side, model.schedule.steps)


def sampled(model: Any, start: Tensor, sigmas: list[float], options: dict[str, Any]) -> Tensor:
    """Latents (B, C, h, w) at the end of `sigmas`. The noise of a batch is drawn in one piece."""
    import torch

    from ..nodes.runtime import Prefix
    from ..sampling.composite import free_of, locked
    from ..sampling.guidance import guided
    from ..sampling.noise import add_noise
    from ..sampling.samplers import sampler

    if len(sigmas) < 2:
        return start
    dit, room, cfg = model.module, start.shape[-2] * start.shape[-1], options["cfg"]
    generator = torch.Generator("cpu").manual_seed(options["seed"])
    noise = torch.randn(start.shape, generator=generator)
    texts = [*options["positive"], *(options["negative"] if cfg != 1 else [])]
    if len(texts) > 2:
        raise ValueError("This host follows one conditioning at each input; do not combine them.")
    prefixes = [Prefix(text, room).of(dit, "cpu", torch.float32) for text in texts]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((x.shape[0],), sigma)
        positive, *negative = (dit(x, t, prefix).float() for prefix in prefixes)
        return guided(positive, negative[0], cfg) if negative else positive

    done, steps = [], len(sigmas) - 1
    with torch.no_grad():
        for number, (latents, own) in enumerate(zip(start, noise, strict=True)):
            x, follow = add_noise(latents, own, sigmas[0])[None], velocity
            if options["mask"] is not None:
                free = free_of(options["mask"], number, latents)
                follow = locked(velocity, latents, own, free)
            for state in sampler(options["sampler_name"])(follow, x, sigmas):
                x = state.x
                set_progress(number * steps + state.step, len(start) * steps)
            done.append(x)
    return torch.cat(done)
