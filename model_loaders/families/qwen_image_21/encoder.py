"""The text encoder of Qwen-Image-2.1: a prompt and its references in, conditioning out.

The references' pixels are in Qwen3-VL's context (`qwen3_vl.py`), each behind its name in the prompt
(`templates.py`). The diffusion model reads the hidden states behind the system turn and puts the
references' latents in the place of their vision tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layers import Block, See, Store, computed
from ...qwen_vl import MERGE, Grid, on_white, positions
from ...qwen_vl import patches as shared_patches
from .qwen3_vl import PATCH, EncoderConfig, Qwen3VL, tiny_config
from .sequence import ends_of
from .templates import PromptTokenizer

__all__ = [  # a caller needs this module and the tokenizer's, not the network's
    "Conditioning", "Encoder", "EncoderConfig", "PictureError", "Qwen3VL", "on_white", "patches",
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

    stores = True  # `encode` takes a `layers.Store`

    def __init__(
        self, model: Qwen3VL, tokenizer: PromptTokenizer, config: EncoderConfig | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config or model.config
        tokenizer.must_fit(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    @torch.no_grad()
    def encode(
        self, prompt: str, images: Sequence[Tensor] = (), store: Store | None = None
    ) -> Conditioning:
        """Read a prompt with its references, in their order.

        `images`: (H, W, 3 or 4) in 0..1, sides multiples of 32. What `store` knows is not read
        again. Raises PictureError for another shape, PromptError for text that is not text.
        """
        grids = [_grid(image, number) for number, image in enumerate(images, start=1)]
        ids = self.tokenizer.prompt(prompt, [h * w // MERGE**2 for h, w in grids])
        slots = torch.tensor([ids.slots], device=self.device)
        where, left = positions(slots, grids), iter(images)
        blocks, start = [], 0
        for end in cuts(ids.slots, ids.dropped):
            shown = [next(left)] if any(ids.slots[start:end]) else []
            here = slots[:, start:end], where[..., start:end]
            blocks.append(self._block(ids.ids[:end], *here, shown, store))
            start = end
        kept = store.keep("words", self, blocks, 0) if store else computed(blocks, 0)
        hidden = torch.cat([x for x in kept.outputs if x is not None], dim=1)
        return Conditioning(hidden[:, ids.dropped :].float(), slots[0, ids.dropped :], grids)

    def _block(
        self, ids: Sequence[int], slots: Tensor, where: Tensor, shown: list[Tensor],
        store: Store | None,
    ) -> Block:  # fmt: skip
        """The last tokens of `ids`, as many as `slots` (1, n), and the picture that they show."""
        own, model = ids[-slots.shape[1] :], self.model

        def compute(see: See) -> Tensor:
            x = model.model.language_model.embed_tokens(torch.tensor([own], device=self.device))
            seen = self._look(shown[0], x, store) if shown else None
            return model.read(x, slots, seen, where, see, len(ids) - len(own))

        return Block(len(own), (own, *shown), compute)

    def _look(self, image: Tensor, like: Tensor, store: Store | None) -> list[Tensor]:
        def compute() -> list[Tensor]:
            pixels = patches(on_white(image)[None])
            return self.model.look(pixels.to(like.device, like.dtype), [_grid(image, 1)])

        return store.recall("vision", self, (image,), compute) if store else compute()

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


def cuts(slots: Sequence[bool], dropped: int) -> list[int]:
    """Where blocks end: behind each picture, and in words alone where `ends_of` says.

    The first `dropped` tokens, which every prompt has, belong to the first block. So the blocks of
    the diffusion model, which does not read them, are these.
    """
    ends, start = [], 0
    for is_picture, run in itertools.groupby(slots):
        end = start + len(list(run))
        ends += [end] if is_picture else ends_of(max(start, dropped), end)[:-1]
        start = end
    return ends if ends and ends[-1] == start else [*ends, start]


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
