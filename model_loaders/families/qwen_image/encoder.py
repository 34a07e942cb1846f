"""The text encoder of Qwen-Image: a prompt and its references in, conditioning out.

The diffusion model reads the hidden states behind the system turn, those of the pictures among
them. The references' pixels reach it a second time, as latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pictures import at_area, resize, snap
from ...qwen_vl import MERGE, Grid, on_white, patches
from .qwen2_5_vl import PATCH, EncoderConfig, Qwen25VL, tiny_config
from .sizes import AREA_VLM, SLOT
from .templates import PromptTokenizer

__all__ = ["Conditioning", "Encoder", "EncoderConfig", "PictureError", "Qwen25VL", "tiny_config"]

STEP = 32  # its sides are multiples of this before they become multiples of a slot
# Of the pixels in 0..1 that the vision tower was trained with (CLIP's).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PictureError(ValueError):
    """A picture that the encoder cannot read."""


@dataclass(frozen=True)
class Conditioning:
    """What the diffusion model reads of a prompt and its references.

    `hidden` (1, L, hidden) fp32; `slots` (L) True where something else will take the place of a
    state, which is nowhere; `grids` rows and columns of vision patches of each reference.
    """

    hidden: Tensor
    slots: Tensor
    grids: list[Grid]


class Encoder:
    """A network with the tokenizer that it was trained with."""

    def __init__(self, model: Qwen25VL, tokenizer: PromptTokenizer) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        tokenizer.must_fit(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    @torch.no_grad()
    def encode(
        self, prompt: str, images: Sequence[Tensor] = (), *, area: int = AREA_VLM,
        numbered: bool = True, areas: Sequence[int] = (),
    ) -> Conditioning:  # fmt: skip
        """Read a prompt with its references, in their order.

        `images`: (H, W, 3 or 4) in 0..1 of any size, each seen at about `area` pixels, not at all
        at 0. `areas`: those of its own of each, where not 0. `numbered`: they are called
        "Picture 1: " and so on. Raises PictureError for another shape, PromptError for text that
        is not text.
        """
        if any(areas) and not area:
            raise PictureError(
                "This model's text encoder is not shown its reference; leave out the size in which "
                "it would see it."
            )
        shown = images if area else ()
        each = areas or [0] * len(shown)
        pixels = [
            _seen(image, number, own or area)
            for number, (image, own) in enumerate(zip(shown, each, strict=True), start=1)
        ]
        grids = [(x.shape[2] // PATCH, x.shape[3] // PATCH) for x in pixels]
        prompt_ids = self.tokenizer.prompt(prompt, [h * w // MERGE**2 for h, w in grids], numbered)
        dropped = prompt_ids.dropped
        hidden = self.model(
            torch.tensor([prompt_ids.ids], device=self.device),
            torch.tensor([prompt_ids.slots], device=self.device),
            torch.cat([patches(x, PATCH) for x in pixels]) if pixels else None,
            grids,
        )[:, dropped:].float()
        slots = torch.zeros(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        return Conditioning(hidden, slots, grids)


def _seen(image: Tensor, number: int, area: int) -> Tensor:
    """What the vision tower sees of reference `number`: (1, 3, H, W), normalised.

    Resized twice, as the published pipelines do it: to `area`, then to whole vision tokens.
    """
    if image.ndim != 3 or image.shape[-1] not in (3, 4) or not image.numel():
        given = " x ".join(map(str, image.shape))
        raise PictureError(
            f"Reference {number} has the shape {given}; the text encoder needs height x width x 3 "
            "or 4 channels."
        )
    height, width = image.shape[:2]
    image = on_white(resize(image, at_area(width, height, area, STEP))).permute(1, 2, 0)
    height, width = image.shape[:2]
    image = resize(image, (snap(width, SLOT), snap(height, SLOT)), bicubic=True)
    mean, std = torch.tensor([MEAN, STD], device=image.device)
    return ((image - mean) / std).permute(2, 0, 1)[None]
