"""What the browser tests share: the real page in a headless Chromium, and hands to use it with."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# No name but this machine's leads anywhere: the page's calls home fail at once, without a handler
# in Python that every one of its 260 requests would have to pass.
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
SLOW = 180_000  # milliseconds: a machine that is shared
# What is drawn for nobody costs most of the time where no graphics card draws it.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MaximumFps": 15,
}
NOT_OURS = ("api.comfy.org", "accessed before initialization")


def missing() -> str | None:
    """Why the browser tests cannot run here, or None when they can."""
    wanted = {
        "pip install playwright": importlib.util.find_spec("playwright"),
        "pip install comfyui-frontend-package==1.49.6": importlib.util.find_spec(
            "comfyui_frontend_package"
        ),
        "install Debian's chromium, or name one in $CHROMIUM": CHROMIUM,
    }
    absent = [how for how, found in wanted.items() if not found]
    return f"no browser tests: {'; '.join(absent)}" if absent else None


# ---- a studio and a page -------------------------------------------------------------------------


def studio(host_tools: Any, home: Path) -> Iterator[Any]:
    """A studio with the pack's nodes and those of the tests, first visit done, until the end."""
    running = host_tools.Host(home, Path("all")).start()
    try:
        running.warm()
        running.post("/api/settings", SETTINGS)
        yield running
    finally:
        running.stop()


def browser(host: Any, profile: Path) -> Iterator[Any]:
    """The page, loaded, with everything that its console said in `page.said`."""
    # By name: type checkers run where playwright is not installed.
    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    base = f"http://127.0.0.1:{host.port}"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            viewport={"width": 1400, "height": 900},
            args=FLAGS,
        )
        try:
            page = context.pages[0]
            said: list[str] = []
            page.on("console", lambda message: note(message, said))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.said = said  # type: ignore[attr-defined]
            visit(page, base)
            yield page
        finally:
            context.close()


def note(message: Any, said: list[str]) -> None:
    if message.type == "error":
        said.append(f"{message.text} {message.location}")


def complaints(page: Any) -> list[str]:
    """What the console called an error, without what the front end says on every machine."""
    return [text for text in page.said if not any(other in text for other in NOT_OURS)]


def visit(page: Any, address: str) -> None:
    """Open the address and wait until the page can be used."""
    page.goto(address, wait_until="domcontentloaded", timeout=SLOW)
    known = "window.LiteGraph && 'SeedlingReferences' in window.LiteGraph.registered_node_types"
    page.wait_for_function(f"{known} && window.app?.vueAppReady", timeout=SLOW)
    page.get_by_test_id("queue-button").wait_for(timeout=SLOW)
    # Behind it a first visit's template is still being opened.
    page.wait_for_function("!document.getElementById('splash-loader')", timeout=SLOW)
    page.wait_for_timeout(1000)


# ---- hands ---------------------------------------------------------------------------------------


def set_nodes_2(page: Any, on: bool) -> None:
    """Nodes as page elements (Nodes 2.0), or drawn on the canvas."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
    page.wait_for_function("on => LiteGraph.vueNodesMode === on", arg=on, timeout=SLOW)


def open_flow(page: Any, flow: dict[str, Any]) -> None:
    """Load a workflow; its nodes are there, and none is missing."""
    page.evaluate("flow => app.loadGraphData(flow)", flow)
    wanted = sorted(node["type"] for node in flow["nodes"])
    there = "wanted => app.graph.nodes.map(n => n.type).sort().join() === wanted"
    page.wait_for_function(there, arg=",".join(wanted), timeout=SLOW)
    page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.draw(true)")
    page.wait_for_timeout(300)


def run(page: Any) -> None:
    page.get_by_test_id("queue-button").click()


def toasts(page: Any) -> list[str]:
    return page.locator(".p-toast-message").all_inner_texts()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press, move, release, in steps as a hand does."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=4)
    page.mouse.move(*end, steps=4)
    page.wait_for_timeout(100)
    page.mouse.up()


def centre(locator: Any) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def slot(page: Any, node: int, number: int, is_input: bool) -> tuple[float, float]:
    """Where a socket is on the screen."""
    asked = """([id, slot, isInput]) => {
        const at = app.graph.getNodeById(id).getConnectionPos(isInput, slot);
        const [x, y] = app.canvas.convertOffsetToCanvas(at);
        const box = app.canvas.canvas.getBoundingClientRect();
        return [x + box.left, y + box.top];
    }"""
    x, y = page.evaluate(asked, [node, number, is_input])
    return x, y


# Browsers give scripts no way to drag a file in from outside: the events are made by hand.
GIVE = """([how, x, y, name, kind, data]) => {
    const bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, { type: kind }));
    const said = { bubbles: true, cancelable: true };
    if (how === 'paste') {
        const event = new ClipboardEvent('paste', { ...said, clipboardData: carried });
        document.activeElement.dispatchEvent(event);
        return;
    }
    const options = { ...said, dataTransfer: carried, clientX: x, clientY: y };
    const target = document.elementFromPoint(x, y);
    for (const kind of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(kind, options));
}"""


def drop_file(page: Any, at: tuple[float, float], path: Path, kind: str = "image/png") -> None:
    """Drop a file on a point of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(GIVE, ["drop", *at, path.name, kind, data])


def paste_file(page: Any, path: Path, kind: str = "image/png") -> None:
    """Paste a file where the focus is."""
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(GIVE, ["paste", 0, 0, path.name, kind, data])
