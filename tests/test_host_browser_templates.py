"""The example workflows in the real front end: first visit, template browser, node library."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
PATIENCE, RUN = 120_000, 240_000  # milliseconds: a machine that is shared


sys.path.append(str(TESTS / "workflows"))
canvas, check, layouts, make = (
    importlib.import_module(name) for name in ("canvas", "check", "layouts", "make")
)
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOWN = "app.rootGraph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth === 128"


def saved(page: Any) -> Any:
    """What the page would save."""
    return json.loads(page.evaluate("JSON.stringify(app.rootGraph.serialize())"))


def queued(page: Any) -> Any:
    """What the page would queue."""
    asked = "app.graphToPrompt().then(made => JSON.stringify(made.output))"
    nodes = json.loads(page.evaluate(asked))
    return {k: {n: v for n, v in node.items() if n != "_meta"} for k, node in nodes.items()}


def graph(host: Any, stem: str) -> Any:
    """What it should queue for a workflow."""
    return canvas.completed(make.graph(stem), host.get("/api/object_info")[1])


def tabs(page: Any) -> list[str]:
    found = page.evaluate("app.extensionManager.workflow.openWorkflows.map(w => w.filename)")
    return [name for name in found if not name.startswith("Unsaved")]


def active(page: Any) -> str:
    return page.evaluate("app.extensionManager.workflow.activeWorkflow.filename")


def troubles(page: Any) -> int:
    """Signs of missing nodes, models or pictures, or of another error."""
    return page.locator(
        "[data-testid=error-overlay], [data-testid^=missing-], .p-toast-message-error"
    ).count()


def wait_for_nodes(page: Any, count: int) -> None:
    page.wait_for_function("n => app.rootGraph.nodes.length === n", arg=count, timeout=PATIENCE)
    page.wait_for_timeout(500)


def as_shipped(graph: Any) -> Any:
    """A saved graph without what depends on the language, the window, and a script's widgets."""
    for node in graph["nodes"]:
        del node["size"]
        for slot in (*node["inputs"], *node["outputs"]):
            slot.pop("localized_name", None)
            slot["links"] = slot.get("links") or []
    return {name: graph[name] for name in ("nodes", "links", "groups", "version")}


def example(title: str) -> Any:
    return json.loads((ROOT / "example_workflows" / f"{title}.json").read_text("utf-8"))


# ---- a first visit, in this order ---------------------------------------------------------------


def test_a_first_visit_opens_text_to_image(page: Any, hands: Any, host: Any) -> None:
    wait_for_nodes(page, len(example("Text to Image")["nodes"]))
    assert queued(page) == graph(host, "text_to_image")
    assert tabs(page) == ["Text-to-Image"]
    assert page.get_by_role("dialog").count() == 0
    assert troubles(page) == 0 and hands.complaints(page) == []
    keep(page, "first-visit")


def test_run_makes_a_picture(page: Any, hands: Any, host: Any) -> None:
    hands.run(page)
    page.wait_for_function(SHOWN, timeout=RUN)
    assert (host.home / "output" / "text_to_image_00001_.png").is_file()
    seed = saved(page)["nodes"][5]["widgets_values_named"]["seed"]
    assert seed != 1, "the seed has not changed for the next run"
    keep(page, "text-to-image")


# ---- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_template_opens_from_the_browser(page: Any, hands: Any, host: Any, title: str) -> None:
    page.said.clear()
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    card = page.get_by_test_id(f"template-workflow-{title}")
    card.wait_for(timeout=PATIENCE)
    if title == "Text to Image":
        keep(page, "templates")
    picture = card.locator("img").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") == 512
    picture.click()
    shipped, (stem, _) = example(title), layouts.WORKFLOWS[title]
    wait_for_nodes(page, len(shipped["nodes"]))
    assert tabs(page)[-1].startswith(title)
    assert queued(page) == graph(host, stem)
    assert as_shipped(saved(page)) == as_shipped(shipped)
    assert troubles(page) == 0 and hands.complaints(page) == []
    keep(page, stem)


def test_a_missing_node_would_be_seen(page: Any) -> None:
    graph = example("Image Set")
    graph["nodes"][0]["type"] = "SeedlingLoadNothing"
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.get_by_test_id("error-overlay").wait_for(timeout=PATIENCE)
    assert troubles(page) > 0
    page.evaluate("graph => app.loadGraphData(graph)", example("Image Set"))
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=error-overlay]')", timeout=PATIENCE
    )


def test_a_further_visit_keeps_the_tabs(page: Any, hands: Any, host: Any) -> None:
    """Those that are open, no further Text to Image, and the same one in front."""
    before, front, count = tabs(page), active(page), len(saved(page)["nodes"])
    page.wait_for_timeout(2000)  # the page keeps drafts half a second after a change
    hands.visit(page, f"http://127.0.0.1:{host.port}")
    wait_for_nodes(page, count)
    assert (tabs(page), active(page)) == (before, front) and before
    assert troubles(page) == 0


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])
@pytest.mark.parametrize("title", ["Fix a Region", "Sketch to Picture", "Character Sheet"])
def test_a_run_makes_no_node_grow(page: Any, hands: Any, title: str, nodes_2: bool) -> None:
    """With texts and previews each node is as high as it was shipped: nothing lies on anything."""
    shipped = example(title)
    for node in shipped["nodes"]:
        values = node.get("widgets_values_named", {})
        if node["type"] == "SeedlingCanvasSize" and nodes_2:
            values["shape"] = "128x160"  # what was done before is not done again
            node["widgets_values"] = list(values.values())
    hands.set_nodes_2(page, nodes_2)
    hands.open_flow(page, shipped)
    page.evaluate("""() => {
        window.ended = null;
        const { api } = window.comfyAPI.api;
        for (const kind of ['execution_success', 'execution_error'])
            api.addEventListener(kind, () => (window.ended = kind), { once: true });
    }""")
    hands.run(page)
    page.wait_for_function("window.ended", timeout=RUN)
    assert page.evaluate("window.ended") == "execution_success"
    page.wait_for_timeout(2500)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)
    keep(page, f"ran-{title}-{int(nodes_2)}")
    after = saved(page)
    high = {node["id"]: node["size"][1] for node in shipped["nodes"]}
    grown = [
        f"{node['type']}: {high[node['id']]} -> {node['size'][1]}"
        for node in after["nodes"]
        if node["size"][1] > high[node["id"]] + 1
    ]
    assert grown == [] and check.overlaps(after) == []


# ---- blueprints --------------------------------------------------------------------------------


def place(page: Any, name: str) -> None:
    """Put a blueprint on an empty canvas, as the only node."""
    page.evaluate("app.rootGraph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_timeout(500)
    page.keyboard.type(name, delay=10)
    page.get_by_text(name).first.wait_for(timeout=PATIENCE)
    page.wait_for_timeout(1000)
    page.keyboard.press("Enter")
    wait_for_nodes(page, 1)
    page.mouse.click(700, 500)  # lets go of it


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_comes_from_the_search(page: Any, hands: Any, name: str) -> None:
    """One node with the promised ports, which queues the nodes of its workflow."""
    page.said.clear()
    place(page, name)
    (node,) = saved(page)["nodes"]
    stem, plan = next(found for found in layouts.BLUEPRINTS.items() if found[1].name == name)
    assert page.evaluate("app.rootGraph.nodes[0].title") == name
    assert [slot["name"] for slot in node["inputs"]] == [port.name for port in plan.ports]
    kinds = [make.graph(stem)[key]["class_type"] for key in plan.layout.nodes]
    assert sorted(found["class_type"] for found in queued(page).values()) == sorted(kinds)
    assert troubles(page) == 0 and hands.complaints(page) == []


def test_a_blueprint_paints(page: Any, hands: Any, host: Any) -> None:
    """Text to Image from the library, wired to Save Image and run: the workflow's own picture."""
    place(page, "Text to Image (Seedling)")
    page.evaluate(
        """() => {
            const save = LiteGraph.createNode('SaveImage');
            app.rootGraph.add(save);
            app.rootGraph.nodes[0].connect(0, save, 0);
        }"""
    )
    hands.run(page)
    page.wait_for_function(SHOWN, timeout=RUN)
    (made,) = (host.home / "output").glob("ComfyUI_*.png")
    (first,) = (host.home / "output").glob("text_to_image_*.png")
    assert pixels(made) == pixels(first)


def pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def keep(page: Any, name: str) -> None:
    """Write a screenshot where $SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"templates-{name}.png"))
