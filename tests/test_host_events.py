"""A page that comes back misses nothing, and none takes another's place or stops the host (G9)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from seedling.host.events import MOST_BYTES, MOST_SOCKETS, Hub, Session


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
host, Page = tools.host, tools.Page
count_graph, one = tools.count_graph, tools.one


def with_page(host: Any, work: Callable[[Any, aiohttp.ClientSession], Awaitable[Any]]) -> Any:
    """Run `work(page, session)` with a page that is connected."""

    async def run() -> Any:
        async with aiohttp.ClientSession() as session:
            page = await Page(host, session).connect()
            return await work(page, session)

    return asyncio.run(run())


async def queue(host: Any, page: Any, prompt: Any) -> str:
    return await asyncio.to_thread(host.queue, prompt, client_id=page.sid)


def test_the_order_of_a_run(host: Any) -> None:
    """As ComfyUI's: start, cached, each node, success, status, and at last executing nothing."""

    async def work(page: Any, _: Any) -> list[str]:
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        await page.socket.send_str(json.dumps(flags))
        assert (await page.until("feature_flags"))["data"]["supports_preview_metadata"]
        job = await queue(host, page, count_graph(11))
        await page.until("executing", node=None, prompt_id=job)
        told = [m for m in page.heard if m["data"].get("prompt_id") in (None, job)]
        kinds = [m["type"] for m in told]
        return [kind for kind in kinds if kind not in ("feature_flags", "progress_state")]

    kinds = with_page(host, work)
    assert kinds[0] == "status"
    assert [kind for kind in kinds if kind != "status"] == [
        "execution_start", "execution_cached", "executing", "executing", "executed",
        "execution_success", "executing",
    ]  # fmt: skip
    assert kinds[-2] == "status"


def test_cached_outputs_are_shown_again(host: Any) -> None:
    async def work(page: Any, _: Any) -> None:
        seen = []
        for _ in range(2):
            await queue(host, page, count_graph(12))
            seen.append((await page.until("executed", node="2"))["data"]["output"])
        assert seen[0] == seen[1]

    with_page(host, work)


def test_previews_and_progress(host: Any) -> None:
    """A preview carries its node; progress says value and maximum."""

    async def work(page: Any, _: Any) -> None:
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        await page.socket.send_str(json.dumps(flags))
        job = await queue(host, page, one("TestSteps", steps=8, seconds=0.02))
        await page.until("progress", value=8.0, max=8.0)
        await page.until("executing", node=None, prompt_id=job)
        kind, length = struct.unpack(">II", page.binary[0][:8])
        where = json.loads(page.binary[0][8 : 8 + length])
        assert kind == 4 and where["prompt_id"] == job and where["node_id"] == "1"
        assert page.binary[0][8 + length :][:2] == b"\xff\xd8"
        states = [m["data"]["nodes"]["1"] for m in page.heard if m["type"] == "progress_state"]
        assert states[-1]["state"] == "finished"

    with_page(host, work)


def test_a_page_that_counts_misses_nothing(host: Any) -> None:
    """100 cuts during runs; with `since` every lasting message arrives once, in order."""

    async def work(page: Any, session: aiohttp.ClientSession) -> None:
        sid = page.sid
        jobs: list[str] = []
        for cut in range(100):
            if cut % 10 == 0:
                jobs.append(await queue(host, page, count_graph(1000 + cut)))
                jobs.append(await queue(host, page, one("TestSteps", steps=5, seconds=0.005)))
            else:
                await asyncio.sleep(0.003)
            if cut % 3:
                await read_some(page)
            page.cut()
            last = max((m.get("seq", 0) for m in page.heard), default=0)
            heard = page.heard
            page = Page(host, session)
            page.heard = heard
            await page.connect(sid, since=last)
            assert page.sid == sid
        await page.until("executing", node=None, prompt_id=jobs[-1])
        for kind in ("execution_start", "execution_success"):
            seen = [m["data"]["prompt_id"] for m in page.heard if m["type"] == kind]
            assert seen == jobs
        numbers = [m["seq"] for m in page.heard if "seq" in m]
        assert numbers == sorted(set(numbers))

    with_page(host, work)


async def read_some(page: Any) -> None:
    for _ in range(3):
        try:
            await page.next(0.01)
        except (asyncio.TimeoutError, TimeoutError):
            return


def test_the_stock_page_misses_nothing_either(host: Any) -> None:
    """It cannot count. What its browser has not confirmed comes again; here: everything."""

    async def work(page: Any, session: aiohttp.ClientSession) -> None:
        sid = page.sid
        for _ in range(10):
            page.cut()
            job = await queue(host, page, count_graph(int(time.monotonic() * 1e6) % 10**9))
            await asyncio.to_thread(host.finished, job)
            page = await Page(host, session).connect(sid)
            await page.until("execution_start", prompt_id=job)
            await page.until("executed", prompt_id=job)
            await page.until("execution_success", prompt_id=job)
            await page.until("executing", node=None, prompt_id=job)

    with_page(host, work)


def test_a_live_id_is_not_taken(host: Any) -> None:
    """A second page with the id of a live one (a duplicated tab) gets an id of its own."""

    async def work(page: Any, session: aiohttp.ClientSession) -> None:
        reading = asyncio.create_task(page.until("executing", node=None))
        other = await Page(host, session).connect(page.sid)
        assert other.sid != page.sid
        await queue(host, page, count_graph(13))
        await reading
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await other.until("execution_start", seconds=0.3)

    with_page(host, work)


def test_a_dead_socket_makes_room(host: Any) -> None:
    """A half-open connection does not answer: within seconds the page has its id again."""

    async def work(page: Any, session: aiohttp.ClientSession) -> None:
        # Nobody reads from `page.socket`, so no ping is answered: as when a network is gone.
        again = await Page(host, session).connect(page.sid)
        assert again.sid == page.sid

    with_page(host, work)


def test_junk_and_large_frames_are_harmless(host: Any) -> None:
    async def work(page: Any, session: aiohttp.ClientSession) -> None:
        for text in (
            "",
            "x",
            "[]",
            "1",
            '{"type": 1}',
            '{"type": "feature_flags", "data": 3}',
            "[" * 9999,
        ):
            await page.socket.send_str(text)
        await page.socket.send_bytes(b"\x00" * 1000)
        await queue(host, page, count_graph(14))
        await page.until("executing", node=None)
        await page.socket.send_str("x" * 2**20)
        with pytest.raises(ConnectionError):
            while True:
                await page.next(3)

    with_page(host, work)
    assert host.finished(host.queue(count_graph(15)))["status"]["completed"]


def test_sockets_are_counted(host: Any) -> None:
    async def work(page: Any, session: aiohttp.ClientSession) -> int:
        pages = [page]
        try:
            while len(pages) < MOST_SOCKETS + 5:
                pages.append(await Page(host, session).connect())
        except aiohttp.WSServerHandshakeError as error:
            assert error.status == 503
        return len(pages)

    assert 2 < with_page(host, work) <= MOST_SOCKETS


def test_no_client_tells_every_page(host: Any) -> None:
    """A script that names no client: the pages see its run."""

    async def work(page: Any, _: Any) -> None:
        job = await asyncio.to_thread(host.queue, count_graph(16))
        await page.until("execution_success", prompt_id=job)

    with_page(host, work)


def test_the_record_is_bounded() -> None:
    """8 MiB a page, the previews given up first, the lasting messages last."""
    session = Session("x")
    for number in range(1, 4000):
        session.number = number
        session.add("preview" if number % 2 else "executed", "x" * 10_000)
    assert session.bytes <= MOST_BYTES
    assert session.bytes == sum(len(note.data) for note in session.kept)
    assert sum(note.kind == "preview" and bool(note.data) for note in session.kept) <= 1
    session.confirm(session.number)
    assert session.bytes == 0 and not session.kept


def test_a_page_that_does_not_read_is_let_go() -> None:
    """Its socket is closed; what it will need is kept within the bound."""

    class Stalled:
        closed = False

        async def close(self) -> None:
            self.closed = True

    async def run() -> None:
        hub = Hub()
        session = hub._new("x")
        session.socket = stalled = Stalled()  # type: ignore[assignment]
        for _ in range(1000):
            hub.tell("x", "executed", "y" * 10_000)
        await asyncio.sleep(0.01)
        assert stalled.closed and session.socket is None
        assert session.bytes <= MOST_BYTES

    asyncio.run(run())
