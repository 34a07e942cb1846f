"""What the tests of the host share: a studio process, and a client for it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

HERE = Path(__file__).resolve().parent
JSON = {"Content-Type": "application/json"}


class Host:
    """A studio on a free port."""

    def __init__(self, home: Path, log: Path | None = None) -> None:
        self.home, self.log, self.process, self.port = home, log, None, 0

    def start(self) -> Host:
        (self.home / "port").unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "studio" / "host_process.py"), str(self.home), "0"]
        command += [str(self.log)] if self.log else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.home / "stderr", "ab") as errors:
            self.process = subprocess.Popen(command, env=environment, stderr=errors)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.port = int((self.home / "port").read_text())
                if self.get("/api/prompt")[0] == 200:
                    return self
            except (OSError, ValueError):
                time.sleep(0.05)
        raise RuntimeError((self.home / "stderr").read_text()[-3000:])

    def warm(self) -> Host:
        """Wait until nodes and worker are there."""
        assert self.get("/api/object_info/TestNoise")[0] == 200
        self.finished(self.queue(count_graph(0)))
        return self

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    # ---- requests ------------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest(
                method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True
            )
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None and "Transfer-Encoding" not in (headers or {}):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        status, headers, data = self.ask("GET", path)
        kind = headers.get("content-type", "")
        return status, json.loads(data) if kind.startswith("application/json") else data

    def post(self, path: str, value: Any) -> tuple[int, Any]:
        status, headers, data = self.ask("POST", path, json.dumps(value).encode(), JSON)
        kind = headers.get("content-type", "")
        return status, json.loads(data) if kind.startswith("application/json") else data

    def queue(self, prompt: Any, **more: Any) -> str:
        """Queue a prompt that must be taken; its id."""
        status, answer = self.post("/api/prompt", {"prompt": prompt, **more})
        assert status == 200, answer
        return answer["prompt_id"]

    def finished(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        """The history of a job, when it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.get(f"/api/history/{job_id}")[1]
            if found:
                return found[job_id]
            time.sleep(0.02)
        raise AssertionError(f"{job_id} did not end within {seconds} s: {self.get('/api/queue')}")

    def upload(self, name: str, data: bytes, path: str = "/upload/image", **fields: str) -> Any:
        parts = [
            f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        head = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = b"".join(parts) + head.encode() + data + b"\r\n--x--\r\n"
        status, _, answer = self.ask(
            "POST", path, body, {"Content-Type": "multipart/form-data; boundary=x"}
        )
        return status, json.loads(answer)

    def memory(self) -> int:
        """Resident bytes of the server's process."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def error_of(history: dict[str, Any]) -> str:
    """The message of a job's execution_error."""
    messages = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    return messages[-1]["exception_message"] if messages else ""


def count_graph(seed: int, size: int = 8) -> dict[str, Any]:
    """Noise into a counter: quick, and tells whether it ran."""
    return {
        "1": {"class_type": "TestNoise", "inputs": {"seed": seed, "size": size}},
        "2": {"class_type": "TestCount", "inputs": {"value": ["1", 0]}},
    }


def one(kind: str, **inputs: Any) -> dict[str, Any]:
    """A graph of one node."""
    return {"1": {"class_type": kind, "inputs": inputs}}


class Page:
    """A socket like the page's."""

    def __init__(self, host: Host, session: aiohttp.ClientSession) -> None:
        self.host, self.session, self.sid = host, session, ""
        self.socket: Any = None
        self.heard: list[dict[str, Any]] = []
        self.binary: list[bytes] = []

    async def connect(self, sid: str = "", since: int | None = None, **options: Any) -> Page:
        query = f"?clientId={sid}" + (f"&since={since}" if since is not None else "")
        self.socket = await self.session.ws_connect(
            f"http://127.0.0.1:{self.host.port}/ws{query}", **options
        )
        first = await self.next()
        self.sid = first["data"]["sid"]
        return self

    async def next(self, seconds: float = 10.0) -> dict[str, Any]:
        """The next JSON message."""
        assert self.socket is not None
        while True:
            message = await self.socket.receive(seconds)
            if message.type == aiohttp.WSMsgType.TEXT:
                self.heard.append(json.loads(message.data))
                return self.heard[-1]
            if message.type == aiohttp.WSMsgType.BINARY:
                self.binary.append(message.data)
                continue
            raise ConnectionError(f"the socket ended: {message.type.name}")

    async def until(self, kind: str, seconds: float = 15.0, **data: Any) -> dict[str, Any]:
        """The next message of a kind whose data has these values."""

        async def look() -> dict[str, Any]:
            while True:
                message = await self.next(seconds)
                found = message["data"]
                if message["type"] == kind and all(found.get(k) == v for k, v in data.items()):
                    return message

        return await asyncio.wait_for(look(), seconds)

    def cut(self) -> None:
        """Drop the connection without a word."""
        assert self.socket is not None
        transport = self.socket._response.connection.transport
        transport.abort()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A studio that is ready, for the tests of one file."""
    home = tmp_path_factory.mktemp("studio")
    running = Host(home, home / "opened").start()
    try:
        yield running.warm()
    finally:
        running.stop()
