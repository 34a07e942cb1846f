"""From a prompt to token ids: the turns that FLUX.2's text encoders were read with.

Both read 512 tokens, whatever the prompt: what is missing are padding tokens, which nobody in the
encoder looks at, but whose states the diffusion model reads. Qwen3 pads behind, Mistral in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ... import tokenizers as shared

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 512
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class PromptIds:
    """A padded conversation: `ids` (512), `read` (512) True where it is not padding."""

    ids: tuple[int, ...]
    read: tuple[bool, ...]


class PromptTokenizer(shared.PromptTokenizer):
    """Writes the conversation around a prompt and pads it."""

    pad: ClassVar[str]
    pads_in_front: ClassVar[bool] = False

    def conversation(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def prompt(self, prompt: str) -> PromptIds:
        """Raises PromptError for a prompt that is too long, or no Unicode."""
        ids = self.conversation(prompt)
        if len(ids) > LENGTH:
            room = LENGTH - len(self.conversation(""))
            raise shared.PromptError(
                f"The prompt has {len(ids) - LENGTH + room} tokens, but FLUX.2 reads at most "
                f"{room}; shorten it."
            )
        missing = LENGTH - len(ids)
        padding, read = [self.control[self.pad]] * missing, [True] * len(ids)
        if self.pads_in_front:
            return PromptIds((*padding, *ids), (*[False] * missing, *read))
        return PromptIds((*ids, *padding), (*read, *[False] * missing))


class Qwen3Tokenizer(PromptTokenizer):
    """A user's turn and an answer whose thoughts are skipped."""

    needed = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    owner = "Qwen3"
    pad = "<|endoftext|>"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        for token in (THINK, THOUGHT):  # ordinary tokens to Qwen, so a prompt may hold them
            if (number := tokenizer.token_to_id(token)) is None:
                raise shared.TokenizerError(
                    f"This tokenizer has no {token}; needed is the tokenizer of Qwen3."
                )
            self.control[token] = number

    def conversation(self, prompt: str) -> list[int]:
        control, text = self.control, self.text
        start, end = control["<|im_start|>"], control["<|im_end|>"]
        asked = [start, *text(f"user\n{prompt}"), end, *text("\n"), start, *text("assistant\n")]
        return [*asked, control[THINK], *text("\n\n"), control[THOUGHT], *text("\n\n")]


class MistralTokenizer(PromptTokenizer):
    """A system prompt and an instruction, without an answer."""

    needed = ("<s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
    owner = "Mistral Small 3"
    pad = "<pad>"
    pads_in_front = True

    def conversation(self, prompt: str) -> list[int]:
        c, text = self.control, self.text
        system = [c["<s>"], c["[SYSTEM_PROMPT]"], *text(SYSTEM), c["[/SYSTEM_PROMPT]"]]
        return [*system, c["[INST]"], *text(prompt), c["[/INST]"]]
