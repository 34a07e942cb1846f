"""Stand-ins for the core nodes that call a network.

MODEL, CLIP and VAE are the engine's `Loaded` here; everything else is as in ComfyUI: IMAGE
(B, H, W, C) in 0..1, LATENT {"samples": (B, C, h, w)}, CONDITIONING [[hidden (1, L, C), {...}]].
torch is imported inside: the server lists nodes without it.
"""

from __future__ import annotations

from typing import Any

from .standin import io
from .standin.runtime import CURRENT

LARGEST_SIDE = 16384


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEDecode",
            display_name="VAE Decode",
            category="model/latent",
            description="Decodes latent images back into pixel space images.",
            search_aliases=["decode", "decode latent", "latent to image", "render latent"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to be decoded."),
                io.Vae.Input("vae", tooltip="The VAE model used for decoding the latent."),
            ],
            outputs=[io.Image.Output(tooltip="The decoded image.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        import torch

        from ..sampling.pipeline import finished

        pictures = []
        for latent in samples["samples"]:
            check()
            with torch.no_grad():
                pixels = vae.module.decode(latent[None].to(computes(vae)))
            pictures.append(finished(pixels, (pixels.shape[3], pixels.shape[2])))
        if len({picture.shape[-1] for picture in pictures}) > 1:  # one has alpha: then all have
            pictures = [with_alpha(picture) for picture in pictures]
        return io.NodeOutput(torch.stack(pictures))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEEncode",
            display_name="VAE Encode",
            category="model/latent",
            search_aliases=["encode", "encode image", "image to latent"],
            inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any) -> io.NodeOutput:
        import torch

        from ..sampling.pipeline import as_pixels

        factor = vae.family.pixels_per_token
        height, width = (side // factor * factor for side in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        latents = []
        for image in pixels[:, top : top + height, left : left + width]:
            check()
            with torch.no_grad():
                latents.append(vae.module.encode(as_pixels(image, computes(vae))))
        return io.NodeOutput({"samples": torch.cat(latents).float()})


class CLIPTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPTextEncode",
            display_name="CLIP Text Encode (Prompt)",
            category="model/conditioning",
            description="Encodes a prompt into a conditioning that guides the diffusion model.",
            search_aliases=["text", "prompt", "positive prompt", "negative prompt", "encode text"],
            inputs=[
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, tooltip="The text to be encoded."
                ),
                io.Clip.Input("clip", tooltip="The CLIP model used for encoding the text."),
            ],
            outputs=[io.Conditioning.Output(tooltip="What the text says to the diffusion model.")],
        )

    @classmethod
    def execute(cls, text: str, clip: Any) -> io.NodeOutput:
        read = clip.module.encode(text)
        return io.NodeOutput([[read.hidden, {"slots": read.slots}]])


class EmptyLatentImage(io.ComfyNode):
    """Latents of the channels and the size that core makes; samplers fit them to their model."""

    ID, NAME, CHANNELS, STEP, SIDE = "EmptyLatentImage", "Empty Latent Image", 4, 8, 512
    CATEGORY = "model/latent"

    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": cls.SIDE, "min": 16, "max": LARGEST_SIDE, "step": cls.STEP}
        return io.Schema(
            node_id=cls.ID,
            display_name=cls.NAME,
            category=cls.CATEGORY,
            search_aliases=["empty latent", "new latent", "blank latent"],
            inputs=[
                io.Int.Input("width", tooltip="The width of the latent images in pixels.", **size),
                io.Int.Input(
                    "height", tooltip="The height of the latent images in pixels.", **size
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, batch_size: int | None) -> Any:
        """Bounds, and the memory that they come to: 16384 x 16384 x 4096 is never meant."""
        if width is None or height is None or batch_size is None:
            return True
        sides = 16 <= width <= LARGEST_SIDE and 16 <= height <= LARGEST_SIDE
        if not sides or not 1 <= batch_size <= 4096:
            return f"Sides are 16 to {LARGEST_SIDE} pixels, a batch has 1 to 4096 images."
        need = width * height // 64 * 4 * cls.CHANNELS * batch_size
        if need > 2**31:
            return f"These latents need {need / 2**30:.0f} GiB; at most 2 GiB are made."
        return True

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1) -> io.NodeOutput:
        import torch

        samples = torch.zeros(batch_size, cls.CHANNELS, height // 8, width // 8)
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": 8})


class EmptySD3LatentImage(EmptyLatentImage):
    ID, NAME, CHANNELS, STEP, SIDE = "EmptySD3LatentImage", "EmptySD3LatentImage", 16, 16, 1024
    CATEGORY = "model/latent/stable diffusion"


class ConditioningZeroOut(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConditioningZeroOut",
            display_name="Conditioning Zero Out",
            category="model/conditioning/transform",
            search_aliases=["null conditioning", "clear conditioning"],
            inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: list[Any]) -> io.NodeOutput:
        return io.NodeOutput([[hidden * 0, dict(more)] for hidden, more in conditioning])


def check() -> None:
    """Stop here if the user cancelled."""
    if runtime := CURRENT.get():
        runtime.check()


def computes(part: Any) -> Any:
    """The numbers that a network computes in: 32 bits on a CPU, whatever its file has."""
    import torch

    cpu = next(part.module.parameters()).device.type == "cpu"
    return torch.float32 if cpu else part.dtype


def with_alpha(image: Any) -> Any:
    import torch

    return torch.nn.functional.pad(image, (0, 1), value=1.0) if image.shape[-1] == 3 else image


MODEL_NODES: list[type[io.ComfyNode]] = [
    VAEDecode, VAEEncode, CLIPTextEncode, EmptyLatentImage, EmptySD3LatentImage,
    ConditioningZeroOut,
]  # fmt: skip
