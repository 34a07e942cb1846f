"""A real ComfyUI offers the templates, thumbnails and blueprints, and has all their nodes."""

from __future__ import annotations

import importlib
import io
import json
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.comfyui

TOOLS = Path(__file__).resolve().parents[1] / "workflows"
ROOT = TOOLS.parents[1]
PACK = "seedling-pack"  # the folder's name in custom_nodes
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))


def tool(name: str) -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module(name)


canvas, check, layouts, make = (tool(name) for name in ("canvas", "check", "layouts", "make"))


@pytest.fixture(scope="module")
def infos(server: Any) -> dict[str, Any]:
    return server.ask("/object_info")


def download(server: Any, path: str) -> bytes:
    with urllib.request.urlopen(server.url + urllib.parse.quote(path), timeout=60) as answer:
        return answer.read()


def test_the_templates_are_listed(server: Any) -> None:
    listed = server.ask("/workflow_templates")
    assert sorted(listed[PACK]) == [path.stem for path in EXAMPLES] == sorted(layouts.WORKFLOWS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_template_and_its_thumbnail_are_served(server: Any, path: Path) -> None:
    folder = f"/api/workflow_templates/{PACK}"
    assert download(server, f"{folder}/{path.name}") == path.read_bytes()
    with Image.open(io.BytesIO(download(server, f"{folder}/{path.stem}.jpg"))) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_template_opens_here(path: Path, infos: Any) -> None:
    """Every node, slot and value is one that this ComfyUI has, and the API graph is the same."""
    graph = json.loads(path.read_text("utf-8"))
    assert check.faults(graph, infos) == []
    stem, _ = layouts.WORKFLOWS[path.stem]
    assert canvas.to_api(graph, infos) == canvas.completed(make.graph(stem), infos)


def test_the_blueprints_are_offered(server: Any, infos: Any) -> None:
    """As the node library asks for them: the list, then each by its id."""
    listed = server.ask("/global_subgraphs")
    ours = {
        entry["name"]: key
        for key, entry in listed.items()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"
    }
    assert sorted(ours) == [path.stem for path in BLUEPRINTS]
    for path in BLUEPRINTS:
        entry = server.ask(f"/global_subgraphs/{ours[path.stem]}")
        assert entry["source"] == "custom_node"
        assert entry["data"] == path.read_text("utf-8")
        (inner,) = json.loads(entry["data"])["definitions"]["subgraphs"]
        assert check.faults(inner, infos) == []


def test_no_blueprint_takes_a_name_that_core_has(server: Any) -> None:
    """The node library keeps them by name alone."""
    names = [entry["name"] for entry in server.ask("/global_subgraphs").values()]
    assert [path.stem for path in BLUEPRINTS if names.count(path.stem) != 1] == []
