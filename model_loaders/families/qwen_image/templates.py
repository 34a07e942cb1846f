"""From a prompt to token ids: Qwen2.5-VL's tokenizer and the turns of Qwen-Image.

The user's text never becomes a control token: only this file writes `<|im_end|>` and its like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import tokenizers as shared

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"

# The system turns, as in diffusers' pipelines; with "user" they are 34 and 64 tokens, which the
# diffusion model does not read.
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate."
)


@dataclass(frozen=True)
class PromptIds:
    """A whole conversation as token ids.

    `ids` (L); `slots` (L) True at `<|image_pad|>`; the first `dropped` tokens are read by the
    encoder, and not by the diffusion model.
    """

    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    dropped: int


class PromptTokenizer(shared.PromptTokenizer):
    """Writes the conversation around a prompt. Takes over `tokenizer` and changes its settings."""

    needed = (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD)
    owner = "Qwen2.5-VL"

    def prompt(self, prompt: str, slots: Sequence[int] = (), numbered: bool = True) -> PromptIds:
        """The conversation that asks for `prompt`, with pictures of `slots[i]` vision tokens each.

        `numbered`: every picture is called "Picture 1: " and so on. An empty prompt is read as one
        space. Raises PromptError for text that is not Unicode.
        """
        turn, end, pad = (self.control[name] for name in (TURN_START, TURN_END, IMAGE_PAD))
        start, stop = self.control[VISION_START], self.control[VISION_END]
        text = self.text
        ids = [turn, *text(f"system\n{EDIT if slots else DESCRIBE}"), end, *text("\n"), turn]
        dropped = len(ids) + len(text("user\n"))
        words = "user\n"
        for number, count in enumerate(slots, start=1):
            words += f"Picture {number}: " if numbered else ""
            ids += [*(text(words) if words else ()), start, *[pad] * count, stop]
            words = ""
        ids += [*text(words + (prompt or " ")), end, *text("\n"), turn, *text("assistant\n")]
        return PromptIds(tuple(ids), tuple(i == pad for i in ids), dropped)
