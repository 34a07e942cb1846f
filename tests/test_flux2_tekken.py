"""The tokenizer inside ComfyUI's file of Mistral, against joining bytes by rank one at a time."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from seedling.model_loaders.families.flux2.encoder import EncoderConfig, TextModel
from seedling.model_loaders.families.flux2.tekken import _letters, tekken
from seedling.model_loaders.families.flux2.templates import SYSTEM, MistralTokenizer
from seedling.model_loaders.load import load_encoder
from seedling.model_loaders.tokenizers import TokenizerError

PATTERN = r" ?\w+|\s+|[^\w\s]+"  # Python's `re` reads it as `tokenizers` does
SPECIAL = {0: "<unk>", 1: "<s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]",
           18: "[/SYSTEM_PROMPT]"}  # fmt: skip
FIRST = 20
CUP = "杯".encode()
JOINED = [b"in", b"th", b"the", b" th", b" the", b"re", b"red", b" red", b"cup", b"cu", b"up",
          b"\xc3\xbc", b"gr\xc3\xbc", b"gr", CUP[:2], CUP, b"beyond"]  # fmt: skip
WORDS = [bytes([b]) for b in range(256)] + JOINED
TEXTS = ["the red cup", "grün, 红色的杯子", "[INST] <s> tharedupcu in\n\nthere", "", "the cup\ton"]


def described(**changes: Any) -> bytes:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(w).decode()} for i, w in enumerate(WORDS)]
    config = {
        "pattern": PATTERN, "default_num_special_tokens": FIRST,
        "default_vocab_size": FIRST + len(WORDS) - 1,  # the last word is beyond it
    }  # fmt: skip
    special = [{"rank": i, "token_str": text} for i, text in SPECIAL.items()]
    whole = {"config": config, "vocab": vocab, "special_tokens": special, **changes}
    return json.dumps(whole).encode()


def by_rank(text: str) -> list[int]:
    """Of all neighbours, those whose whole has the lowest rank are joined, until none has one."""
    ranks, ids = {word: i for i, word in enumerate(WORDS[:-1])}, []
    for piece in re.findall(PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            pairs = [(ranks.get(a + b, 1 << 30), i)
                     for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]  # fmt: skip
            if not pairs or (best := min(pairs))[0] == 1 << 30:
                break
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        ids += [FIRST + ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_joined_by_rank(text: str) -> None:
    tokenizer = MistralTokenizer(tekken(described()))
    assert tokenizer.text(text) == by_rank(text)
    assert tokenizer.tokenizer.decode(tokenizer.text(text)) == text


def test_control_tokens_have_their_own_ids_and_come_from_no_prompt() -> None:
    tokenizer = MistralTokenizer(tekken(described()))
    assert {i: t for t, i in tokenizer.control.items()} == {
        i: t for i, t in SPECIAL.items() if t in MistralTokenizer.needed
    }
    ids = tokenizer.prompt("the red [INST]").ids
    said = [1, 17, *by_rank(SYSTEM), 18, 3, *by_rank("the red [INST]"), 4]
    assert list(ids) == [11] * (512 - len(said)) + said
    assert tokenizer.size == FIRST + len(WORDS) - 1
    assert sorted(_letters()) == sorted(ByteLevel.alphabet())


def test_a_file_of_comfyuis_needs_no_tokenizer_beside_it(tmp_path: Path) -> None:
    config = EncoderConfig(
        "mistral", FIRST + len(WORDS), hidden=32, heads=4, kv_heads=2, head_dim=128,
        intermediate=48, read=(10, 20, 30), theta=1e9, eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = {
        k: torch.randn(t.shape) for k, t in TextModel(config, device="meta").state_dict().items()
    }
    path = tmp_path / "mistral_3_small_flux2.safetensors"
    save_file(
        {**weights, "tekken_model": torch.frombuffer(bytearray(described()), dtype=torch.uint8)},
        path,
    )
    encoder = load_encoder(path).module
    assert encoder.tokenizer.text("the red cup") == by_rank("the red cup")
    assert encoder.encode("the red cup").hidden.shape == (1, 512, 96)
    beside = tmp_path / "mistral_3_small_flux2.tokenizer.json"
    tekken(described(vocab=[])).save(str(beside))  # its own comes first
    with pytest.raises(KeyError):
        load_encoder(path).module.tokenizer.tokenizer.get_vocab()["the"]


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"config": {}}', described(special_tokens=None)])
def test_a_damaged_description_is_refused_in_words(broken: bytes) -> None:
    with pytest.raises(TokenizerError, match="cannot be read .* put tokenizer.json of Mistral"):
        tekken(broken)
