"""What a user was asked about a file is asked once, not at every start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..model_loaders.load import Loaded

KEPT = 1000  # files that are remembered


def notes(loaded: Loaded) -> tuple[str, ...]:
    """What to tell of a component; which model it is, is asked at a file's first time only."""
    question = loaded.checkpoint.config.get("variant_question")
    if not question or _first(loaded.checkpoint.files):
        return loaded.notes
    return tuple(note.replace(f"; {question}", "") for note in loaded.notes)


def _first(files: list[Path]) -> bool:
    """Whether these files, as they are now, have not been asked about; from now on they have."""
    digest = hashlib.sha256()
    for file in sorted(files):
        seen = file.stat()
        digest.update(f"{file.resolve()} {seen.st_size} {seen.st_mtime_ns}\n".encode())
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    place, mark = Path(home, "seedling", "asked.txt"), digest.hexdigest()
    try:
        known = place.read_text("utf-8").split() if place.is_file() else []
        if mark in known:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join([*known, mark][-KEPT:]), "utf-8")
    except (OSError, ValueError):  # then it is asked again
        pass
    return True
