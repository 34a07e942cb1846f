"""Qwen-Image, its editors and Qwen-Image-Layered: a 20B two-stream DiT, Wan 2.1's VAE, Qwen2.5-VL.

One architecture, six published models (`variants.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...family import APACHE, Component, Family, Licence, by_schedule, later, with_tokenizer
from ...pictures import resize
from . import conditioning, keys, sizes
from .configs import dit_config, vae_config
from .offers import OFFERS
from .schedules import schedule
from .variants import VARIANTS, settings

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint


def licence(checkpoint: Checkpoint) -> Licence:
    """All six are published under Apache-2.0."""
    return APACHE


def _published() -> Mapping[str, Any]:
    from .dit import DiTConfig

    return {
        "Qwen-Image and its editors": DiTConfig(),
        "Qwen-Image-Layered": DiTConfig(layered=True),
    }


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
            build=later(__name__, ".dit", "DiT"),
            unused=keys.DIT_UNUSED,
            published=_published,
            lent=keys.DIT_LENT,
        ),
        Component(
            kind="vae",
            example="qwen_image_vae.safetensors from vae/",
            layouts=keys.VAE_LAYOUTS,
            config=vae_config,
            build=later(__name__, ".vae", "VAE"),
        ),
        Component(
            kind="encoder",
            example="qwen_2.5_vl_7b.safetensors from text_encoders/",
            layouts=keys.ENCODER_LAYOUTS,
            config=later(__name__, ".encoder", "EncoderConfig.from_header"),
            build=later(__name__, ".encoder", "Qwen25VL"),
            unused=keys.ENCODER_UNUSED,
            finish=with_tokenizer(__name__, "PromptTokenizer"),
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
    own_size=conditioning.OWN_SIZE,
    accepts=conditioning.accepts,
    frames=conditioning.frames,
    modulations=by_schedule,
    offers=OFFERS,
)
