"""Where the published FLUX.2 are. Those of Black Forest Labs ask for an account and a token."""

from __future__ import annotations

from ...family import APACHE, Licence, Offer, PublishedFile
from .variants import KLEIN_NC

SMALL, LARGE = "Comfy-Org/flux2-klein-4B", "Comfy-Org/flux2-klein-9B"
VAE = PublishedFile("vae", "Comfy-Org/flux2-dev", "split_files/vae/flux2-vae.safetensors")


def _encoder(repository: str, file: str, tokenizer: str) -> tuple[PublishedFile, ...]:
    return (
        PublishedFile("text_encoders", repository, f"split_files/text_encoders/{file}.safetensors"),
        PublishedFile("text_encoders", tokenizer, "tokenizer.json", f"{file}.tokenizer.json"),
    )


QWEN_4B = _encoder(SMALL, "qwen_3_4b", "Qwen/Qwen3-4B")
QWEN_8B = _encoder(LARGE, "qwen_3_8b", "Qwen/Qwen3-8B")


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
        (LARGE, "split_files/diffusion_models/flux-2-klein-9b.safetensors"), QWEN_8B,
    ),
    _offer(
        "flux2-klein-9b-kv", "FLUX.2 klein 9B-KV", KLEIN_NC,
        ("black-forest-labs/FLUX.2-klein-9b-kv", "flux-2-klein-9b-kv.safetensors"), QWEN_8B,
    ),
)  # fmt: skip
