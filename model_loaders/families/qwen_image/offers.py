"""Where the published Qwen-Images are, as ComfyUI's repackaged files."""

from __future__ import annotations

from ...family import APACHE, Offer, PublishedFile
from .variants import EDIT, EDIT_2509, EDIT_2511, IMAGE, IMAGE_2512, LAYERED, VARIANTS

BASE = "Comfy-Org/Qwen-Image_ComfyUI"
EDITS = "Comfy-Org/Qwen-Image-Edit_ComfyUI"
LAYERS = "Comfy-Org/Qwen-Image-Layered_ComfyUI"
ENCODER = (
    PublishedFile("text_encoders", BASE, "split_files/text_encoders/qwen_2.5_vl_7b.safetensors"),
    PublishedFile(
        "text_encoders",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "tokenizer.json",
        "qwen_2.5_vl_7b.tokenizer.json",
    ),
)


def _offer(variant: str, repository: str, file: str, vae: str = "qwen_image_vae") -> Offer:
    where = LAYERS if vae != "qwen_image_vae" else BASE
    return Offer(
        variant,
        VARIANTS[variant],
        APACHE,
        (
            PublishedFile(
                "diffusion_models", repository, f"split_files/diffusion_models/{file}.safetensors"
            ),
            *ENCODER,
            PublishedFile("vae", where, f"split_files/vae/{vae}.safetensors"),
        ),
    )


OFFERS = (
    _offer(IMAGE, BASE, "qwen_image_bf16"),
    _offer(IMAGE_2512, BASE, "qwen_image_2512_bf16"),
    _offer(EDIT, EDITS, "qwen_image_edit_bf16"),
    _offer(EDIT_2509, EDITS, "qwen_image_edit_2509_bf16"),
    _offer(EDIT_2511, EDITS, "qwen_image_edit_2511_bf16"),
    _offer(LAYERED, LAYERS, "qwen_image_layered_bf16", "qwen_image_layered_vae"),
)
