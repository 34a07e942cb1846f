"""The real front end in a real browser: load, find, drag, wire, run, cancel, fail, save, reopen."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.browser
FLOW = {
    "last_node_id": 2,
    "last_link_id": 1,
    "nodes": [
        {"id": 1, "type": "TestNoise", "pos": [100, 200], "size": [270, 110], "order": 0, "mode": 0,
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
         "widgets_values": [7, "fixed", 64, 1]},
        {"id": 2, "type": "SaveImage", "pos": [450, 200], "size": [300, 300], "order": 1, "mode": 0,
         "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
         "widgets_values": ["browser"]},
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
}  # fmt: skip
BROKEN = {
    "last_node_id": 2,
    "last_link_id": 1,
    "nodes": [
        {"id": 1, "type": "SeedlingReferences", "pos": [100, 200], "order": 0, "mode": 0,
         "outputs": [{"name": "references", "type": "SEEDLING_REFERENCES", "links": [1]}],
         "widgets_values": ["model", '["gone.png"]']},
        {"id": 2, "type": "PreviewAny", "pos": [600, 200], "order": 1, "mode": 0,
         "inputs": [{"name": "source", "type": "*", "link": 1}]},
    ],
    "links": [[1, 1, 0, 2, 0, "SEEDLING_REFERENCES"]],
    "version": 0.4,
}  # fmt: skip
SENTENCE = "there is no gone.png in the input folder; upload it first."


def alone(kind: str, *values: Any) -> dict[str, Any]:
    """A workflow of one node."""
    node = {"id": 1, "type": kind, "pos": [100, 200], "order": 0, "widgets_values": list(values)}
    return {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}


def test_the_page_loads_without_an_error(page: Any, hands: Any) -> None:
    assert hands.complaints(page) == []


def test_the_search_finds_our_nodes(page: Any, hands: Any) -> None:
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.keyboard.type("Seedling Load", delay=20)
    page.get_by_text("Load DiT").first.wait_for(timeout=hands.SLOW)
    page.keyboard.press("Escape")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])
def test_a_node_is_dragged_from_the_library_and_wired(page: Any, hands: Any, nodes_2: bool) -> None:
    """From the sidebar onto the canvas, then from its output to an input, all with the mouse."""
    hands.set_nodes_2(page, nodes_2)
    preview = alone("PreviewImage")
    preview["nodes"][0]["pos"] = [1000, 200]
    hands.open_flow(page, preview)
    toggle = "Workspace.ToggleSidebarTab.node-library"
    page.evaluate("name => app.extensionManager.command.execute(name)", toggle)
    page.get_by_placeholder("Search...").last.fill("Noise for Tests")
    item = page.locator("[draggable=true]", has_text="Noise for Tests").first
    item.wait_for(timeout=hands.SLOW)
    hands.drag(page, hands.centre(item), (600, 500))
    placed = "app.graph.nodes.find(n => n.type === 'TestNoise')"
    page.wait_for_function(placed, timeout=hands.SLOW)
    page.evaluate("name => app.extensionManager.command.execute(name)", toggle)
    page.wait_for_timeout(500)
    noise = page.evaluate(f"{placed}.id")
    hands.drag(page, hands.slot(page, noise, 0, False), hands.slot(page, 1, 0, True))
    page.wait_for_function("app.graph.getNodeById(1).getInputNode(0)", timeout=hands.SLOW)
    assert page.evaluate("app.graph.getNodeById(1).getInputNode(0).type") == "TestNoise"


def test_a_workflow_opens_runs_and_shows_its_picture(page: Any, hands: Any, host: Any) -> None:
    """Loaded without a missing node; Run; the picture is on the node and in the output folder."""
    hands.set_nodes_2(page, False)
    hands.open_flow(page, FLOW)
    assert page.evaluate("window.app.graph.nodes.every(n => !n.has_errors)")
    assert page.get_by_text("Missing Node").count() == 0
    hands.run(page)
    shown = "window.app.graph.getNodeById(2).imgs?.[0]?.naturalWidth === 64"
    page.wait_for_function(shown, timeout=hands.SLOW)
    assert (host.home / "output" / "browser_00001_.png").is_file()


def test_a_saved_picture_brings_its_graph_back(page: Any, hands: Any, host: Any) -> None:
    """The PNG that was just saved, dropped on the empty canvas."""
    page.evaluate("window.app.graph.clear()")
    hands.drop_file(page, (600, 500), host.home / "output" / "browser_00001_.png")
    back = "window.app.graph.nodes.map(n => n.type).sort().join() === 'SaveImage,TestNoise'"
    page.wait_for_function(back, timeout=hands.SLOW)
    seed = "app.graph.nodes.find(n => n.type === 'TestNoise').widgets[0].value"
    assert page.evaluate(seed) == 7


def test_the_picture_shows_in_nodes_2(page: Any, hands: Any) -> None:
    """As an element of the page, in the size in which it was made."""
    hands.set_nodes_2(page, True)
    hands.open_flow(page, FLOW)
    hands.run(page)
    picture = page.locator("[data-node-id='2'] img[src*='/view']").first
    picture.wait_for(timeout=hands.SLOW)
    loaded = "[...document.querySelectorAll(\"[data-node-id='2'] img\")]"
    page.wait_for_function(f"{loaded}.some(i => i.naturalWidth === 64)", timeout=hands.SLOW)
    hands.set_nodes_2(page, False)


def test_a_run_is_cancelled_from_the_page(page: Any, hands: Any, host: Any) -> None:
    """With the button beside Run, within one step of many."""
    hands.open_flow(page, alone("TestSteps", 10_000, 0.1))
    heard = "e => window.interrupted = e.detail.node_id, { once: true }"
    page.evaluate(f"app.api.addEventListener('execution_interrupted', {heard})")
    hands.run(page)
    page.get_by_label("Cancel current run").first.click(timeout=hands.SLOW)  # once it is enabled
    page.wait_for_function("window.interrupted === '1'", timeout=hands.SLOW)
    assert host.get("/api/queue")[1] == {"queue_running": [], "queue_pending": []}
    assert len(host.get("/api/jobs?status=cancelled")[1]["jobs"]) == 1


def test_what_is_wrong_is_said_in_our_words(page: Any, hands: Any) -> None:
    """The node's own sentence under its title; said once for the same failure twice."""
    hands.open_flow(page, BROKEN)
    page.evaluate("app.graph.getNodeById(1).title = 'My pictures'")
    hands.run(page)
    page.wait_for_function(
        "text => [...document.querySelectorAll('.p-toast-message')]"
        ".some((each) => each.innerText === text)",
        arg=f"My pictures\n{SENTENCE}",
        timeout=hands.SLOW,
    )
    hands.run(page)
    page.wait_for_timeout(1500)
    assert sum(SENTENCE in said for said in hands.toasts(page)) == 1


def test_other_nodes_keep_the_page_s_words(page: Any, hands: Any, host: Any) -> None:
    """A failure that is not ours is reported as it always was, and the next run works."""
    page.evaluate("app.extensionManager.toast.removeAll()")
    hands.open_flow(page, alone("TestBad", "raise", 1))
    hands.run(page)
    page.get_by_text("TestBad").first.wait_for(timeout=hands.SLOW)
    reasons: list[str] = []
    while len(reasons) < 100 and not any("on purpose" in reason for reason in reasons):
        job = host.get("/api/jobs?status=failed")[1]["jobs"][0]
        reasons.append(job["execution_error"]["exception_message"])
        page.wait_for_timeout(100)
    assert "on purpose" in reasons[-1]
    assert not any("on purpose" in said for said in hands.toasts(page))
    hands.open_flow(page, FLOW)
    page.evaluate("app.graph.getNodeById(1).widgets[0].value = 8")
    hands.run(page)
    shown = "window.app.graph.getNodeById(2).imgs?.[0]?.naturalWidth === 64"
    page.wait_for_function(shown, timeout=hands.SLOW)
