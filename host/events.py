"""What the page is told, and how it misses nothing.

A session is a page: it has an id, at most one live socket, and a record of what was sent to it and
not yet confirmed. A confirmation costs the page nothing: behind messages goes a ping that carries
their number, which every browser answers by itself. A page that comes back is sent the rest; a
client that counts may say `since=N` instead, and gets exactly what came after message N.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

MOST_SOCKETS = 64
MOST_SESSIONS = 256
MOST_BYTES = 8 * 2**20  # kept for a page that is away or slow
LARGEST_FRAME = 64 * 2**10  # a page only says who it is
ALIVE_WITHIN = 2.0  # seconds in which a live socket answers a ping
TEXT = 3  # type of a binary message: a text on a node
FORGET_AFTER = 3600.0  # seconds without a socket
# Of these only the latest matters.
REPLACED = ("progress_state", "progress", "status", "preview")
FEATURES = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 100 * 2**20,
    "extension": {"manager": {"supports_v4": False}},
    "node_replacements": True,
    "assets": False,
}


@dataclass
class Note:
    """One message of a session."""

    number: int
    kind: str
    data: str | bytes


@dataclass
class Session:
    """A page, whether it is connected or not."""

    sid: str
    socket: web.WebSocketResponse | None = None
    number: int = 0  # of the last message
    confirmed: int = 0
    kept: deque[Note] = field(default_factory=deque)
    bytes: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0  # number of the last message written to the socket
    left: float = field(default_factory=time.monotonic)
    pong: asyncio.Event = field(default_factory=asyncio.Event)
    features: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Note] = field(default_factory=dict)  # the last message of each kind
    gaps: int = 0  # messages in `kept` that were given up
    overflow: bool = False  # something was given up that the page will miss

    def add(self, kind: str, data: str | bytes) -> None:
        """Append message `number`; what it overtakes is given up if it was not sent yet."""
        if kind in REPLACED:
            old = self.latest.get(kind)
            if old is not None and old.number > self.sent:
                self._empty(old)
            if self.gaps > len(self.kept) // 2:
                self.kept = deque(note for note in self.kept if note.data)
                self.gaps = 0
        note = Note(self.number, kind, data)
        self.latest[kind] = note
        self.kept.append(note)
        self.bytes += len(data)
        if self.bytes > MOST_BYTES:
            for note in self.latest.values():
                if note.kind in REPLACED and note.number < self.number:
                    self._empty(note)
        while self.bytes > MOST_BYTES and len(self.kept) > 1:
            if self._first().number > self.sent:
                self.overflow = True
        self.waiting.set()

    def confirm(self, number: int) -> None:
        """The page has everything up to this message."""
        self.confirmed = max(self.confirmed, min(number, self.number))
        while self.kept and self.kept[0].number <= self.confirmed:
            self._first()

    def _first(self) -> Note:
        note = self.kept.popleft()
        self.gaps -= not note.data
        self.bytes -= len(note.data)
        note.data = ""
        return note

    def _empty(self, note: Note) -> None:
        """Give up a message; its place is cleared later, many at once."""
        if note.data:
            self.bytes -= len(note.data)
            self.gaps += 1
            note.data = ""


class Hub:
    """All sessions of a host."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.remaining = 0  # jobs in the queue, for `status`
        self.catch_up: dict[str, tuple[str, Any]] = {}

    # ---- sending -------------------------------------------------------------------------------

    def tell(self, sid: str | None, kind: str, data: Any) -> None:
        """Send an event to one session, or to all with None."""
        for session in self._addressed(sid):
            session.number += 1
            text = json.dumps({"type": kind, "data": data, "seq": session.number})
            self._put(session, kind, text)

    def show(self, sid: str | None, plain: bytes, full: bytes) -> None:
        """Send a preview, in the form that the page knows."""
        for session in self._addressed(sid):
            session.number += 1
            knows = session.features.get("supports_preview_metadata")
            self._put(session, "preview", full if knows else plain)

    def text(self, sid: str | None, node_id: str, text: str) -> None:
        """Show a text on a node."""
        name = node_id.encode()
        data = struct.pack(">II", TEXT, len(name)) + name + text.encode(errors="replace")
        for session in self._addressed(sid):
            session.number += 1
            self._put(session, "text", data)

    def _put(self, session: Session, kind: str, data: str | bytes) -> None:
        session.add(kind, data)
        if session.socket is not None and session.overflow:
            # It does not read: the page connects anew when it does, and gets what is kept.
            socket, session.socket = session.socket, None
            session.left = time.monotonic()
            asyncio.get_running_loop().create_task(drop(socket))

    def status(self, remaining: int) -> None:
        self.remaining = remaining
        self.tell(None, "status", self._status())

    def _status(self) -> dict[str, Any]:
        return {"status": {"exec_info": {"queue_remaining": self.remaining}}}

    def _addressed(self, sid: str | None) -> list[Session]:
        if sid is None:
            return list(self.sessions.values())
        session = self.sessions.get(sid)
        if session is None:  # a page that will come back, after a restart of the host, say
            session = self._new(sid)
        return [session]

    def _new(self, sid: str) -> Session:
        now = time.monotonic()
        idle = sorted(
            (s.left, s.sid) for s in self.sessions.values() if s.socket is None
        )  # the longest away first
        for left, name in idle:
            if len(self.sessions) >= MOST_SESSIONS or now - left > FORGET_AFTER:
                del self.sessions[name]
        self.sessions[sid] = session = Session(sid)
        return session

    # ---- sockets -------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """GET /ws."""
        if sum(s.socket is not None for s in self.sessions.values()) >= MOST_SOCKETS:
            raise web.HTTPServiceUnavailable(text=f"At most {MOST_SOCKETS} pages at once.")
        sid = request.query.get("clientId", "")
        since = request.query.get("since", "")
        socket = web.WebSocketResponse(max_msg_size=LARGEST_FRAME, autoping=False, timeout=2)
        await socket.prepare(request)
        session = await self._seat(sid if is_client_id(sid) else secrets.token_hex(16), socket)
        if since.isdigit() and len(since) < 16:
            session.confirm(int(since))
        session.sent, session.overflow = session.confirmed, False
        await socket.send_str(
            json.dumps({"type": "status", "data": self._status() | {"sid": session.sid}})
        )
        writer = asyncio.create_task(self._write(session, socket))
        try:
            await self._read(session, socket)
        finally:
            writer.cancel()
            if session.socket is socket:  # not if another one took its place
                session.socket, session.left = None, time.monotonic()
        return socket

    async def _seat(self, sid: str, socket: web.WebSocketResponse) -> Session:
        """The session for a new socket. A live socket keeps its id: the newcomer gets another."""
        session = self.sessions.get(sid)
        if session is not None and session.socket is not None:
            old = session.socket
            if await self._alive(session, old):
                sid, session = secrets.token_hex(16), None
            elif session.socket is old:
                session.socket = None
                asyncio.get_running_loop().create_task(drop(old))
        if session is None or session.socket is not None:
            session = self._new(sid if session is None else secrets.token_hex(16))
        session.socket = socket
        return session

    async def _alive(self, session: Session, socket: web.WebSocketResponse) -> bool:
        session.pong.clear()
        try:
            await asyncio.wait_for(socket.ping(struct.pack(">Q", session.confirmed)), ALIVE_WITHIN)
            await asyncio.wait_for(session.pong.wait(), ALIVE_WITHIN)
        except (asyncio.TimeoutError, ConnectionError, RuntimeError):
            return False
        return session.socket is socket

    async def _read(self, session: Session, socket: web.WebSocketResponse) -> None:
        async for message in socket:
            if message.type == WSMsgType.PING:
                await socket.pong(message.data)
            elif message.type == WSMsgType.PONG:
                session.pong.set()
                if session.socket is socket and len(message.data) == 8:
                    session.confirm(struct.unpack(">Q", message.data)[0])
            elif message.type == WSMsgType.TEXT:
                await self._hear(session, socket, message.data)

    async def _hear(self, session: Session, socket: web.WebSocketResponse, text: str) -> None:
        """The one thing that a page says: what it knows. Anything else is ignored."""
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(said, dict) or said.get("type") != "feature_flags":
            return
        if isinstance(said.get("data"), dict):
            session.features = said["data"]
        await socket.send_str(json.dumps({"type": "feature_flags", "data": FEATURES}))

    async def _write(self, session: Session, socket: web.WebSocketResponse) -> None:
        """Send what is kept, in order, and behind it the ping that will confirm it."""
        try:
            while True:
                session.waiting.clear()
                if session.socket is not socket:
                    return
                wrote = False
                for note in [note for note in session.kept if note.number > session.sent]:
                    if note.number <= session.confirmed or not note.data:
                        continue
                    session.sent = note.number
                    wrote = True
                    send = socket.send_str if isinstance(note.data, str) else socket.send_bytes
                    await send(note.data)  # type: ignore[arg-type]
                if wrote:
                    await socket.ping(struct.pack(">Q", session.sent))
                if not any(note.number > session.sent for note in session.kept):
                    await session.waiting.wait()
        except (ConnectionError, RuntimeError):
            return


async def drop(socket: web.WebSocketResponse) -> None:
    """Close a socket that does not answer."""
    try:
        await asyncio.wait_for(socket.close(), 1)
    except (asyncio.TimeoutError, ConnectionError, RuntimeError):
        return


def is_client_id(value: Any) -> bool:
    """Whether a value may name a client: short, and safe in a log."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII) is not None
