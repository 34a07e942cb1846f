"""Our text encoders and VAEs as ComfyUI's CLIP and VAE, built with core's layers.

With `comfy_bridge.py` the only file that imports `comfy`, and only when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.load import Loaded, load_encoder, load_vae
from ..quant.operations import Operations
from .adapters import Frames, TextModel, Words, without_alpha


def operations(compute: torch.dtype | None) -> Operations:
    """Core's layers, which cast, patch and page their weights; `compute` is what embeddings give.

    Linear and Embedding load weights in torch's way, so that they have some before: core's own way
    leaves `weight` None until a file is read, and our loader checks names and shapes first.
    """
    import comfy.ops

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            nn.Linear._load_from_state_dict(self, *args)

    class Embedding(comfy.ops.manual_cast.Embedding):
        def _load_from_state_dict(self, *args: Any) -> None:
            nn.Embedding._load_from_state_dict(self, *args)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input, out_dtype=compute or self.weight.dtype)

    core = comfy.ops.manual_cast
    return Operations(
        "comfyui", Linear, core.Conv2d, core.LayerNorm, core.RMSNorm, Embedding, casts=True
    )


# ---- CLIP --------------------------------------------------------------------------------------


def load_clip(path: str, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    """A CLIP around our text encoder."""
    import comfy.model_management as memory
    import comfy.model_patcher as patching
    import comfy.sd

    device = memory.text_encoder_device()
    core = [Path(comfy.sd.__file__).with_name("text_encoders") / "qwen25_tokenizer"]
    loaded = load_encoder(
        path, operations=operations(arithmetic(device)), dtype=dtype, tokenizer_paths=core
    )
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = TextModel(loaded, memory.intermediate_device())
    clip.tokenizer = Words()
    kind = patching.ModelPatcher if disable_dynamic else patching.CoreModelPatcher
    clip.patcher = kind(
        clip.cond_stage_model,
        load_device=device,
        offload_device=memory.text_encoder_offload_device(),
    )
    clip.patcher.is_clip = True
    clip.patcher.cached_patcher_init = (clip_patcher, (path, dtype))
    clip.layer_idx, clip.apply_hooks_to_conds = None, None
    clip.use_clip_schedule, clip.tokenizer_options = False, {}
    return clip


def clip_patcher(path: str, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    return load_clip(path, dtype, disable_dynamic).patcher


def arithmetic(device: torch.device) -> torch.dtype | None:
    """What to compute in: fp32 on a CPU, elsewhere what the weights are."""
    return torch.float32 if device.type == "cpu" else None


# ---- VAE ---------------------------------------------------------------------------------------


def load_our_vae(path: str, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    """A VAE around ours, with alpha where a picture has any."""
    import comfy.model_management as memory
    import comfy.model_patcher as patching
    import comfy.sd

    class VAE(comfy.sd.VAE):
        def __init__(self, loaded: Loaded, dtype: torch.dtype) -> None:
            config, self.size = loaded.config, None
            self.first_stage_model = Frames(loaded)
            self.device, self.vae_dtype = memory.vae_device(), dtype
            self.output_device, self.working_dtypes = memory.intermediate_device(), [dtype]
            kind = patching.ModelPatcher if disable_dynamic else patching.CoreModelPatcher
            self.patcher = kind(
                self.first_stage_model,
                load_device=self.device,
                offload_device=memory.vae_offload_device(),
            )
            self.downscale_ratio = self.upscale_ratio = config.factor
            self.latent_channels, self.output_channels = config.z_dim, config.in_channels
            self.latent_dim, self.pad_channel_value = 2, 1.0  # a picture without alpha is opaque
            self.crop_input = self.handles_tiling = True
            self.disable_offload = self.not_video = False
            self.downscale_index_formula = self.upscale_index_formula = None
            self.extra_1d_channel = self.format_encoded = None
            self.audio_sample_rate = 44100
            self.process_input = lambda image: image * 2.0 - 1.0
            self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
            # Large layers run in strips of about 1 GiB, which twice over is enough, beside what a
            # VAE holds of a whole picture.
            held = getattr(loaded.module, "held", 0) * dtype.itemsize

            def needed(pixels: int) -> int:
                return min(8192 * pixels, (2 << 30) + held * pixels)

            self.memory_used_encode = lambda shape, kind: needed(shape[2] * shape[3])
            self.memory_used_decode = lambda shape, kind: needed(
                config.factor**2 * shape[2] * shape[3]
            )

        def decode(self, *args: Any, **kwargs: Any) -> Tensor:
            return without_alpha(super().decode(*args, **kwargs))

        def decode_tiled(self, *args: Any, **kwargs: Any) -> Tensor:
            return without_alpha(super().decode_tiled(*args, **kwargs))

    device = memory.vae_device()
    dtype = dtype or memory.vae_dtype(device, [torch.bfloat16, torch.float32])
    if device.type == "cpu":
        dtype = torch.float32
    loaded = load_vae(path, operations=operations(None), dtype=dtype)
    vae = VAE(loaded, dtype)
    vae.patcher.cached_patcher_init = (vae_patcher, (path, dtype))
    return vae


def vae_patcher(path: str, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    return load_our_vae(path, dtype, disable_dynamic).patcher
