"""A studio in a process of its own, with nodes that misbehave: what the tests of the host start.

Usage: python host_process.py HOME PORT [LOG | all]. With LOG every file that is opened is written
there; with `all` the pack's own nodes are served too.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def serve(home: str, port: str, log: str | None = None) -> None:
    from aiohttp import web

    from seedling.host import studio
    from seedling.host.library import OURS
    from seedling.host.paths import Folders
    from seedling.host.server import Options, make_app

    if log and log != "all":
        watch(log)
    folders = Folders(Path(home))
    entries = (OURS, "host_dummy_nodes") if log == "all" else ("host_dummy_nodes",)
    page = studio.page_folder()
    options = Options(folders, studio.ROOT, entries=entries, grace=1.0, page=page)
    app = make_app(options)
    sockets = studio.listen("127.0.0.1", int(port))
    Path(home, "port").write_text(str(sockets[0].getsockname()[1]))
    web.run_app(app, sock=sockets, print=None, shutdown_timeout=1)


def watch(log: str) -> None:
    """Write down the path of every file that this process opens from now on."""
    out = open(log, "a", buffering=1)

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str):
            out.write(ascii(arguments[0]) + "\n")

    sys.addaudithook(note)


if __name__ == "__main__":
    # The worker imports the dummy nodes too: it gets this process's sys.path.
    sys.path[0] = str(HERE)
    serve(*sys.argv[1:])
