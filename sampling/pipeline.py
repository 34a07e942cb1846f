"""From a prompt and references to pictures: what the command line, the host and Python call.

`Pipeline.run` is a generator: it yields `Progress` after every step and a `Picture` as soon as one
is done, so showing, saving and stopping belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.family import Schedule
from ..model_loaders.load import Loaded, load_dit, load_encoder, load_vae
from . import SamplingError
from .guidance import guided
from .noise import image_seed, noise
from .samplers import State, sampler, steps_of
from .schedules import sigmas_for
from .sizes import grid

OPAQUE_ALPHA, OPAQUE_SHARE = 0.9, 0.999  # a picture this opaque, nearly everywhere, has no alpha


@dataclass(frozen=True)
class Task:
    """What to make. None means: as the checkpoint likes it.

    `references` are pictures (H, W, 3 or 4) in 0..1, "image 1", "image 2", ... in the prompt;
    `size` is (width, height) in pixels, by default that of the first reference; `resolution` is the
    side of the square whose area references are brought to, 0 keeps each as large as it is.
    `sigmas` fall to 0 and go without `steps`. Image k of `count` is the image that `seed` + k makes
    alone.
    """

    prompt: str
    references: tuple[Tensor, ...] = ()
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    seed: int = 0
    count: int = 1
    sampler: str = "euler"
    sigmas: tuple[float, ...] | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a task comes to, before anything is computed."""

    size: tuple[int, int]  # of the pictures, in pixels
    padded: tuple[int, int]  # that the model makes; cropped to `size` at the right and the bottom
    references: tuple[tuple[int, int], ...]  # sizes that the references are brought to
    sigmas: tuple[float, ...]
    schedule: str
    reason: str
    guidance: float
    tokens: int  # of the target


@dataclass(frozen=True)
class Progress:
    """A step of image `image` (0-based) is done."""

    image: int
    state: State


@dataclass(frozen=True)
class Picture:
    """A finished picture (H, W, 3 or 4) in 0..1 on the CPU; `seed` makes it again alone."""

    index: int
    seed: int
    pixels: Tensor


class Pipeline:
    """A DiT, a VAE and a text encoder of one family, ready to run."""

    def __init__(self, dit: Loaded, vae: Loaded, encoder: Loaded) -> None:
        for other in (vae, encoder):
            if other.family.name != dit.family.name:
                raise SamplingError(
                    f"{dit.checkpoint.name} is of the family {dit.family.name}, but "
                    f"{other.checkpoint.name} is of {other.family.name}; choose files of one "
                    "family."
                )
        self.family, self.dit, self.vae, self.encoder = dit.family, dit, vae, encoder
        self.family.check(dit, vae, encoder)

    @classmethod
    def load(
        cls,
        dit: Path | str,
        vae: Path | str,
        encoder: Path | str,
        *,
        device: torch.device | str = "cpu",
        tokenizer_paths: Sequence[Path | str] = (),
    ) -> Pipeline:
        """From three files; a folder of a whole diffusers pipeline serves as any of them."""
        return cls(
            load_dit(dit, device=device),
            load_vae(vae, device=device),
            load_encoder(encoder, device=device, tokenizer_paths=tokenizer_paths),
        )

    def plan(self, task: Task) -> Plan:
        """Sizes, sigmas and guidance of a task; SamplingError when it makes no sense."""
        check(task)
        schedule = self.dit.schedule
        assert schedule is not None
        side = self.dit.checkpoint.config.get("resolution", 1024)
        resolution = side if task.resolution is None else task.resolution
        shown = tuple(
            self.family.reference_size(r.shape[1], r.shape[0], resolution**2)
            for r in task.references
        )
        width, height = task.size or (shown[0] if shown else (side, side))
        padded, _ = grid(width, height, self.family.step)
        tokens = padded.width * padded.height // self.family.pixels_per_token**2
        given = task.sigmas is not None
        return Plan(
            size=(width, height),
            padded=(padded.width, padded.height),
            references=shown,
            sigmas=sigmas_of(task, schedule, tokens),
            schedule="given" if given else schedule.name,
            reason="the sigmas were given" if given else schedule.reason,
            guidance=schedule.guidance if task.guidance is None else task.guidance,
            tokens=tokens,
        )

    @torch.no_grad()
    def run(self, task: Task) -> Iterator[Progress | Picture]:
        """Make the pictures of `task`, one after the other, over one computed prefix."""
        plan = self.plan(task)
        model = self._model(task, plan)
        width, height = plan.padded
        factor = self.family.pixels_per_token
        shape = (self.family.channels(self.dit), height // factor, width // factor)
        for index in range(task.count):
            x = noise(task.seed, index, shape, self.device)[None] * plan.sigmas[0]
            for state in sampler(task.sampler)(model, x, plan.sigmas):
                x = state.x
                yield Progress(index, state)
            pixels = self.vae.module.decode(x.to(self._dtype(self.vae)))
            yield Picture(index, image_seed(task.seed, index), finished(pixels, plan.size))

    @property
    def device(self) -> torch.device:
        return next(self.dit.module.parameters()).device

    @property
    def compute(self) -> tuple[torch.device, torch.dtype]:
        """Where, and in what numbers, the DiT computes."""
        return self.device, self._dtype(self.dit)

    def _dtype(self, part: Loaded) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else part.dtype

    def _model(self, task: Task, plan: Plan) -> Any:
        """The velocity as a function of x and sigma, everything that no step changes computed."""
        device, dtype = self.compute
        images = [
            self.family.resize(r.to(device), size)
            for r, size in zip(task.references, plan.references, strict=True)
        ]
        latents = [
            self.vae.module.encode(as_pixels(image, self._dtype(self.vae))) for image in images
        ]
        dit, prompts = (
            self.dit.module,
            [task.prompt, task.negative][: 1 if plan.guidance == 1 else 2],
        )
        prefixes = [
            self.family.prefix(
                dit, self.encoder.module, text, images, latents, room=plan.tokens, dtype=dtype
            )
            for text in prompts
        ]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            t = torch.full((x.shape[0],), sigma, device=device)
            positive, *negative = (dit(x.to(dtype), t, prefix).float() for prefix in prefixes)
            return guided(positive, negative[0], plan.guidance) if negative else positive

        return velocity


def check(task: Task) -> None:
    """Raise SamplingError for what no model can do."""
    if task.count < 1:
        raise SamplingError(f"at least one picture must be made, {task.count} were asked for.")
    if task.resolution is not None and task.resolution < 0:
        raise SamplingError(
            f"the references' resolution is {task.resolution}; give a side in pixels, or 0 to keep "
            "each as large as it is."
        )
    image_seed(task.seed, 0)
    sampler(task.sampler)
    for number, image in enumerate(task.references, start=1):
        if image.ndim != 3 or image.shape[-1] not in (3, 4) or not image.is_floating_point():
            given = (
                f"{' x '.join(map(str, image.shape))}, {str(image.dtype).removeprefix('torch.')}"
            )
            raise SamplingError(
                f"reference {number} is {given}; give height x width x 3 or 4 channels, as floats "
                "in 0..1."
            )


def sigmas_of(task: Task, schedule: Schedule, tokens: int) -> tuple[float, ...]:
    """The sigmas that were given, if they lead to a picture; else those of the schedule."""
    if task.sigmas is None:
        return tuple(sigmas_for(schedule, task.steps, tokens).tolist())
    sigmas = tuple(map(float, task.sigmas))
    steps = len(steps_of(sigmas))
    if steps < 1 or sigmas[-1] != 0:
        raise SamplingError(
            f"the sigmas must end at 0, the finished picture, after at least one step; got "
            f"{', '.join(f'{sigma:.4g}' for sigma in sigmas) or 'none'}."
        )
    if task.steps not in (None, steps):
        raise SamplingError(
            f"{task.steps} steps were asked for, but sigmas for {steps} were given; leave out one."
        )
    return sigmas


def as_pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """A picture (H, W, 3 or 4) in 0..1 as (1, 4, H, W) in -1..1; without alpha it is opaque."""
    if image.shape[-1] == 3:
        image = torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)
    return (image * 2 - 1).permute(2, 0, 1)[None].to(dtype)


def finished(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Decoded (1, 4, H, W) in -1..1 as a picture of `size` in 0..1; no alpha where it is opaque."""
    width, height = size
    image = (pixels[0, :, :height, :width].float().permute(1, 2, 0) + 1) / 2
    opaque = (image[..., 3] > OPAQUE_ALPHA).float().mean() >= OPAQUE_SHARE
    return (image[..., :3] if opaque else image).clamp(0, 1).cpu()
