"""Takes the pictures of docs/images anew: `make screenshots`. Needs what the browser tests need.

The studio is real and so is what it shows: the first picture is made by the embedded model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser_tools as hands
import host_tools

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SIZE = {"width": 1280, "height": 720}
BIGGEST = 250_000  # bytes: they are in the repository
PATIENCE = 300_000  # milliseconds for a picture of the embedded model
NAMES = ("photo.png", "image-1.png", "image-2.png")
LIST = [
    {"image": "image_1", "name": "cat"},
    {"image": "image_2", "name": "ground"},
    {"image": "image_3", "role": "the colours"},
]


@contextmanager
def page() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        for host in hands.studio(host_tools, home):
            for picture in (ROOT / "assets" / "demo").glob("*.png"):
                (home / "input" / picture.name).write_bytes(picture.read_bytes())
            for shown in hands.browser(host, Path(folder, "profile")):
                shown.set_viewport_size(SIZE)
                yield shown


def take(shown: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{name}.jpg"
    shown.wait_for_timeout(1500)
    shown.screenshot(path=str(path), type="jpeg", quality=80)
    size = path.stat().st_size
    assert size < BIGGEST, f"{path} has {size} bytes, at most {BIGGEST}"
    sys.stdout.write(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB\n")


def fit(shown: Any) -> None:
    shown.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    shown.wait_for_timeout(1000)


def text_to_image(shown: Any) -> None:
    flow = json.loads((ROOT / "example_workflows" / "Text to Image.json").read_text("utf-8"))
    hands.open_flow(shown, flow)
    fit(shown)
    hands.run(shown)
    saver = "app.graph.nodes.find(n => n.type === 'SaveImage')"
    shown.wait_for_function(f"app.nodeOutputs[{saver}.id]?.images?.length", timeout=PATIENCE)
    take(shown, "studio")


def references() -> dict[str, Any]:
    """Three pictures, wired to a References node that names them."""
    nodes: list[Any] = [
        {"id": n, "type": "LoadImage", "pos": [20 + 250 * (n - 1), 420], "size": [230, 300],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [n]},
                     {"name": "MASK", "type": "MASK", "links": None}],
         "widgets_values": [name, "image"]}
        for n, name in enumerate(NAMES, start=1)
    ]  # fmt: skip
    inputs = [
        {"name": f"images.image_{n}", "label": f"image_{n}", "type": "IMAGE", "link": n}
        for n in (1, 2, 3)
    ]
    nodes.append(
        {"id": 4, "type": "SeedlingReferences", "pos": [800, 420], "size": [320, 340],
         "inputs": inputs, "widgets_values": ["model", json.dumps(LIST)],
         "outputs": [{"name": "references", "type": "SEEDLING_REFERENCES", "links": [4]}]}
    )  # fmt: skip
    nodes.append(
        {"id": 5, "type": "PreviewAny", "pos": [1160, 420], "size": [230, 120],
         "inputs": [{"name": "source", "type": "*", "link": 4}]}
    )  # fmt: skip
    links: list[Any] = [[n, n, 0, 4, n - 1, "IMAGE"] for n in (1, 2, 3)]
    links.append([4, 4, 0, 5, 0, "SEEDLING_REFERENCES"])
    return {"last_node_id": 5, "last_link_id": 4, "version": 0.4, "links": links, "nodes": nodes}


def strip(shown: Any) -> None:
    flow = references()
    del flow["nodes"][4], flow["links"][3]  # nothing needs to run: the more room for the node
    hands.open_flow(shown, flow)
    fit(shown)
    tile = shown.locator(".seedling-strip-tile")
    tile.nth(2).wait_for(timeout=hands.SLOW)
    tile.nth(2).focus()
    shown.keyboard.press("Shift+Home")
    take(shown, "reference-strip")


def error(shown: Any) -> None:
    """The same node with a picture on its list that is not there."""
    flow = references()
    flow["nodes"][3]["widgets_values"][1] = json.dumps([*LIST, "holiday.png"])
    hands.open_flow(shown, flow)
    fit(shown)
    hands.run(shown)
    shown.locator(".p-toast-message-error").wait_for(timeout=hands.SLOW)
    take(shown, "error")


def main() -> int:
    if reason := hands.missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    with page() as shown:
        hands.set_nodes_2(shown, True)
        text_to_image(shown)
        strip(shown)
        error(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
