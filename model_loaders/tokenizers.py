"""Tokenizers of text encoders: where their files lie, and text that never becomes a control token.

A family writes its conversation with a `PromptTokenizer` of its own. Everything between two control
tokens is encoded in one piece, so the ids equal those of the whole conversation at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2's rule for splitting text into words.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's control tokens in the order of their ids, which follow the vocabulary (from 151643 on).
QWEN_CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# Where ComfyUI has Qwen's tokenizer, which all its Qwen encoders share.
COMFYUI = Path("comfy", "text_encoders", "qwen25_tokenizer")


class TokenizerError(ValueError):
    """No usable tokenizer; the message says where to put one."""


class PromptError(ValueError):
    """A prompt that cannot be encoded."""


class PromptTokenizer:
    """A tokenizer whose control tokens are written by its family only, never by a prompt.

    A subclass names the tokens that it writes (`needed`) and whose tokenizer has them (`owner`).
    Takes over `tokenizer` and changes its settings. `size` is one more than the largest id.
    """

    needed: ClassVar[tuple[str, ...]] = ()
    owner: ClassVar[str] = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {token: tokenizer.token_to_id(token) for token in self.needed}
        self.control = {token: i for token, i in ids.items() if i is not None}
        if missing := [token for token in self.needed if token not in self.control]:
            raise TokenizerError(
                f"This tokenizer has no {', '.join(missing)}; needed is the tokenizer of "
                f"{self.owner}."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text: "<|im_end|>" in a prompt is characters
        self.tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if set(self.text("".join(self.needed))) & set(self.control.values()):
            raise TokenizerError(
                "This tokenizer does not mark its control tokens as special, so a prompt could "
                f"contain them; use tokenizer.json as {self.owner} was published with it."
            )

    def must_fit(self, vocab_size: int) -> None:
        """Raise TokenizerError where an encoder with so many tokens is another model's."""
        if self.size > vocab_size:
            raise TokenizerError(
                f"The tokenizer has {self.size} tokens, the text encoder {vocab_size}: they do not "
                "belong together; use the tokenizer that was published with the encoder."
            )

    def text(self, text: str) -> list[int]:
        """Token ids of text between two control tokens. Raises PromptError for half characters."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The prompt holds half a character (U+{ord(text[error.start]):04X}), which is not "
                "valid text; delete the broken symbol and type it again."
            ) from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids


Made = TypeVar("Made", bound=PromptTokenizer)


def find_tokenizer(
    make: Callable[[Tokenizer], Made],
    encoder: Path | str,
    vocab_size: int | None = None,
    tokenizer_paths: Sequence[Path | str] = (),
) -> Made:
    """The tokenizer that belongs to the encoder file or folder `encoder`, as `make` takes it.

    Looked for beside the file (`<name>.tokenizer.json`, `tokenizer.json`, `vocab.json` with
    `merges.txt`), in a diffusers folder (`../tokenizer`, `../processor`), in `tokenizer_paths`,
    files or folders, then in the ComfyUI that the file lies in. A tokenizer that `make` refuses, or
    that has more ids than `vocab_size`, belongs to another model and is passed over. Raises
    TokenizerError when none is left.
    """
    encoder, refused = Path(encoder), []
    for place in _places(encoder, tokenizer_paths):
        if not place.is_file():
            continue
        try:
            found = make(open_tokenizer(place))
        except TokenizerError:
            refused.append(f"{place} is damaged or another model's")
            continue
        if vocab_size is None or found.size <= vocab_size:
            return found
        refused.append(f"{place} has {found.size} tokens, the encoder {vocab_size}")
    own = "tokenizer.json" if encoder.is_dir() else f"{encoder.stem}.tokenizer.json"
    note = f" ({'; '.join(refused)})" if refused else ""
    raise TokenizerError(
        f"The text encoder {encoder.name} came without its tokenizer{note}; copy tokenizer.json "
        "from the folder `processor` or `tokenizer` of the repository that it was published in "
        f"to {(encoder if encoder.is_dir() else encoder.parent) / own}."
    )


def _places(encoder: Path, extra: Sequence[Path | str]) -> list[Path]:
    """Files to try, best first; vocab.json stands for itself and the merges beside it."""
    own = [] if encoder.is_dir() else [encoder.with_name(f"{encoder.stem}.tokenizer.json")]
    folder = encoder if encoder.is_dir() else encoder.parent
    around = [parent / COMFYUI for parent in folder.absolute().parents]
    others = (
        folder, folder.parent / "tokenizer", folder.parent / "processor", *map(Path, extra), *around
    )  # fmt: skip
    for place in others:
        is_file = place.suffix == ".json"
        own += [place] if is_file else [place / "tokenizer.json", place / "vocab.json"]
    return own


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Read `tokenizer.json`, or `vocab.json` with `merges.txt` beside it.

    Raises TokenizerError for a file that is missing or is something else.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    try:
        if path.name != "vocab.json":
            return Tokenizer.from_file(str(path))
        lines = path.with_name("merges.txt").read_text("utf-8").splitlines()
        pairs = [
            tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
        ]
        merges = [(left, right) for left, right in pairs]
        config = path.with_name("tokenizer_config.json")
        added = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        vocab = json.loads(path.read_text("utf-8"))
        return byte_level_bpe(vocab, merges, added.get("added_tokens_decoder"))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer that can be read: {error}") from error


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    added: dict[str, dict[str, Any]] | None = None,
) -> Tokenizer:
    """Qwen2's tokenizer over a vocabulary, with its control tokens behind it.

    `added` is `added_tokens_decoder` of tokenizer_config.json, for files that have one.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    words = Split(Regex(QWEN_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = Steps([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if added:
        entries = [added[key] for key in sorted(added, key=int)]
        tokens = [(entry["content"], entry.get("special", True)) for entry in entries]
    else:
        tokens = [(name, True) for name in QWEN_CONTROL]
    for name, special in tokens:  # ids follow the order
        token = AddedToken(name, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer
