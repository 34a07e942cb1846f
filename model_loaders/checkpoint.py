"""One lazy view over a checkpoint: a .safetensors or .gguf file, or a folder of shards.

Quantized weights are one tensor each, whatever container they come in (`containers`). Opening reads
headers and config only. A tensor is either mapped (`Checkpoint.tensor`: no copy, pages come from
the file when they are touched) or streamed into memory that the caller provides
(`Checkpoint.copy_into`: one small buffer, whatever the dtype and device of the destination).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .containers import recognised
from .gguf import WITH_VISION, read_gguf, vision_beside
from .header import TORCH_DTYPES, damaged, identity, printable, read_header, shown
from .header import CheckpointError as CheckpointError  # re-exported: the one error of this module
from .header import TensorInfo as TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = ".safetensors.index.json"
MAX_SHARDS = 1000
CHUNK = 8 << 20  # bytes that are read at a time when tensors are copied


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor is found: a name in the file, and what part of that tensor it is.

    `rows` are a range of the first axis; `last_tap` takes the last index of the third axis (the
    newest frame of a causal convolution's kernel), which thereby disappears; `shape` is the same
    numbers with other sides (a 1x1 convolution as a matrix). None copies anything.
    """

    name: str
    rows: tuple[int, int] | None = None
    last_tap: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Names, shapes and where to find them. Immutable; `view` gives another over the same files."""

    path: Path
    names: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    _identities: Mapping[Path, tuple[int, int]] = field(repr=False)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The file's or folder's name, for messages."""
        return shown(self.path)

    @property
    def files(self) -> list[Path]:
        return list(self._identities)

    @cached_property
    def bytes(self) -> int:
        """Of all tensors in the files, each counted once."""
        infos = (part for info in self.names.values() for part in parts_of(info))
        return sum({(i.file, i.begin): i.end - i.begin for i in infos}.values())

    def view(self, sources: Mapping[str, Source]) -> Checkpoint:
        """The same files under other names. What `sources` does not use keeps its own name."""
        used = {source.name for source in sources.values()}
        names = {key: self._taken(source) for key, source in sources.items()}
        rest = {key: info for key, info in self.names.items() if key not in used}
        for key in rest.keys() & names.keys():
            other = printable(sources[key].name)
            raise CheckpointError(f"{self.name} holds {printable(key)} twice, also as {other}.")
        return replace(self, names={**rest, **names})

    def _taken(self, source: Source) -> TensorInfo:
        info = self.names[source.name]
        if source.rows is not None:
            start, stop = source.rows
            row = (info.end - info.begin) // max(info.stored[0], 1)
            begin, end = info.begin + start * row, info.begin + stop * row
            if info.form is not None:  # its parts stay whole, and are cut when they are read
                begin, end = info.begin, info.end
            info = replace(
                info,
                shape=(stop - start, *info.shape[1:]),
                stored=(stop - start, *info.stored[1:]),
                begin=begin,
                end=end,
                rows=source.rows,
            )
        if source.last_tap:
            info = replace(info, shape=(*info.shape[:2], *info.shape[3:]), last_tap=True)
        if source.shape is not None:
            info = replace(info, shape=source.shape)
        return info

    def torch_dtype(self, name: str) -> torch.dtype:
        """The dtype in which `name` is stored. Raises CheckpointError where torch has none."""
        return self.dtype_of(self.names[name])

    def dtype_of(self, info: TensorInfo) -> torch.dtype:
        import torch

        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.name}: {printable(info.key)} is {info.dtype}, which cannot be read yet."
            )
        return getattr(torch, TORCH_DTYPES[info.dtype])

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU: memory-mapped, so no memory until it is touched.

        Writing to it changes a private copy of the pages, never the file. One that does not lie
        where arithmetic can use it (its dtype's boundary, one run of bytes) is read instead. Raises
        CheckpointError when the file has changed since it was opened.
        """
        return self.mapped(self.names[name])

    def mapped(self, info: TensorInfo) -> Tensor:
        """As `tensor`, of any tensor of these files."""
        import torch

        dtype = self.dtype_of(info)
        if (info.last_tap and info.stored[2] > 1) or info.begin % dtype.itemsize:
            out = torch.empty(info.shape, dtype=dtype)
            self.stream(info, out)
            return out
        self._check_unchanged(info.file)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        try:
            if info.file not in self._handles:
                size = self._identities[info.file][0]
                self._handles[info.file] = torch.from_file(
                    str(info.file), shared=False, size=size, dtype=torch.uint8
                )
        except (RuntimeError, OSError) as error:
            where = f"{shown(info.file)}: {printable(info.key)}"
            raise CheckpointError(f"{where} cannot be read: {error}.") from error
        tensor = self._handles[info.file][info.begin : info.end].view(dtype).view(info.stored)
        return (tensor[:, :, -1] if info.last_tap else tensor).view(info.shape)

    def copy_into(self, name: str, out: Tensor, buffer: Tensor | None = None) -> None:
        """Stream the tensor into `out` (same shape, contiguous, any dtype and device).

        Nothing is mapped, so nothing but `out` and the buffer takes memory. Whoever reads many
        tensors gives one `staging_buffer` to all: buffers that come and go leave holes in the heap.
        Raises CheckpointError when the file has changed since it was opened.
        """
        self.stream(self.names[name], out, buffer)

    def stream(self, info: TensorInfo, out: Tensor, buffer: Tensor | None = None) -> None:
        """As `copy_into`, of any tensor of these files."""
        dtype = self.dtype_of(info)
        assert out.shape == info.shape, f"{info.key}: {tuple(out.shape)} is not {info.shape}"
        self._check_unchanged(info.file)
        if info.numel == 0:
            return
        sides, out = (info.stored, out) if info.last_tap else ((info.numel,), out.view(-1))
        row = (info.end - info.begin) // sides[0]  # bytes
        step = max(1, CHUNK // row)
        needed = min(step, sides[0]) * row
        if buffer is None or buffer.numel() < needed:
            buffer = staging_buffer(out.device, needed)
        window = memoryview(buffer.numpy())  # type: ignore[arg-type]
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin)
            for start in range(0, sides[0], step):
                rows = min(step, sides[0] - start)
                if not _read_all(file, window[: rows * row]):
                    raise CheckpointError(
                        f"{shown(info.file)} became shorter while {printable(info.key)} was read; "
                        "is it still being downloaded?"
                    )
                part = buffer[: rows * row].view(dtype).view(rows, *sides[1:])
                out[start : start + rows].copy_(part[:, :, -1] if info.last_tap else part)

    def _check_unchanged(self, file: Path) -> None:
        try:
            unchanged = identity(file) == self._identities[file]
        except OSError:
            unchanged = False
        if not unchanged:  # a mapping of a file that became shorter would end the process
            raise CheckpointError(f"{shown(file)} has changed since it was opened; open it again.")


def parts_of(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors in files that make up this one."""
    if info.form is None:
        return (info,)
    return tuple(part for own in info.form.parts.values() for part in parts_of(own))


def staging_buffer(device: torch.device, size: int = CHUNK) -> Tensor:
    """Memory for `Checkpoint.copy_into` on the way to `device`."""
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _read_all(file: Any, window: memoryview) -> bool:
    """Fill `window`; False where the file ends first."""
    while window:
        got = file.readinto(window)
        if not got:
            return False
        window = window[got:]
    return True


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a .safetensors or .gguf file, or a folder with one component's shards.

    A language model in GGUF brings the vision part beside it along. Raises CheckpointError.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
        path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise CheckpointError(f"{printable(str(path))} cannot be opened: {error}.") from None
    if not is_folder and path.suffix == ".gguf":
        return _open_gguf(path)
    if not is_folder:
        return _assemble(path, [path], {})
    index = _index_of(path)
    if index is not None:
        weight_map = _weight_map(path, index)
        files = [path / shard for shard in dict.fromkeys(weight_map.values())]
        checkpoint = _assemble(path, files, _config_beside(path))
        _check_index(checkpoint, index, weight_map)
        return checkpoint
    return _assemble(path, [_only_file(path)], _config_beside(path))


def _assemble(path: Path, files: Iterable[Path], config: dict[str, Any]) -> Checkpoint:
    names: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    identities: dict[Path, tuple[int, int]] = {}
    for file in files:
        header = read_header(file)
        twice = names.keys() & header.names.keys()
        if twice:
            first = printable(min(twice))
            raise CheckpointError(
                f"{first} is in both {shown(names[min(twice)].file)} and {shown(file)}; download "
                "the folder again."
            )
        names.update(header.names)
        metadata = {**header.metadata, **metadata}
        identities[file] = header.identity
    if not names:
        raise damaged(path, "holds no tensors")
    names = recognised(path, names, metadata)
    return Checkpoint(path, names, metadata, config or _config_inside(path, metadata), identities)


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf(path)
    names, identities = dict(header.names), {path: header.identity}
    config = _config_inside(path, header.metadata)
    if header.metadata.get("general.architecture") in WITH_VISION:
        beside = vision_beside(path)
        if beside is None:
            raise CheckpointError(
                f"{shown(path)} is a language model without its vision part; put the *mmproj*.gguf "
                "file of the same model into its folder."
            )
        vision = read_gguf(beside)
        names |= vision.names
        identities[beside] = vision.identity
        config |= _config_inside(beside, vision.metadata)
    if not names:
        raise damaged(path, "holds no tensors")
    return Checkpoint(path, names, header.metadata, config, identities)


def _index_of(folder: Path) -> Path | None:
    """The shard index; of several (`….fp16.safetensors.index.json`) the one without a variant."""
    found = [file for file in folder.glob(f"*{INDEX}") if file.is_file()]
    return min(found, key=lambda file: (len(file.name), file.name), default=None)


def _only_file(folder: Path) -> Path:
    """The one .safetensors file of a folder without index. Raises CheckpointError."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    where = f"The folder {folder.name}"
    if any("-of-" in file.name for file in files):
        raise CheckpointError(
            f"{where} holds shards but no *{INDEX}, so some may be missing; download it again."
        )
    if files:
        some = ", ".join(file.name for file in files[:5])
        raise CheckpointError(
            f"{where} holds {len(files)} safetensors files ({some}); give one of them."
        )
    if (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/*.safetensors"))
        some = ", ".join(dict.fromkeys(parts)) or "none of which has weights"
        raise CheckpointError(
            f"{where} is a whole pipeline; give the folder of one component ({some})."
        )
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if pickles:
        raise CheckpointError(
            f"{where} holds PyTorch pickles only ({pickles[0]}), which can run code and are not "
            "read; download the .safetensors files of this model."
        )
    raise CheckpointError(
        f"{where} holds no .safetensors file; give a file, or the folder that has the weights."
    )


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > 100_000_000:
            raise damaged(path, "is too large for what it should hold")
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{shown(path)} cannot be read: {why}.") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({type(error).__name__})") from None


def _weight_map(folder: Path, index: Path) -> dict[str, str]:
    """Tensor -> shard. A shard is a plain file name: an index must not reach outside its folder."""
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder.name}/{index.name} has no weight_map; download it again.")
    for key, shard in weight_map.items():
        plain = (
            isinstance(shard, str) and shard.isprintable() and not set(shard) & set('/\\:*?"<>|')
        )
        if not plain or not shard.endswith(".safetensors") or shard.startswith("."):
            raise CheckpointError(
                f"{folder.name}/{index.name} puts {printable(key)} into {printable(str(shard))}, "
                "which is not a plain file name beside it: it is not read."
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(
            f"{folder.name}/{index.name} lists more than {MAX_SHARDS} shards; download it again."
        )
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder.name}/{shard} is missing, though {index.name} lists it; download it into "
                "the folder."
            )
    return weight_map


def _check_index(checkpoint: Checkpoint, index: Path, weight_map: Mapping[str, str]) -> None:
    for key, shard in weight_map.items():
        info = checkpoint.names.get(key)
        if info is None or info.file.name != shard:
            where = f"it is in {info.file.name}" if info else "it is not there"
            raise CheckpointError(
                f"{checkpoint.path.name}/{index.name} puts {printable(key)} into {shard}, but "
                f"{where}: index and shards belong to different models; download the folder again."
            )


def _config_beside(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    config = _read_json(file)
    if not isinstance(config, dict):
        raise damaged(file, "is not a JSON object")
    return config


def _config_inside(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config that some files carry as JSON in their metadata."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:
        kind = type(error).__name__
        raise damaged(
            path, f"has a config in its metadata that is not valid JSON ({kind})"
        ) from None
    return config if isinstance(config, dict) else {}
