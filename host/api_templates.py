"""What the page offers to begin with: example workflows as templates, subgraph blueprints.

The examples stand in the list of ComfyUI's own templates, as "Getting Started": that is what the
page shows to somebody new. Listed as a pack's they would stand behind two clicks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from .api_files import PACK, own_file
from .server import STATE, State


async def packs(request: web.Request) -> web.Response:
    """Templates by pack: none, see above."""
    return web.json_response({})


def described(file: Path) -> dict[str, str]:
    """A template as ComfyUI's own list describes one; in words of the workflow's first note."""
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    notes = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    words = (notes or [""])[0].split("\n\n")[0].replace("*", "")
    kind = {"mediaType": "image", "mediaSubtype": "jpg"}
    return {"name": file.stem, "title": file.stem, "description": words} | kind


async def core_templates(request: web.Request) -> web.Response:
    """ComfyUI's own templates and their logos: here the pack's, and none."""
    if request.path.endswith("_logo.json"):
        return web.json_response({})
    folder = request.app[STATE].options.root / "example_workflows"
    found = [described(file) for file in sorted(folder.glob("*.json"))]
    group = {"moduleName": "default", "title": "Getting Started", "type": "image"}
    return web.json_response([group | {"isEssential": True, "templates": found}] if found else [])


async def core_template(request: web.Request) -> web.StreamResponse:
    """A template of that list: `<name>.json`, and `<name>-1.jpg`, its picture."""
    folder = request.app[STATE].options.root / "example_workflows"
    name = request.match_info["file"].replace("-1.jpg", ".jpg")
    # The page takes no space in ?template=: there, dashes stand for them.
    names = {path.name.replace(" ", "-"): path.name for path in folder.glob("*.json")}
    return web.FileResponse(own_file(folder, names.get(name, name)))


def blueprints(state: State) -> dict[str, Path]:
    """Subgraph blueprints by their id."""
    folder = state.options.root / "subgraphs"
    return {
        hashlib.sha256(path.name.encode()).hexdigest(): path
        for path in sorted(folder.glob("*.json"))
    }


def blueprint(path: Path) -> dict[str, Any]:
    pack = {"node_pack": f"custom_nodes.{PACK}"}
    return {"source": "custom_node", "name": path.stem, "info": pack}


async def subgraphs(request: web.Request) -> web.Response:
    found = blueprints(request.app[STATE])
    return web.json_response({key: blueprint(path) for key, path in found.items()})


async def subgraph(request: web.Request) -> web.Response:
    path = blueprints(request.app[STATE]).get(request.match_info["id"])
    if path is None:
        raise web.HTTPNotFound(text="There is no such blueprint.")
    return web.json_response(blueprint(path) | {"data": path.read_text(encoding="utf-8")})


def add_static(app: web.Application) -> None:
    """Routes without /api."""
    app.router.add_get(r"/templates/{file:index[\w.-]*\.json}", core_templates)
    app.router.add_get(r"/templates/{file:[^/]+\.(?:json|jpg)}", core_template)


ROUTES = [
    ("GET", "/workflow_templates", packs),
    ("GET", "/global_subgraphs", subgraphs),
    ("GET", "/global_subgraphs/{id}", subgraph),
]
