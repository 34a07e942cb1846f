"""The real front end in a real browser: it loads, finds our nodes, runs, and shows the picture."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
FRONT_END = importlib.util.find_spec("comfyui_frontend_package")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: install Debian's, or set CHROMIUM"),
    pytest.mark.skipif(not FRONT_END, reason="comfyui-frontend-package is not installed"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SLOW = 90_000  # milliseconds: a machine that is shared
NOT_OURS = ("api.comfy.org", "accessed before initialization")
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


def load(name: str) -> Any:
    """A neighbour of this file; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


tools = load("host_tools")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    running = tools.Host(tmp_path_factory.mktemp("studio"), Path("all")).start().warm()
    running.post("/api/settings", {"Comfy.TutorialCompleted": True})
    yield running
    running.stop()


def note(message: Any, said: list[str]) -> None:
    if message.type == "error":
        said.append(f"{message.text} {message.location}")


@pytest.fixture(scope="module")
def page(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, loaded, with everything that its console said in `page.said`."""
    # By name: type checkers run where playwright is not installed.
    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    base = f"http://127.0.0.1:{host.port}"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=CHROMIUM,
            headless=True,
            viewport={"width": 1400, "height": 900},
            args=FLAGS,
        )
        context.route(lambda url: not url.startswith(base), lambda route: route.abort())
        page = context.pages[0]
        said: list[str] = []
        page.on("console", lambda message: note(message, said))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.said = said  # type: ignore[attr-defined]
        page.goto(base, wait_until="domcontentloaded", timeout=SLOW)
        known = "window.LiteGraph && 'TestNoise' in window.LiteGraph.registered_node_types"
        page.wait_for_function(f"{known} && window.app.vueAppReady", timeout=SLOW)
        page.get_by_test_id("queue-button").wait_for(timeout=SLOW)
        page.wait_for_timeout(1000)
        try:
            yield page
        finally:
            context.close()


def test_the_page_loads_without_an_error(page: Any) -> None:
    ours = [text for text in page.said if not any(other in text for other in NOT_OURS)]
    assert ours == []


def test_the_search_finds_our_nodes(page: Any) -> None:
    names = page.evaluate("Object.keys(window.LiteGraph.registered_node_types)")
    wanted = [name for name in names if name.startswith("Seedling")]
    if not wanted:
        pytest.skip("the pack's nodes could not be imported")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.keyboard.type("Seedling Load", delay=20)
    page.get_by_text("Load DiT").first.wait_for(timeout=15_000)
    page.keyboard.press("Escape")


def test_a_workflow_opens_runs_and_shows_its_picture(page: Any, host: Any) -> None:
    """Loaded without a missing node; Run; the picture is on the node and in the output folder."""
    page.evaluate("flow => window.app.loadGraphData(flow)", FLOW)
    page.wait_for_function("window.app.graph.getNodeById(2)", timeout=15_000)
    assert page.evaluate("window.app.graph.nodes.every(n => !n.has_errors)")
    assert page.get_by_text("Missing Node").count() == 0
    page.get_by_test_id("queue-button").click()
    shown = "window.app.graph.getNodeById(2).imgs?.[0]?.naturalWidth === 64"
    page.wait_for_function(shown, timeout=30_000)
    assert (host.home / "output" / "browser_00001_.png").is_file()
    keep(page, "run")


def test_a_saved_picture_brings_its_graph_back(page: Any, host: Any) -> None:
    """The PNG that was just saved, dropped on the page."""
    data = list((host.home / "output" / "browser_00001_.png").read_bytes())
    page.evaluate("window.app.graph.clear()")
    drop = """async bytes => {
        const file = new File([new Uint8Array(bytes)], 'x.png', {type: 'image/png'});
        await window.app.handleFile(file);
    }"""
    page.evaluate(drop, data)
    back = "window.app.graph.nodes.map(n => n.type).sort().join() === 'SaveImage,TestNoise'"
    page.wait_for_function(back, timeout=15_000)


def test_an_error_is_told_and_the_next_run_works(page: Any, host: Any) -> None:
    flow = {
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [{"id": 1, "type": "TestBad", "pos": [100, 200], "widgets_values": ["raise", 1]}],
        "links": [],
        "version": 0.4,
    }
    page.evaluate("flow => window.app.loadGraphData(flow)", flow)
    page.get_by_test_id("queue-button").click()
    page.get_by_text("TestBad").first.wait_for(timeout=15_000)
    job = host.get("/api/jobs?status=failed")[1]["jobs"][0]
    assert "on purpose" in job["execution_error"]["exception_message"]


def keep(page: Any, name: str) -> None:
    """Write a screenshot where $SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"host-{name}.png"))
