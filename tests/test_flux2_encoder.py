"""FLUX.2's text encoders and their templates, against transformers on the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from seedling.model_loaders.families.flux2.encoder import Encoder, EncoderConfig, TextModel
from seedling.model_loaders.families.flux2.templates import (
    LENGTH,
    SYSTEM,
    MistralTokenizer,
    Qwen3Tokenizer,
)
from seedling.model_loaders.tokenizers import (
    QWEN_CONTROL,
    PromptError,
    TokenizerError,
    byte_level_bpe,
)
from seedling.quant.operations import widened

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
PROMPT = "a red cup, it's on\nthe table"
LETTERS = {word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def qwen(thoughts: bool = True) -> Tokenizer:
    added = {str(i): {"content": token} for i, token in enumerate(QWEN_CONTROL)}
    extra = {str(20 + i): {"content": f"<{end}think>", "special": False}
             for i, end in enumerate(("", "/"))}  # fmt: skip
    return byte_level_bpe(LETTERS, [], added | (extra if thoughts else {}))


def mistral() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in MistralTokenizer.needed])
    return tokenizer


def config(kind: str) -> EncoderConfig:
    tokenizer = qwen() if kind == "qwen3" else mistral()
    theta, eps = (1e6, 1e-6) if kind == "qwen3" else (1e9, 1e-5)
    return EncoderConfig(
        kind, tokenizer.get_vocab_size(with_added_tokens=True), hidden=32, read=(1, 3, 5), heads=4,
        kv_heads=2, head_dim=16, intermediate=48, theta=theta, eps=eps,
    )  # fmt: skip


def oracle_and_ours(kind: str) -> tuple[torch.nn.Module, TextModel]:
    torch.manual_seed(0)
    c = config(kind)
    settings = {
        **WIDTHS, "vocab_size": c.vocab_size, "rms_norm_eps": c.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta},
    }  # fmt: skip
    if kind == "qwen3":
        oracle = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    else:
        settings |= {"sliding_window": None}
        oracle = transformers.MistralForCausalLM(transformers.MistralConfig(**settings))
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = TextModel(c)
    weights = {k: v for k, v in oracle.state_dict().items() if k in ours.state_dict()}
    ours.load_state_dict(weights, strict=True)
    return oracle.eval(), ours


@torch.no_grad()
def test_qwen3_equals_what_the_published_pipeline_reads():
    """Its own code with the same prompt: template, padding and the layers."""
    oracle, ours = oracle_and_ours("qwen3")
    chat = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=qwen(), pad_token="<|endoftext|>", chat_template=chat
    )
    read = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds
    for prompt in (PROMPT, ""):
        theirs = read(oracle, tokenizer, prompt, hidden_states_layers=(1, 3, 5))
        got = Encoder(ours, Qwen3Tokenizer(qwen())).encode(prompt)
        assert got.hidden.shape == theirs.shape == (1, LENGTH, 96) and not got.slots.any()
        torch.testing.assert_close(got.hidden, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


@torch.no_grad()
def test_mistral_equals_transformers_on_the_published_conversation():
    """Padded in front; its template as text, read by the plain tokenizer."""
    oracle, ours = oracle_and_ours("mistral")
    text = f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]{PROMPT}[/INST]"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=mistral(), pad_token="<pad>", padding_side="left"
    )
    read = tokenizer(
        text, padding="max_length", max_length=LENGTH, return_tensors="pt", add_special_tokens=False
    )
    states = oracle(
        input_ids=read["input_ids"], attention_mask=read["attention_mask"],
        output_hidden_states=True, use_cache=False,
    ).hidden_states  # fmt: skip
    theirs = torch.cat([states[i] for i in (1, 3, 5)], dim=-1)
    got = Encoder(ours, MistralTokenizer(mistral())).encode(PROMPT).hidden
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_nothing_above_the_last_layer_that_is_read_is_built(kind):
    _, ours = oracle_and_ours(kind)
    assert len(ours.model.layers) == 5  # of 6
    assert not any("norm.weight" in name and "layers" not in name for name in ours.state_dict())


@torch.no_grad()
def test_16_bit_weights_are_read_with_fp32_arithmetic():
    _, ours = oracle_and_ours("qwen3")
    narrow = {k: v.bfloat16() for k, v in ours.state_dict().items()}
    wide = TextModel(ours.config)
    wide.load_state_dict({k: v.float() for k, v in narrow.items()})
    small = TextModel(ours.config, widened(), dtype=torch.bfloat16)
    small.load_state_dict(narrow)
    tokenizer = Qwen3Tokenizer(qwen())
    a, b = (Encoder(model, tokenizer).encode(PROMPT).hidden for model in (small, wide))
    assert torch.equal(a, b)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_a_prompt_holds_no_control_token(token):
    tokenizer = Qwen3Tokenizer(qwen())
    plain, ids = tokenizer.prompt("").ids, tokenizer.prompt(f"a {token} b").ids
    count = tokenizer.control[token]
    used = sum(tokenizer.prompt(f"a {token} b").read) - sum(tokenizer.prompt("").read)
    assert used == len(f"a {token} b")  # letters, over a vocabulary of bytes
    assert ids.count(count) == plain.count(count) - (used if token == tokenizer.pad else 0)


@pytest.mark.parametrize(
    ("make", "tokenizer"), [(Qwen3Tokenizer, qwen), (MistralTokenizer, mistral)]
)
def test_a_prompt_that_is_too_long_is_refused_with_its_room(make, tokenizer):
    made = make(tokenizer())
    room = LENGTH - sum(made.prompt("").read)
    assert all(made.prompt("x" * room).read)
    with pytest.raises(PromptError, match=f"has {room + 1} tokens, .* reads at most {room}"):
        made.prompt("x" * (room + 1))


def test_tokenizers_of_other_models_are_refused():
    with pytest.raises(TokenizerError, match="no <think>"):
        Qwen3Tokenizer(qwen(thoughts=False))
    with pytest.raises(TokenizerError, match=r"no <s>.*Mistral Small 3"):
        MistralTokenizer(qwen())
    _, ours = oracle_and_ours("qwen3")
    more = qwen()
    more.add_tokens(["another"])
    with pytest.raises(TokenizerError, match="do not belong together"):
        Encoder(ours, Qwen3Tokenizer(more))


@pytest.mark.parametrize(
    ("kind", "widths", "layers"),
    [
        ("qwen3", {}, (27, 36)),
        ("qwen3", {"hidden": 4096, "intermediate": 12288}, (27, 36)),
        ("mistral", {"vocab_size": 131072, "hidden": 5120, "intermediate": 32768,
                     "read": (10, 20, 30)}, (30, 40)),
    ],
)  # fmt: skip
def test_a_quarter_of_the_published_layers_is_never_there(
    kind: str, widths: dict[str, Any], layers: tuple[int, int]
) -> None:
    """By the published configs, on the meta device: neither loaded nor run."""
    read, all_of_them = layers
    ours = TextModel(EncoderConfig(kind, **widths), device="meta")
    per_layer = sum(p.numel() for p in ours.model.layers[0].parameters())
    assert len(ours.model.layers) == read == 0.75 * all_of_them
    assert sum(p.numel() for p in ours.model.layers.parameters()) == read * per_layer
    whole = sum(p.numel() for p in ours.parameters()) + (all_of_them - read) * per_layer
    saved = (all_of_them - read) * per_layer / whole
    assert 0.22 < saved < 0.25  # the embedding stays
