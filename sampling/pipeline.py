"""From a prompt and references to pictures: what the command line, the host and Python call.

`Pipeline.run` is a generator: it yields `Progress` after every step and a `Picture` as soon as one
is done, so showing, saving and stopping belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_loaders.load import Loaded, Precision, load_dit, load_encoder, load_vae
from ..model_loaders.lora import Lora, load_lora
from ..quant.lora import Adapters
from . import SamplingError
from .composite import locked
from .cost import vlm_tokens
from .guidance import guided
from .noise import add_noise, image_seed, noise
from .prefix_store import PrefixStore
from .samplers import sampler
from .sizes import grid
from .task import Picture, Plan, Progress, Task, check, sigmas_of

MAX_STRENGTH = 100  # of a LoRA, as in ComfyUI
OPAQUE_ALPHA, OPAQUE_SHARE = 0.9, 0.999  # a picture this opaque, nearly everywhere, has no alpha


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
        vram: int | None = None,
        dtype: Precision = None,
    ) -> Pipeline:
        """From three files; a folder of a whole diffusers pipeline serves as any of them.

        `loras` as for `set_loras`, `variant` and `dtype` as for `load_dit`. `vram`: bytes of
        weights that may lie on `device`; the encoder, which works once for a prompt, then gets the
        least that it can run with, and the DiT what it and the VAE leave.
        """
        one, left = None if vram is None else 0, vram
        words = load_encoder(
            encoder, dtype=dtype, device=device, tokenizer_paths=tokenizer_paths, vram=one
        )
        pixels = load_vae(vae, dtype=dtype, device=device)
        if left is not None:
            left = max(left - words.resident - pixels.resident, 1)
        painter = load_dit(dit, dtype=dtype, device=device, variant=variant, vram=left)
        pipeline = cls(painter, pixels, words, store)
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
            if not abs(strength) <= MAX_STRENGTH:  # NaN is not either
                raise SamplingError(
                    f"the strength of {path.name} is {strength:g}; give a number such as 0.8, from "
                    f"-{MAX_STRENGTH} to {MAX_STRENGTH}."
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
        if task.together and not hasattr(self.dit.module, "joint"):
            raise SamplingError(
                f"{self.family.title} cannot paint pictures at once that see each other (joint); "
                "choose sequential, where each sees those before it, or independent."
            )
        schedule = self.dit.schedule
        assert schedule is not None
        side = self.dit.checkpoint.config.get("resolution", 1024)
        resolution = task_side(task, self.dit)
        sides = [resolution] * len(task.references)
        if task.edit is not None:
            if self._frames(task) > 1:
                raise SamplingError(
                    f"{self.dit.checkpoint.name} takes a picture apart into layers and cannot edit "
                    "a part of it; choose another model, or leave out the region."
                )
            sides[0] = 0  # every pixel stays in its place
        shown = tuple(
            self.family.reference_size(r.shape[1], r.shape[0], side**2)
            for r, side in zip(task.references, sides, strict=True)
        )
        seen = task.vlm_sides if any(task.vlm_sides) else ()
        if seen and self.family.own_size is None:
            raise SamplingError(
                f"the text encoder of {self.family.title} does not look at references; leave out "
                "the resolution in which it would see them."
            )
        width, height = task.size or (shown[0] if shown else (side, side))
        if shown and task.size is None and self._keeps(resolution):
            height, width = task.references[0].shape[:2]
        padded, _ = grid(width, height, self.family.step)
        if task.edit is not None:
            height, width = task.edit.original.shape[:2]
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
            vlm_tokens=vlm_tokens(self.family, task.references, shown, seen),
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
            model, references = self._model(task, plan)
        width, height = plan.padded
        family, factor = self.family, self.family.pixels_per_latent
        frames, edit = self._frames(task), task.edit
        shape = (frames, family.channels(self.dit), height // factor, width // factor)
        for index in range(1 if task.together else task.count):
            own = [noise(one.seed, 0, shape, self.device) for one in task.together]
            start = torch.cat(own or [noise(task.seed, index, shape, self.device)])
            x, follow = start * plan.sigmas[0], model
            if edit is not None and edit.alpha is not None:
                seen = references[0].float()
                free = edit.free(width // seen.shape[-1])[None].to(seen)
                x = add_noise(seen, start, plan.sigmas[0])
                follow = locked(model, seen, start, free)
            for state in sampler(task.sampler)(follow, x, plan.sigmas):
                x = state.x
                yield Progress(index, state)
            for row, latents in enumerate(x[min(frames - 1, 1) :]):
                pixels = self.vae.module.decode(latents[None].to(self._dtype(self.vae)))
                size = plan.size if edit is None else plan.padded
                image = finished(pixels, size, keep_alpha=frames > 1)
                image = image if edit is None else edit.finished(image)
                if task.together:
                    yield Picture(row, task.together[row].seed, image)
                else:
                    yield Picture(index, image_seed(task.seed, index), image, row)

    @property
    def device(self) -> torch.device:
        return next(self.dit.module.parameters()).device

    @property
    def compute(self) -> tuple[torch.device, torch.dtype]:
        """Where, and in what numbers, the DiT computes."""
        return self.device, self._dtype(self.dit)

    def _dtype(self, part: Loaded) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else part.dtype

    def _frames(self, task: Task) -> int:
        """How many latents are painted together: more than one by a model that paints layers."""
        return self.family.frames(self.dit, task.layers) if self.family.frames else 1

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
        images = given if self.family.encoder_resizes else images
        if any(task.vlm_sides) and self.family.own_size:
            images = self.family.own_size.show(given, images, task.vlm_sides)
        return images, latents

    def _model(self, task: Task, plan: Plan) -> tuple[Any, list[Tensor]]:
        """The velocity as a function of x and sigma, everything that no step changes computed, and
        the references' latents.
        """
        device, dtype = self.compute
        images, latents = self._references(task, plan)
        dit, schedule = self.dit.module, self.dit.schedule
        strengths = [(self._numbers[path], strength) for path, (_, strength) in self.loras.items()]
        self.store.mark(dit, *sorted(strengths))
        read: dict[str, float] = {}
        if schedule is not None and schedule.embedded_guidance:
            read["guidance"] = plan.guidance
        own = [one.prompt for one in task.together] or [task.prompt]
        prompts = [own, [task.negative]][: 1 if read or plan.guidance == 1 else 2]
        how = self.family.own_size.how(task.vlm_sides) if self.family.own_size else {}
        settings = {"room": plan.tokens, "dtype": dtype, "store": self.store, **read, **how}
        prefixes = []
        for texts in prompts:
            found = [
                self.family.prefix(dit, self.encoder.module, text, images, latents, **settings)
                for text in texts
            ]
            places = [one.place for one in task.together]
            each = found if len(found) > 1 else found * len(places)
            prefixes.append(dit.joint(each, places) if places else found[0])

        ahead = known_ahead(self.dit, plan.sigmas, dtype)
        rescale = rescaled(self.dit)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            t = torch.full((x.shape[0],), sigma, device=device)
            known = (ahead[sigma],) if ahead else ()
            positive, *negative = (dit(x.to(dtype), t, p, *known).float() for p in prefixes)
            return guided(positive, negative[0], plan.guidance, rescale) if negative else positive

        return velocity, latents


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
