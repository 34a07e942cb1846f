"""The header of a GGUF file, read as if somebody hostile had written it, and its tensors' names.

A file is magic, version and counts, then keys with values, then the tensors' names, sides (the
fastest first) and places, then their bytes (ggml, docs/gguf.md). DiTs keep their published names.
Language models and their vision parts (`mmproj`) have llama.cpp's, which become ComfyUI's here.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from .header import MAX_DIMENSIONS, MAX_SIDE, Form, Header, TensorInfo, damaged, printable

MAX_COUNT = 1_000_000  # keys, tensors, entries of a list
MAX_TEXT = 1 << 24
SHORT = 1024  # numbers in a list that is kept
# Kinds of values: struct's letter, by their number; 8 is text, 9 a list.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, LIST = 8, 9
# ggml's types by their number. Plain ones: as they are called in safetensors files.
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
BLOCKS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1}
# Architectures whose tensors have llama.cpp's names. Their q and k are not reordered.
LANGUAGE = ("qwen2", "qwen2vl", "qwen3", "qwen3vl")
VISION = "clip"
WITH_VISION = ("qwen2vl", "qwen3vl")  # whose vision part is a file of its own


def read_gguf(path: Path) -> Header:
    """Read and check the header of the GGUF file `path`. Raises CheckpointError."""
    status = path.stat()
    with path.open("rb") as file:
        reader = _Reader(path, file, status.st_size)
        values = reader.header()
        names = reader.tensors(values)
    arch = values.get("general.architecture")
    metadata = {key: str(v) for key, v in values.items() if isinstance(v, str | int | float)}
    if arch in LANGUAGE:
        names = _renamed(path, names, _language)
    elif arch == VISION:
        names = _vision(path, names)
    else:  # whatever it says ("flux", "qwen_image", "pig"): its names tell what it is
        names = {_bare(name): info for name, info in names.items()}
    metadata["config"] = json.dumps(_config(str(arch), values))
    return Header(names, metadata, (status.st_size, status.st_mtime_ns))


def _config(arch: str, values: dict[str, Any]) -> dict[str, Any]:
    """What shapes cannot tell of a language model or its vision part, in transformers' words."""
    if arch == VISION:
        marks = values.get("clip.vision.is_deepstack_layers")
        levels = [i for i, mark in enumerate(marks or ()) if mark]
        depth = int(values.get("clip.vision.block_count") or 0)
        every = int(values.get("clip.vision.n_wa_pattern") or 0)
        said = {
            "num_heads": values.get("clip.vision.attention.head_count"),
            "deepstack_visual_indexes": levels or None,
            "window_size": values.get("clip.vision.window_size"),
            "fullatt_block_indexes": [*range(every - 1, min(depth, SHORT), every)]
            if every > 0
            else None,
        }
        return {"vision_config": {key: v for key, v in said.items() if v is not None}}
    said = {
        "num_attention_heads": values.get(f"{arch}.attention.head_count"),
        "rope_theta": values.get(f"{arch}.rope.freq_base"),
        "rms_norm_eps": values.get(f"{arch}.attention.layer_norm_rms_epsilon"),
    }
    own = {key: v for key, v in said.items() if v is not None}
    return {"text_config": own} if arch in LANGUAGE and own else {}


def vision_beside(path: Path) -> Path | None:
    """The file with the vision part of the language model `path`, in the same folder.

    Of several the one that has most of its name in common.
    """
    found = [p for p in path.parent.glob("*.gguf") if "mmproj" in p.name.lower() and p != path]

    def alike(other: Path) -> int:
        words = set(re.split(r"[-_.]", path.stem.lower()))
        return len(words & set(re.split(r"[-_.]", other.stem.lower())))

    return max(sorted(found), key=alike, default=None)


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.count = 0

    def take(self, count: int) -> bytes:
        got = self.file.read(count) if 0 <= count <= self.size else b""
        if len(got) != count:
            raise damaged(self.path, "is cut short inside its header")
        return got

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def limited(self, letter: str, what: str, most: int = MAX_COUNT) -> int:
        value = self.number(letter)
        if value > most:
            raise damaged(self.path, f"announces {value} {what}: it is damaged")
        return value

    def text(self) -> str:
        return self.take(self.limited("Q", "bytes of text", MAX_TEXT)).decode("utf-8", "replace")

    def header(self) -> dict[str, Any]:
        if self.take(4) != b"GGUF":
            raise damaged(self.path, "is not a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            raise damaged(self.path, f"is a GGUF file of version {version}, readable are 2 and 3")
        self.count = self.limited("Q", "tensors")
        keys = self.limited("Q", "keys")
        return {self.text(): self.value(self.limited("I", "as a kind", 12)) for _ in range(keys)}

    def value(self, kind: int) -> Any:
        """A value; of lists only those of a few numbers, the others are stepped over."""
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(NUMBERS[kind])
        inner, count = self.limited("I", "as a kind", 12), self.limited("Q", "entries")
        if inner in NUMBERS and count <= SHORT:
            return [self.number(NUMBERS[inner]) for _ in range(count)]
        if inner in NUMBERS:
            self.skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
        elif inner == TEXT:
            for _ in range(count):
                self.skip(self.limited("Q", "bytes of text", MAX_TEXT))
        else:
            raise damaged(self.path, "has lists of lists among its keys")
        return None

    def skip(self, count: int) -> None:
        if self.file.seek(count, 1) > self.size:
            raise damaged(self.path, "is cut short inside its header")

    def tensors(self, values: dict[str, Any]) -> dict[str, TensorInfo]:
        listed = [self.entry() for _ in range(self.count)]
        step = values.get("general.alignment", 32)
        if not isinstance(step, int) or not 1 <= step <= 1 << 16:
            raise damaged(self.path, f"has an alignment of {step}")
        start = -(-self.file.tell() // step) * step
        names: dict[str, TensorInfo] = {}
        for name, sides, kind, offset in listed:
            if name in names:
                raise damaged(self.path, f"names {printable(name)} twice: it is damaged")
            original = values.get(f"comfy.gguf.orig_shape.{name}")
            names[name] = self.info(name, sides, kind, start + offset, original)
        return names

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        count = self.limited("I", f"sides of {printable(name)}", MAX_DIMENSIONS)
        sides = tuple(self.limited("Q", "as a side", MAX_SIDE) for _ in range(count))[::-1]
        return name, sides, self.number("I"), self.limited("Q", "as a place", MAX_SIDE)

    def info(
        self, name: str, sides: tuple[int, ...], kind: int, begin: int, original: Any
    ) -> TensorInfo:
        where, count = printable(name), math.prod(sides)
        if kind in PLAIN:
            dtype = PLAIN[kind]
            size, form = count * BYTES[dtype], None
            stored = sides
        elif kind in BLOCKS:
            from ..quant.gguf import TYPES

            dtype = BLOCKS[kind]
            if dtype not in TYPES:
                readable = ", ".join(TYPES)
                raise damaged(self.path, f"holds {where} as {dtype}; readable are {readable}")
            block, bytes, _ = TYPES[dtype]
            if not sides or sides[-1] % block:
                raise damaged(self.path, f"holds {where} of {sides}, no multiple of {block}")
            size, out = count // block * bytes, math.prod(sides[:-1])
            stored = (out, size // max(out, 1))
            raw = TensorInfo("U8", stored, self.path, name, begin, begin + size, stored)
            form = Form("gguf", {"weight": raw}, sides[0], {"type": dtype})
        else:
            raise damaged(self.path, f"holds {where} as the unknown type {kind}")
        if begin + size > self.size:
            raise damaged(self.path, f"is cut short at tensor {where}")
        shape = sides
        if isinstance(original, list) and math.prod(original) == count:
            shape = tuple(map(int, original))  # ggml knows at most 4 sides
            stored = stored if form else shape
        return TensorInfo(dtype, shape, self.path, name, begin, begin + size, stored, form=form)


def _bare(name: str) -> str:
    return name.removeprefix("model.diffusion_model.")


# ---- names of language models ------------------------------------------------------------------

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def _language(name: str) -> str:
    if inside := IN_LAYER.fullmatch(name):
        return f"model.layers.{inside[1]}.{LAYER.get(inside[2], inside[2])}.{inside[3]}"
    layer, _, leaf = name.rpartition(".")
    return f"{TOP.get(layer, layer)}.{leaf}"


# Two generations of vision parts: Qwen2.5-VL has gated MLPs, Qwen3-VL linear_fc1 and DeepStack.
BLOCK = {
    "attn_out": "attn.proj", "attn_qkv": "attn.qkv", "ln1": "norm1", "ln2": "norm2",
    "ffn_gate": "mlp.gate_proj",
}  # fmt: skip
MLP = {False: {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
       True: {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"}}  # fmt: skip
MERGER = {
    False: {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"},
    True: {"v.post_ln": "merger.norm", "mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"},
}  # fmt: skip
IN_BLOCK = re.compile(r"v\.blk\.(\d+)\.(.+)\.(weight|bias)")
DEEPSTACK = re.compile(r"v\.deepstack\.(\d+)\.(norm|fc1|fc2)\.(weight|bias)")


def _vision(path: Path, names: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The vision part under ComfyUI's names: patch embedding whole, query, key and value fused."""
    gated = any(".ffn_gate." in name for name in names)
    levels = sorted({int(found[1]) for name in names if (found := DEEPSTACK.fullmatch(name))})

    def rename(name: str) -> str:
        if inside := IN_BLOCK.fullmatch(name):
            layer = {**BLOCK, **MLP[not gated]}.get(inside[2], inside[2])
            return f"visual.blocks.{inside[1]}.{layer}.{inside[3]}"
        if level := DEEPSTACK.fullmatch(name):
            layer = level[2].replace("fc", "linear_fc")
            return f"visual.deepstack_merger_list.{levels.index(int(level[1]))}.{layer}.{level[3]}"
        layer, _, leaf = name.rpartition(".")
        tops = {"v.patch_embd": "patch_embed.proj", "v.position_embd": "pos_embed"}
        return f"visual.{ {**tops, **MERGER[not gated]}.get(layer, layer) }.{leaf}"

    frames = [names.pop(n, None) for n in ("v.patch_embd.weight", "v.patch_embd.weight.1")]
    renamed = _renamed(path, names, rename)
    for name, info in _fused(renamed):
        renamed[name] = info
    first, second = frames
    if first and second and len(first.shape) == 4:
        out, channels, *sides = first.shape
        form = Form("stacked", {"weight": first, "second": second}, out)
        shape = (out, channels, 2, *sides)
        renamed["visual.patch_embed.proj.weight"] = replace(
            first, dtype="stacked", shape=shape, form=form
        )
    return renamed


def _fused(names: dict[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """attn_q, attn_k and attn_v of a block as attn.qkv; they are taken out of `names`."""
    for name in [n for n in names if re.search(r"\.attn_q\.(weight|bias)$", n)]:
        parts = [names.pop(name.replace(".attn_q.", f".attn_{part}.")) for part in "qkv"]
        first = parts[0]
        shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        form = Form(
            "joined", dict(zip(("weight", "second", "third"), parts, strict=True)), shape[0]
        )
        yield (
            name.replace(".attn_q.", ".attn.qkv."),
            replace(first, dtype="joined", shape=shape, form=form),
        )


def _renamed(path: Path, names: dict[str, TensorInfo], rename: Any) -> dict[str, TensorInfo]:
    renamed = {rename(name): info for name, info in names.items()}
    if len(renamed) != len(names):
        raise damaged(path, "has two tensors for the same place: it is damaged")
    return renamed
