"""The studio's engine for the time of a batch: the same server, on a port of its own."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from .batch_values import BatchError


@asynccontextmanager
async def engine(home: Path, models: tuple[Path, ...]) -> AsyncIterator[str]:
    """Start it; its address. It ends with the block. BatchError when it cannot run here."""
    missing = [name for name in ("torch", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        raise BatchError(
            f"To make pictures here {', '.join(missing)} is missing: pip install 'seedling[run]'; "
            "or name a server with --server."
        )
    from aiohttp import web

    from .paths import Folders
    from .queue import QueueError
    from .server import Options, make_app
    from .studio import ROOT, listen

    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    (sock,) = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = make_app(Options(Folders(home, models), ROOT, port))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    try:
        try:
            await runner.setup()
        except QueueError as error:
            raise BatchError(f"{error} Or send the batch to it: --server ADDRESS.") from error
        except OSError as error:
            raise BatchError(f"{home} cannot be used: {error}; choose another --home.") from error
        await web.SockSite(runner, sock).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
        sock.close()
