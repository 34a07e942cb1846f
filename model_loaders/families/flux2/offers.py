"""Where the published FLUX.2 are. Those of Black Forest Labs ask for an account and a token."""

from __future__ import annotations

from ...family import APACHE, Licence, Offer, PublishedFile
from .variants import DEV_NC, KLEIN_NC

SMALL, LARGE = "Comfy-Org/flux2-klein-4B", "Comfy-Org/flux2-klein-9B"
DEV, BFL = "Comfy-Org/flux2-dev", "black-forest-labs/FLUX.2"
VAE = PublishedFile("vae", DEV, "split_files/vae/flux2-vae.safetensors")


def _encoder(
    repository: str, file: str, tokenizer: str, path: str = "tokenizer.json"
) -> tuple[PublishedFile, ...]:
    return (
        PublishedFile("text_encoders", repository, f"split_files/text_encoders/{file}.safetensors"),
        PublishedFile("text_encoders", tokenizer, path, f"{file}.tokenizer.json"),
    )


QWEN_4B = _encoder(SMALL, "qwen_3_4b", "Qwen/Qwen3-4B")
QWEN_8B = _encoder(LARGE, "qwen_3_8b", "Qwen/Qwen3-8B")
MISTRAL = _encoder(
    DEV, "mistral_3_small_flux2_bf16", f"{BFL}-dev", "tokenizer/tokenizer.json"
)  # fmt: skip


def _offer(
    name: str,
    title: str,
    terms: Licence,
    dit: tuple[str, str],
    encoder: tuple[PublishedFile, ...],
) -> Offer:
    return Offer(name, title, terms, (PublishedFile("diffusion_models", *dit), *encoder, VAE))


OFFERS = (
    _offer(
        "flux2-klein-4b", "FLUX.2 klein 4B", APACHE,
        (SMALL, "split_files/diffusion_models/flux-2-klein-4b.safetensors"), QWEN_4B,
    ),
    _offer(
        "flux2-klein-base-4b", "FLUX.2 klein base 4B", APACHE,
        (SMALL, "split_files/diffusion_models/flux-2-klein-base-4b.safetensors"), QWEN_4B,
    ),
    _offer(
        "flux2-klein-9b", "FLUX.2 klein 9B", KLEIN_NC,
        (f"{BFL}-klein-9B", "flux-2-klein-9b.safetensors"), QWEN_8B,
    ),
    _offer(
        "flux2-klein-base-9b", "FLUX.2 klein base 9B", KLEIN_NC,
        (f"{BFL}-klein-base-9B", "flux-2-klein-base-9b.safetensors"), QWEN_8B,
    ),
    _offer(
        "flux2-klein-9b-kv", "FLUX.2 klein 9B-KV", KLEIN_NC,
        (f"{BFL}-klein-9b-kv", "flux-2-klein-9b-kv.safetensors"), QWEN_8B,
    ),
    _offer(
        "flux2-dev", "FLUX.2 dev", DEV_NC,
        (f"{BFL}-dev", "flux2-dev.safetensors"), MISTRAL,
    ),
)  # fmt: skip
