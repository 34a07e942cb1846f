"""Our networks in the words of core's CLIP, VAE and guiders; the half that needs no ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.load import Loaded
from ..sampling import SamplingError
from ..sampling.guidance import guided
from ..sampling.pipeline import OPAQUE_ALPHA, OPAQUE_SHARE, known_ahead, rescaled
from .kept import read, store_of

# What changes how core calls a model; without all of it the model can be asked directly.
HOOKS = (
    "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function", "model_function_wrapper", "context_handler",
    "multigpu_clones",
)  # fmt: skip
PARTIAL = (
    "area",
    "mask",
    "control",
    "gligen",
    "hooks",
    "timestep_start",
    "timestep_end",
    "default",
)


class Words:
    """Core's half of a tokenizer: ours needs the pictures as well, so it works in the model."""

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, images: Any = (), **kwargs: Any
    ) -> dict[str, Any]:
        images = [x[0] if x.ndim == 4 else x for x in images]
        return {"prompt": text, "images": images, "how": kwargs.get("how", {})}

    def state_dict(self) -> dict[str, Any]:
        return {}


class TextModel(nn.Module):
    """What core's CLIP asks of a text encoder."""

    def __init__(self, loaded: Loaded, output: torch.device) -> None:
        super().__init__()
        self.transformer = loaded.module.model
        self.seedling = loaded
        self.output = output

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") is not None:
            raise SamplingError(
                f"{self.seedling.checkpoint.name} is read at the one layer that the diffusion "
                "model was trained with; remove CLIP Set Last Layer."
            )

    def reset_clip_options(self) -> None:
        """No option is ever kept."""

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, None, dict[str, Any]]:
        how = tokens.get("how", {})
        if tokens.get("kept"):
            # Core notes here which patches the weights carry now.
            patches = getattr(self, "current_weight_patches_uuid", None)
            store_of(self.seedling).mark(self.seedling.module, patches)
            found = read(self.seedling, tokens["prompt"], tokens["images"], how)
        else:
            found = self.seedling.module.encode(tokens["prompt"], tokens["images"], **how)
        extra = {"slots": found.slots.to(self.output), "reference_latents": []}
        return found.hidden.to(self.output), None, extra


class Frames(nn.Module):
    """Our VAE, one picture at a time: the same bits as for each alone. Tiles are its strips."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.vae = loaded.module
        self.seedling = loaded

    def encode(self, pixels: Tensor, **kwargs: Any) -> Tensor:
        return torch.cat([self.vae.encode(x[None]) for x in pixels])

    def decode(self, latents: Tensor, **kwargs: Any) -> Tensor:
        return torch.cat([self.vae.decode(x[None]) for x in latents])

    def encode_tiled(self, pixels: Tensor, tile_y: int = 512, **kwargs: Any) -> Tensor:
        strips = -(-pixels.shape[2] // tile_y)
        return torch.cat([self.vae.encode(x[None], strips) for x in pixels])

    def decode_tiled(self, latents: Tensor, tile_y: int = 32, **kwargs: Any) -> Tensor:
        strips = -(-latents.shape[2] // tile_y)
        return torch.cat([self.vae.decode(x[None], strips) for x in latents])


def without_alpha(images: Tensor) -> Tensor:
    """Pictures (B, H, W, 4) in 0..1 as RGB when all of them are opaque, as the pipeline does it."""
    if images.shape[-1] == 3:
        return images
    share = (images[..., 3] > OPAQUE_ALPHA).float().mean(dim=(1, 2))
    return images[..., :3] if bool((share >= OPAQUE_SHARE).all()) else images


def memory_factor(dit: Any) -> float:
    """Core's measure of memory per token: the kept keys and values, and a block's activations.

    Core multiplies it by 0.01 MiB for every byte of a number (model_base.py, memory_required).
    """
    width = dit.config.dim
    numbers = 2 * dit.config.layers * width + 24 * width
    return numbers / (0.01 * 1024 * 1024)


def is_plain(guider: Any, extra_args: dict[str, Any]) -> bool:
    """Nothing stands between the guider and our model."""
    options = extra_args["model_options"]
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    conditions = [*guider.conds["positive"], *guider.conds.get("negative", [])]
    return (
        hasattr(guider.inner_model, "seedling")
        and len(guider.conds["positive"]) == 1
        and len(guider.conds.get("negative", [])) <= 1
        and not any(options.get(hook) for hook in HOOKS)
        and not any(wrappers.values())
        and not any(key in c for c in conditions for key in PARTIAL)
        and all(c.get("strength", 1.0) == 1.0 for c in conditions)
    )


def directly(guider: Any, sigmas: Sequence[float]) -> Any:
    """The guided velocity of our model, as `sampling/pipeline.py` computes it."""
    inner = guider.inner_model
    ahead = known_ahead(inner.seedling, sigmas, inner.get_dtype_inference())
    rescale = rescaled(inner.seedling)
    named = ("positive", "negative") if guider.cfg != 1 else ("positive",)
    prefixes = [
        c["model_conds"]["prefix"].cond for name in named for c in guider.conds.get(name, [])
    ]
    patcher = getattr(guider, "model_patcher", None)
    replaced = any(n.startswith("diffusion_model") for n in getattr(patcher, "object_patches", ()))
    if not replaced and getattr(patcher, "current_hooks", None) is None:
        store = store_of(inner.seedling)  # core notes which patches the weights carry now
        store.mark(inner.diffusion_model, getattr(inner, "current_weight_patches_uuid", None))
        for prefix in prefixes:
            prefix.store = store

    def velocity(x: Tensor, sigma: float) -> Tensor:
        at = x.new_full((len(x),), sigma)
        known = (ahead[sigma],) if ahead else ()
        positive, *negative = (inner.velocity(x, at, p, *known) for p in prefixes)
        return guided(positive, negative[0], guider.cfg, rescale) if negative else positive

    return velocity
