"""What a batch has done, in its folder: a row for each picture, and notes to go on from.

`manifest.jsonl` has the rows. Those of a job are written at once, when all its pictures are there,
so a job without a complete set of rows is still to be made. `queued.jsonl` notes what a server has
accepted; it goes when the batch is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .batch_values import BatchError
from .images import write_new

ROWS, NOTES = "manifest.jsonl", "queued.jsonl"


class Manifest:
    """The folder of a batch. `stem` begins the names of its pictures."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.number = 0  # of the last picture

    def open(self) -> None:
        """Make the folder and see what is there; BatchError when it cannot be used."""
        pattern = re.compile(re.escape(self.stem) + r"_(\d{5,9})\.\w+")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.folder)
            for name in (ROWS, NOTES):
                _end_line(self.folder / name)
        except OSError as error:
            raise self._unusable(error) from error
        self.number = max(
            (int(m[1]) for name in names if (m := pattern.fullmatch(name))), default=0
        )

    def done(self) -> set[str]:
        """The jobs of which every row and every picture is there."""
        seen: dict[str, set[int]] = {}
        wanted: dict[str, int] = {}
        for row in self._lines(ROWS):
            job, file = row.get("job"), row.get("file")
            there = file is None or (
                isinstance(file, str) and (self.folder / Path(file).name).is_file()
            )
            if isinstance(job, str) and there:
                seen.setdefault(job, set()).add(row.get("picture", 1))
                wanted[job] = row.get("of", 1)
        return {job for job, pictures in seen.items() if len(pictures) >= wanted[job]}

    def queued(self) -> dict[str, str]:
        """The id under which a server accepted each job last."""
        return {
            row["job"]: row["prompt_id"]
            for row in self._lines(NOTES)
            if isinstance(row.get("job"), str) and isinstance(row.get("prompt_id"), str)
        }

    def note(self, job: str, prompt_id: str) -> None:
        """A server has accepted a job."""
        self._append(NOTES, [{"job": job, "prompt_id": prompt_id}])

    async def keep(self, data: bytes, name: str) -> str:
        """Save a picture under the next free name; `name` is the server's, for its suffix."""
        suffix = Path(name).suffix.lower()
        suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ".bin"
        while True:
            self.number += 1
            path = self.folder / f"{self.stem}_{self.number:05d}{suffix}"
            try:
                # In a thread: the disk may take a tenth of a second.
                if await asyncio.to_thread(write_new, path, data):
                    return path.name
            except OSError as error:
                raise self._unusable(error) from error

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """A job is done: all its rows."""
        self._append(ROWS, rows)

    def complete(self) -> None:
        """Nothing is left to go on from."""
        with contextlib.suppress(OSError):
            (self.folder / NOTES).unlink(missing_ok=True)

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with open(self.folder / name, "ab", buffering=0) as file:
                file.write(text.encode("utf-8", "backslashreplace"))  # one write: whole or cut
        except OSError as error:
            raise self._unusable(error) from error

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a file; a line that was cut off is none."""
        path = self.folder / name
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise self._unusable(error) from error
        for line in data.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row

    def _unusable(self, error: OSError) -> BatchError:
        return BatchError(
            f"{error.filename or self.folder} cannot be used: {error.strerror or error}; make "
            "room, or choose another folder with --out."
        )


def _end_line(path: Path) -> None:
    """A line that a break has cut gets its end, so that the next one is whole."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
