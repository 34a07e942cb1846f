"""The header of a safetensors file, read as if somebody hostile had written it.

A file is 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes
without holes. Everything is checked against the file's size before anybody trusts an offset;
whatever is wrong is a `CheckpointError`: one sentence with the file's name.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000  # bytes; the limit of the format
MAX_DIMENSIONS = 16
MAX_SIDE = 1 << 48

# Name in the header -> bits per element.
DTYPES: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# Names in headers -> torch's.
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip


class CheckpointError(ValueError):
    """A file that cannot be used. The message is for the user and names the file."""


@dataclass(frozen=True)
class Form:
    """How a weight is quantized: the format as files call it, its settings, and its tensors.

    `parts` are the tensors as they are stored, "weight" and what belongs to it, for all `out` rows.
    """

    format: str
    parts: Mapping[str, TensorInfo]
    out: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it looks like, after the view that was asked for.

    Stored are `stored` elements of `dtype` in the bytes [begin, end) of `file`, named `key` there.
    The tensor itself is all of them, or the rows `rows` of the first axis (already taken out of
    `stored`, `begin` and `end`), or the last index of the third axis where `last_tap` is set.

    With a `form` it is quantized: `dtype` is then the format's name, `shape` that of the weight,
    and what is stored is in the form's parts.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    key: str
    begin: int
    end: int
    stored: tuple[int, ...]
    rows: tuple[int, int] | None = None
    last_tap: bool = False
    form: Form | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """Names in the order of their bytes, the metadata, and what the file was when it was read."""

    names: dict[str, TensorInfo]
    metadata: dict[str, str]
    identity: tuple[int, int]


def shown(path: Path) -> str:
    """A file's name as people know it: with its folder where the name alone says nothing."""
    generic = ("model", "diffusion_pytorch_model", "config", "transformer", "vae", "text_encoder")
    return f"{path.parent.name}/{path.name}" if path.name.startswith(generic) else path.name


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that a new download would mend."""
    return CheckpointError(f"{shown(path)} {what}; download it again.")


def identity(path: Path) -> tuple[int, int]:
    """Size and time of the last change: whether the bytes are still those that were checked."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_header(path: Path) -> Header:
    """Read and check the header of the file `path`. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening: a pipe would wait for ever
            raise CheckpointError(f"{shown(path)} is not a regular file; give a .safetensors file.")
        with path.open("rb") as file:
            length = _header_length(path, file.read(512), status.st_size)
            file.seek(8)
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{shown(path)} cannot be read: {why}.") from error
    entries = _parse(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    names = {key: _tensor(path, key, entry, 8 + length) for key, entry in entries.items()}
    _check_layout(path, names, 8 + length, status.st_size)
    return Header(names, metadata, (status.st_size, status.st_mtime_ns))


def _header_length(path: Path, head: bytes, size: int) -> int:
    other = _other_format(head)
    if other:
        raise CheckpointError(f"{shown(path)} {other}")
    if size == 0:
        raise damaged(path, "is empty")
    length = int.from_bytes(head[:8], "little")
    if size < 10 or head[8:9] != b"{" or length < 2:
        raise damaged(
            path, f"is not a safetensors file ({size} bytes, begins with {head[:12]!r}) or damaged"
        )
    if length > MAX_HEADER:
        raise damaged(
            path, f"announces a header of {length} bytes, allowed are {MAX_HEADER}: it is damaged"
        )
    if 8 + length > size:
        raise damaged(
            path, f"is cut short inside its header: {8 + length} bytes announced, {size} there"
        )
    return length


def _other_format(head: bytes) -> str | None:
    """What a file is that is not safetensors, as the rest of a sentence."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model; run `git lfs pull` or download it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (HTML), not a model: the download failed; download it again."
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")):
        return (
            "is a PyTorch pickle or a zip archive, which can run code and is not read; use the "
            ".safetensors file of this model."
        )
    if head.startswith(b"\x1f\x8b"):
        return "is compressed (gzip); unpack it first."
    if head.startswith(b"GGUF"):
        return "is a GGUF file by another name; rename it to end in .gguf."
    return None


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise damaged(path, f"names {printable(twice)} twice: it is damaged")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        kind = type(error).__name__
        raise damaged(
            path, f"has a header that is not valid JSON ({kind}): it is damaged"
        ) from None
    if not isinstance(entries, dict):
        raise damaged(path, "has a header that is not a JSON object")
    return entries


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "has metadata that are not strings")
    return metadata


def _tensor(path: Path, key: str, entry: Any, start: int) -> TensorInfo:
    """One entry of the header, every field of it checked."""
    where = f"has a header entry {printable(key)} that"
    if not isinstance(entry, dict):
        raise damaged(path, f"{where} is not an object")
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(path, f"{where} has the unknown data type {printable(str(dtype))}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise damaged(path, f"{where} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise damaged(path, f"{where} has impossible offsets")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * DTYPES[dtype]:
        raise damaged(path, f"{where} has {end - begin} bytes for {tuple(shape)} of {dtype}")
    sides = tuple(shape)
    return TensorInfo(dtype, sides, path, key, start + begin, start + end, sides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIDE  # not bool, not float


def _check_layout(path: Path, names: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """The tensors follow one another without overlap or hole, and end where the file ends."""
    position = start
    for info in sorted(names.values(), key=lambda t: (t.begin, t.end)):
        if info.begin != position:
            what = "overlapping tensors" if info.begin < position else "a hole"
            raise damaged(path, f"has {what} at {printable(info.key)}: it is damaged")
        position = info.end
    if position > size:
        cut = min((t for t in names.values() if t.end > size), key=lambda t: t.begin)
        where = f"is cut short at tensor {printable(cut.key)}"
        raise damaged(path, f"{where}: {position} bytes announced, {size} there")
    if position < size:
        raise damaged(path, f"has {size - position} bytes behind its last tensor: it is damaged")


def printable(name: str) -> str:
    """A name or text from a file, safe to print: no control characters, not endless."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."
