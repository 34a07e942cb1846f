"""The web server: what is let in, and where it goes.

Doors are closed by default. The Host header must name this machine (no DNS rebinding), a request
that a browser sends for another site is refused, and what changes something must be JSON, or come
from our own page: only a page of ours can send our own Origin.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from .events import Hub
from .images import remove_old, remove_parts
from .library import OURS, Library, load
from .paths import Folders, PathError
from .queue import Queue
from .runner import Runner

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "[::1]")
PREVIEWS_LAST = 24 * 3600  # seconds
LARGEST_JSON = 16 * 2**20
LARGEST_UPLOAD = 100 * 2**20
# The page sends these without saying that they are JSON.
LOOSE = ("/settings", "/userdata", "/upload/", "/users", "/internal/")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Options:
    """How a studio is served."""

    folders: Folders
    root: Path  # of the pack: web/, locales/, example_workflows/, subgraphs/
    port: int = 8188
    listen: str = "127.0.0.1"
    allowed: tuple[str, ...] = ()  # further host names, for a reverse proxy
    entries: tuple[str, ...] = (OURS,)
    grace: float = 30.0
    page: Path | None = None  # the front end's static folder


@dataclass
class State:
    """What the handlers share."""

    options: Options
    hub: Hub
    queue: Queue
    runner: Runner
    thread: concurrent.futures.ThreadPoolExecutor
    library: asyncio.Future[Library] | None = None
    posted: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    async def nodes(self) -> Library:
        """The nodes, when they are imported."""
        assert self.library is not None
        return await asyncio.shield(self.library)

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run what takes time or calls a node's code off the loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)


STATE = web.AppKey("state", State)


class BadRequest(ValueError):
    """A request with a fault; the text names the field."""


def make_app(options: Options) -> web.Application:
    """The application; everything starts with it and ends with it."""
    from .api import add_routes

    middlewares = [doors(options), sentences, headers]
    app = web.Application(client_max_size=LARGEST_UPLOAD, middlewares=middlewares)
    hub, queue = Hub(), Queue(options.folders.queue)
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="nodes")
    runner = Runner(queue, hub, options.folders, options.entries)
    runner.grace = options.grace
    app[STATE] = State(options, hub, queue, runner, thread)
    app.cleanup_ctx.append(life)
    add_routes(app)
    return app


async def life(app: web.Application) -> AsyncIterator[None]:
    """Start the queue, the nodes and the worker; end them in turn."""
    state = app[STATE]
    folders = state.options.folders
    folders.make()
    state.queue.open()
    await asyncio.to_thread(remove_parts, folders.of("output"))
    await asyncio.to_thread(remove_old, folders.of("temp"), PREVIEWS_LAST)
    again = await state.queue.recover()
    if again:
        log.warning("%d job was cut off by the end of the last session and runs again", len(again))
    loop = asyncio.get_running_loop()
    state.library = loop.run_in_executor(state.thread, load, folders, state.options.entries)
    state.library.add_done_callback(lambda f: f.cancelled() or f.exception())  # asked for later
    state.hub.remaining = await state.queue.count("pending", "in_progress")
    running = asyncio.create_task(state.runner.run())
    yield
    running.cancel()
    state.runner.close()
    state.queue.close()
    state.thread.shutdown(wait=False)


# ---- middlewares -------------------------------------------------------------------------------


def host_of(header: str) -> str:
    """The host in a Host header or an origin's netloc, without its port."""
    name, _, port = header.rpartition(":")
    return name.lower() if port.isdigit() and name else header.lower()


def doors(options: Options) -> Any:
    """The middleware that refuses what does not come from here."""
    names = {*LOCAL, *(name.lower() for name in options.allowed)}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.getall("Host", [])
        if len(host) != 1 or host_of(host[0]) not in names:
            raise web.HTTPForbidden(
                text="This host name is not served; open the studio under 127.0.0.1, or allow the "
                "name with --allow-host."
            )
        origin = request.headers.get("Origin")
        if origin is not None and not same_origin(origin, host[0]):
            raise web.HTTPForbidden(text="A page of another origin may not talk to this studio.")
        site = request.headers.get("Sec-Fetch-Site", "none")
        navigation = request.method == "GET" and request.path == "/"
        if site not in ("none", "same-origin") and not navigation:
            raise web.HTTPForbidden(text="A page of another site may not talk to this studio.")
        if request.headers.get("Content-Encoding"):
            raise web.HTTPUnsupportedMediaType(text="Compressed requests are not taken.")
        if request.method not in ("GET", "HEAD"):
            check_body(request, origin is not None)
        return await handler(request)

    return check


def same_origin(origin: str, host: str) -> bool:
    """Whether an Origin is that of the page that `host` serves."""
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def check_body(request: web.Request, from_page: bool) -> None:
    """Only JSON changes anything: no plain form of another site can send that unasked."""
    path = request.path.removeprefix("/api")
    uploads = path.startswith("/upload/")
    declared = request.content_length or 0
    if declared > (LARGEST_UPLOAD if uploads or path.startswith("/userdata") else LARGEST_JSON):
        raise web.HTTPRequestEntityTooLarge(max_size=LARGEST_UPLOAD, actual_size=declared)
    if request.content_type == "application/json" and "Content-Type" in request.headers:
        return
    if uploads and request.content_type == "multipart/form-data":
        # Scripts may upload too; a browser always says where a form comes from.
        return
    if (
        from_page
        and (path.startswith(LOOSE) or path.endswith("/cancel"))
        or request.method == "DELETE"
    ):
        return
    raise web.HTTPUnsupportedMediaType(text="Send JSON, with Content-Type: application/json.")


@web.middleware
async def sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Faults of a request become 4xx with a sentence; faults of ours are logged, and still JSON."""
    try:
        return await handler(request)
    except (BadRequest, PathError) as error:
        return refusal(400, str(error))
    except BadHttpMessage as error:  # the headers of a part of a form
        return refusal(400, f"The body cannot be read: {' '.join(error.message.split())[:200]}")
    except FileNotFoundError:
        return refusal(404, "There is no such file.")
    except (ConnectionError, asyncio.CancelledError, web.HTTPException):
        raise
    except Exception:
        log.exception("%s %s", request.method, request.path)
        return refusal(500, "The studio made a mistake; its terminal says more.")


def refusal(status: int, text: str) -> web.Response:
    """An answer in the form that the page reads."""
    error = {"type": "bad_request", "message": text, "details": "", "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=status)


@web.middleware
async def headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What every answer carries: no guessing of types, no frames of other sites, fresh pages."""
    response = await handler(request)
    if not response.prepared:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        response.headers.setdefault("X-Frame-Options", "SAMEORIGIN")
        if request.path == "/" or request.path.startswith(("/api/", "/extensions/")):
            response.headers.setdefault("Cache-Control", "no-store")
    return response


# ---- reading requests --------------------------------------------------------------------------


def parse_json(text: bytes | str) -> Any:
    """JSON as the standard has it: no NaN, no endless numbers or depth. BadRequest otherwise."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("a number is too large")
        return value

    try:
        return json.loads(text, parse_constant=constant, parse_float=number)
    except RecursionError:
        raise BadRequest("The JSON is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and integers of 5,000 digits are among them
        raise BadRequest(f"The body is not JSON: {str(error)[:200]}") from None


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request carries; an empty body is an empty object."""
    data = await request.read()
    if len(data) > LARGEST_JSON:
        raise web.HTTPRequestEntityTooLarge(max_size=LARGEST_JSON, actual_size=len(data))
    value = parse_json(data) if data.strip() else {}
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def whole(request: web.Request, name: str, default: int, most: int) -> int:
    """A whole number from the query, between 0 and `most`."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadRequest(f"{name} must be a whole number from 0 to {most}.")
    return min(int(text), most)


def strings(value: Any, name: str) -> list[str]:
    """A list of texts from a body."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest(f"{name} must be a list of texts.")
    return value
