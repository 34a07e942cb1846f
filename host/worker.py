"""The process in which nodes run: it may raise, hang or die, and the host goes on.

The host talks to it over a pipe, in JSON, never in pickle. Where the system can fork, workers come
out of a process that has imported torch already, so that a new one is there within a second.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cache import Cache
from .executor import Executor, Job
from .library import load
from .paths import Folders

BUDGET = 2 * 2**30  # bytes of results of earlier runs
PREVIEW_SIDE = 512
JPEG, PNG = 1, 2
WITH_METADATA = 4  # type of a binary message: a preview with its node

Message = tuple[str, Any]  # what a worker said: a kind, and JSON values or bytes


class Worker:
    """A worker process as the host sees it. `heard` is called from a thread, with every message.

    Messages: ("ready", None), ("event", [kind, data]), ("preview", [bytes, data]), ("text", [node,
    text]), ("done", outcome) and at last ("gone", exit code).
    """

    def __init__(
        self, folders: Folders, entries: tuple[str, ...], heard: Callable[[Message], None]
    ) -> None:
        self.heard = heard
        context = starter()
        ours, theirs = context.Pipe()
        settings = {
            "base": str(folders.base), "models": [str(path) for path in folders.models],
            "entries": list(entries), "threads": threads_wanted(),
        }  # fmt: skip
        self.process = context.Process(
            target=main, args=(theirs, json.dumps(settings)), name="worker", daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe: Connection = ours
        self.sending = threading.Lock()
        threading.Thread(target=self._listen, name="worker's pipe", daemon=True).start()

    def send(self, kind: str, value: Any = None) -> bool:
        """Tell the worker; False when it is gone."""
        try:
            with self.sending:
                self.pipe.send_bytes(json.dumps([kind, value]).encode())
        except (OSError, ValueError):
            return False
        return True

    def kill(self) -> None:
        self.process.kill()

    def _listen(self) -> None:
        while True:
            try:
                data = self.pipe.recv_bytes()
            except (EOFError, OSError):
                break
            self.heard(unpacked(data))
        self.process.join(5)
        self.heard(("gone", self.process.exitcode))


def unpacked(data: bytes) -> Message:
    """A message from a worker: JSON, or for a preview its bytes behind their JSON."""
    if data[:1] == b"P":
        length = struct.unpack(">I", data[1:5])[0]
        return "preview", [data[5 + length :], json.loads(data[5 : 5 + length])]
    kind, value = json.loads(data)
    return kind, value


def starter() -> Any:
    """How processes are started here: out of a prepared one if the system can."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")  # macOS: torch's libraries dislike forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def threads_wanted() -> int:
    """How many threads torch shall use; 0 leaves it to torch."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else 0


# ---- in the worker's process -------------------------------------------------------------------


class Line:
    """The worker's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock = pipe, threading.Lock()
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.running: str | None = None
        self.stop = threading.Event()

    def send(self, data: bytes) -> None:
        try:
            with self.lock:
                self.pipe.send_bytes(data)
        except OSError:
            os._exit(0)  # the host is gone: nobody wants what we make

    def say(self, kind: str, value: Any = None) -> None:
        self.send(json.dumps([kind, value], allow_nan=False).encode())

    def preview(self, where: dict[str, Any], image: Any) -> None:
        """Send a picture to be shown on a node; one that cannot be shown is left out."""
        try:
            data, kind = preview_bytes(image)
        except (TypeError, ValueError, OSError, AttributeError, IndexError):
            return
        head = json.dumps(where | {"image_type": kind}).encode()
        self.send(b"P" + struct.pack(">I", len(head)) + head + data)

    def listen(self) -> None:
        """Take what the host sends; without a host this process ends at once, inside a node too."""
        while True:
            try:
                kind, value = json.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            if kind == "interrupt":
                if value in (None, self.running):
                    self.stop.set()
            else:
                self.jobs.put((kind, value))


def preview_bytes(image: Any) -> tuple[bytes, str]:
    """A preview, a tensor (H, W, C) or (1, H, W, C) or a picture, as JPEG; as PNG with alpha."""
    from PIL import Image

    from .images import to_pillow

    if isinstance(image, tuple):  # ComfyUI's (format, picture, largest side)
        image = image[1]
    if isinstance(image, Image.Image):
        picture = image.copy()
    else:
        picture = to_pillow(image[0] if image.ndim == 4 else image)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    data = io.BytesIO()
    kind = "PNG" if picture.mode in ("RGBA", "LA", "P") else "JPEG"
    if kind == "JPEG" and picture.mode != "RGB":
        picture = picture.convert("RGB")
    picture.save(data, kind, **({"quality": 90} if kind == "JPEG" else {"compress_level": 1}))
    return data.getvalue(), f"image/{kind.lower()}"


def main(pipe: Connection, settings_text: str) -> None:
    """The worker's whole life."""
    settings = json.loads(settings_text)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    line = Line(pipe)
    threading.Thread(target=line.listen, name="host's pipe", daemon=True).start()
    if settings["threads"]:
        import torch

        torch.set_num_threads(settings["threads"])
    folders = Folders(Path(settings["base"]), tuple(Path(path) for path in settings["models"]))
    library = load(folders, settings["entries"])
    executor = Executor(library, folders, Cache(BUDGET), lambda *event: line.say("event", event))
    executor.preview = line.preview
    executor.text = lambda node_id, text: line.say("text", [node_id, text[:10_000]])
    executor.stopped = line.stop.is_set
    line.say("ready")
    while True:
        try:
            turn(line, executor)
        except BaseException:  # noqa: BLE001  nothing of one job may end the next
            if line.running is not None:
                line.running = None
                line.say("done", {"status": "error", "messages": [], "outputs": {}, "meta": {}})


def turn(line: Line, executor: Executor) -> None:
    """Wait for one order and do it."""
    kind, value = line.jobs.get()
    if kind == "free":
        executor.cache.clear()
        import gc

        gc.collect()
        return
    line.stop.clear()
    line.running = value["prompt_id"]
    outcome = executor.run(Job(**value))
    line.running = None
    line.say("done", vars(outcome))


def binary_preview(data: bytes, where: dict[str, Any]) -> bytes:
    """A preview as the page takes it over the socket."""
    head = json.dumps(where).encode()
    return struct.pack(">II", WITH_METADATA, len(head)) + head + data


def plain_preview(data: bytes, where: dict[str, Any]) -> bytes:
    """The same for clients that did not say that they know the newer form."""
    return struct.pack(">II", 1, JPEG if where["image_type"] == "image/jpeg" else PNG) + data
