"""Mistral's tokenizer from its own description, "tekken", which ComfyUI's file of it holds.

It lists tokens as bytes by rank, as tiktoken does: neighbours are joined whose whole has the lowest
rank. Here it becomes the same thing in merges, for `tokenizers`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import open_checkpoint
from ...family import with_tokenizer
from ...tokenizers import TokenizerError
from .keys import TEKKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

find = with_tokenizer(__package__ or "", "MistralTokenizer")


def finish(module: Any, path: Path, tokenizer_paths: Sequence[Path | str] = ()) -> Any:
    """The encoder of a network: with the tokenizer beside its file, else with the one in it."""
    try:
        return find(module, path, tokenizer_paths)
    except TokenizerError:
        inside = described_in(path)
        if inside is None:
            raise
    from .encoder import Encoder
    from .templates import MistralTokenizer

    tokenizer = MistralTokenizer(tekken(inside))
    tokenizer.must_fit(module.config.vocab_size)
    return Encoder(module, tokenizer)


def described_in(path: Path) -> bytes | None:
    """The description that a file holds."""
    checkpoint = open_checkpoint(path)
    name = next((n for n in checkpoint.names if n.rpartition(".")[2] == TEKKEN), None)
    return None if name is None else bytes(checkpoint.tensor(name).numpy())


def tekken(description: bytes) -> Tokenizer:
    """The tokenizer that it describes. Raises TokenizerError for what is no description.

    Control tokens have the first ids, as many as `default_num_special_tokens`, the others follow
    by rank up to `default_vocab_size` in all.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    try:
        said = json.loads(description)
        first, size = (
            int(said["config"][f"default_{key}"]) for key in ("num_special_tokens", "vocab_size")
        )
        words = [base64.b64decode(word["token_bytes"]) for word in said["vocab"][: size - first]]
        named = {int(token["rank"]): str(token["token_str"]) for token in said["special_tokens"]}
        pattern = Regex(said["config"]["pattern"])
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise TokenizerError(
            f"The tokenizer inside the text encoder's file cannot be read ({error!r}); put "
            "tokenizer.json of Mistral Small 3 beside the file."
        ) from None
    control = [named.get(i, f"<SPECIAL_{i}>") for i in range(first)]
    letters = _letters()
    vocab = {token: i for i, token in enumerate(control)}
    vocab |= {"".join(letters[b] for b in word): first + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(words, letters)))
    split = Split(pattern, behavior="isolated")
    tokenizer.pre_tokenizer = Steps([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def _merges(words: Sequence[bytes], letters: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make up a token, in the order of what they make."""
    ranks, merges = {word: rank for rank, word in enumerate(words)}, []
    for word in words:
        cuts = ((word[:i], word[i:]) for i in range(1, len(word)))
        pairs = [(ranks[a], ranks[b]) for a, b in cuts if a in ranks and b in ranks]
        merges += sorted(pairs)
    text = ["".join(letters[b] for b in word) for word in words]
    return [(text[a], text[b]) for a, b in merges]


def _letters() -> list[str]:
    """The character that stands for each byte, as GPT-2 chose them: itself if it can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in seen]
    return [chr(b) if b in seen else chr(256 + hidden.index(b)) for b in range(256)]
