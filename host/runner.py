"""Takes jobs from the queue to the worker, one at a time, and writes down how each ended."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from .events import Hub
from .paths import Folders
from .queue import Queue, Row
from .worker import Message, Worker, binary_preview, plain_preview

log = logging.getLogger(__name__)
ENDS = {"success": "completed", "error": "failed", "interrupted": "cancelled"}


class Runner:
    """The loop between queue and worker. Its own faults end a job at most, never the loop."""

    def __init__(self, queue: Queue, hub: Hub, folders: Folders, entries: Sequence[str]) -> None:
        self.queue, self.hub, self.folders, self.entries = queue, hub, folders, tuple(entries)
        self.worker: Worker | None = None
        self.starting: asyncio.Task[None] | None = None
        self.ticket = object()  # of the worker whose messages count
        self.ready = asyncio.Event()
        self.more = asyncio.Event()
        self.job: Row | None = None
        self.node: tuple[str, str] | None = None  # id and type of the node that runs
        self.done: asyncio.Future[dict[str, Any]] | None = None
        self.grace = 30.0  # seconds that a cancelled node may take to stop
        self.cancelled: set[str] = set()
        self.handed = False  # whether the worker has the job
        self.failures = 0  # workers in a row that ended before they were ready
        self.closing = False

    # ---- the worker's messages -----------------------------------------------------------------

    def start_worker(self) -> None:
        """Start a worker process; it is ready when it says so."""
        self.ready.clear()
        self.worker = None
        self.starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        if self.closing:
            return
        loop = asyncio.get_running_loop()
        self.ticket = ticket = object()

        def heard(message: Message) -> None:
            try:
                loop.call_soon_threadsafe(self._heard, ticket, message)
            except RuntimeError:  # the loop has ended
                pass

        # In a thread: the first one waits for the process that imports torch.
        self.worker = await asyncio.to_thread(Worker, self.folders, self.entries, heard)
        if self.closing:
            self.worker.kill()

    def _heard(self, ticket: object, message: Message) -> None:
        kind, value = message
        if ticket is not self.ticket:
            return  # the last words of a worker that was replaced
        if kind == "ready":
            self.ready.set()
        elif kind == "gone":
            self._lost(value)
        elif self.job is None:
            return
        elif kind == "event":
            self._event(*value)
        elif kind == "preview":
            data, where = value
            plain, full = plain_preview(data, where), binary_preview(data, where)
            self.hub.show(self.job.client, plain, full)
        elif kind == "text":
            self.hub.text(self.job.client, *value)
        elif kind == "done" and self.done is not None and not self.done.done():
            self.done.set_result(value)

    def _event(self, kind: str, data: dict[str, Any]) -> None:
        assert self.job is not None
        if kind == "executing":
            node = self.job.prompt.get(data["node"]) or {}
            self.node = (data["node"], node.get("class_type", ""))
        self.hub.tell(self.job.client, kind, data)

    def _lost(self, code: int | None) -> None:
        """The process is gone: its job ends, and the next worker starts at once."""
        log.warning("the worker ended with %s; a new one starts", code)
        if self.handed and self.done is not None and not self.done.done():
            self.done.set_result(self._epitaph(code))
        # One that was ready is replaced at once; one that never was, after a growing pause.
        self.failures = 0 if self.ready.is_set() else self.failures + 1
        self.ready.clear()
        pause = 0.0 if self.failures == 0 else min(0.5 * 2**self.failures, 60.0)
        if not self.closing:
            asyncio.get_running_loop().call_later(pause, self.start_worker)

    def _epitaph(self, code: int | None) -> dict[str, Any]:
        """What the history says of a job whose worker died."""
        assert self.job is not None
        node_id, kind = self.node or (None, "?")
        data: dict[str, Any] = {
            "prompt_id": self.job.id, "node_id": node_id, "node_type": kind, "executed": [],
            "timestamp": int(time.time() * 1000),
        }  # fmt: skip
        if self.job.id in self.cancelled:
            event, status = "execution_interrupted", "interrupted"
        else:
            event, status = "execution_error", "error"
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            data |= {
                "exception_message": f"The process that runs the nodes ended ({how}) in '{kind}'. "
                "If the system was out of memory, try a smaller size or a smaller model.",
                "exception_type": "WorkerDied", "traceback": [], "current_inputs": {},
                "current_outputs": [],
            }  # fmt: skip
        self.hub.tell(self.job.client, event, data)
        return {"status": status, "messages": [[event, data]], "outputs": {}, "meta": {}}

    # ---- jobs ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled: the next job, and the next."""
        self.start_worker()
        while True:
            try:
                await self._one()
            except sqlite3.Error as error:  # the disk; what waits is safe on it
                log.error("the queue cannot be written: %s", error)
                await asyncio.sleep(1)
            except Exception:  # a fault of ours: it ends this job, not the host
                log.exception("a job could not be run")
                await asyncio.sleep(0.1)

    async def _worker(self) -> Worker:
        """The worker, when it is ready."""
        while True:
            await self.ready.wait()
            if self.starting is not None:
                await self.starting
            if self.worker is not None and self.ready.is_set():
                return self.worker

    async def _one(self) -> None:
        await self._worker()
        self.more.clear()
        job = await self.queue.take()
        if job is None:
            await self.more.wait()
            return
        result: dict[str, Any] = {"status": "error", "messages": [], "outputs": {}, "meta": {}}
        self.job, self.node = job, None
        try:
            self.done = asyncio.get_running_loop().create_future()
            worker = await self._worker()
            self.handed = True
            worker.send(
                "run",
                {
                    "prompt_id": job.id,
                    "prompt": job.prompt,
                    "targets": job.targets,
                    "extra": job.extra,
                },
            )
            result = await self.done
        finally:
            self.handed = False
            self.cancelled.discard(job.id)
            self.job = self.done = None
            await self._close(job, result)
            self.hub.tell(job.client, "executing", {"node": None, "prompt_id": job.id})

    async def _close(self, job: Row, result: dict[str, Any]) -> None:
        """Write the end of a job down; when the disk refuses its results, without them."""
        status = ENDS[result["status"]]
        try:
            await self.queue.finish(job.id, status, result)
        except (sqlite3.Error, ValueError, TypeError) as error:
            log.error("the result of %s could not be kept: %s", job.id, error)
            note = {"error": {"message": f"The result could not be kept: {error}"}}
            await self.queue.finish(job.id, "failed", note)
        self.hub.status(await self.queue.count("pending", "in_progress"))

    def added(self) -> None:
        """There is more to do."""
        self.more.set()

    async def interrupt(self, job_id: str | None = None) -> bool:
        """Cancel the running job, only if it is `job_id` when that is given.

        A node that does not stop in time takes its process with it.
        """
        job, worker = self.job, self.worker
        if job is None or worker is None or job_id not in (None, job.id):
            return False
        self.cancelled.add(job.id)
        worker.send("interrupt", job.id)
        asyncio.get_running_loop().call_later(self.grace, self._insist, job.id, worker)
        return True

    def _insist(self, job_id: str, worker: Worker) -> None:
        if self.job is not None and self.job.id == job_id and self.worker is worker:
            log.warning("a node did not stop within %.0f s; its process is ended", self.grace)
            worker.kill()

    def free(self) -> None:
        """Forget models and results of earlier runs."""
        if self.worker is not None:
            self.worker.send("free")

    def close(self) -> None:
        self.closing = True
        if self.worker is not None:
            self.worker.kill()
