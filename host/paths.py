"""The folders of a studio, and the one gate through which a name from outside becomes a path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("input", "output", "temp")
MODEL_FOLDERS = (
    "checkpoints", "clip_vision", "configs", "controlnet", "diffusion_models", "embeddings",
    "loras", "text_encoders", "upscale_models", "vae", "vae_approx",
)  # fmt: skip
LEGACY = {"unet": "diffusion_models", "clip": "text_encoders"}  # ComfyUI's older names
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf")  # nothing that unpickles
LONGEST_NAME = 200  # bytes; file systems end at 255, and savers add a counter and a suffix

# What no name may hold: control characters, and marks that turn the rest of a name around.
UNSEEN = re.compile("[\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What Windows would read as a device, whatever its suffix.
DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)\s*(\..*)?")


class PathError(ValueError):
    """A name that does not lead to a place inside its folder."""


def checked_parts(name: str) -> list[str]:
    """The parts of a relative name by the rules of every system; PathError if it is unsafe."""
    if not isinstance(name, str) or UNSEEN.search(name):
        raise PathError("A file name must be text without control characters.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PathError("A file name must be valid Unicode.") from None
    if name.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", name):
        raise PathError(f"{name[:60]!r} is not a name inside the folder; give a relative one.")
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    for part in parts:
        if part == ".." or ":" in part or DEVICE.fullmatch(part) or part[-1] in " .":
            raise PathError(f"{part[:60]!r} cannot be part of a file name here; choose another.")
        if len(part.encode()) > LONGEST_NAME:
            raise PathError(f"A file name may have at most {LONGEST_NAME} bytes; shorten it.")
    return parts


def inside(root: Path, *names: str) -> Path:
    """The real path of a name below `root`; PathError when it, or a link on its way, leads out.

    The path need not exist. What is checked is what is returned: the path with every link resolved.
    """
    parts = [part for name in names for part in checked_parts(name)]
    home = root.resolve()
    try:
        path = home.joinpath(*parts).resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise PathError(f"{'/'.join(parts)[:60]!r} cannot be followed to a file.") from None
    if not path.is_relative_to(home):
        raise PathError(f"{'/'.join(parts)[:60]!r} leads out of its folder.")
    return path


def existing(root: Path, *names: str) -> Path:
    """As `inside`, for a regular file that is there and has no second name outside our sight."""
    path = inside(root, *names)
    try:
        found = path.is_file() and path.stat().st_nlink == 1
    except OSError:
        found = False
    if not found:
        raise FileNotFoundError("/".join(names))
    return path


@dataclass(frozen=True)
class Folders:
    """Where a studio keeps what it reads and writes: one base folder, and folders of models."""

    base: Path
    models: tuple[Path, ...] = ()  # besides base/models: a ComfyUI's models folder, say

    def of(self, kind: str) -> Path:
        """The folder called input, output or temp."""
        if kind not in KINDS:
            raise PathError(f"There is no folder {str(kind)[:20]!r}; choose input, output or temp.")
        return self.base / kind

    @property
    def user(self) -> Path:
        return self.base / "user"

    @property
    def queue(self) -> Path:
        """Not below `user`, which the page may write to."""
        return self.base / "queue.sqlite"

    def make(self) -> None:
        """Create what is missing."""
        for path in (*(self.of(kind) for kind in KINDS), self.user):
            path.mkdir(parents=True, exist_ok=True)
        for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
            (self.base / "models" / kind).mkdir(parents=True, exist_ok=True)

    def model_roots(self, kind: str) -> list[Path]:
        """The folders that hold models of a kind, the studio's own first."""
        kind = LEGACY.get(kind, kind)
        if kind not in MODEL_FOLDERS:
            raise PathError(f"There is no model folder {str(kind)[:40]!r}.")
        names = (kind, *(old for old, new in LEGACY.items() if new == kind))
        roots = [root / name for root in (self.base / "models", *self.models) for name in names]
        return [root for root in roots if root.is_dir()]

    def model_files(self, kind: str) -> list[str]:
        """Names of the model files of a kind, relative to their folder, with forward slashes."""
        names = {name for root in self.model_roots(kind) for name, _ in files_below(root)}
        return sorted(name for name in names if name.endswith(MODEL_SUFFIXES))

    def model_path(self, kind: str, name: str) -> Path | None:
        """The file behind a name from `model_files`; links are the owner's choice and followed."""
        parts = checked_parts(name)
        for root in self.model_roots(kind):
            path = root.joinpath(*parts)
            if path.is_file():
                return path
        return None


def files_below(root: Path, links: bool = True) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files under a folder as (relative name, entry), in order; hidden ones are left out."""
    waiting: list[tuple[str, Path]] = [("", root)]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # Links to folders are not entered: they may lead in a circle.
            if entry.is_dir(follow_symlinks=False):
                waiting.append((f"{prefix}{entry.name}/", Path(entry.path)))
            elif is_file(entry, links):
                yield prefix + entry.name, entry


def is_file(entry: os.DirEntry[str], links: bool) -> bool:
    try:
        return entry.is_file(follow_symlinks=links)
    except OSError:  # a loop of links
        return False


def annotated(name: str, default: str = "input") -> tuple[str, str]:
    """A name with its folder: "a.png [output]" -> ("a.png", "output")."""
    found = re.fullmatch(r"(.*?)\s*\[(input|output|temp)\]", name, re.DOTALL)
    return (found[1], found[2]) if found else (name, default)


def annotated_path(folders: Folders, name: str) -> Path:
    """The existing file that a Load Image widget names; PathError or FileNotFoundError."""
    plain, kind = annotated(name)
    return existing(folders.of(kind), plain)
