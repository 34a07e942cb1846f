"""The embedded model's tokenizer, and prompts as the trainer's batches need them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from ..model_loaders.families.qwen_image_21.encoder import Encoder, EncoderConfig, on_white, patches
from ..model_loaders.families.qwen_image_21.qwen3_vl import Qwen3VL, tiny_config
from ..model_loaders.families.qwen_image_21.templates import SYSTEM, PromptTokenizer
from ..model_loaders.tokenizers import byte_level_bpe
from .world.vocabulary import CHINESE, CHINESE_PLACES, CHINESE_RELATIONS

VOCABULARY = 900
FRAME = f"system\n{SYSTEM}\nuser\nassistant\n<image1> <image2> <image3> <image4>"
TOKENS_PER_SLOT_SIDE = 32  # pixels


def words_of(text: str) -> list[str]:
    """Chinese has no spaces: cut at the world's words, so that no token spans two of them."""
    known = {
        w
        for table in (CHINESE, CHINESE_PLACES, CHINESE_RELATIONS)
        for words in table.values()
        for w in words
    }
    cut = "|".join(
        sorted((*known, "背景", "上", "的", "一个", "两个", "三个", "四个"), key=len, reverse=True)
    )
    return [piece for piece in re.split(f"({cut})", text) if piece]


def train_tokenizer(texts: Iterable[str], path: Path, size: int = VOCABULARY) -> None:
    """Byte-level BPE in Qwen's format, learned from the world's captions and instructions."""
    splitter = byte_level_bpe({}, [])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pieces = (
        piece for text in texts for piece in (words_of(text) if not text.isascii() else [text])
    )
    learner.train_from_iterator(itertools.chain([FRAME] * 2000, pieces), trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    byte_level_bpe(model["vocab"], merges).save(str(path))


class Prompts:
    """Prompts to ids, and batches of them to what the DiT reads."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = PromptTokenizer(Tokenizer.from_file(str(path)))

    def ids(self, prompt: str, sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Ids of the whole conversation; `sizes` are the references' (width, height) in pixels."""
        side = TOKENS_PER_SLOT_SIDE
        return list(self.tokenizer.prompt(prompt, [w // side * (h // side) for w, h in sizes]).ids)

    @property
    def dropped(self) -> int:
        """Tokens of the system turn, which the DiT never sees."""
        return self.tokenizer.prompt("", []).dropped

    def encode(self, encoder: Encoder, ids: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """What the DiT reads: hidden states (B, L', C) and slots (L',), system turn dropped.

        `ids` (B, L) are whole conversations, `pictures` (B, R, H, W, 4) uint8 their references.
        """
        b, r, h, w, _ = pictures.shape
        if r:
            rows = on_white(pictures.reshape(b * r * h, w, 4) / 255)  # (3, B * R * H, W)
            pixels = rows.unflatten(1, (b * r, h)).transpose(0, 1)
            hidden = encoder.encode_ids(ids, patches(pixels), [(h // 16, w // 16)] * (b * r))
        else:
            hidden = encoder.encode_ids(ids)
        start = self.dropped
        return hidden[:, start:], ids[0, start:] == self.tokenizer.image_pad


def encoder_config(prompts: Prompts) -> EncoderConfig:
    return tiny_config(
        prompts.tokenizer.size,
        hidden=192, layers=3, heads=6, kv_heads=2, head_dim=32, intermediate=512,
        vision_hidden=128, vision_depth=2, vision_heads=4, vision_intermediate=256,
        vision_positions=64, deepstack=(0,),
    )  # fmt: skip


def build_encoder(prompts: Prompts) -> Encoder:
    """A fresh, randomly initialised encoder."""
    model = Qwen3VL(encoder_config(prompts)).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # louder words: what a layer adds must not drown them
        model.model.language_model.embed_tokens.weight.mul_(10)
    return Encoder(model, prompts.tokenizer)
