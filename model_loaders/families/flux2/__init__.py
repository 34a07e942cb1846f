"""FLUX.2: a two-stream DiT, an RGB VAE with 16 x 16 pixels per token, Qwen3 or Mistral."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...family import Component, Family
from . import conditioning, keys, sizes
from .configs import dit_config, published_dits, vae_config
from .variants import APACHE, VARIANTS, licence, schedule, settings

if TYPE_CHECKING:
    from torch import nn

    from ....quant.operations import Operations
    from ...checkpoint import Checkpoint
    from .encoder import Encoder, EncoderConfig


def _build_dit(config: Any, operations: Operations, device: Any, dtype: Any = None) -> nn.Module:
    from .dit import DiT

    return DiT(config, operations, device, dtype)


def _build_vae(config: Any, operations: Operations, device: Any, dtype: Any = None) -> nn.Module:
    from .vae import VAE

    return VAE(config, operations, device, dtype)


def _encoder_config(kind: str) -> Callable[[Checkpoint], EncoderConfig]:
    def config(checkpoint: Checkpoint) -> EncoderConfig:
        from .encoder import EncoderConfig

        return EncoderConfig.from_header(checkpoint, kind)

    return config


def _build_encoder(
    config: Any, operations: Operations, device: Any, dtype: Any = None
) -> nn.Module:
    from .encoder import TextModel

    return TextModel(config, operations, device, dtype)


def _finish_encoder(
    tokenizer: str, module: Any, path: Path, tokenizer_paths: Sequence[Path | str] = ()
) -> Encoder:
    from ...tokenizers import find_tokenizer
    from . import templates
    from .encoder import Encoder

    make = getattr(templates, tokenizer)
    return Encoder(module, find_tokenizer(make, path, module.config.vocab_size, tokenizer_paths))


def _modulations(dit: Any, sigmas: Sequence[float], dtype: Any) -> Sequence[Any]:
    return dit.modulations(sigmas, dtype)


FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    licence=APACHE,
    components=(
        Component(
            kind="dit",
            example="flux-2-klein-4b.safetensors from diffusion_models/",
            layouts=keys.DIT_LAYOUTS,
            config=dit_config,
            build=_build_dit,
            published=published_dits,
        ),
        Component(
            kind="vae",
            example="flux2-vae.safetensors from vae/",
            layouts=keys.VAE_LAYOUTS,
            config=vae_config,
            build=_build_vae,
            unused=keys.VAE_UNUSED,
        ),
        Component(
            kind="encoder",
            example="qwen_3_4b.safetensors from text_encoders/",
            layouts=keys.QWEN3_LAYOUTS,
            config=_encoder_config("qwen3"),
            build=_build_encoder,
            unused=keys.QWEN3_UNUSED,
            finish=partial(_finish_encoder, "Qwen3Tokenizer"),
        ),
        Component(
            kind="encoder",
            example="mistral_3_small_flux2_bf16.safetensors from text_encoders/",
            layouts=keys.MISTRAL_LAYOUTS,
            config=_encoder_config("mistral"),
            build=_build_encoder,
            unused=keys.MISTRAL_UNUSED,
            finish=partial(_finish_encoder, "MistralTokenizer"),
        ),
    ),
    schedule=schedule,
    licence_of=licence,
    step=sizes.STEP,
    pixels_per_token=sizes.STEP,
    channels=conditioning.channels,
    reference_size=sizes.reference_size,
    resize=sizes.resize,
    prefix=conditioning.prefix,
    check=conditioning.check,
    variants=VARIANTS,
    settings=settings,
    modulations=_modulations,
)
