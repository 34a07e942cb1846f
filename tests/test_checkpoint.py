"""Opening checkpoints: the lazy view, files and folders of shards."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders import checkpoint as module
from seedling.model_loaders.checkpoint import CheckpointError, Source, open_checkpoint


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_file(some_tensors(), path, {"format": "pt", "config": '{"answer": 42}'})
    return path


def raw(entries: object, data: bytes = b"", header: bytes | None = None) -> bytes:
    """The bytes of a safetensors file with this header."""
    header = json.dumps(entries).encode() if header is None else header
    return struct.pack("<Q", len(header)) + header + data


# The view


def test_names_shapes_and_values_are_those_of_the_library(file):
    opened = open_checkpoint(file)
    expected = some_tensors()
    assert {k: v.shape for k, v in opened.names.items()} == {
        k: tuple(v.shape) for k, v in expected.items()
    }
    for key, value in expected.items():
        assert torch.equal(opened.tensor(key), value) and opened.tensor(key).dtype == value.dtype
        out = torch.empty(value.shape, dtype=torch.float64)
        opened.copy_into(key, out)
        assert torch.equal(out, value.double())
    assert opened.config == {"answer": 42}
    assert opened.metadata["format"] == "pt"
    assert opened.path == file and opened.files == [file]


def test_a_tensor_is_mapped_not_copied_and_the_file_is_safe(file):
    opened = open_checkpoint(file)
    first = opened.tensor("a.weight")
    assert first.data_ptr() == opened.tensor("a.weight").data_ptr()
    before = file.read_bytes()
    first.fill_(7.0)
    assert file.read_bytes() == before
    assert not torch.equal(open_checkpoint(file).tensor("a.weight"), first)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_a_view_takes_rows_and_the_last_tap(file, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    opened, expected = open_checkpoint(file), some_tensors()
    view = opened.view(
        {
            "upper": Source("a.weight", rows=(0, 3)),
            "lower": Source("a.weight", rows=(3, 6)),
            "conv": Source("b.weight", last_tap=True),
            "s": Source("scalar"),
        }
    )
    assert set(view.names) == {"upper", "lower", "conv", "s", "half", "empty", "marker"}
    pairs = {
        "upper": expected["a.weight"][:3],
        "lower": expected["a.weight"][3:],
        "conv": expected["b.weight"][:, :, -1],
        "s": expected["scalar"],
    }
    for key, value in pairs.items():
        assert view.names[key].shape == tuple(value.shape)
        assert torch.equal(view.tensor(key), value) and view.tensor(key).is_contiguous()
        out = torch.empty(value.shape)
        view.copy_into(key, out)
        assert torch.equal(out, value.float())
    assert view.tensor("lower").data_ptr() == opened.tensor("a.weight")[3:].data_ptr()


def test_a_view_that_would_hide_a_tensor_is_refused(file):
    with pytest.raises(CheckpointError, match="some.safetensors holds half twice"):
        open_checkpoint(file).view({"half": Source("scalar")})


def test_tensors_off_their_boundary_are_read_all_the_same(tmp_path):
    values = torch.randn(3)
    entries = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    path = tmp_path / "odd.safetensors"
    path.write_bytes(raw(entries, b"\0" + values.numpy().tobytes()))
    assert torch.equal(open_checkpoint(path).tensor("x"), values)


def test_a_file_that_changed_since_it_was_opened_is_an_error_not_a_crash(file):
    opened = open_checkpoint(file)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="some.safetensors has changed"):
        opened.tensor("a.weight")
    with pytest.raises(CheckpointError, match="some.safetensors has changed"):
        opened.copy_into("a.weight", torch.empty(6, 4))
    file.unlink()
    with pytest.raises(CheckpointError, match="some.safetensors has changed"):
        opened.tensor("a.weight")


# Folders


def shards(folder: Path, weight_map: dict | None = None) -> Path:
    folder.mkdir()
    tensors = list(some_tensors().items())
    save_file(dict(tensors[:3]), folder / "w-00001-of-00002.safetensors")
    save_file(dict(tensors[3:]), folder / "w-00002-of-00002.safetensors")
    real = {k: "w-00001-of-00002.safetensors" for k, _ in tensors[:3]}
    real |= {k: "w-00002-of-00002.safetensors" for k, _ in tensors[3:]}
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": real if weight_map is None else weight_map}))
    return folder


def test_a_sharded_folder_reads_like_one_file(tmp_path, file):
    folder = shards(tmp_path / "transformer")
    (folder / "config.json").write_text('{"num_layers": 3}')
    opened, single = open_checkpoint(folder), open_checkpoint(file)
    assert {k: (v.dtype, v.shape) for k, v in opened.names.items()} == {
        k: (v.dtype, v.shape) for k, v in single.names.items()
    }
    assert all(torch.equal(opened.tensor(k), single.tensor(k)) for k in single.names)
    assert opened.config == {"num_layers": 3}
    assert len(opened.files) == 2


def test_a_folder_with_one_file_needs_no_index(tmp_path):
    (tmp_path / "vae").mkdir()
    save_file(some_tensors(), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert "half" in open_checkpoint(tmp_path / "vae").names


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/x.safetensors",
        "..\\x.safetensors", "C:x.safetensors", "\\\\server\\x.safetensors", "x\0.safetensors",
        "..", "", ".hidden.safetensors", "x.bin", 5, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_an_index_never_opens_anything_outside_its_folder(tmp_path, shard):
    save_file(some_tensors(), tmp_path / "outside.safetensors")
    folder = shards(tmp_path / "model", {"half": shard})
    opened: list[str] = []
    watching = True

    def watch(event: str, args: tuple) -> None:
        if watching and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(watch)
    with pytest.raises(CheckpointError, match="w.safetensors.index.json.*not a plain file name"):
        open_checkpoint(folder)
    watching = False
    assert [o for o in opened if not o.startswith(str(folder))] == []


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"half": "w-00003-of-00003.safetensors"}, "w-00003-of-00003.safetensors is missing"),
        ({"half": "w-00001-of-00002.safetensors"}, "puts half into w-00001.*not there"),
        ({"nope": "w-00001-of-00002.safetensors"}, "puts nope into"),
        ({f"t{i}": f"s{i}.safetensors" for i in range(5000)}, "more than 1000 shards"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(shards(tmp_path / "model", weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = shards(tmp_path / "model")
    save_file(some_tensors(), folder / "w-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in both .*00001.* and .*00002"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00", "7", '{"weight_map": 7}'])
def test_a_damaged_index_is_one_sentence(tmp_path, text):
    folder = shards(tmp_path / "model")
    (folder / "w.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="w.safetensors.index.json"):
        open_checkpoint(folder)


def test_folders_without_usable_weights_say_what_is_in_them(tmp_path):
    def refusal(folder: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        return str(caught.value)

    def folder(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(b"x")
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    assert "holds no .safetensors file" in refusal(folder("nothing"))
    assert "pickles only (model.bin)" in refusal(folder("old", "model.bin"))
    assert "2 safetensors files (a.safetensors, b.sa" in refusal(
        folder("two", "a.safetensors", "b.safetensors")
    )
    assert "index.json, so some may be missing" in refusal(
        folder("part", "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
    )
    assert "give the folder of one component (transformer, vae)" in refusal(
        folder("all", "model_index.json", "vae/v.safetensors", "transformer/t.safetensors")
    )
