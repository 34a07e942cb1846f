"""`seedling studio`: the editor in the browser, served from this machine."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from .paths import Folders

DEFAULT_PORT = 8188  # ComfyUI's: tools that talk to one find the other
ROOT = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `seedling studio`."""
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    parser.add_argument("--no-browser", action="store_true", help="only serve, open nothing")
    parser.add_argument(
        "--home",
        type=Path,
        default=os.environ.get("SEEDLING_HOME") or Path.home() / "seedling",
        help="where pictures, saved workflows and the queue are kept (default: %(default)s, or "
        "$SEEDLING_HOME)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with diffusion_models/, vae/, text_encoders/: a ComfyUI's models folder, "
        "say; may be given more than once",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="default: %(default)s. Whoever reaches another address can use this machine: there is "
        "no password",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name that the browser may use, behind a proxy; may be given more than "
        "once",
    )


def page_folder() -> Path | None:
    """The installed editor's files; None when it is not installed."""
    found = importlib.util.find_spec("comfyui_frontend_package")
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0]) / "static" if places else None
    return folder if folder is not None and (folder / "index.html").is_file() else None


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the exit code."""
    missing = [
        name for name in ("aiohttp", "torch", "PIL") if importlib.util.find_spec(name) is None
    ]
    page = page_folder()
    if missing or page is None:
        absent = ", ".join([*missing, *([] if page else ["comfyui-frontend-package"])])
        sys.stderr.write(f"The studio needs {absent}: pip install 'seedling[run,host]'\n")
        return 2
    from aiohttp import web

    from .queue import QueueError
    from .server import Options, make_app

    models = tuple(path.expanduser().resolve() for path in options.models)
    folders = Folders(Path(options.home).expanduser().resolve(), models)
    try:
        sockets = listen(options.listen, options.port)
    except OSError as error:
        sys.stderr.write(
            f"Port {options.port} cannot be used ({error.strerror}); is a ComfyUI or a studio open "
            "there? Choose another with --port.\n"
        )
        return 2
    app = make_app(
        Options(folders, ROOT, options.port, options.listen, tuple(options.allow_host), page=page)
    )
    port = sockets[0].getsockname()[1]
    address = f"http://127.0.0.1:{port}/"

    async def announce(_: web.Application) -> None:
        sys.stderr.write(
            f"Seedling Studio: {address}   (Ctrl-C ends it)\nIts files: {folders.base}\n"
        )
        if not options.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    app.on_startup.append(announce)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    try:
        web.run_app(app, sock=sockets, print=None, handle_signals=True, shutdown_timeout=1)
    except QueueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def listen(address: str, port: int) -> list[socket.socket]:
    """A listening socket. OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # on Windows this would share the port with another program
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return [sock]
