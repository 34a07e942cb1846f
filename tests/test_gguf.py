"""GGUF files: numbers as the `gguf` library has them, names of DiTs and of language models."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import load_dit, load_encoder
from seedling.quant.gguf import GGUF, TYPES
from seedling.quant.layouts import Parts
from seedling.quant.linear import QuantizedLinear

Kind = gguf.GGMLQuantizationType
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what the library can also quantize


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_the_librarys_bit_for_bit(kind: str) -> None:
    """Of random bytes, so that every code, scale and sign occurs; infinities among the scales."""
    block, size, numbers = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[Kind[kind]] == (block, size)
    raw = np.random.default_rng(0).integers(0, 256, (4096, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.dequantize(raw, Kind[kind]).reshape(-1, block))
    ours = torch.empty(len(raw), block)
    numbers(torch.from_numpy(raw), ours)
    assert torch.equal(ours.nan_to_num(0.25), theirs.nan_to_num(0.25))
    assert ours.isfinite().float().mean() > 0.8


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_may_begin_at_any_byte(kind: str) -> None:
    """Of one block too; a file's `general.alignment` may be 1. And in other dtypes."""
    block, size, _ = TYPES[kind]
    raw = torch.randint(0, 256, (3 * size + 1,), dtype=torch.uint8)
    raw[1::2] &= 59  # no scale is infinite
    raw[2::2] &= 59
    for count in (1, 3):
        moved, copied = raw[1 : 1 + count * size], raw[1 : 1 + count * size].clone()
        found = []
        for bytes in (moved, copied):
            parts = Parts({"weight": bytes[None]}, (1, count * block), settings={"type": kind})
            layout = GGUF(parts)
            found.append(layout.values())
            half = torch.empty(1, count * block, dtype=torch.bfloat16)
            layout.write(half)
            assert torch.equal(half, found[0].bfloat16())
        assert torch.equal(*found) and found[0].isfinite().all()
        assert layout.stored.data_ptr() == copied.data_ptr()


def stored(values: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """An array for the writer. Types that the library cannot make get random codes."""
    if kind in ("F32", "F16"):
        return values.numpy().astype({"F32": np.float32, "F16": np.float16}[kind]), None
    if kind in (*WRITABLE, "BF16"):
        return gguf.quantize(values.numpy(), Kind[kind]), Kind[kind]
    block, size, _ = TYPES[kind]
    rows, width = values.shape[0], values[0].numel()
    raw = np.random.default_rng(1).integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
        scale = np.full((rows, width // block), 0.002, dtype=np.float16)
        raw[:, :, place : place + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1), Kind[kind]


def write(
    path: Path, arch: str, tensors: dict[str, Tensor], kinds: str = "F32", keys: Any = None
) -> Path:
    """A GGUF file; `kinds`: the type of all tensors with two sides."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "long word"])
    writer.add_array("some.numbers", list(range(4000)))
    for key, value in (keys or {}).items():
        add = {list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    for name, values in tensors.items():
        kind = str(kinds) if values.ndim == 2 or kinds in ("F32", "F16") else "F32"
        if values.ndim == 2 and kind in TYPES and values.shape[1] % TYPES[kind][0]:
            kind = "F16"
        data, raw_type = stored(values, kind)
        writer.add_tensor(name, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def dit(tiny: Any) -> dict[str, Tensor]:
    """A DiT wide enough for blocks of 256."""
    from dataclasses import replace

    from seedling.model_loaders.families.qwen_image_21.dit import DiT

    config = replace(tiny.DIT, heads=8, mlp_dim=768, context_dim=256)
    torch.manual_seed(0)
    return {k: 0.05 * torch.randn_like(v) for k, v in DiT(config).state_dict().items()}


@pytest.mark.parametrize("arch", ["qwen_image21", "qwen_image", "pig", "flux"])
def test_the_architecture_in_the_file_does_not_matter(tmp_path: Path, dit: Any, arch: str) -> None:
    """Wild files say many things; names and shapes tell what a file is. With and without prefix."""
    prefix = "model.diffusion_model." if arch == "pig" else ""
    named = {prefix + name: values for name, values in dit.items()}
    loaded = load_dit(write(tmp_path / "q.gguf", arch, named, "Q8_0"))
    assert loaded.family.name == "qwen_image_21" and loaded.config.heads == 8
    assert "GGUF Q8_0" in " ".join(loaded.notes)


@pytest.mark.parametrize("kind", [*TYPES, "F16", "BF16", "F32"])
def test_layers_hold_what_the_library_reads(tmp_path: Path, dit: Any, kind: str) -> None:
    path = write(tmp_path / f"{kind}.gguf", "qwen_image21", dit, kind)
    loaded = load_dit(path)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    layer = loaded.module.transformer_blocks[1].img_mlp.gate_layer
    name = "transformer_blocks.1.img_mlp.gate_layer.weight"
    whole = torch.from_numpy(gguf.dequantize(theirs[name].data, theirs[name].tensor_type))
    whole = whole.view(loaded.checkpoint.names[name].shape)
    x = torch.randn(3, whole.shape[1])
    if kind in TYPES:
        assert isinstance(layer, QuantizedLinear) and torch.equal(layer.layout.weight(), whole)
        assert layer.layout.bytes == theirs[name].n_bytes
        assert layer.layout.stored.data_ptr() % 1 == 0  # mapped: no copy of the file
        report = inspect(path)
        assert f"GGUF {kind}" in str(report.quantization) and report.usable
    assert torch.allclose(layer(x), x @ whole.T, rtol=1e-4, atol=1e-5)


def test_asked_for_fp32_weights_are_written_out(tmp_path: Path, dit: Any) -> None:
    path = write(tmp_path / "q.gguf", "qwen_image21", dit, "Q8_0")
    whole = load_dit(path, dtype=torch.float32).module
    kept = load_dit(path).module
    layer, name = kept.transformer_blocks[0].attn.to_q, "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(whole.state_dict()[name], layer.layout.weight())


def test_original_shapes(tmp_path: Path) -> None:
    """ggml keeps at most four sides, so some tensors are stored with others."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen_image")
    writer.add_array("comfy.gguf.orig_shape.a.weight", [2, 3, 1, 4])
    writer.add_tensor("a.weight", np.arange(24, dtype=np.float32).reshape(6, 4))
    writer.add_tensor("b.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_checkpoint(path)
    assert opened.tensor("a.weight").flatten().tolist() == list(range(24))
    assert opened.names["a.weight"].shape == (2, 3, 1, 4)


# ---- language models ---------------------------------------------------------------------------

TEXT = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down"}  # fmt: skip
VISION = {"attn.qkv": "attn_qkv", "attn.proj": "attn_out", "norm1": "ln1", "norm2": "ln2",
          "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"}  # fmt: skip
MERGER = {"merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2",
          "pos_embed": "v.position_embd"}  # fmt: skip


def in_llama_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The text and the vision part of a Qwen3-VL as llama.cpp's converter calls them."""
    text, vision = {}, {}
    for name, values in state.items():
        layer, _, leaf = name.rpartition(".")
        if name.startswith("model.visual."):
            layer = layer.removeprefix("model.visual.")
            if layer == "patch_embed.proj" and leaf == "weight":
                vision["v.patch_embd.weight"] = values[:, :, 0].contiguous()
                vision["v.patch_embd.weight.1"] = values[:, :, 1].contiguous()
            elif layer == "patch_embed.proj":
                vision["v.patch_embd.bias"] = values
            elif layer.startswith("blocks."):
                _, i, rest = layer.split(".", 2)
                vision[f"v.blk.{i}.{VISION[rest]}.{leaf}"] = values
            elif layer.startswith("deepstack_merger_list."):
                _, i, rest = layer.split(".")
                at = 8 * (int(i) + 1)  # llama.cpp counts the vision part's layers
                vision[f"v.deepstack.{at}.{rest.replace('linear_', '')}.{leaf}"] = values
            else:
                vision[f"{MERGER[layer]}.{leaf}"] = values
        else:
            layer = layer.removeprefix("model.language_model.")
            if layer.startswith("layers."):
                _, i, rest = layer.split(".", 2)
                text[f"blk.{i}.{TEXT[rest]}.{leaf}"] = values
            else:
                text[f"{ {'embed_tokens': 'token_embd', 'norm': 'output_norm'}[layer] }.{leaf}"] = (
                    values
                )
    return text, vision


@pytest.fixture
def encoder(tmp_path: Path, tiny_model: Any) -> tuple[Path, Path, Any]:
    """A tiny encoder as two GGUF files, and the folder with its tokenizer."""
    state = load_encoder(tiny_model.encoder).module.model.state_dict()
    text, vision = in_llama_names(dict(state))
    path = write(tmp_path / "Qwen3-VL-8B-Q8_0.gguf", "qwen3vl", text, "Q8_0")
    keys = {"clip.vision.attention.head_count": 2, "clip.vision.is_deepstack_layers": [True]}
    write(tmp_path / "mmproj-Qwen3-VL-8B-F16.gguf", "clip", vision, "F16", keys)
    return path, tiny_model.tokenizer, state


def test_a_text_encoder_with_its_vision_part(encoder: Any) -> None:
    path, tokenizer, state = encoder
    loaded = load_encoder(path, tokenizer_paths=[tokenizer])
    for name, values in load_encoder(path, dtype=torch.float32, tokenizer_paths=[tokenizer]
                                     ).module.model.state_dict().items():  # fmt: skip
        assert (values - state[name]).abs().max() < 0.02 * state[name].abs().max(), name
    picture = torch.rand(64, 64, 3)
    read = loaded.module.encode("a red circle", [picture])
    assert read.hidden.isfinite().all() and read.slots.sum() == 4


OLDER = {"attn.proj": "attn_out", "norm1": "ln1", "norm2": "ln2", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
OLDER_MERGER = {"merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2"}


def test_the_older_vision_part_has_queries_keys_and_values_apart(tmp_path: Path) -> None:
    """Qwen2.5-VL: what the file keeps apart is one layer again, quantized parts too."""
    from seedling.model_loaders.families.qwen_image.encoder import Qwen25VL
    from seedling.model_loaders.families.qwen_image.qwen2_5_vl import tiny_config
    from seedling.model_loaders.load import find
    from seedling.model_loaders.quantized import written_out

    config = tiny_config(300)
    state = {k: torch.randn_like(v) for k, v in Qwen25VL(config).state_dict().items()}
    text, vision = {}, {}
    for name, values in state.items():
        layer, _, leaf = name.removeprefix("model.visual.").rpartition(".")
        if not name.startswith("model.visual."):
            text |= in_llama_names({name: values})[0]
        elif layer == "patch_embed.proj":
            for frame, end in ((0, ""), (1, ".1")):
                vision[f"v.patch_embd.weight{end}"] = values[:, :, frame].contiguous()
        elif layer.startswith("blocks."):
            _, i, rest = layer.split(".", 2)
            if rest == "attn.qkv":
                for part, third in zip("qkv", values.chunk(3), strict=True):
                    vision[f"v.blk.{i}.attn_{part}.{leaf}"] = third.contiguous()
            else:
                vision[f"v.blk.{i}.{OLDER[rest]}.{leaf}"] = values
        else:
            vision[f"{OLDER_MERGER[layer]}.{leaf}"] = values
    keys = {"clip.vision.attention.head_count": 2, "clip.vision.block_count": 3,
            "clip.vision.n_wa_pattern": 2, "clip.vision.window_size": 56}  # fmt: skip
    path = write(tmp_path / "Qwen2.5-VL-7B.gguf", "qwen2vl", text, "F32",
                 {"qwen2vl.attention.head_count": 2})  # fmt: skip
    write(tmp_path / "Qwen2.5-VL-7B-mmproj.gguf", "clip", vision, "Q8_0", keys)
    found = find("encoder", path)
    read = found.component.config(found.checkpoint)
    assert read == config
    for name, values in state.items():
        if found.checkpoint.names[name].form is None:
            got = found.checkpoint.tensor(name).float()
        else:
            got = written_out(found.checkpoint, name, torch.float32, torch.device("cpu"))
        assert (got - values).abs().max() < 0.02 * values.abs().max(), name


def test_a_text_encoder_alone_says_what_is_missing(encoder: Any) -> None:
    path, *_ = encoder
    next(path.parent.glob("mmproj*")).unlink()
    with pytest.raises(CheckpointError, match="mmproj"):
        load_encoder(path)
    assert "mmproj" in inspect(path).problems[0]


# ---- hostile headers ---------------------------------------------------------------------------


def raw(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


ONE = struct.pack("<QQ", 1, 0) + text("a.weight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "cut short inside its header"),
        (b"GGUX" + b"\0" * 40, "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9), "version 9"),
        (raw(struct.pack("<QQ", 1 << 60, 0)), "announces"),
        (raw(struct.pack("<QQ", 0, 1 << 60)), "announces"),
        (raw(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1 << 62)), "announces"),
        (raw(struct.pack("<QQ", 0, 1), text("k"), struct.pack("<IIQ", 9, 9, 4)), "lists of lists"),
        (raw(struct.pack("<QQ", 0, 1), text("k"), struct.pack("<I", 77)), "announces"),
        (raw(ONE, struct.pack("<I", 99)), "announces"),
        (raw(ONE, struct.pack("<IQQIQ", 2, 4, 4, 0, 0)), "cut short at tensor a.weight"),
        (raw(ONE, struct.pack("<IQQIQ", 2, 4, 4, 12, 0)), "no multiple of 256"),
        (raw(ONE, struct.pack("<IQQIQ", 2, 256, 1, 19, 0)), "as IQ1_S; readable are"),
        (raw(ONE, struct.pack("<IQQIQ", 2, 4, 4, 999, 0)), "unknown type 999"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"bad.gguf.*{message}"):
        open_checkpoint(path)
