"""The host under load: hostile requests (G6) and jobs (G16, H6), many of each.

Marked `slow`, and short even then. `make soak` runs them at full length: SOAK_REQUESTS and
SOAK_JOBS say how many.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "1000"))
JOBS = int(os.environ.get("SOAK_JOBS", "300"))
WARM = 500  # jobs after which memory may no longer grow
MOST_GROWTH = 32 * 2**20  # bytes, of the server and of the worker
MOST_DISK = 64 * 2**20 + 40 * 2**20  # bytes: the largest WAL, and the file of the history


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
count_graph = tools.count_graph


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Any]:
    running = tools.Host(tmp_path)
    try:
        yield ready(running.start()).warm()
    finally:
        running.stop()


def ready(running: Any) -> Any:
    """Wait for the nodes: a machine under load takes its time to import them."""
    for _ in range(6):
        try:
            running.get("/api/object_info/TestNoise")
            break
        except TimeoutError:
            continue
    return running


# ---- hostile requests --------------------------------------------------------------------------

TEXTS = (
    "", "x", "..", "../../etc/passwd", "..\\..\\x", "/etc/passwd", "C:\\x", "%00", "%2e%2e%2f", "~",
    "a" * 300, "a" * 9000, "\u202egnp.x", "雨", "nan", "-1", "1e999", "9" * 400, "null", "[]", "{}",
    "true", "<script>", "con", "x.png", "default", "workflows", "output", "input", "temp", "\x7f",
    "00000000-0000-4000-8000-000000000000", "TestNoise", "en", "loras", "a/b", "a//b", ".", "?",
)  # fmt: skip
NAMES = (
    "filename", "type", "subfolder", "preview", "channel", "dir", "recurse", "split", "full_info",
    "max_items", "offset", "limit", "status", "sort_by", "sort_order", "overwrite", "rand",
    "clientId", "since", "prompt", "prompt_id", "client_id", "number", "front", "extra_data",
    "partial_execution_targets", "delete", "clear", "job_ids", "unload_models", "free_memory",
    "class_type", "inputs", "value", "seed", "size", "count", "1", "2", "images", "__proto__",
)  # fmt: skip
TYPES = ("application/json", "application/json", "application/json", "text/plain", "image/png",
         "multipart/form-data; boundary=x", "multipart/form-data", "application/json; charset=x",
         "application/x-www-form-urlencoded", "", "\x01")  # fmt: skip


def routes(folder: Path) -> list[tuple[str, str]]:
    """Every route that the studio has, as (method, path)."""
    from seedling.host.paths import Folders
    from seedling.host.server import Options, make_app
    from seedling.host.studio import ROOT

    router = make_app(Options(Folders(folder), ROOT)).router
    found = [
        (route.method, route.resource.canonical) for route in router.routes() if route.resource
    ]
    return [pair for pair in found if pair[1] != "/ws"] + [("GET", "/ws")]


class Hostile:
    """Random requests, most of them nearly right."""

    def __init__(self, seed: int, paths: list[tuple[str, str]]) -> None:
        self.chance, self.paths = random.Random(seed), paths

    def request(self) -> bytes:
        """A request as bytes of HTTP/1.1, complete enough to be answered."""
        pick = self.chance.choice
        method, path = pick(self.paths)
        if self.chance.random() < 0.1:
            method = pick(("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"))
        while "{" in path:
            head, _, rest = path.partition("{")
            path = head + self.quoted(pick(TEXTS)) + rest.partition("}")[2]
        query = "&".join(
            f"{pick(NAMES)}={self.quoted(pick(TEXTS))}" for _ in range(self.chance.randrange(4))
        )
        path = f"{path}?{query}" if query else path
        body = self.body() if method not in ("GET", "HEAD") else b""
        headers = {
            "Host": "127.0.0.1" if self.chance.random() < 0.95 else pick(TEXTS)[:200],
            "Content-Type": pick(TYPES), "Content-Length": str(len(body)), "Connection": "close",
        }  # fmt: skip
        if self.chance.random() < 0.2:
            headers["Origin"] = pick(("http://127.0.0.1", "null", "http://evil.example", ""))
        if self.chance.random() < 0.1:
            headers[pick(("Range", "If-None-Match", "Accept", "Cookie", "Sec-Fetch-Site",
                          "Content-Encoding", "If-Modified-Since", "X"))] = pick(TEXTS)  # fmt: skip
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        return "\r\n".join(lines).encode("utf-8", "replace") + body

    def quoted(self, text: str) -> str:
        """As a URL has it, mostly."""
        return quote(text, safe="%") if self.chance.random() < 0.9 else text.replace(" ", "")

    def body(self) -> bytes:
        pick = self.chance.choice
        kind = self.chance.random()
        if kind < 0.05:
            return self.chance.randbytes(self.chance.randrange(200))
        if kind < 0.1:
            return pick(
                (b"[" * 100_000, b'{"a":' * 10_000, b"1e999", b"NaN", b'"\xff"', b"9" * 9999)
            )
        if kind < 0.15:
            field = (
                f'Content-Disposition: form-data; name="{pick(NAMES)}"; filename="{pick(TEXTS)}"'
            )
            return f"--x\r\n{field}\r\n\r\n{pick(TEXTS)}\r\n--x--\r\n".encode("utf-8", "replace")
        if kind < 0.5:
            body: Any = {"prompt": self.bent(count_graph(self.chance.randrange(10**6)))}
            body |= {pick(NAMES): self.value(2)} if self.chance.random() < 0.5 else {}
        else:
            body = self.value(3)
        return json.dumps(body).encode()

    def bent(self, graph: dict[str, Any]) -> Any:
        """A good prompt with something changed, or not."""
        if self.chance.random() < 0.3:
            return graph
        node = self.chance.choice(list(graph.values()))
        place = self.chance.choice((graph, node, node["inputs"]))
        place[self.chance.choice((*place, *NAMES))] = self.value(3)
        return graph

    def value(self, depth: int) -> Any:
        pick = self.chance.choice
        kind = self.chance.randrange(9 if depth else 6)
        if kind < 6:
            return (None, True, self.chance.randrange(-(2**70), 2**70), -0.5, pick(TEXTS), 0)[kind]
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.chance.randrange(4))]
        return {pick(NAMES): self.value(depth - 1) for _ in range(self.chance.randrange(4))}


def answered(port: int, request: bytes) -> int:
    """The status of an answer; 0 for a connection that is closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(request)
            answer = connection.makefile("rb").readline()
        except ConnectionError:
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


@pytest.mark.parametrize("seed", [int(os.environ.get("SOAK_SEED", "1"))])
def test_hostile_requests_are_answered(host: Any, tmp_path: Path, seed: int) -> None:
    """No 5xx, no silence, no growth; afterwards a job runs as before."""
    paths = routes(tmp_path / "other")
    generators = threading.local()
    numbers = iter(range(seed * 1000, seed * 1000 + 1000))
    bad: list[tuple[int, bytes]] = []
    start = time.monotonic()

    def one(_: int) -> int:
        if not hasattr(generators, "hostile"):
            generators.hostile = Hostile(next(numbers), paths)
        request = generators.hostile.request()
        status = answered(host.port, request)
        if status >= 500 or status == 0:
            bad.append((status, request[:2000]))
        return status

    with ThreadPoolExecutor(4) as pool:
        warm = Counter(pool.map(one, range(min(200, REQUESTS))))
        before = host.memory()
        seen = warm + Counter(pool.map(one, range(REQUESTS - warm.total())))
    host.post("/api/queue", {"clear": True})
    host.post("/api/interrupt", {})
    grown = (host.memory() - before) / 2**20
    sys.stdout.write(f"{seen.total()} requests on {len(paths)} routes in ")
    sys.stdout.write(f"{time.monotonic() - start:.0f} s: {dict(seen.most_common())}; ")
    sys.stdout.write(f"server grew by {grown:.1f} MiB\n")
    assert not bad, bad[:5]
    assert seen.total() == REQUESTS and seen[200] > REQUESTS / 20
    assert host.finished(host.queue(count_graph(7)))["status"]["status_str"] == "success"
    assert grown < 64


# ---- many jobs ---------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def handles(pid: int) -> tuple[int, int]:
    """How many files and threads a process has."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def disk(home: Path) -> int:
    return sum(file.stat().st_size for file in home.glob("queue.sqlite*"))


async def worked_off(url: str, count: int, look: Any) -> tuple[set[str], Counter[str]]:
    """Queue `count` jobs, a hundred ahead, and hear of their ends; the ids sent, and the ends."""
    from seedling.host.batch_client import Client

    sent: set[str] = set()
    ends: Counter[str] = Counter()
    news = asyncio.Event()

    def heard(kind: str, data: dict[str, Any]) -> None:
        if kind == "execution_success":
            ends[data["prompt_id"]] += 1
            news.set()

    async with Client(url) as client:
        listener = asyncio.create_task(client.listen(heard, news.set))
        await news.wait()
        for number in range(count):
            sent.add(await client.queue(count_graph(number + 1000), str(uuid4())))
            while len(sent) - len(ends) > 100:
                news.clear()
                await asyncio.wait_for(news.wait(), 60)
            if number in (min(WARM, count // 2), count - 1):
                look()
        while len(ends) < count:
            news.clear()
            await asyncio.wait_for(news.wait(), 60)
        listener.cancel()
    return sent, ends


def test_many_jobs(host: Any) -> None:
    """None is lost or runs twice; memory, files, threads and the database stay as they are."""
    first = host.finished(host.queue(count_graph(1)))
    pids = (host.process.pid, first["outputs"]["2"]["pid"][0])
    looks: list[tuple[Any, Any, int]] = []

    def look() -> None:
        looks.append((
            [resident(pid) for pid in pids], [handles(pid) for pid in pids], disk(host.home)
        ))  # fmt: skip

    start = time.monotonic()
    sent, ends = asyncio.run(worked_off(f"http://127.0.0.1:{host.port}", JOBS, look))
    spent = time.monotonic() - start
    (memory, before, _), (memory_after, after, size) = looks
    grown = [new - old for old, new in zip(memory, memory_after, strict=True)]
    sys.stdout.write(f"{JOBS} jobs in {spent:.0f} s; server and worker grew by ")
    sys.stdout.write(f"{[round(n / 2**20, 1) for n in grown]} MiB after the first ")
    sys.stdout.write(f"{min(WARM, JOBS // 2)}; files and threads {before} and then {after}; ")
    sys.stdout.write(f"queue {size / 2**20:.1f} MiB\n")
    assert len(sent) == JOBS and set(ends) == sent and set(ends.values()) == {1}
    last = host.finished(host.queue(count_graph(2)))
    assert last["outputs"]["2"]["pid"] == [pids[1]], "the worker was replaced"
    assert all(n < MOST_GROWTH for n in grown)
    for (files, threads), (files_after, threads_after) in zip(before, after, strict=True):
        assert files_after <= files + 4 and threads_after <= threads + 2
    assert size < MOST_DISK
