"""Files that are not what they should be: cut, damaged, hostile, or something else."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seedling.model_loaders.checkpoint import Checkpoint, CheckpointError, open_checkpoint


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4),
        "b.weight": torch.randn(10, 3, 3, 2, 2).bfloat16(),
        "scalar": torch.tensor(3.5),
        "half": torch.randn(7).half(),
        "empty": torch.empty(0, 4),
        "marker": torch.arange(5, dtype=torch.uint8),
    }


def raw(entries: object, data: bytes = b"", header: bytes | None = None) -> bytes:
    """The bytes of a safetensors file with this header."""
    header = json.dumps(entries).encode() if header is None else header
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n  <html lang=en>", "web page"),
        (b"PK\x03\x04rest of a zip", "pickle or a zip"),
        (b"\x80\x02}q\x00.", "pickle or a zip"),
        (b"\x1f\x8b\x08\x00rest", "compressed"),
        (b"GGUF\x03\x00\x00\x00", "GGUF file by another name"),
        (b"", "is empty"),
        (b"short", "not a safetensors file"),
        (b'{"error": "Access denied"}', "not a safetensors file"),
        (b"\0" * 64, "not a safetensors file"),
        (struct.pack("<Q", 200_000_000) + b"{}", "allowed are 100000000"),
        (struct.pack("<Q", 1000) + b'{"a": ', "cut short inside its header: 1008 bytes .* 14"),
        (raw({}), "holds no tensors"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, message):
    path = tmp_path / "thing.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"thing.safetensors.*{message}") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_endless_files_are_refused_without_waiting(tmp_path):
    with pytest.raises(CheckpointError, match="nope.safetensors does not exist"):
        open_checkpoint(tmp_path / "nope.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(CheckpointError, match="pipe.safetensors is not a regular file"):
            open_checkpoint(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError):
        open_checkpoint("with\0nul.safetensors")


def entry(dtype: object = "F32", shape: object = (2,), begin: int = 0, end: int = 8) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
CRAFTED = {
    "negative side": {"x": entry(shape=[-2])},
    "float side": {"x": entry(shape=[2.0])},
    "bool side": {"x": entry(shape=[True, 2])},
    "null side": {"x": entry(shape=[None])},
    "huge side": {"x": entry(shape=[1 << 60, 1 << 60])},
    "many sides": {"x": entry(shape=[1] * 10_000)},
    "shape is text": {"x": entry(shape="2")},
    "no shape": {"x": {"dtype": "F32", "data_offsets": [0, 8]}},
    "unknown dtype": {"x": entry(dtype="F33")},
    "dtype is a list": {"x": entry(dtype=["F32"])},
    "offsets reversed": {"x": entry(begin=8, end=0)},
    "offset negative": {"x": entry(begin=-8, end=0)},
    "offset is text": {"x": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
    "three offsets": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
    "too few bytes": {"x": entry(shape=[3])},
    "behind the end": {"x": entry(shape=[4], end=16)},
    "hole": {"x": entry(shape=[1], begin=4, end=8)},
    "overlap": {"x": entry(), "y": entry()},
    "rest unused": {"x": entry(shape=[1], end=4)},
    "entry is a number": {"x": 5},
    "metadata are numbers": {"__metadata__": {"a": 1}, "x": entry()},
    "metadata are a list": {"__metadata__": [], "x": entry()},
    "header is a list": [],
    "NaN": b'{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    "endless number": b'{"x": {"shape": [' + b"9" * 10_000 + b"]}}",
    "name twice": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "field twice": b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "deep": DEEP,
    "not UTF-8": b'{"\xff": 1}',
    "cut JSON": b'{"x": {',
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
def test_illegal_headers_are_refused_and_named(tmp_path, case):
    entries = CRAFTED[case]
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(
        raw(None, b"\0" * 8, entries) if isinstance(entries, bytes) else raw(entries, b"\0" * 8)
    )
    with pytest.raises(CheckpointError, match="crafted.safetensors") as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 400


def test_strange_names_are_just_names(tmp_path):
    names = ["a\0b", "../../x", "__class__", "__dict__.clear", "", " ", "é", "\ud800", "x" * 5000]
    entries = {name: entry(begin=8 * i, end=8 * i + 8) for i, name in enumerate(names)}
    path = tmp_path / "names.safetensors"
    path.write_bytes(raw(entries, b"\0" * 8 * len(names)))
    assert list(open_checkpoint(path).names) == names


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_file(some_tensors(), path, {"format": "pt"})
    return path, path.read_bytes()


def test_every_cut_is_one_sentence_with_the_file_and_the_sizes(whole):
    path, content = whole
    opened = open_checkpoint(path)
    edges = {e + d for i in opened.names.values() for e in (i.begin, i.end) for d in (-1, 0, 1)}
    cuts = {*range(64), *edges, *random.Random(0).sample(range(len(content)), 100)}
    short = path.with_name("short.safetensors")
    for cut in sorted(c for c in cuts if c < len(content)):
        short.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="short.safetensors") as caught:
            open_checkpoint(short)
        if cut > 10:
            assert str(cut) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_corruption_is_refused_or_read_as_the_library_reads_it(whole, data):
    path, content = whole
    changed = bytearray(content)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    bad = path.with_name("bad.safetensors")
    bad.write_bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])
    try:
        opened = open_checkpoint(bad)
    except CheckpointError as error:
        assert "bad.safetensors" in str(error)
        return
    same_as_library(opened, bad)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200) | st.builds(raw, JSON))
def test_any_bytes_are_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "any.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="any.safetensors"):
        open_checkpoint(path)


def same_as_library(opened: Checkpoint, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as library:
            keys = set(library.keys())
            assert keys == set(opened.names)
            for key in keys:
                theirs, ours = library.get_tensor(key), opened.tensor(key)
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                pair = (t.reshape(-1).view(torch.uint8) for t in (ours, theirs))  # NaNs too
                assert torch.equal(*pair)
    except SafetensorError:
        pytest.fail("the library refuses what was accepted")
