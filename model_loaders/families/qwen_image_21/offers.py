"""Where the published Qwen-Image-2.1 is, as ComfyUI's repackaged files."""

from __future__ import annotations

from ...family import Licence, Offer, PublishedFile

QWEN_RESEARCH = Licence(
    name="Qwen Research Licence",
    url="",
    commercial=False,
    notice="Built with Qwen. For research and other non-commercial use; a commercial licence is "
    "given on request.",
)
REPOSITORY = "Comfy-Org/Qwen-Image-2.1"

OFFERS = (
    Offer(
        "qwen-image-2.1",
        "Qwen-Image-2.1",
        QWEN_RESEARCH,
        (
            PublishedFile(
                "diffusion_models", REPOSITORY, "diffusion_models/qwen_image_2.1_bf16.safetensors"
            ),
            PublishedFile("text_encoders", REPOSITORY, "text_encoders/qwen3vl_8b_bf16.safetensors"),
            PublishedFile(
                "text_encoders",
                "Qwen/Qwen3-VL-8B-Instruct",
                "tokenizer.json",
                "qwen3vl_8b_bf16.tokenizer.json",
            ),
            PublishedFile("vae", REPOSITORY, "vae/qwen_image_2.1_vae_bf16.safetensors"),
        ),
    ),
)
