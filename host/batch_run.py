"""Keeps a server busy with the jobs of a batch, and brings home what they make.

A few jobs are always queued ahead, so the server never waits for this side. Events of the socket
say at once that a job ended; every few seconds the jobs are asked for as well, so that a socket
that is down, or a server that was restarted, costs time and never a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .batch_client import Client, GoneError, RefusedError, failure, files_of, seconds_of
from .batch_manifest import Manifest
from .batch_workflow import Graph, values_of

AHEAD = 4  # jobs in the server's queue, the running one included
LOOK = 5.0  # seconds without news after which the jobs are asked for
MOST_LOST = 2  # times that a job is queued again after the server has forgotten it
PROMPTS, SEEDS = ("prompt", "prompts", "text"), ("seed", "noise_seed")


@dataclass
class Job:
    """One run of the workflow. `key` names it in the manifest, `values` is what was set."""

    number: int  # from 1, in the order of the batch
    key: str
    graph: Graph
    values: dict[str, Any]
    lost: int = 0


@dataclass
class Flight:
    """A job that the server has."""

    job: Job
    prompt_id: str
    started: float | None = None
    nodes: dict[str, float] = field(default_factory=dict)  # seconds of each node that ran
    node: tuple[str, float] | None = None  # the one that runs, since when


class Bar(Protocol):
    """What is told while a batch runs."""

    def landed(self, job: Job) -> None:
        """A job is done or has failed."""
        ...

    def step(self, value: float, most: float) -> None:
        """The running job is so far."""
        ...


class Run:
    """One run of a batch. Afterwards `failures` says what is missing and why."""

    def __init__(
        self, client: Client, manifest: Manifest, saved: list[Path], bar: Bar, workflow: str
    ) -> None:
        self.client, self.manifest, self.saved, self.bar = client, manifest, saved, bar
        self.workflow = workflow
        self.flying: dict[str, Flight] = {}
        self.ended: set[str] = set()
        self.news = asyncio.Event()
        self.look = True  # ask for all jobs at the next occasion
        self.failures: list[tuple[Job, str]] = []
        self.waiting: deque[Job] = deque()

    async def all(self, jobs: Sequence[Job]) -> None:
        """Until every job is done or has failed. GoneError when the server stays away."""
        await self.adopt(jobs)
        listener = asyncio.create_task(self.client.listen(self.heard, self.connected))
        await self.news.wait()
        try:
            while self.waiting or self.flying:
                while self.waiting and len(self.flying) < AHEAD:
                    await self.send(self.waiting.popleft())
                await self.bring_home()
        except GoneError:
            raise
        except BaseException:
            await self.take_back()
            raise
        finally:
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener

    async def adopt(self, jobs: Sequence[Job]) -> None:
        """Find the jobs that an earlier run left with this server; the rest waits to be sent."""
        known = self.manifest.queued()
        left = [job for job in jobs if job.key in known]
        there = await self.client.waiting() if left else set()
        for job in jobs:
            prompt_id = known.get(job.key)
            if prompt_id is None:
                self.waiting.append(job)
                continue
            history = None if prompt_id in there else await self.client.history(prompt_id)
            if prompt_id in there or (history is not None and failure(history) is None):
                self.flying[prompt_id] = Flight(job, prompt_id)
            else:
                self.waiting.append(job)

    async def send(self, job: Job) -> None:
        """Queue a job. One that is refused has failed."""
        try:
            prompt_id = await self.client.queue(job.graph, str(uuid.uuid4()))
        except RefusedError as error:
            self.fail(job, str(error))
            return
        self.manifest.note(job.key, prompt_id)
        self.flying[prompt_id] = Flight(job, prompt_id)

    # ---- news ----------------------------------------------------------------------------------

    def connected(self) -> None:
        """The socket is open, or could not be opened: what it told meanwhile went by."""
        self.look = True
        self.news.set()

    def heard(self, kind: str, data: dict[str, Any]) -> None:
        """An event of the socket."""
        flight = self.flying.get(str(data.get("prompt_id")))
        if flight is None:
            return
        now = time.perf_counter()
        if kind == "execution_start":
            flight.started = now
        elif kind == "progress":
            self.bar.step(data.get("value") or 0, data.get("max") or 1)
        elif kind == "executing":
            if flight.node is not None:
                flight.nodes[flight.node[0]] = now - flight.node[1]
            flight.node = None
            if data.get("node") is None:  # the end: by now the history has it
                self.ended.add(flight.prompt_id)
                self.news.set()
            else:
                flight.node = (str(data["node"]), now)

    async def bring_home(self) -> None:
        """Wait for a job to end, and fetch what it made."""
        if not self.flying:
            return
        if not self.ended and not self.look:
            try:
                await asyncio.wait_for(self.news.wait(), LOOK)
            except asyncio.TimeoutError:
                self.look = True
        self.news.clear()
        there: set[str] | None = None
        if self.look:
            # The queue first: a job moves from there to the history, never back.
            there = await self.client.waiting()
        wanted = set(self.flying) - there if there is not None else set(self.ended)
        self.look = False
        self.ended -= wanted
        for prompt_id in [key for key in self.flying if key in wanted]:
            flight = self.flying.pop(prompt_id)
            try:
                await self.land(flight)
            except RefusedError as error:
                self.fail(flight.job, str(error))
            except BaseException:
                self.flying[prompt_id] = flight
                raise

    async def land(self, flight: Flight) -> None:
        """A job is over: its pictures and their rows, or its failure."""
        job = flight.job
        history = await self.client.history(flight.prompt_id)
        if history is None:
            job.lost += 1
            if job.lost > MOST_LOST:
                self.fail(job, "The server has lost it three times.")
            else:
                self.waiting.appendleft(job)
            return
        wrong = failure(history)
        if wrong is not None:
            self.fail(job, wrong)
            return
        if self.waiting:  # the server's queue is filled up before the pictures come
            await self.send(self.waiting.popleft())
        shown = files_of(history)
        rows = []
        for place, (node, file) in enumerate(shown, start=1):
            data = await self.client.fetch(file)
            name = await self.manifest.keep(data, str(file["filename"]))
            self.saved.append(self.manifest.folder / name)
            rows.append({"file": name, "node": node, "picture": place, "of": len(shown)})
        self.manifest.add([self.row(flight, history, row) for row in rows or [{"file": None}]])
        self.bar.landed(job)

    def row(self, flight: Flight, history: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """A row of the manifest."""
        job = flight.job
        spent = seconds_of(history)
        if spent is None and flight.started is not None:
            spent = time.perf_counter() - flight.started
        recipe = {
            "workflow": self.workflow,
            "prompt": values_of(job.graph, PROMPTS), "seed": values_of(job.graph, SEEDS),
            "set": job.values, "prompt_id": flight.prompt_id,
        }  # fmt: skip
        return row | {
            "recipe": recipe, "seconds": spent,
            "nodes": {node: round(seconds, 4) for node, seconds in flight.nodes.items()},
            "job": job.key, "number": job.number, "done": round(time.time(), 3),
        }  # fmt: skip

    def fail(self, job: Job, why: str) -> None:
        self.failures.append((job, why))
        self.bar.landed(job)

    async def take_back(self) -> None:
        """Leave nothing of ours in the queue: the next run would make it twice."""
        started = [f for f in self.flying.values() if f.started is not None]
        running = max(started, key=lambda f: f.started or 0.0, default=None)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(
                self.client.take_back(list(self.flying), running.prompt_id if running else None), 5
            )
