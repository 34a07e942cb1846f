"""A batch's side of a server: a ComfyUI or a studio, over HTTP and its websocket.

A server that is away for a moment (it restarts, say) is waited for; what it had accepted is asked
for before anything is sent twice.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp

from .batch_values import BatchError
from .batch_workflow import Graph, Info

PATIENCE = 60.0  # seconds without an answer after which a server counts as gone
PAUSE = 0.5  # seconds between two attempts
ASKED = 300.0  # seconds that one answer may take: a first /object_info imports every node
BUSY = (502, 503, 504)
AWAY = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)
T = TypeVar("T")
Heard = Callable[[str, dict[str, Any]], None]


class RefusedError(BatchError):
    """A prompt that the server does not take, in its words."""


class GoneError(BatchError):
    """A server that does not answer any more."""


class Client:
    """One server. Use it inside `async with`."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url, self.patience = checked_url(url), patience
        self.sid = uuid.uuid4().hex
        self.session: aiohttp.ClientSession

    async def __aenter__(self) -> Client:
        limits = aiohttp.ClientTimeout(total=ASKED, sock_connect=10)
        self.session = aiohttp.ClientSession(timeout=limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    # ---- questions -----------------------------------------------------------------------------

    async def greet(self) -> None:
        """Make sure that somebody is there who talks like a ComfyUI."""
        try:
            found = await self._get("/prompt")
        except (*AWAY, aiohttp.ClientError, ValueError) as error:
            raise BatchError(
                f"No ComfyUI or studio answers at {self.url} ({error or type(error).__name__}); "
                "start it, correct --server, or leave --server out to run without one."
            ) from error
        if not isinstance(found, dict) or "exec_info" not in found:
            raise BatchError(f"{self.url} is not a ComfyUI or a studio; correct --server.")

    async def object_info(self, kinds: Sequence[str]) -> Info:
        """/object_info of these nodes; without those that the server does not have."""
        found: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            found |= await self.patiently(self._get, f"/object_info/{quote(kind, safe='')}") or {}
        return found

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What became of a job; None while it waits or runs, or when nobody knows it."""
        found = await self.patiently(self._get, f"/history/{prompt_id}")
        return found.get(prompt_id)

    async def waiting(self) -> set[str]:
        """The ids of all jobs that wait or run."""
        return await self.patiently(self._ids)

    async def queue(self, graph: Graph, prompt_id: str) -> str:
        """Queue a prompt; its id, which old servers choose themselves. RefusedError if not."""
        body = {"prompt": graph, "client_id": self.sid, "prompt_id": prompt_id}
        attempts = 0

        async def once() -> str:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and await self.is_known(prompt_id):
                return prompt_id  # the answer was lost, the job was not
            async with self.session.post(f"{self.url}/prompt", json=body) as answer:
                if answer.status in BUSY:
                    raise aiohttp.ServerDisconnectedError
                text = await answer.text()
                if answer.status != 200:
                    raise RefusedError(refusal(answer.status, text))
            taken = json.loads(text)
            if taken.get("node_errors"):
                # One output of several: the server makes the rest, and nobody would notice.
                await self.take_back([taken["prompt_id"]], None)
                raise RefusedError(refusal(400, text))
            return taken["prompt_id"]

        return await self.patiently(once)

    async def is_known(self, prompt_id: str) -> bool:
        # In this order: a job moves from the queue to the history, never back.
        return prompt_id in (await self._ids()) or prompt_id in await self._get(
            f"/history/{prompt_id}"
        )

    async def _ids(self) -> set[str]:
        found = await self._get("/queue")
        return {item[1] for rows in found.values() for item in rows}

    async def fetch(self, file: dict[str, Any]) -> bytes:
        """The bytes of a file that a job has shown."""
        names = {"filename": "", "subfolder": "", "type": "output"}
        query = {name: str(file.get(name, default)) for name, default in names.items()}

        async def once() -> bytes:
            async with self.session.get(f"{self.url}/view", params=query) as answer:
                if answer.status in BUSY:
                    raise aiohttp.ServerDisconnectedError
                if answer.status != 200:
                    raise RefusedError(
                        f"The server does not hand out {query['filename']} ({answer.status})."
                    )
                return await answer.read()

        return await self.patiently(once)

    async def take_back(self, waiting: Sequence[str], running: str | None) -> None:
        """Take jobs of ours out of the queue, and stop the one that runs."""
        for path, body in (
            ("/queue", {"delete": list(waiting)} if waiting else None),
            ("/interrupt", {"prompt_id": running} if running else None),
        ):
            if body is not None:
                async with self.session.post(f"{self.url}{path}", json=body):
                    pass

    async def _get(self, path: str) -> Any:
        async with self.session.get(f"{self.url}{path}") as answer:
            if answer.status in BUSY:
                raise aiohttp.ServerDisconnectedError
            if answer.status == 404:
                return {}
            answer.raise_for_status()
            return json.loads(await answer.text())

    async def patiently(self, ask: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Ask until there is an answer; GoneError after `patience` seconds."""
        start = time.monotonic()
        while True:
            try:
                return await ask(*arguments)
            except AWAY as error:
                if time.monotonic() - start > self.patience:
                    raise GoneError(
                        f"{self.url} has not answered for {self.patience:.0f} s."
                    ) from error
                await asyncio.sleep(PAUSE)

    # ---- the socket ----------------------------------------------------------------------------

    async def listen(self, heard: Heard, connected: Callable[[], None]) -> None:
        """Hand on every event, until cancelled; a socket that ends is opened again."""
        scheme, rest = self.url.split("://", 1)
        address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws?clientId={self.sid}"
        while True:
            try:
                async with self.session.ws_connect(address, max_msg_size=0) as socket:
                    connected()
                    async for message in socket:
                        if message.type != aiohttp.WSMsgType.TEXT:
                            continue  # a preview
                        said = json.loads(message.data)
                        if isinstance(said, dict) and isinstance(said.get("data"), dict):
                            heard(str(said.get("type")), said["data"])
            except (*AWAY, aiohttp.ClientError, ValueError):
                pass  # the jobs are asked for now and then too: nothing is lost without a socket
            connected()
            await asyncio.sleep(PAUSE)


def checked_url(url: str) -> str:
    """The address without a slash at its end; BatchError for what is none."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
        raise BatchError(f"--server takes an address such as http://127.0.0.1:8188; not {url!r}.")
    return parts.geturl().rstrip("/")


# ---- the server's words ------------------------------------------------------------------------


def refusal(status: int, text: str) -> str:
    """Why a prompt was not taken: the first node's first fault, else what the server says."""
    try:
        body = json.loads(text)
        for node_id, entry in (body.get("node_errors") or {}).items():
            for error in entry.get("errors", ()):
                what = _joined(error.get("message"), error.get("details"))
                return f"Node {node_id} ({entry.get('class_type')}): {what}"
        error = body["error"]
        if isinstance(error, str):
            return error
        return _joined(error.get("message"), error.get("details"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"The server answered {status}: {text[:200]}"


def _joined(message: Any, details: Any) -> str:
    parts = [str(part).strip() for part in (message, details) if part]
    return _line(": ".join(parts) or "it does not say why")


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def failure(history: dict[str, Any]) -> str | None:
    """Why a job of the history failed; None when it did not."""
    status = history.get("status") or {}
    for kind, data in reversed(status.get("messages") or []):
        if kind == "execution_error":
            node = f"Node {data.get('node_id')} ({data.get('node_type')}): "
            said = data.get("exception_message") or data.get("exception_type")
            return _line((node if data.get("node_id") is not None else "") + str(said))
        if kind == "execution_interrupted":
            return f"It was cancelled at node {data.get('node_id')} ({data.get('node_type')})."
    if status.get("status_str") == "success" or (not status and history.get("outputs")):
        return None
    return "The server says that it failed, and not why."


def files_of(history: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The files that a job made, as (node, file): what it saved, its previews if it saved none."""
    shown = [
        (node_id, entry)
        for node_id, output in (history.get("outputs") or {}).items()
        for entries in output.values()
        if isinstance(entries, list)
        for entry in entries
        if isinstance(entry, dict) and entry.get("filename")
    ]
    saved = [item for item in shown if item[1].get("type", "output") == "output"]
    previews = [item for item in shown if item[1].get("type") == "temp"]
    return saved or previews


def seconds_of(history: dict[str, Any]) -> float | None:
    """How long a job ran, by the server's clock."""
    messages = (history.get("status") or {}).get("messages") or []
    times = {kind: data.get("timestamp") for kind, data in messages if isinstance(data, dict)}
    start, end = times.get("execution_start"), times.get("execution_success")
    return None if start is None or end is None else (end - start) / 1000
