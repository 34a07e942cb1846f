"""Our networks as ComfyUI's objects: a ModelPatcher, a CLIP and a VAE that core's nodes work with.

With `comfy_codecs.py` the only file that imports `comfy`, and only when it is used. Classes that
extend ComfyUI's are made inside functions for that reason. Written against ComfyUI 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.load import Loaded, Precision, load_dit
from ..sampling import SamplingError
from ..sampling.detail import windowed
from ..sampling.noise import batch_noise
from ..sampling.samplers import sampler
from ..sampling.schedules import shift_of
from .adapters import directly, is_plain, memory_factor
from .comfy_codecs import load_clip, load_our_vae, operations
from .kept import store_of
from .lora_keys import Named, published, renaming
from .runtime import Prefix, Report, Run, one_by_one, preview_of, seeded_noise, where

PREVIEW_SIDE = 512


class ComfyUI:
    """The runtime inside ComfyUI."""

    def load(self, kind: str, path: str, dtype: Precision, variant: str | None = None) -> Any:
        dtype = None if dtype == "auto" else dtype  # core chooses itself, for its device
        if kind == "dit":
            return load_model(path, dtype, variant)
        return {"encoder": load_clip, "vae": load_our_vae}[kind](path, dtype)

    def loaded(self, thing: Any) -> Loaded | None:
        for name in ("model", "cond_stage_model", "first_stage_model"):
            inner = getattr(thing, name, None)
            if inner is not None and hasattr(inner, "seedling"):
                return inner.seedling
        return None

    def read(
        self, clip: Any, prompt: str, images: list[Tensor], how: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        tokens = clip.tokenize(prompt, images=images, how=how)
        # Hooks change weights unseen; nothing that they touched may be kept, or read from there.
        tokens["kept"] = getattr(clip.patcher, "forced_hooks", None) is None
        (hidden, extra), *_ = clip.encode_from_tokens_scheduled(tokens)
        return hidden, extra["slots"]

    def encode(self, vae: Any, image: Tensor) -> Tensor:
        loaded = self.loaded(vae)
        if loaded is not None and loaded.config.in_channels < image.shape[-1]:  # no alpha: on white
            image = image[..., :3] * image[..., 3:] + (1 - image[..., 3:])
        return vae.encode(image[None])

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def fit(self, model: Any, latent: dict[str, Any]) -> Tensor:
        import comfy.sample

        factor = latent.get("downscale_ratio_spacial")
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], factor)
        wanted = model.get_model_object("latent_format").latent_channels
        if samples.shape[1] != wanted:
            raise SamplingError(
                f"the latent has {samples.shape[1]} channels, the model needs {wanted}; encode "
                "the picture with the VAE that belongs to the model."
            )
        return samples

    def sample(self, model: Any, run: Run) -> Tensor:
        import comfy.model_management as memory
        import comfy.model_sampling
        import comfy.samplers

        if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
            raise SamplingError(
                "this model is not a flow model, which is all that this sampler can follow; use "
                "KSampler for it."
            )
        guider = comfy.samplers.CFGGuider(model)
        conditions = {"positive": run.positive, "negative": run.negative}
        guider.inner_set_conds({k: v for k, v in conditions.items() if v})
        guider.set_cfg(run.guidance)
        drawn = batch_noise(run.seed, 0, len(run.latents), run.latents.shape[1:])
        done = guider.sample(
            seeded_noise(run, "cpu") if run.seeds else drawn,
            run.latents,
            flow_sampler(run, self.loaded(model)),
            torch.tensor(run.sigmas),
            denoise_mask=run.mask,
            disable_pbar=True,
            seed=run.seed,
        )
        return done.to(memory.intermediate_device(), memory.intermediate_dtype())

    def progress(self, total: int) -> Report:
        import comfy.model_management
        import comfy.utils
        from PIL import Image

        bar = comfy.utils.ProgressBar(total)

        def report(done: int, of: int, preview: Tensor | None) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            shown = None
            if preview is not None:
                pixels = (preview[..., :3] * 255).round().to(torch.uint8).numpy()
                shown = ("JPEG", Image.fromarray(pixels), PREVIEW_SIDE)
            bar.update_absolute(done, of, shown)

        return report

    def tell(self, text: str) -> None:
        from comfy_execution.progress import get_progress_state
        from server import PromptServer

        (node, _), server = where(), getattr(PromptServer, "instance", None)
        if node and server is not None:  # a node that another unfolded into is not on the page
            shown = get_progress_state().dynprompt.get_display_node_id(node)
            server.send_progress_text(text, shown)


def load_model(
    path: str,
    dtype: torch.dtype | None,
    variant: str | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher around our DiT."""
    import comfy.model_management as memory
    import comfy.model_patcher as patching
    import comfy.weight_adapter

    loaded = load_dit(path, operations=operations(None), dtype=dtype, variant=variant)
    device = memory.get_torch_device()
    plain = disable_dynamic or device.type == "cpu"  # where core would not keep our class
    kind = patching.ModelPatcher if plain else patching.CoreModelPatcher
    patcher = renaming(kind, comfy.weight_adapter.WeightAdapterBase)(
        base_model(loaded),
        load_device=device,
        offload_device=memory.unet_offload_device(),
    )
    patcher.cached_patcher_init = (load_model, (path, dtype, variant))
    return patcher


def base_model(loaded: Loaded) -> Any:
    """A BaseModel whose `diffusion_model` is our DiT itself, so LoRA keys are the DiT's names."""
    import comfy.conds
    import comfy.model_base
    import comfy.model_management as memory

    dit = loaded.module

    class Condition(comfy.conds.CONDRegular):
        """A prefix on its way to the model; never batched with another, and shared by a batch."""

        def process_cond(self, batch_size: int, **kwargs: Any) -> Condition:
            return self

        def can_concat(self, other: Any) -> bool:
            return False

        def concat(self, others: list[Any]) -> Any:
            return self.cond

        def size(self) -> list[int]:
            return [1, 1, self.cond.tokens]

    # Of this class, whose ways are all replaced, for core's LoRA loaders to try diffusers' names.
    class SeedlingModel(comfy.model_base.QwenImage):
        def __init__(self) -> None:
            super().__init__(model_config(loaded), comfy.model_base.ModelType.FLUX)
            self.diffusion_model = dit
            memory.archive_model_dtypes(dit)
            self.seedling, self.published = loaded, published(loaded)
            self.memory_usage_factor_conds = ("prefix",)

        def get_dtype(self) -> torch.dtype:
            return loaded.dtype

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            tensors = super().state_dict(*args, **kwargs)
            return tensors if args or kwargs else Named(tensors, self.published)

        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            noise = kwargs["noise"]
            room = noise.shape[-2] * noise.shape[-1]
            return {"prefix": Condition(Prefix([kwargs["cross_attn"], kwargs], room))}

        def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
            return {"prefix": [1, 1, Prefix([kwargs["cross_attn"], kwargs], 0).tokens]}

        def velocity(self, x: Tensor, sigma: Tensor, prefix: Prefix, *known: Any) -> Tensor:
            """noise - x0 (B, C, h, w) in fp32 at sigmas (B,); `known`: what they do in the DiT."""
            dtype = self.get_dtype_inference()
            t = self.model_sampling.timestep(sigma).float()
            return dit(x.to(dtype), t, prefix.of(dit, x.device, dtype), *known).float()

        def _apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            v = self.velocity(x, t, kwargs["prefix"])
            return self.model_sampling.calculate_denoised(t, v, x)

    return SeedlingModel()


def model_config(loaded: Loaded) -> Any:
    """What core's BaseModel wants to know; core's schedulers get the checkpoint's own shift."""
    import comfy.latent_formats
    import comfy.model_management as memory
    import comfy.supported_models_base

    schedule = loaded.schedule
    assert schedule is not None
    side = loaded.checkpoint.config.get("resolution", 1024) // loaded.family.pixels_per_token
    mu = shift_of(schedule, side * side, schedule.steps)
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = latent_format(loaded, comfy.latent_formats.LatentFormat)
    config.sampling_settings = {"shift": mu}
    config.memory_usage_factor = memory_factor(loaded.module)
    config.manual_cast_dtype = memory.unet_manual_cast(
        loaded.dtype, memory.get_torch_device(), [torch.bfloat16, torch.float32]
    )
    return config


def latent_format(loaded: Loaded, base: Any) -> Any:
    """Latents travel as the DiT reads them: nothing is scaled."""
    found = base()
    found.latent_channels = loaded.family.channels(loaded)
    found.spacial_downscale_ratio = loaded.family.pixels_per_latent
    found.latent_rgb_factors = loaded.checkpoint.config.get("latent_rgb_factors")
    found.latent_rgb_factors_bias = loaded.checkpoint.config.get("latent_rgb_bias")
    return found


def flow_sampler(run: Run, loaded: Loaded | None) -> Any:
    """Our samplers as one of core's.

    A model of ours that nothing has patched is asked for its velocity directly, image by image:
    then the result is the command line's, bit for bit. All others go through core's guidance.
    """
    import comfy.samplers

    class FlowSampler(comfy.samplers.Sampler):
        def sample(
            self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any,
            noise: Tensor, latent_image: Tensor, denoise_mask: Tensor | None = None,
            disable_pbar: bool = False,
        ) -> Tensor:  # fmt: skip
            if is_plain(model_wrap, extra_args) and denoise_mask is None and loaded is not None:
                velocity = directly(model_wrap, run.sigmas)
                try:
                    return one_by_one(velocity, run, latent_image, loaded)
                finally:
                    store_of(loaded).trim()
            inner = comfy.samplers.KSAMPLER(through_core)
            return inner.sample(
                model_wrap, sigmas, extra_args, None, noise, latent_image, denoise_mask
            )

    def through_core(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **kwargs: Any
    ) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return (x - model(x, x.new_full((len(x),), sigma), **extra_args)) / sigma

        follow = velocity if run.window is None else windowed(velocity, *run.window)
        for state in sampler(run.sampler)(follow, x, run.sigmas):
            x = state.x
            run.report(state.step, state.total, preview_of(loaded, state.denoised))
        return x

    return FlowSampler()
