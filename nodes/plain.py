"""Nodes without ComfyUI: MODEL, CLIP and VAE are `Loaded`, as model_loaders returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_loaders.load import Loaded, Precision, load_dit, load_encoder, load_vae
from ..sampling import SamplingError
from ..sampling.guidance import guided
from ..sampling.pipeline import as_pixels, finished, known_ahead, rescaled
from .kept import read, store_of
from .runtime import Prefix, Report, Run, one_by_one, where

LOADERS = {"dit": load_dit, "encoder": load_encoder, "vae": load_vae}


class Plain:
    """The runtime of the embedded host and of tests, on the CPU."""

    def load(self, kind: str, path: str, dtype: Precision, variant: str | None = None) -> Loaded:
        chosen = {"variant": variant} if variant else {}
        return LOADERS[kind](path, dtype=dtype, **chosen)

    def loaded(self, thing: Any) -> Loaded | None:
        return thing if hasattr(thing, "family") and hasattr(thing, "module") else None

    def read(
        self, clip: Loaded, prompt: str, images: list[Tensor], how: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        found = read(clip, prompt, images, how)
        return found.hidden, found.slots

    def encode(self, vae: Loaded, image: Tensor) -> Tensor:
        channels = vae.config.in_channels
        return vae.module.encode(as_pixels(image, torch.float32, channels)).float()

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        pictures = [vae.module.decode(x[None].float()) for x in latents]
        height, width = pictures[0].shape[2:]
        shown = [finished(picture, (width, height)) for picture in pictures]
        if len({picture.shape[-1] for picture in shown}) > 1:  # one has alpha: give all of them one
            shown = [F.pad(p, (0, 4 - p.shape[-1]), value=1.0) for p in shown]
        return torch.stack(shown)

    def fit(self, model: Loaded, latent: dict[str, Any]) -> Tensor:
        samples, channels = latent["samples"], model.family.channels(model)
        if torch.count_nonzero(samples) == 0:
            factor = latent.get("downscale_ratio_spacial", 8) / model.family.pixels_per_latent
            height, width = (round(side * factor) for side in samples.shape[-2:])
            return samples.new_zeros(len(samples), channels, height, width)
        if samples.shape[1] != channels:
            raise SamplingError(
                f"the latent has {samples.shape[1]} channels, the model needs {channels}; encode "
                "the picture with the VAE that belongs to the model."
            )
        return samples

    @torch.no_grad()
    def sample(self, model: Loaded, run: Run) -> Tensor:
        if len(run.positive) != 1 or len(run.negative) > 1:
            raise SamplingError(
                "several conditionings were combined, which this host cannot follow; connect one, "
                "or run the workflow in ComfyUI."
            )
        dit, room = model.module, run.latents.shape[-2] * run.latents.shape[-1]
        weighed = run.positive if run.guidance == 1 else [*run.positive, *run.negative]
        store, prefixes = store_of(model), []
        with store.reading():
            for conditioning in weighed:
                prefix = Prefix(conditioning, room)
                prefix.store = store
                prefixes.append(prefix.of(dit, "cpu", torch.float32))

        ahead = known_ahead(model, run.sigmas, torch.float32)
        rescale = rescaled(model)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            t = torch.full((x.shape[0],), sigma)
            known = (ahead[sigma],) if ahead else ()
            positive, *negative = (dit(x, t, prefix, *known).float() for prefix in prefixes)
            return guided(positive, negative[0], run.guidance, rescale) if negative else positive

        try:
            return one_by_one(velocity, run, run.latents, model)
        finally:
            prefixes.clear()
            store.trim()

    def progress(self, total: int) -> Report:
        from comfy_api.latest import ComfyAPISync

        api = ComfyAPISync()

        def report(done: int, of: int, preview: Tensor | None) -> None:
            api.execution.set_progress(done, of, preview_image=preview)

        report(0, total, None)
        return report

    def tell(self, text: str) -> None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, where()[0])
