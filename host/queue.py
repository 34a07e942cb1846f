"""The durable queue: a job that was accepted outlives this process, however it ends.

One thread owns the SQLite file. It takes all writes that wait, commits them together, and only then
answers each. A commit is in the system's hands (SQLite's WAL with synchronous=NORMAL): kill -9 and
a crash of Python lose nothing. It does not wait for the disk, which may take a tenth of a second: a
second thread has the WAL written out within FLUSHED_WITHIN seconds, so a power cut or a crash of
the system may take back what was written in that time. The file stays whole in any case.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)
MOST_FINISHED = 2000  # jobs that the history keeps
FLUSHED_WITHIN = 0.5  # seconds after which the disk is asked to have what was written
# The WAL goes into the file, which syncs both, where few notice: at a rest, and when it is large.
REST, ENOUGH_WAL, LARGEST_WAL = 0.5, 4 * 2**20, 64 * 2**20  # seconds, bytes, bytes
MOST_ATTEMPTS = 2  # a job that took the host down twice does not get a third chance
FINISHED = ("completed", "failed", "cancelled")
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, number REAL NOT NULL,
  status TEXT NOT NULL, client TEXT, prompt TEXT NOT NULL, targets TEXT NOT NULL,
  extra TEXT NOT NULL, workflow TEXT, attempts INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL,
  started INTEGER, ended INTEGER, result TEXT);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number, seq);
CREATE INDEX IF NOT EXISTS by_end ON jobs (ended);
"""
T = TypeVar("T")


class QueueError(ValueError):
    """A queue that cannot be opened, or a job that cannot be put into it."""


@dataclass(frozen=True)
class Row:
    """A job as the queue has it; times in milliseconds since 1970."""

    id: str
    number: float
    status: str  # pending, in_progress, completed, failed or cancelled
    client: str | None
    prompt: dict[str, Any]
    targets: list[str]
    extra: dict[str, Any]
    attempts: int
    created: int
    started: int | None
    ended: int | None
    result: dict[str, Any]


def row_of(values: sqlite3.Row) -> Row:
    return Row(
        id=values["id"], number=plain(values["number"]), status=values["status"],
        client=values["client"],
        prompt=json.loads(values["prompt"]), targets=json.loads(values["targets"]),
        extra=json.loads(values["extra"]), attempts=values["attempts"], created=values["created"],
        started=values["started"], ended=values["ended"],
        result=json.loads(values["result"] or "{}"),
    )  # fmt: skip


def plain(number: float) -> float:
    """A whole number as one."""
    return int(number) if number == int(number) else number


def now() -> int:
    return int(time.time() * 1000)


class Queue:
    """Jobs in their order. Every method is a coroutine that returns when it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="queue", daemon=True)
        self._opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._flusher = threading.Thread(target=self._flush, name="queue's disk", daemon=True)
        self._written, self._closing = threading.Event(), threading.Event()

    def open(self) -> None:
        """Open the file and take it for this process; QueueError when another host has it."""
        self._thread.start()
        problem = self._opened.get()
        if problem is not None:
            raise QueueError(
                f"The queue {self.path} could not be opened ({problem}); is another studio using "
                "this folder? Close it, or choose another --home."
            ) from problem
        self._flusher.start()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        self._closing.set()
        self._written.set()
        if self._flusher.is_alive():
            self._flusher.join()

    # ---- what callers ask for ------------------------------------------------------------------

    async def add(
        self,
        job_id: str,
        client: str | None,
        number: float | None,
        front: bool,
        job: Mapping[str, Any],
    ) -> float:
        """Append a job; its number, which orders the queue. QueueError for an id that is taken.

        `job` has prompt, targets, extra. Without `number` it goes to the end, with `front` ahead.
        """

        def write(db: sqlite3.Connection) -> float:
            order = number
            if order is None:
                last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
                order = float(last[0] + 1 if last else 1)
                order = -order if front else order
            workflow = (job["extra"].get("extra_pnginfo") or {}).get("workflow") or {}
            name = workflow.get("id") if isinstance(workflow, dict) else None
            try:
                db.execute(
                    "INSERT INTO jobs (id, number, status, client, prompt, targets, extra,"
                    " workflow, created) VALUES (?, ?, 'pending', ?, ?, ?, ?, ?, ?)",
                    (job_id, order, client, json.dumps(job["prompt"]), json.dumps(job["targets"]),
                     json.dumps(job["extra"]), name if isinstance(name, str) else None, now()),
                )  # fmt: skip
            except sqlite3.IntegrityError:
                raise QueueError(f"There is a job {job_id} already; leave prompt_id out.") from None
            return plain(order)

        return await self._do(write)

    async def recover(self) -> list[str]:
        """After a crash: put back what was running, once; the ids put back."""

        def write(db: sqlite3.Connection) -> list[str]:
            cut = db.execute(
                "SELECT id, attempts FROM jobs WHERE status = 'in_progress'"
            ).fetchall()
            again = [row["id"] for row in cut if row["attempts"] < MOST_ATTEMPTS]
            for row in cut:
                if row["id"] in again:
                    note = {
                        "interrupted": "The host ended while this job ran; it was queued again."
                    }
                    db.execute(
                        "UPDATE jobs SET status = 'pending', result = ? WHERE id = ?",
                        (json.dumps(note), row["id"]),
                    )
                else:
                    note = {
                        "message": "The host ended twice while this job ran; it is not tried again."
                    }
                    self._finish(db, row["id"], "failed", {"error": note})
            return again

        return await self._do(write)

    async def take(self) -> Row | None:
        """The next job, marked as running; None when none waits."""

        def write(db: sqlite3.Connection) -> Row | None:
            found = db.execute(
                "SELECT * FROM jobs WHERE status = 'pending' ORDER BY number, seq LIMIT 1"
            ).fetchone()
            if found is None:
                return None
            db.execute(
                "UPDATE jobs SET status = 'in_progress', attempts = attempts + 1, started = ? "
                "WHERE id = ?",
                (now(), found["id"]),
            )
            return row_of(found)

        return await self._do(write)

    async def finish(self, job_id: str, status: str, result: Mapping[str, Any]) -> None:
        """A job ended; the oldest of the history go when there are too many."""

        def write(db: sqlite3.Connection) -> None:
            self._finish(db, job_id, status, result)
            db.execute(
                "DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs WHERE ended IS NOT NULL "
                "ORDER BY ended DESC, seq DESC LIMIT -1 OFFSET ?)",
                (MOST_FINISHED,),
            )

        await self._do(write)

    async def cancel(self, ids: list[str] | None = None) -> int:
        """Take waiting jobs out of the queue, all with None; how many there were."""
        return await self._delete("status = 'pending'", ids)

    async def forget(self, ids: list[str] | None = None) -> int:
        """Delete finished jobs, all with None."""
        return await self._delete("ended IS NOT NULL", ids)

    async def rows(
        self, statuses: tuple[str, ...], limit: int = -1, offset: int = 0, newest: bool = True
    ) -> list[Row]:
        """Jobs of these states: finished ones by their end, others by their place."""
        marks = ",".join("?" * len(statuses))
        ended = set(statuses) <= set(FINISHED)
        way = "DESC" if newest else "ASC"
        order = f"ended {way}, seq {way}" if ended else "status, number, seq"
        sql = f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY {order} LIMIT ? OFFSET ?"
        return await self._do(
            lambda db: [row_of(row) for row in db.execute(sql, (*statuses, limit, offset))]
        )

    async def row(self, job_id: str) -> Row | None:
        sql = "SELECT * FROM jobs WHERE id = ?"
        found = await self._do(lambda db: db.execute(sql, (job_id,)).fetchone())
        return row_of(found) if found else None

    async def count(self, *statuses: str) -> int:
        """How many jobs are in these states."""
        marks = ",".join("?" * len(statuses))
        sql = f"SELECT count(*) FROM jobs WHERE status IN ({marks})"
        return await self._do(lambda db: db.execute(sql, statuses).fetchone()[0])

    # ---- the thread ----------------------------------------------------------------------------

    async def _delete(self, which: str, ids: list[str] | None) -> int:
        def write(db: sqlite3.Connection) -> int:
            if ids is None:
                return db.execute(f"DELETE FROM jobs WHERE {which}").rowcount
            sql = f"DELETE FROM jobs WHERE {which} AND id = ?"
            return sum(db.execute(sql, (job_id,)).rowcount for job_id in ids)

        return await self._do(write)

    def _finish(
        self, db: sqlite3.Connection, job_id: str, status: str, result: Mapping[str, Any]
    ) -> None:
        db.execute(
            "UPDATE jobs SET status = ?, ended = ?, result = ? WHERE id = ?",
            (status, now(), json.dumps(result), job_id),
        )

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._work.put((work, loop, answer))
        return await answer

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=2, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # commits are written, and synced by _flush
        db.execute("PRAGMA wal_autocheckpoint = 0")  # that would sync inside some client's commit
        db.executescript(SCHEMA)
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
        return db

    def _serve(self) -> None:
        try:
            db = self._connect()
        except (sqlite3.Error, OSError) as error:
            self._opened.put(error)
            return
        self._opened.put(None)
        while True:
            batch = [self._next(db)]
            while not self._work.empty() and len(batch) < 256:
                batch.append(self._work.get())
            asked = [entry for entry in batch if entry is not None]
            self._together(db, asked)
            if len(asked) < len(batch):
                db.close()
                return

    def _next(self, db: sqlite3.Connection) -> Any:
        """The next piece of work. What the WAL holds goes into the file while nobody waits."""
        size = self._wal_size()
        if ENOUGH_WAL < size < LARGEST_WAL:
            try:
                return self._work.get(timeout=REST)
            except queue.Empty:
                pass
        if size > ENOUGH_WAL:
            try:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:  # a full disk: the WAL goes on to hold it all
                log.error("the queue cannot be tidied: %s", error)
        return self._work.get()

    def _wal_size(self) -> int:
        try:
            return os.stat(f"{self.path}-wal").st_size
        except OSError:
            return 0

    def _flush(self) -> None:
        """Have the disk write what was committed, beside the thread that commits."""
        while not self._closing.is_set():
            self._written.wait()
            self._written.clear()
            try:
                handle = os.open(f"{self.path}-wal", os.O_RDWR)
            except OSError:  # it went into the file, which syncs both
                continue
            try:
                os.fsync(handle)
            except OSError as error:
                log.error("the disk did not take the queue: %s", error)
            finally:
                os.close(handle)
            self._closing.wait(FLUSHED_WITHIN)

    def _together(self, db: sqlite3.Connection, batch: list[Any]) -> None:
        """Do all of a batch in one transaction, then answer."""
        answers: list[tuple[Any, Any, Any, BaseException | None]] = []
        changes = db.total_changes
        try:
            db.execute("BEGIN IMMEDIATE")
            for work, loop, future in batch:
                db.execute("SAVEPOINT one")
                try:
                    answers.append((loop, future, work(db), None))
                    db.execute("RELEASE one")
                except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
                    if not db.in_transaction:  # a full disk has ended it already
                        raise
                    answers.append((loop, future, None, error))
                    db.execute("ROLLBACK TO one")
                    db.execute("RELEASE one")
            db.execute("COMMIT")
            if db.total_changes > changes:
                self._written.set()
        except sqlite3.Error as error:  # the disk is full or gone: nothing of the batch is kept
            if db.in_transaction:
                db.execute("ROLLBACK")
            answers = [(loop, future, None, error) for _, loop, future in batch]
        for loop, future, value, problem in answers:
            try:
                loop.call_soon_threadsafe(answer, future, value, problem)
            except RuntimeError:  # the loop has ended
                pass


def answer(future: asyncio.Future[Any], value: Any, problem: BaseException | None) -> None:
    if future.done():
        return
    if problem is not None:
        future.set_exception(problem)
    else:
        future.set_result(value)
