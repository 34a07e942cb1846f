"""The text encoder of Qwen-Image-2.1 against transformers and diffusers, same weights, fp32."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from seedling.model_loaders.families.qwen_image_21.encoder import (
    Encoder,
    EncoderConfig,
    PictureError,
    Qwen3VL,
    on_white,
    patches,
    tiny_config,
)
from seedling.model_loaders.families.qwen_image_21.keys import ENCODER_UNUSED
from seedling.model_loaders.families.qwen_image_21.templates import (
    SYSTEM,
    PromptTokenizer,
    find_tokenizer,
)
from seedling.model_loaders.qwen_vl import positions
from seedling.model_loaders.tokenizers import PromptError, TokenizerError, byte_level_bpe
from seedling.quant.operations import widened

transformers = pytest.importorskip("transformers")
SENTENCES = [
    f"system\n{SYSTEM}",
    "user\na red cup on the wooden table, it's the 2nd of 3",
    "<image1> put the cup of <image2> on the table\n\nassistant\n",
    "一只红色的杯子放在桌子上，把杯子变成蓝色",
]
# Width, height and mode of references, unequal on purpose.
PICTURES = [(96, 64, "RGBA"), (32, 128, "RGB"), (64, 64, "RGBA")]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE with Qwen's rules and control tokens, trained on the sentences above."""
    rules = byte_level_bpe({}, [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = rules.pre_tokenizer, rules.normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return byte_level_bpe(model["vocab"], [(a, b) for a, b in model["merges"]])


TOKENIZER = PromptTokenizer(trained_tokenizer())
WHOLE = trained_tokenizer()  # parses control tokens: encodes a conversation at once


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(count)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, len(mode)), dtype=np.uint8), mode)
        for w, h, mode in PICTURES[:count]
    ]


def tensors(images: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(image)).float() / 255.0 for image in images]


def published_config(config: EncoderConfig, **ids: int) -> Any:
    """transformers' config as it is published, with the rotary sections written by hand."""
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": config.theta,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": {128: [24, 20, 20], 32: [6, 5, 5]}[config.head_dim],
        },
    }
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden,
        "intermediate_size": config.vision_intermediate,
        "num_heads": config.vision_heads,
        "out_hidden_size": config.hidden,
        "num_position_embeddings": config.vision_positions,
        "deepstack_visual_indexes": list(config.deepstack),
    }
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


CONFIG = tiny_config(
    TOKENIZER.size, hidden=64, heads=4, intermediate=96, vision_hidden=48, vision_intermediate=80,
    vision_depth=4, vision_heads=3, deepstack=(0, 2), theta=100.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def oracle() -> Any:
    ids = {"image_token_id": TOKENIZER.image_pad, "video_token_id": CONFIG.vocab_size - 1}
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(published_config(CONFIG, **ids)).eval()
    for name, parameter in model.named_parameters():
        around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, around, 0.1)
    return model


def weights(oracle: Any) -> dict[str, torch.Tensor]:
    return {name: w for name, w in oracle.state_dict().items() if name not in ENCODER_UNUSED}


@pytest.fixture(scope="module")
def encoder(oracle: Any) -> Encoder:
    model = Qwen3VL(CONFIG)
    model.load_state_dict(weights(oracle), strict=True)
    return Encoder(model, TOKENIZER)


@pytest.fixture(scope="module")
def processor() -> Any:
    """Qwen3-VL's processor, without the video part that needs torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(transformers.Qwen3VLProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            pass

    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096},
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=WHOLE, pad_token="<|endoftext|>")
    return Processor(image_processor, fast, None, chat_template=CHAT)


@pytest.fixture(scope="module")
def pipeline(oracle: Any, processor: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.QwenImage21Pipeline(None, None, oracle, processor, None)


# ---- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_conditioning_is_that_of_diffusers(encoder: Encoder, pipeline: Any, count: int) -> None:
    images = pictures(count)
    for prompt in ("put the red cup of <image1> on the table, 杯子\n", ""):
        with torch.no_grad():
            hidden, _, slots = pipeline._get_qwen_prompt_embeds(prompt, images or None, "cpu")
        ours = encoder.encode(prompt, tensors(images))
        close(ours.hidden, hidden)
        assert torch.equal(ours.slots, slots[0])
        assert ours.grids == [(h // 16, w // 16) for w, h, _ in PICTURES[:count]]
        assert int(ours.slots.sum()) == sum(h * w // 4 for h, w in ours.grids)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_hidden_states_are_those_of_transformers(encoder: Encoder, oracle: Any, count: int) -> None:
    """A batch of conversations: the last layer's output, caught by a hook on it."""
    sizes = [(h // 16, w // 16) for w, h, _ in PICTURES[:count]]
    rows = [TOKENIZER.prompt(p, [h * w // 4 for h, w in sizes]) for p in ("a cup", "cup a")]
    ids = torch.tensor([rows[0].ids, rows[1].ids[: len(rows[0].ids)]])
    pixels = [torch.rand(1, 3, h * 16, w * 16) for h, w in sizes] * 2
    values = torch.cat([patches(p) for p in pixels]) if pixels else None
    grid = torch.tensor([(1, h, w) for h, w in sizes * 2])
    caught: list[torch.Tensor] = []
    layer = oracle.model.language_model.norm
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        oracle(
            input_ids=ids,
            pixel_values=values,
            image_grid_thw=grid if count else None,
            mm_token_type_ids=(ids == TOKENIZER.image_pad).int(),
        )
        hook.remove()
        close(encoder.encode_ids(ids, values, grid if count else ()), caught[0])


def test_patches_are_those_of_the_processor(processor: Any) -> None:
    opaque = [image.convert("RGB") for image in pictures(3)]
    theirs = processor.image_processor(opaque, return_tensors="pt")
    ours = torch.cat([patches(on_white(image)[None]) for image in tensors(opaque)])
    close(ours, theirs["pixel_values"], 1e-6)
    assert theirs["image_grid_thw"].tolist() == [[1, h // 16, w // 16] for w, h, _ in PICTURES]


def test_transparent_pixels_are_white() -> None:
    image = pictures(1)[0]
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    ours = (on_white(tensors([image])[0]) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(ours.numpy(), np.array(white))


def test_every_weight_learns(encoder: Encoder) -> None:
    model = Qwen3VL(CONFIG).initialise(torch.Generator().manual_seed(0))
    ids = TOKENIZER.prompt("a cup", [4])
    batch = torch.tensor([ids.ids, ids.ids])
    values = patches(torch.rand(2, 3, 64, 64))
    hidden = Encoder(model, TOKENIZER).encode_ids(batch, values, [(4, 4)] * 2)
    hidden.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []


def test_text_before_is_not_read_again(encoder: Encoder) -> None:
    """In parts, with the keys and values of those before, as in one piece."""
    ids = torch.tensor([TOKENIZER.prompt("the red cup").ids])
    slots = torch.zeros_like(ids, dtype=torch.bool)
    embedded, where = encoder.model.model.language_model.embed_tokens(ids), positions(slots, [])
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old = kept.get(layer)
        joined = new if old is None else [torch.cat(pair, 2) for pair in zip(old, new, strict=True)]
        kept[layer] = joined[0], joined[1]
        return kept[layer]

    with torch.no_grad():
        whole = encoder.model(ids, slots)
        for start, end in ((0, 20), (20, ids.shape[1])):
            part = slice(start, end)
            read = encoder.model.read(
                embedded[:, part], slots[:, part], None, where[..., part], see, start
            )
            close(read, whole[:, part])


def test_built_on_meta_then_filled(encoder: Encoder, oracle: Any) -> None:
    model = Qwen3VL(CONFIG, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(weights(oracle), strict=True, assign=True)
    images = tensors(pictures(1))
    filled = Encoder(model, TOKENIZER).encode("a cup", images)
    close(filled.hidden, encoder.encode("a cup", images).hidden, 0.0)


def test_16_bit_weights_are_widened(encoder: Encoder) -> None:
    """bf16 weights with fp32 arithmetic: exactly the fp32 network of the rounded weights."""
    half = Qwen3VL(CONFIG, widened(), dtype=torch.bfloat16)
    half.load_state_dict(encoder.model.state_dict())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    rounded = Qwen3VL(CONFIG)
    rounded.load_state_dict({n: w.float() for n, w in half.state_dict().items()})
    images = tensors(pictures(2))
    a, b = (Encoder(m, TOKENIZER).encode("a cup", images).hidden for m in (half, rounded))
    assert a.dtype == torch.float32
    close(a, b, 1e-6)


# ---- the config --------------------------------------------------------------------------------

CONFIG_4B = EncoderConfig(
    hidden=2560, intermediate=9728, vision_hidden=1024, vision_depth=24, vision_intermediate=4096,
    deepstack=(5, 11, 17),
)  # fmt: skip


@pytest.mark.parametrize("config", [EncoderConfig(), CONFIG_4B], ids=["8B", "4B"])
def test_published_files_map_one_to_one(config: EncoderConfig) -> None:
    """Names and shapes at full size, and the config back from them alone."""
    with torch.device("meta"):
        theirs = transformers.Qwen3VLForConditionalGeneration(published_config(config))
    shapes = {name: tuple(w.shape) for name, w in theirs.state_dict().items()}
    assert set(ENCODER_UNUSED) <= set(shapes)
    names = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    header: Any = SimpleNamespace(names=names, config={})
    assert EncoderConfig.from_header(header) == config
    ours = {n: tuple(w.shape) for n, w in Qwen3VL(config, device="meta").state_dict().items()}
    assert ours == {name: shape for name, shape in shapes.items() if name not in ENCODER_UNUSED}


def test_config_survives_a_file() -> None:
    odd = replace(CONFIG, theta=10000.0, eps=1e-5)
    header: Any = SimpleNamespace(
        names=Qwen3VL(odd, device="meta").state_dict(), config=json.loads(json.dumps(odd.to_json()))
    )
    assert EncoderConfig.from_header(header) == odd
    header.config["text_config"] = {"rope_parameters": {"rope_theta": 7.0}}
    assert EncoderConfig.from_header(header).theta == 7.0
    header.config.clear()  # nothing says that the vision tower has 3 heads
    with pytest.raises(ValueError, match="needs the config.json"):
        EncoderConfig.from_header(header)


@pytest.mark.parametrize("head_dim, sections", [(128, (24, 20, 20)), (64, (12, 10, 10))])
def test_rotary_sections(head_dim: int, sections: tuple[int, int, int]) -> None:
    assert replace(CONFIG, head_dim=head_dim).mrope == sections


# ---- the prompt --------------------------------------------------------------------------------


def conversation(prompt: str, slots: list[int]) -> str:
    """The published template, written out as one string."""
    images = " ".join(
        f"<image{i}><|vision_start|>{'<|image_pad|>' * n}<|vision_end|>"
        for i, n in enumerate(slots, start=1)
    )
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{images}{prompt or ' '}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


BITS = [
    " ",
    "\n",
    "\r",
    "\t",
    "it's",
    "cup",
    "杯子",
    "<",
    "|",
    ">",
    "<image1>",
    "e",
    "\u0301",
    "12",
]
WILD = st.lists(st.sampled_from(BITS) | st.characters(exclude_categories=["Cs"]), max_size=12).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(prompt=WILD, slots=st.lists(st.integers(1, 6), max_size=3))
def test_ids_are_those_of_the_whole_conversation(prompt: str, slots: list[int]) -> None:
    ours = TOKENIZER.prompt(prompt, slots)
    assert list(ours.ids) == WHOLE.encode(conversation(prompt, slots)).ids
    assert sum(ours.slots) == sum(slots)


def test_the_system_turn_is_dropped(pipeline: Any) -> None:
    ids = TOKENIZER.prompt("a cup")
    assert ids.dropped == pipeline._drop_idx
    assert WHOLE.decode(list(ids.ids[ids.dropped :]), skip_special_tokens=False) == (
        "<|im_start|>user\na cup<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("slots", [[], [2]])
@pytest.mark.parametrize("token", PromptTokenizer.needed)
def test_a_prompt_cannot_write_control_tokens(token: str, slots: list[int]) -> None:
    plain, attack = TOKENIZER.prompt("a", slots), TOKENIZER.prompt(token, slots)
    control = set(TOKENIZER.control.values())
    assert [i for i in attack.ids if i in control] == [i for i in plain.ids if i in control]
    assert token in WHOLE.decode(list(attack.ids), skip_special_tokens=True)


def test_broken_text_is_refused() -> None:
    with pytest.raises(PromptError, match="U\\+D83D"):
        TOKENIZER.prompt("a \ud83d cup")


@pytest.mark.parametrize("shape", [(64, 60, 3), (0, 32, 3), (64, 64, 1), (1, 64, 64, 3)])
def test_unfit_pictures_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(PictureError, match="Reference 2"):
        encoder.encode("a cup", [torch.zeros(32, 32, 3), torch.zeros(shape)])


# ---- finding the tokenizer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["beside/tiny.tokenizer.json", "beside/tokenizer.json", "tokenizer/tokenizer.json",
     "processor/tokenizer.json", "elsewhere/tokenizer.json", "elsewhere/vocab.json"],
)  # fmt: skip
def test_tokenizer_is_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    (tmp_path / "beside").mkdir(exist_ok=True)
    if path.name == "vocab.json":
        WHOLE.model.save(str(path.parent))
    else:
        WHOLE.save(str(path))
    encoder = tmp_path / "beside" / "tiny.safetensors"
    found = find_tokenizer(encoder, CONFIG.vocab_size, [tmp_path / "elsewhere"])
    assert found.prompt("a cup, 杯子", [2]) == TOKENIZER.prompt("a cup, 杯子", [2])


def test_another_models_tokenizer_is_passed_over(tmp_path: Path) -> None:
    encoder = tmp_path / "tiny.safetensors"
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged.*tiny\.tokenizer\.json"):
        find_tokenizer(encoder)
    WHOLE.save(str(tmp_path / "own.json"))
    assert find_tokenizer(encoder, None, [tmp_path / "own.json"]).size == CONFIG.vocab_size
    with pytest.raises(TokenizerError, match="the encoder 100"):
        find_tokenizer(encoder, 100, [tmp_path / "own.json"])


def test_encoder_and_tokenizer_must_fit(encoder: Encoder) -> None:
    with pytest.raises(TokenizerError, match="do not belong together"):
        Encoder(encoder.model, TOKENIZER, replace(CONFIG, vocab_size=300))


def test_control_tokens_must_be_special() -> None:
    added = {
        str(i): {"content": token, "special": False}
        for i, token in enumerate(PromptTokenizer.needed)
    }
    with pytest.raises(TokenizerError, match="does not mark"):
        PromptTokenizer(byte_level_bpe({}, [], added))


@pytest.mark.comfyui
def test_comfyuis_copy_of_qwens_tokenizer() -> None:
    """The real vocabulary: published ids, and the system turn has the published fourteen tokens."""
    folder = Path(os.environ["COMFYUI_DIR"]) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    real = find_tokenizer("nowhere.safetensors", 151936, [folder])
    assert list(real.control.values()) == [151644, 151645, 151652, 151653, 151655]
    ids = real.prompt("make it red, 杯子", [2])
    assert ids.dropped == 14
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(conversation("make it red, 杯子", [2])).input_ids == list(ids.ids)
