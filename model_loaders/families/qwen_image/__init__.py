"""Qwen-Image, its editors and Qwen-Image-Layered: a 20B two-stream DiT, Wan 2.1's VAE, Qwen2.5-VL.

One architecture, six published models (`variants.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...family import Component, Family, Licence
from ...pictures import resize
from . import conditioning, keys, sizes
from .configs import dit_config, vae_config
from .schedules import schedule
from .variants import VARIANTS, settings

if TYPE_CHECKING:
    from torch import nn

    from ....quant.operations import Operations
    from ...checkpoint import Checkpoint
    from .encoder import Encoder, EncoderConfig

APACHE = Licence(
    "Apache-2.0", "", commercial=True, notice="Free for any use, with its notice kept."
)


def licence(checkpoint: Checkpoint) -> Licence:
    """All six are published under Apache-2.0."""
    return APACHE


def _build_dit(config: Any, operations: Operations, device: Any, dtype: Any = None) -> nn.Module:
    from .dit import DiT

    return DiT(config, operations, device, dtype)


def _published() -> Mapping[str, Any]:
    from .dit import DiTConfig

    return {
        "Qwen-Image and its editors": DiTConfig(),
        "Qwen-Image-Layered": DiTConfig(layered=True),
    }


def _build_vae(config: Any, operations: Operations, device: Any, dtype: Any = None) -> nn.Module:
    from .vae import VAE

    return VAE(config, operations, device, dtype)


def _encoder_config(checkpoint: Checkpoint) -> EncoderConfig:
    from .encoder import EncoderConfig

    return EncoderConfig.from_header(checkpoint)


def _build_encoder(
    config: Any, operations: Operations, device: Any, dtype: Any = None
) -> nn.Module:
    from .encoder import build

    return build(config, operations, device, dtype)


def _finish_encoder(module: Any, path: Path, tokenizer_paths: Sequence[Path | str] = ()) -> Encoder:
    from ...tokenizers import find_tokenizer
    from .encoder import Encoder
    from .templates import PromptTokenizer

    size = module.config.vocab_size
    return Encoder(module, find_tokenizer(PromptTokenizer, path, size, tokenizer_paths))


def _modulations(dit: Any, sigmas: Sequence[float], dtype: Any) -> Sequence[Any]:
    return dit.modulations(sigmas, dtype)


FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    licence=APACHE,
    components=(
        Component(
            kind="dit",
            example="qwen_image_edit_2511_bf16.safetensors from diffusion_models/",
            layouts=keys.DIT_LAYOUTS,
            config=dit_config,
            build=_build_dit,
            unused=keys.DIT_UNUSED,
            published=_published,
        ),
        Component(
            kind="vae",
            example="qwen_image_vae.safetensors from vae/",
            layouts=keys.VAE_LAYOUTS,
            config=vae_config,
            build=_build_vae,
        ),
        Component(
            kind="encoder",
            example="qwen_2.5_vl_7b.safetensors from text_encoders/",
            layouts=keys.ENCODER_LAYOUTS,
            config=_encoder_config,
            build=_build_encoder,
            unused=keys.ENCODER_UNUSED,
            finish=_finish_encoder,
        ),
    ),
    schedule=schedule,
    licence_of=licence,
    step=sizes.STEP,
    pixels_per_token=16,
    channels=conditioning.channels,
    reference_size=sizes.reference_size,
    resize=resize,
    prefix=conditioning.prefix,
    check=conditioning.check,
    pixels_per_latent=8,
    pads=True,
    encoder_resizes=True,
    variants=VARIANTS,
    settings=settings,
    reading=conditioning.reading,
    accepts=conditioning.accepts,
    frames=conditioning.frames,
    modulations=_modulations,
)
