"""From a prompt to token ids: Qwen3-VL's tokenizer and the turns of Qwen-Image-2.1.

The user's text never becomes a control token: only this file writes `<|im_end|>` and its like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import tokenizers as shared

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SYSTEM = "Comprehend and analyze the provided prompt."
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


@dataclass(frozen=True)
class PromptIds:
    """A whole conversation as token ids.

    `ids` (L); `slots` (L) True at `<|image_pad|>`; the first `dropped` tokens are the system turn,
    which the encoder reads and the diffusion model does not.
    """

    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    dropped: int


class PromptTokenizer(shared.PromptTokenizer):
    """Writes the conversation around a prompt. Takes over `tokenizer` and changes its settings."""

    needed = (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD)
    owner = "Qwen3-VL"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.image_pad = self.control[IMAGE_PAD]

    def prompt(self, prompt: str, slots: Sequence[int] = ()) -> PromptIds:
        """The conversation that asks for `prompt`, with pictures of `slots[i]` vision tokens each.

        An empty prompt is read as one space. Raises PromptError for text that is not Unicode.
        """
        turn, end, text = self.control[TURN_START], self.control[TURN_END], self.text
        start, stop = self.control[VISION_START], self.control[VISION_END]
        ids = [turn, *text(f"system\n{SYSTEM}"), end, *text("\n")]
        dropped = len(ids)
        ids += [turn]
        words = "user\n"
        for number, count in enumerate(slots, start=1):
            ids += [*text(f"{words}<image{number}>"), start, *[self.image_pad] * count, stop]
            words = " " if number < len(slots) else ""
        ids += [*text(words + (prompt or " ")), end, *text("\n"), turn, *text("assistant\n")]
        return PromptIds(tuple(ids), tuple(i == self.image_pad for i in ids), dropped)


def find_tokenizer(
    encoder: Path | str,
    vocab_size: int | None = None,
    tokenizer_paths: Sequence[Path | str] = (),
) -> PromptTokenizer:
    """As in `model_loaders.tokenizers`, for Qwen3-VL's tokenizer."""
    return shared.find_tokenizer(PromptTokenizer, encoder, vocab_size, tokenizer_paths)
