"""From a prompt and references to pictures: what the command line, the host and Python call.

`Pipeline.run` is a generator: it yields `Progress` after every step and a `Picture` as soon as one
is done, so showing, saving and stopping belong to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_loaders.family import Schedule
from ..model_loaders.load import Loaded, load_dit, load_encoder, load_vae
from ..model_loaders.lora import Lora, load_lora
from ..quant.lora import Adapters
from . import SamplingError
from .guidance import guided
from .noise import image_seed, noise
from .prefix_store import PrefixStore
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
    alone. `layers` is how many a model paints that takes a picture apart.
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
    layers: int = 4


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
    """A finished picture (H, W, 3 or 4) in 0..1 on the CPU; `seed` makes it again alone.

    `layer` counts those that were painted together, the undermost first.
    """

    index: int
    seed: int
    pixels: Tensor
    layer: int = 0


class Pipeline:
    """A DiT, a VAE and a text encoder of one family, ready to run.

    `store` keeps what was computed of prompts and references from run to run.
    """

    def __init__(
        self, dit: Loaded, vae: Loaded, encoder: Loaded, store: PrefixStore | None = None
    ) -> None:
        for other in (vae, encoder):
            if other.family.name != dit.family.name:
                raise SamplingError(
                    f"{dit.checkpoint.name} is of the family {dit.family.name}, but "
                    f"{other.checkpoint.name} is of {other.family.name}; choose files of one "
                    "family."
                )
        self.family, self.dit, self.vae, self.encoder = dit.family, dit, vae, encoder
        self.family.check(dit, vae, encoder)
        self.loras: dict[Path, tuple[Lora, float]] = {}  # and their strengths
        self._adapters = Adapters(dit.module)
        self.store = store or PrefixStore()
        self._numbers: dict[Path, int] = {}
        self._fresh = count(1)

    @classmethod
    def load(
        cls,
        dit: Path | str,
        vae: Path | str,
        encoder: Path | str,
        *,
        device: torch.device | str = "cpu",
        tokenizer_paths: Sequence[Path | str] = (),
        loras: Sequence[tuple[Path | str, float]] = (),
        store: PrefixStore | None = None,
        variant: str | None = None,
    ) -> Pipeline:
        """From three files; a folder of a whole diffusers pipeline serves as any of them.

        `loras` as for `set_loras`, `variant` as for `load_dit`.
        """
        pipeline = cls(
            load_dit(dit, device=device, variant=variant),
            load_vae(vae, device=device),
            load_encoder(encoder, device=device, tokenizer_paths=tokenizer_paths),
            store,
        )
        pipeline.set_loras(loras)
        return pipeline

    def set_loras(self, loras: Sequence[tuple[Path | str, float]]) -> None:
        """From now on run with these LoRA files, each with its strength, and with no others.

        Only files that are new are read; nothing else is loaded again. What fits nothing is in
        `unmatched` of each of `self.loras`, for the user. Raises CheckpointError for a file that
        cannot be used, SamplingError for senseless strengths; then nothing has changed.
        """
        wanted = {Path(path): float(strength) for path, strength in loras}
        if len(wanted) < len(loras):
            raise SamplingError("a LoRA was given twice; give it once, with the sum of strengths.")
        for path, strength in wanted.items():
            if not math.isfinite(strength):
                raise SamplingError(
                    f"the strength of {path.name} is {strength}; give a number such as 0.8."
                )
        old = {path: lora for path, (lora, _) in self.loras.items()}
        new = {path: load_lora(path, self.dit) for path in wanted if path not in old}
        for path in old.keys() - wanted.keys():
            self._adapters.remove(path)
            del self._numbers[path]
        for path, lora in new.items():
            self._adapters.add(path, lora.branches, lora.vectors)
        for path, strength in wanted.items():
            self._adapters.set_strength(path, strength)
        self.loras = {path: ((old | new)[path], strength) for path, strength in wanted.items()}
        # Numbered as they are read: a file that was read again may have changed.
        self._numbers = {path: self._numbers.get(path) or next(self._fresh) for path in wanted}

    def plan(self, task: Task) -> Plan:
        """Sizes, sigmas and guidance of a task; SamplingError when it makes no sense."""
        check(task)
        if self.family.accepts is not None:
            self.family.accepts(self.dit, len(task.references))
        schedule = self.dit.schedule
        assert schedule is not None
        side = self.dit.checkpoint.config.get("resolution", 1024)
        resolution = task_side(task, self.dit)
        shown = tuple(
            self.family.reference_size(r.shape[1], r.shape[0], resolution**2)
            for r in task.references
        )
        width, height = task.size or (shown[0] if shown else (side, side))
        if shown and task.size is None and self._keeps(resolution):
            height, width = task.references[0].shape[:2]
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
        try:
            yield from self._pictures(task, plan)
        finally:
            self.store.trim()

    def _pictures(self, task: Task, plan: Plan) -> Iterator[Progress | Picture]:
        with self.store.reading():
            model = self._model(task, plan)
        width, height = plan.padded
        family, factor = self.family, self.family.pixels_per_latent
        frames = family.frames(self.dit, task.layers) if family.frames else 1
        shape = (frames, family.channels(self.dit), height // factor, width // factor)
        for index in range(task.count):
            x = noise(task.seed, index, shape, self.device) * plan.sigmas[0]
            for state in sampler(task.sampler)(model, x, plan.sigmas):
                x = state.x
                yield Progress(index, state)
            for layer, latents in enumerate(x[min(frames - 1, 1) :]):
                pixels = self.vae.module.decode(latents[None].to(self._dtype(self.vae)))
                image = finished(pixels, plan.size, keep_alpha=frames > 1)
                yield Picture(index, image_seed(task.seed, index), image, layer)

    @property
    def device(self) -> torch.device:
        return next(self.dit.module.parameters()).device

    @property
    def compute(self) -> tuple[torch.device, torch.dtype]:
        """Where, and in what numbers, the DiT computes."""
        return self.device, self._dtype(self.dit)

    def _dtype(self, part: Loaded) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else part.dtype

    def _keeps(self, resolution: int) -> bool:
        """Whether references keep their pixels in their places."""
        return self.family.pads and resolution == 0

    def _references(self, task: Task, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        """What the encoder is shown of the references, and their latents."""
        given, vae = [r.to(self.device) for r in task.references], self.vae
        resize = with_margin if self._keeps(task_side(task, self.dit)) else self.family.resize
        images = [resize(r, size) for r, size in zip(given, plan.references, strict=True)]
        channels, dtype = vae.config.in_channels, self._dtype(vae)

        def encode(image: Tensor) -> Tensor:
            return vae.module.encode(as_pixels(image, dtype, channels))

        latents = [
            self.store.recall("latents", vae.module, (image, dtype), partial(encode, image))
            for image in images
        ]
        return given if self.family.encoder_resizes else images, latents

    def _model(self, task: Task, plan: Plan) -> Any:
        """The velocity as a function of x and sigma, everything that no step changes computed."""
        device, dtype = self.compute
        images, latents = self._references(task, plan)
        dit, schedule = self.dit.module, self.dit.schedule
        strengths = [(self._numbers[path], strength) for path, (_, strength) in self.loras.items()]
        self.store.mark(dit, *sorted(strengths))
        read: dict[str, float] = {}
        if schedule is not None and schedule.embedded_guidance:
            read["guidance"] = plan.guidance
        prompts = [task.prompt, task.negative][: 1 if read or plan.guidance == 1 else 2]
        settings = {"room": plan.tokens, "dtype": dtype, "store": self.store, **read}
        prefixes = [
            self.family.prefix(dit, self.encoder.module, text, images, latents, **settings)
            for text in prompts
        ]

        ahead = known_ahead(self.dit, plan.sigmas, dtype)
        rescale = rescaled(self.dit)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            t = torch.full((x.shape[0],), sigma, device=device)
            known = (ahead[sigma],) if ahead else ()
            positive, *negative = (dit(x.to(dtype), t, p, *known).float() for p in prefixes)
            return guided(positive, negative[0], plan.guidance, rescale) if negative else positive

        return velocity


def task_side(task: Task, dit: Loaded) -> int:
    """Side of the square that references are brought to, 0 for their own sizes."""
    side = dit.checkpoint.config.get("resolution", 1024)
    return side if task.resolution is None else task.resolution


def known_ahead(dit: Loaded, sigmas: Sequence[float], dtype: Any) -> dict[float, Any]:
    """What each step's sigma does in the DiT, where that depends on nothing else; else nothing."""
    if dit.family.modulations is None or len(sigmas) < 2:
        return {}
    starts = sigmas[:-1]
    return dict(zip(starts, dit.family.modulations(dit.module, starts, dtype), strict=True))


def rescaled(dit: Loaded | None) -> int:
    """Latents per side of a token, where guidance keeps its length; else 0."""
    if dit is None or dit.schedule is None or not dit.schedule.norm_rescale:
        return 0
    return dit.family.pixels_per_token // dit.family.pixels_per_latent


def check(task: Task) -> None:
    """Raise SamplingError for what no model can do."""
    if task.count < 1:
        raise SamplingError(f"at least one picture must be made, {task.count} were asked for.")
    if task.layers < 1:
        raise SamplingError(f"at least one layer must be painted, {task.layers} were asked for.")
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


def as_pixels(image: Tensor, dtype: torch.dtype, channels: int = 4) -> Tensor:
    """A picture (H, W, 3 or 4) in 0..1 as (1, `channels`, H, W) in -1..1, for a VAE.

    One without alpha is opaque; for a VAE without alpha, one that has it is laid on white.
    """
    if image.shape[-1] < channels:
        image = torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)
    elif image.shape[-1] > channels:
        image = image[..., :3] * image[..., 3:] + (1 - image[..., 3:])
    return (image * 2 - 1).permute(2, 0, 1)[None].to(dtype)


def with_margin(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (H, W, C) in the top left of one of `size`; its last row and column go on."""
    right, bottom = size[0] - image.shape[1], size[1] - image.shape[0]
    padded = F.pad(image.permute(2, 0, 1)[None], (0, right, 0, bottom), mode="replicate")
    return padded[0].permute(1, 2, 0)


def finished(pixels: Tensor, size: tuple[int, int], keep_alpha: bool = False) -> Tensor:
    """Decoded (1, 3 or 4, H, W) in -1..1 as a picture of `size` in 0..1.

    No alpha where it is opaque, unless it is to be kept.
    """
    width, height = size
    image = (pixels[0, :, :height, :width].float().permute(1, 2, 0) + 1) / 2
    if image.shape[-1] == 4 and not keep_alpha:
        opaque = (image[..., 3] > OPAQUE_ALPHA).float().mean() >= OPAQUE_SHARE
        image = image[..., :3] if opaque else image
    return image.clamp(0, 1).cpu()
