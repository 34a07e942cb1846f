"""Settings, saved workflows and the page's other small things, below the user folder."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

from .images import write_over
from .paths import MODEL_FOLDERS, PathError, existing, files_below, inside
from .server import LARGEST_JSON, STATE, BadRequest, State, body, parse_json, refusal

# Files that the page asks for at every start: empty until the user writes them.
UNWRITTEN = {"user.css": ("", "text/css"), "comfy.templates.json": ("[]", "application/json")}
MOST_SETTINGS = 2 * 2**20  # bytes


def home(state: State) -> Path:
    """The folder of the one user."""
    path = state.options.folders.user / "default"
    path.mkdir(parents=True, exist_ok=True)
    return path


def info(root: Path, path: Path) -> dict[str, Any]:
    """A file as the page lists it; times in milliseconds."""
    stat = path.stat()
    return {
        "path": path.relative_to(root.resolve()).as_posix(), "size": stat.st_size,
        "modified": int(stat.st_mtime * 1000), "created": int(stat.st_ctime * 1000),
    }  # fmt: skip


# ---- settings ----------------------------------------------------------------------------------


def read_settings(state: State) -> dict[str, Any]:
    """The stored settings; a file that is damaged counts as none."""
    if "settings" not in state.extra:
        state.extra["settings"] = {}
        path = home(state) / "comfy.settings.json"
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                stored = None
            state.extra["settings"] = stored if isinstance(stored, dict) else {}
    return state.extra["settings"]


async def write_settings(state: State, values: dict[str, Any]) -> web.Response:
    settings = read_settings(state) | values
    data = json.dumps(settings, indent=1).encode()
    if len(data) > MOST_SETTINGS:
        raise BadRequest("The settings are too large.")
    state.extra["settings"] = settings
    await asyncio.to_thread(write_over, home(state) / "comfy.settings.json", data)
    return web.Response(status=200)


async def get_settings(request: web.Request) -> web.Response:
    return web.json_response(read_settings(request.app[STATE]))


async def get_setting(request: web.Request) -> web.Response:
    return web.json_response(read_settings(request.app[STATE]).get(request.match_info["id"]))


async def post_settings(request: web.Request) -> web.Response:
    return await write_settings(request.app[STATE], await body(request))


async def post_setting(request: web.Request) -> web.Response:
    data = await request.read()
    if len(data) > LARGEST_JSON:
        raise web.HTTPRequestEntityTooLarge(max_size=LARGEST_JSON, actual_size=len(data))
    return await write_settings(
        request.app[STATE], {request.match_info["id"]: parse_json(data or b"null")}
    )


async def users(request: web.Request) -> web.Response:
    return web.json_response({"storage": "server", "migrated": True})


# ---- user data ---------------------------------------------------------------------------------


async def list_data(request: web.Request) -> web.Response:
    """The files below ?dir=, as names or with their sizes (full_info)."""
    root = home(request.app[STATE])
    name = request.query.get("dir", "")
    if not name:
        raise BadRequest("Say which folder: ?dir=workflows.")
    folder = inside(root, name)
    if not folder.is_dir():  # not yet: an empty one, or the page's console fills with errors
        return web.json_response([])
    names = [found for found, _ in files_below(folder, links=False)]
    if request.query.get("recurse", "").lower() != "true":
        names = [found for found in names if "/" not in found]
    if request.query.get("full_info", "").lower() == "true":
        return web.json_response([info(folder, folder / found) for found in sorted(names)])
    if request.query.get("split", "").lower() == "true":
        return web.json_response([[found, *found.split("/")] for found in sorted(names)])
    return web.json_response(sorted(names))


async def get_data(request: web.Request) -> web.StreamResponse:
    name = request.match_info["file"]
    try:
        path = existing(home(request.app[STATE]), name)
    except FileNotFoundError:
        if name not in UNWRITTEN:
            raise
        text, kind = UNWRITTEN[name]
        return web.Response(text=text, content_type=kind)
    kind = {".json": "application/json", ".css": "text/css"}.get(path.suffix)
    headers = {
        "Content-Type": kind or "application/octet-stream",
        "Content-Security-Policy": "sandbox",
    }
    if not kind:
        headers["Content-Disposition"] = "attachment"
    return web.FileResponse(path, headers=headers)


async def post_data(request: web.Request) -> web.Response:
    """Save a file: a workflow, usually."""
    root = home(request.app[STATE])
    path = writable(root, request.match_info["file"])
    if request.query.get("overwrite", "true") == "false" and path.exists():
        return refusal(409, "There is a file of that name.")
    data = await request.read()
    if path.suffix == ".json":
        parse_json(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(write_over, path, data)
    return saved(request, root, path)


def writable(root: Path, name: str) -> Path:
    """Where a file may be written: not over a folder, not over the settings."""
    path = inside(root, name)
    if path == root.resolve() or path.is_dir() or path.name == "comfy.settings.json":
        raise PathError(f"{name[:60]!r} cannot be written; choose another name.")
    return path


def saved(request: web.Request, root: Path, path: Path) -> web.Response:
    full = request.query.get("full_info", "").lower() == "true"
    found = info(root, path)
    return web.json_response(found if full else found["path"])


async def delete_data(request: web.Request) -> web.Response:
    existing(home(request.app[STATE]), request.match_info["file"]).unlink()
    return web.Response(status=204)


async def move_data(request: web.Request) -> web.Response:
    root = home(request.app[STATE])
    source = existing(root, request.match_info["file"])
    target = writable(root, request.match_info["dest"])
    if request.query.get("overwrite", "true") == "false" and target.exists():
        return refusal(409, "There is a file of that name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    return saved(request, root, target)


# ---- models ------------------------------------------------------------------------------------


async def models(request: web.Request) -> web.Response:
    return web.json_response(list(MODEL_FOLDERS))


async def models_in(request: web.Request) -> web.Response:
    return web.json_response(known_folder(request).model_files(request.match_info["folder"]))


async def experiment_models(request: web.Request) -> web.Response:
    folders = request.app[STATE].options.folders
    return web.json_response(
        [
            {"name": kind, "folders": [str(root) for root in folders.model_roots(kind)]}
            for kind in MODEL_FOLDERS
        ]
    )


async def experiment_models_in(request: web.Request) -> web.Response:
    folders, kind = known_folder(request), request.match_info["folder"]
    listed = []
    for name in folders.model_files(kind):
        path = folders.model_path(kind, name)
        if path is not None:
            stat = path.stat()
            entry = {"name": name, "pathIndex": 0, "size": stat.st_size}
            listed.append(entry | {"modified": stat.st_mtime, "created": stat.st_ctime})
    return web.json_response(listed)


def known_folder(request: web.Request) -> Any:
    if request.match_info["folder"] not in MODEL_FOLDERS:
        raise web.HTTPNotFound(text="There is no such model folder.")
    return request.app[STATE].options.folders


async def nothing(request: web.Request) -> web.Response:
    return web.json_response([])


async def no_entries(request: web.Request) -> web.Response:
    return web.json_response({})


async def logs(request: web.Request) -> web.Response:
    return web.json_response({"entries": [], "size": {"cols": 80, "rows": 24}})


async def subscribe(request: web.Request) -> web.Response:
    return web.Response(status=200)


async def folder_paths(request: web.Request) -> web.Response:
    folders = request.app[STATE].options.folders
    return web.json_response(
        {kind: [str(root) for root in folders.model_roots(kind)] for kind in MODEL_FOLDERS}
    )


ROUTES = [
    ("GET", "/users", users),
    ("GET", "/settings", get_settings),
    ("POST", "/settings", post_settings),
    ("GET", "/settings/{id}", get_setting),
    ("POST", "/settings/{id}", post_setting),
    ("GET", "/userdata", list_data),
    ("GET", "/userdata/{file}", get_data),
    ("GET", "/{file:user\\.css}", get_data),
    ("POST", "/userdata/{file}", post_data),
    ("DELETE", "/userdata/{file}", delete_data),
    ("POST", "/userdata/{file}/move/{dest}", move_data),
    ("GET", "/models", models),
    ("GET", "/models/{folder}", models_in),
    ("GET", "/experiment/models", experiment_models),
    ("GET", "/experiment/models/{folder}", experiment_models_in),
    ("GET", "/view_metadata/{folder}", no_entries),
    ("GET", "/embeddings", nothing),
    ("GET", "/node_replacements", no_entries),
    ("GET", "/internal/logs/raw", logs),
    ("PATCH", "/internal/logs/subscribe", subscribe),
    ("GET", "/internal/folder_paths", folder_paths),
]
