"""FLUX.2: a two-stream DiT, an RGB VAE with 16 x 16 pixels per token, Qwen3 or Mistral."""

from __future__ import annotations

from functools import partial

from ...family import APACHE, Component, Family, by_schedule, later, with_tokenizer
from . import conditioning, keys, sizes
from .configs import dit_config, published_dits, vae_config
from .offers import OFFERS
from .variants import VARIANTS, licence, schedule, settings

_encoder_config = later(__name__, ".encoder", "EncoderConfig.from_header")

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
            build=later(__name__, ".dit", "DiT"),
            published=published_dits,
        ),
        Component(
            kind="vae",
            example="flux2-vae.safetensors from vae/",
            layouts=keys.VAE_LAYOUTS,
            config=vae_config,
            build=later(__name__, ".vae", "VAE"),
            unused=keys.VAE_UNUSED,
        ),
        Component(
            kind="encoder",
            example="qwen_3_4b.safetensors from text_encoders/",
            layouts=keys.QWEN3_LAYOUTS,
            config=partial(_encoder_config, kind="qwen3"),
            build=later(__name__, ".encoder", "TextModel"),
            unused=keys.QWEN3_UNUSED,
            finish=with_tokenizer(__name__, "Qwen3Tokenizer"),
        ),
        Component(
            kind="encoder",
            example="mistral_3_small_flux2_bf16.safetensors from text_encoders/",
            layouts=keys.MISTRAL_LAYOUTS,
            config=partial(_encoder_config, kind="mistral"),
            build=later(__name__, ".encoder", "TextModel"),
            unused=keys.MISTRAL_UNUSED,
            finish=later(__name__, ".tekken", "finish"),
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
    modulations=by_schedule,
    offers=OFFERS,
)
