"""The text encoder of Qwen-Image-2.1: a prompt and its references in, conditioning out.

The references' pixels are in Qwen3-VL's context (`qwen3_vl.py`), each behind its name in the prompt
(`templates.py`). The diffusion model reads the hidden states behind the system turn and puts the
references' latents in the place of their vision tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...qwen_vl import MERGE, Grid, on_white
from ...qwen_vl import patches as shared_patches
from ...tokenizers import TokenizerError
from .qwen3_vl import PATCH, EncoderConfig, Qwen3VL, build, tiny_config
from .templates import PromptTokenizer

__all__ = [  # a caller needs this module and the tokenizer's, not the network's
    "Conditioning", "Encoder", "EncoderConfig", "PictureError", "build", "on_white", "patches",
    "tiny_config",
]  # fmt: skip

SLOT = PATCH * MERGE  # pixels per side of a vision token


class PictureError(ValueError):
    """A picture that the encoder cannot read."""


@dataclass(frozen=True)
class Conditioning:
    """What the diffusion model reads of a prompt and its references.

    `hidden` (1, L, hidden) fp32; `slots` (L) True where a reference's latents go, 2 x 2 tokens
    each; `grids` rows and columns of latent tokens of each reference.
    """

    hidden: Tensor
    slots: Tensor
    grids: list[Grid]


class Encoder:
    """A network with the tokenizer that it was trained with."""

    def __init__(
        self, model: Qwen3VL, tokenizer: PromptTokenizer, config: EncoderConfig | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config or model.config
        if tokenizer.size > self.config.vocab_size:
            raise TokenizerError(
                f"The tokenizer has {tokenizer.size} tokens, the text encoder "
                f"{self.config.vocab_size}: they do not belong together; use the tokenizer that "
                "was published with the encoder."
            )

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    @torch.no_grad()
    def encode(self, prompt: str, images: Sequence[Tensor] = ()) -> Conditioning:
        """Read a prompt with its references, in their order.

        `images`: (H, W, 3 or 4) in 0..1, sides multiples of 32. Raises PictureError for another
        shape, PromptError for text that is not text.
        """
        grids = [_grid(image, number) for number, image in enumerate(images, start=1)]
        ids = self.tokenizer.prompt(prompt, [h * w // MERGE**2 for h, w in grids])
        pixels = [patches(on_white(image)[None]) for image in images]
        hidden = self.encode_ids(
            torch.tensor([ids.ids], device=self.device),
            torch.cat(pixels) if pixels else None,
            grids,
        )
        slots = torch.tensor(ids.slots[ids.dropped :], device=hidden.device)
        return Conditioning(hidden[:, ids.dropped :].float(), slots, grids)

    def encode_ids(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | Sequence[Grid] = (),
    ) -> Tensor:
        """Hidden states (B, L, hidden) of whole conversations of equal length, with autograd.

        The system turn is included. `pixel_values` (P, 1536) as from `patches`, pictures row by
        row; `grid_thw` (N, 3) frames, rows, columns of patches, or pairs of rows and columns.
        """
        if isinstance(grid_thw, Tensor):
            grid_thw = [(int(h), int(w)) for _, h, w in grid_thw.tolist()]
        slots = input_ids == self.tokenizer.image_pad
        return self.model(input_ids, slots, pixel_values, list(grid_thw))


def patches(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 as patches (B * H/16 * W/16, 3 * 2 * 16 * 16) in -1..1."""
    return shared_patches(pixels * 2.0 - 1.0, PATCH)


def _grid(image: Tensor, number: int) -> Grid:
    """Rows and columns of patches of reference `number`."""
    if image.ndim != 3 or image.shape[-1] not in (3, 4):
        given = " x ".join(map(str, image.shape))
        raise PictureError(
            f"Reference {number} has the shape {given}; the text encoder needs height x width x 3 "
            "or 4 channels."
        )
    height, width = image.shape[:2]
    if height % SLOT or width % SLOT or not height or not width:
        raise PictureError(
            f"Reference {number} is {width} x {height} pixels; the text encoder needs sides that "
            f"are multiples of {SLOT}, so resize it first."
        )
    return height // PATCH, width // PATCH
