"""Qwen-Image-2.1: a single-stream DiT, an RGBA VAE with 16 x 16 pixels per token, Qwen3-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...family import APACHE, Component, Family, Licence, later, with_tokenizer
from . import conditioning, keys, sizes
from .configs import PUBLISHED_VAE, dit_config, vae_config
from .offers import OFFERS, QWEN_RESEARCH
from .schedules import schedule

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

# Terms that a network of its own, of the same architecture, may carry in its metadata.
FREE = {"apache-2.0": APACHE}


def licence(checkpoint: Checkpoint) -> Licence:
    """The published network's terms, whatever its metadata say; else what the metadata say.

    Distilled, merged and quantized versions of the published weights inherit their licence, and
    some are labelled wrongly. Only a network of other widths can have been trained by somebody
    else.
    """
    said = str(checkpoint.config.get("licence") or checkpoint.metadata.get("licence") or "").lower()
    return QWEN_RESEARCH if _is_published(checkpoint) else FREE.get(said, QWEN_RESEARCH)


def _is_published(checkpoint: Checkpoint) -> bool:
    def side(name: str) -> tuple[int, ...]:
        return checkpoint.names[name].shape if name in checkpoint.names else ()

    base, z_dim = PUBLISHED_VAE
    return (
        side("img_in.weight")[:1] == (4096,)
        or side("model.language_model.embed_tokens.weight")[1:] == (4096,)
        or (side("encoder.conv_in.weight")[:1], side("post_quant_conv.weight")[:1])
        == ((base,), (z_dim,))
    )


def _published_dits() -> dict[str, Any]:
    from .dit import DiTConfig

    return {"Qwen-Image-2.1": DiTConfig()}


FAMILY = Family(
    name="qwen_image_21",
    title="Qwen-Image-2.1",
    licence=QWEN_RESEARCH,
    components=(
        Component(
            kind="dit",
            example="qwen_image_2.1_bf16.safetensors from diffusion_models/",
            layouts=keys.DIT_LAYOUTS,
            config=dit_config,
            build=later(__name__, ".dit", "DiT"),
            published=_published_dits,
        ),
        Component(
            kind="vae",
            example="qwen_image_2.1_vae_bf16.safetensors from vae/",
            layouts=keys.VAE_LAYOUTS,
            config=vae_config,
            build=later(__name__, ".vae", "VAE"),
        ),
        Component(
            kind="encoder",
            example="qwen3vl_8b_bf16.safetensors from text_encoders/",
            layouts=keys.ENCODER_LAYOUTS,
            config=later(__name__, ".encoder", "EncoderConfig.from_header"),
            build=later(__name__, ".encoder", "Qwen3VL"),
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
    resize=sizes.resize,
    prefix=conditioning.prefix,
    check=conditioning.check,
    own_size=conditioning.OWN_SIZE,
    pads=True,
    offers=OFFERS,
)
