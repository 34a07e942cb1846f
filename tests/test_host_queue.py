"""The queue loses nothing (G8): not to kill -9, not to a full disk, not its order."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from seedling.host.queue import MOST_FINISHED, Queue, QueueError


def load(name: str) -> Any:
    """A neighbour of this file; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


tools = load("host_tools")
count_graph, one = tools.count_graph, tools.one
JOB = {"prompt": {}, "targets": [], "extra": {}}


def opened(path: Path) -> Queue:
    queue = Queue(path)
    queue.open()
    return queue


def test_order_front_and_numbers(tmp_path: Path) -> None:
    """By number, then by arrival; `front` goes ahead of all."""

    async def run() -> list[str]:
        queue = opened(tmp_path / "q")
        for name, number, front in (
            ("a", None, False), ("b", 5, False), ("c", 0.5, False), ("d", None, True),
            ("e", 5, False),
        ):  # fmt: skip
            await queue.add(name, None, number, front, JOB)
        order = []
        while row := await queue.take():
            order.append(row.id)
        queue.close()
        return order

    assert asyncio.run(run()) == ["d", "c", "a", "b", "e"]


def test_an_id_is_taken_once_and_a_file_by_one(tmp_path: Path) -> None:
    async def run() -> None:
        queue = opened(tmp_path / "q")
        await queue.add("a", None, None, False, JOB)
        with pytest.raises(QueueError, match="already"):
            await queue.add("a", None, None, False, JOB)
        assert await queue.count("pending") == 1
        with pytest.raises(QueueError, match="another studio"):
            Queue(tmp_path / "q").open()
        queue.close()

    asyncio.run(run())


def test_a_running_job_is_put_back_once(tmp_path: Path) -> None:
    """Two ends of the host while one job runs: it had its chances."""

    async def run() -> None:
        for attempt in (1, 2):
            queue = opened(tmp_path / "q")
            if attempt == 1:
                await queue.add("a", None, None, False, JOB)
            row = await queue.take()
            assert row is not None and row.id == "a"
            queue.close()  # without finish: as after kill -9
            queue = opened(tmp_path / "q")
            assert await queue.recover() == (["a"] if attempt == 1 else [])
            queue.close()
        queue = opened(tmp_path / "q")
        row = await queue.row("a")
        assert (
            row is not None and row.status == "failed" and "twice" in row.result["error"]["message"]
        )
        queue.close()

    asyncio.run(run())


ACCEPTS = """
import asyncio, sys
from pathlib import Path
from seedling.host.queue import Queue

async def run():
    queue = Queue(Path(sys.argv[1]))
    queue.open()
    for number in range(100_000):
        await queue.add(str(number), None, None, False, {"prompt": {}, "targets": [], "extra": {}})
        print(number, flush=True)

asyncio.run(run())
"""


@pytest.mark.parametrize("count", [1, 200, 3000])
def test_what_was_accepted_survives_kill_9_at_once(tmp_path: Path, count: int) -> None:
    """A process that only accepts jobs, killed right behind an answer: every answer holds."""
    command = [sys.executable, "-c", ACCEPTS, str(tmp_path / "q")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    accepted = [process.stdout.readline().strip() for _ in range(count)]
    process.kill()
    accepted += process.stdout.read().split()  # what it had said before it died
    process.wait()

    async def left() -> list[str]:
        queue = opened(tmp_path / "q")
        rows = await queue.rows(("pending",))
        queue.close()
        return [row.id for row in rows]

    kept = asyncio.run(left())
    assert len(accepted) >= count
    # One more may have been written whose answer was not given any more.
    assert kept[: len(accepted)] == accepted and len(kept) <= len(accepted) + 1


@pytest.mark.parametrize("when", ["at rest", "under load"])
def test_the_log_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What is in the write-ahead log goes into the file, at a rest or when there is much of it."""
    from seedling.host import queue as module

    few, many = (4096, 2**30) if when == "at rest" else (2**16, 2**16 + 1)
    monkeypatch.setattr(module, "REST", 0.05)
    monkeypatch.setattr(module, "ENOUGH_WAL", few)
    monkeypatch.setattr(module, "LARGEST_WAL", many)
    log = tmp_path / "q-wal"

    async def run() -> tuple[int, int]:
        queue, largest = opened(tmp_path / "q"), 0
        for number in range(200):
            await queue.add(str(number), None, None, False, JOB)
            largest = max(largest, log.stat().st_size)
        deadline = time.monotonic() + 20
        while when == "at rest" and log.stat().st_size and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert [row.id for row in await queue.rows(("pending",))] == list(map(str, range(200)))
        size = log.stat().st_size
        queue.close()
        return largest, size

    largest, size = asyncio.run(run())
    assert size == 0 if when == "at rest" else largest < 2**18


def test_the_history_is_bounded(tmp_path: Path) -> None:
    async def run() -> int:
        queue = opened(tmp_path / "q")
        ids = [f"{number:04}" for number in range(MOST_FINISHED + 20)]
        await asyncio.gather(*(queue.add(name, None, None, False, JOB) for name in ids))
        await asyncio.gather(*(queue.finish(name, "completed", {}) for name in ids))
        kept = await queue.count("completed")
        queue.close()
        return kept

    assert asyncio.run(run()) == MOST_FINISHED


def test_one_write_that_fails_does_not_hurt_its_neighbours(tmp_path: Path) -> None:
    async def run() -> None:
        queue = opened(tmp_path / "q")
        answers = await asyncio.gather(
            queue.add("a", None, None, False, JOB),
            queue.add("b", None, None, False, {**JOB, "prompt": {"bad": {1, 2}}}),
            queue.add("c", None, None, False, JOB),
            return_exceptions=True,
        )
        assert isinstance(answers[1], TypeError)
        assert await queue.count("pending") == 2
        queue.close()

    asyncio.run(run())


def test_a_full_disk_is_an_error_and_then_over(tmp_path: Path) -> None:
    """A page limit stands for the disk: a write fails, the rest stays, small ones work again."""

    async def run() -> None:
        queue = opened(tmp_path / "q")
        await queue.add("a", None, None, False, JOB)

        def limit(db: sqlite3.Connection) -> None:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages + 2}")

        await queue._do(limit)
        with pytest.raises(sqlite3.Error, match="full"):
            await queue.add("b", None, None, False, {**JOB, "extra": {"x": "x" * 200_000}})
        await queue.add("c", None, None, False, JOB)
        assert [row.id for row in await queue.rows(("pending",))] == ["a", "c"]
        queue.close()

    asyncio.run(run())


# ---- with a real host --------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Any]:
    running = tools.Host(tmp_path).start().warm()
    try:
        yield running
    finally:
        running.stop()


def test_a_killed_host_keeps_every_job(host: Any) -> None:
    """kill -9 with 1,000 waiting, three times: none lost, in order, the running one once more."""
    blocker = host.queue(one("TestSteps", steps=100_000, seconds=0.05))
    times, ids = [], set()
    for seed in range(200):
        start = time.perf_counter()
        ids.add(host.queue(count_graph(seed)))
        times.append(time.perf_counter() - start)
    with ThreadPoolExecutor(4) as pool:
        ids |= set(pool.map(lambda seed: host.queue(count_graph(seed)), range(200, 1000)))
    assert len(ids) == 1000
    chance, starts = random.Random(3), []
    before = [row[1] for row in host.get("/api/queue")[1]["queue_pending"]]
    for attempt in range(3):
        time.sleep(chance.uniform(0, 0.4))
        host.kill()
        start = time.monotonic()
        host.start()
        starts.append(time.monotonic() - start)
        waiting = host.get("/api/queue")[1]
        rows = [row[1] for row in waiting["queue_running"] + waiting["queue_pending"]]
        assert attempt or blocker in rows
    if host.get(f"/api/jobs/{blocker}")[1]["status"] == "in_progress":
        host.post(f"/api/jobs/{blocker}/cancel", {})
    host.get("/api/object_info/TestNoise")
    rest = host.get("/api/queue")[1]
    left = [row[1] for row in rest["queue_running"] + rest["queue_pending"]]
    done = {job["id"] for job in host.get("/api/jobs?status=completed&limit=1000")[1]["jobs"]}
    kept = set(left) | done
    assert ids <= kept, f"{len(ids - kept)} jobs are lost"
    waiting_again = [row[1] for row in rest["queue_pending"] if row[1] != blocker]
    assert waiting_again == [job for job in before if job in set(waiting_again)]
    host.post("/api/queue", {"clear": True})
    assert host.get("/api/queue")[1]["queue_pending"] == []
    host.stop()
    with sqlite3.connect(host.home / "queue.sqlite") as db:  # readable by other programs
        warm = db.execute("SELECT result FROM jobs WHERE status = 'completed'").fetchone()
    assert json.loads(warm[0])["outputs"]["2"]["runs"]
    cuts = statistics.quantiles(times, n=100)
    sys.stdout.write(f"POST p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms; ")
    sys.stdout.write(f"restarts {[round(s, 2) for s in starts]} s\n")
    assert cuts[98] < 0.5  # the goal is 10 ms on an idle machine; this one may be shared
