"""The example workflows and blueprints: made from the API graphs, and without a fault."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent / "workflows"
ROOT = HERE.parents[1]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
LONG_SIDE = 512  # pixels of a thumbnail


def tool(name: str) -> Any:
    """A module beside the API graphs; they import each other, as the command does."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    return importlib.import_module(name)


canvas, check, layouts, make = (tool(name) for name in ("canvas", "check", "layouts", "make"))


@pytest.fixture(scope="module")
def infos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make.object_info(tmp_path_factory.mktemp("home"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def definition(path: Path) -> Any:
    (found,) = read(path)["definitions"]["subgraphs"]
    return found


# ---- what ships --------------------------------------------------------------------------------


def test_the_files_are_those_that_the_api_graphs_make(infos: Any) -> None:
    """Changed by hand, or by a new input of a node: `make thumbnails` writes them again."""
    made = make.documents(infos)
    shipped = {path.relative_to(ROOT).as_posix(): path for path in (*EXAMPLES, *BLUEPRINTS)}
    assert set(made) == set(shipped)
    stale = [name for name, text in made.items() if shipped[name].read_text("utf-8") != text]
    assert not stale, "run `make thumbnails`"


def test_every_api_graph_is_shipped() -> None:
    stems = {path.name.partition(".")[0] for path in HERE.glob("*.api.json")}
    assert stems == {stem for stem, _ in layouts.WORKFLOWS.values()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_thumbnail_lies_beside(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as image:
        assert image.format == "JPEG"
        assert LONG_SIDE // 2 <= max(image.size) <= LONG_SIDE
        low, high = image.convert("L").getextrema()
        assert high - low > 32, "the picture is empty"


def test_no_thumbnail_is_left_over() -> None:
    pictures = {path.stem for path in (ROOT / "example_workflows").glob("*.jpg")}
    assert pictures == {path.stem for path in EXAMPLES}


# ---- what is in it -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_workflow_has_no_fault(path: Path, infos: Any) -> None:
    assert check.faults(read(path), infos) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_workflow_queues_its_api_graph(path: Path, infos: Any) -> None:
    """The editor itself does the same: test_host_browser_templates.py."""
    stem, _ = layouts.WORKFLOWS[path.stem]
    assert canvas.to_api(read(path), infos) == canvas.completed(make.graph(stem), infos)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_a_blueprint_has_no_fault(path: Path, infos: Any) -> None:
    inner, (outer,) = definition(path), read(path)["nodes"]
    assert check.faults(inner, infos) == []
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == path.stem
    pairs = [(slot["name"], slot["type"]) for slot in inner["inputs"]]
    assert [(slot["name"], slot["type"]) for slot in outer["inputs"]] == pairs
    widgets = [slot["name"] for slot in outer["inputs"] if "widget" in slot]
    assert list(outer["widgets_values_named"]) == widgets


@pytest.mark.parametrize("stem", layouts.BLUEPRINTS)
def test_a_blueprint_is_its_workflow_with_open_ends(stem: str, infos: Any) -> None:
    """The nodes and wires are those of the API graph; what it takes from outside is a port."""
    plan = layouts.BLUEPRINTS[stem]
    flat, ports = canvas.subgraph_to_api(definition(ROOT / f"subgraphs/{plan.name}.json"), infos)
    assert ports == {port.name: list(port.feeds) for port in plan.ports}
    fed = {feed for port in plan.ports for feed in port.feeds}
    wanted = {
        key: {
            "class_type": node["class_type"],
            "inputs": {n: v for n, v in node["inputs"].items() if (key, n) not in fed},
        }
        for key, node in canvas.completed(make.graph(stem), infos).items()
        if key in flat
    }
    assert flat == wanted
    left_out = {"SaveImage", "PreviewImage"}
    assert not left_out & {node["class_type"] for node in flat.values()}


def loaders() -> list[dict[str, Any]]:
    graphs = [read(path) for path in EXAMPLES] + [definition(path) for path in BLUEPRINTS]
    return [n for g in graphs for n in g["nodes"] if n["type"].startswith("SeedlingLoad")]


def test_loaders_say_where_the_real_weights_are() -> None:
    """As the editor's download offer wants it, and as the README and the family name them."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(loaders()) == 3 * (len(EXAMPLES) + len(BLUEPRINTS))
    for node in loaders():
        (model,) = node["properties"]["models"]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/resolve/main/{model['directory']}/{model['name']}")
        assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
        assert model["name"].endswith(".safetensors") and f"`{model['name']}`" in readme


# ---- the checks themselves ---------------------------------------------------------------------


def unplug(graph: Any) -> None:
    graph["links"].pop()


def misplace(graph: Any) -> None:
    graph["nodes"][1]["pos"] = graph["nodes"][0]["pos"]


def flatten(graph: Any) -> None:
    node = next(n for n in graph["nodes"] if n["type"] == "SeedlingFewStepSampler")
    node["size"][1] = 290


def rename(graph: Any) -> None:
    graph["nodes"][0]["type"] = "SeedlingLoadNothing"


def reorder(graph: Any) -> None:
    node = next(n for n in graph["nodes"] if n["type"] == "SeedlingFewStepSampler")
    node["widgets_values"].reverse()


def overdo(graph: Any) -> None:
    node = next(n for n in graph["nodes"] if n["type"] == "SeedlingCanvasSize")
    node["widgets_values"][2] = node["widgets_values_named"]["batch_size"] = 1000


def lose_a_model(graph: Any) -> None:
    node = graph["nodes"][0]
    node["widgets_values"][0] = node["widgets_values_named"]["dit"] = "qwen_image.safetensors"


def cross(graph: Any) -> None:
    graph["links"][0][5] = "VAE"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (unplug, "is not in the list"), (misplace, "lies on"), (flatten, "when it ran"),
        (rename, "which is not there"),
        (reorder, "are not those by order"), (overdo, "out of range"),
        (lose_a_model, "no choice"), (cross, "is not the one"),
    ],
)  # fmt: skip
def test_the_check_finds(spoil: Callable[[Any], None], words: str, infos: Any) -> None:
    graph = read(ROOT / "example_workflows" / "Text to Image.json")
    spoil(graph)
    assert any(words in fault for fault in check.faults(graph, infos))
