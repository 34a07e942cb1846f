"""Image Set, Canvas Size and KSampler on the page: what an artist sees while they run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MODES = pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])
SHOWN = "(app.nodeOutputs['5']?.images ?? []).map(image => image.filename)"


def look(page: Any, name: str) -> None:
    """Keep what is to be seen, in the folder $SCREENSHOTS if there is one."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


@MODES
def test_a_set_shows_all_that_is_done(page: Any, hands: Any, root: Path, nodes_2: bool) -> None:
    """The pictures come one by one, onto the set's own node; the canvas's shape is drawn."""
    flow = json.loads((root / "example_workflows" / "Image Set.json").read_text("utf-8"))
    node = next(n for n in flow["nodes"] if n["type"] == "SeedlingImageSet")
    node["widgets_values"][2] = 100 + nodes_2  # the seed: nothing is known of it
    size = next(n for n in flow["nodes"] if n["type"] == "SeedlingCanvasSize")
    size["widgets_values"][1] = f"{128 + 32 * nodes_2}x128"  # only what runs is drawn
    del node["widgets_values_named"], size["widgets_values_named"]
    hands.set_nodes_2(page, nodes_2)
    hands.open_flow(page, flow)
    page.evaluate("app.canvas.ds.scale = 0.75; app.canvas.ds.offset = [-380, 120]")
    page.evaluate(f"""() => {{
        window.counts = [];
        const count = () => window.counts.push({SHOWN}.length);
        window.comfyAPI.api.api.addEventListener('executed', count);
    }}""")
    hands.run(page)
    page.wait_for_function(f"{SHOWN}.length === 4", timeout=hands.SLOW)
    page.wait_for_function("app.nodeOutputs['6']?.images?.length === 1", timeout=hands.SLOW)
    counts = page.evaluate("window.counts")
    assert counts == sorted(counts) and {1, 2, 3, 4} <= set(counts), "one after the other"
    names = page.evaluate(SHOWN)
    assert names == sorted(names) and all(name.startswith("image_set_") for name in names)
    page.wait_for_function("!app.nodePreviewImages['5']?.length", timeout=hands.SLOW)
    drawn = "app.nodePreviewImages['4']?.length === 1"
    assert page.evaluate(drawn), "Canvas Size shows its sheet after the run, too"
    page.wait_for_timeout(1500)
    look(page, f"set_{int(nodes_2)}")


# What is seen on nodes: file names, the sheet's shape in per cent, and words.
SEEN = f"""async () => {{
    const [url] = app.nodePreviewImages['4'] ?? [];
    let sheet = null;
    if (url) {{
        const image = Object.assign(new Image(), {{ src: url }});
        await image.decode();
        const pen = Object.assign(document.createElement('canvas'), {{ width: 448, height: 320 }})
            .getContext('2d');
        pen.drawImage(image, 0, 0);
        const light = (x, y) => pen.getImageData(x, y, 1, 1).data[0] > 200;
        const many = (length, at) => [...Array(length).keys()].filter(at).length;
        const wide = Math.max(...[...Array(280).keys()].map(y => many(448, x => light(x, y))));
        const high = Math.max(...[...Array(448).keys()].map(x => many(280, y => light(x, y))));
        sheet = Math.round(100 * wide / high);
    }}
    return [{SHOWN}, (app.nodeOutputs['6']?.images ?? []).length, sheet];
}}"""


@MODES
def test_what_was_shown_is_there_again(
    page: Any, hands: Any, host: Any, root: Path, nodes_2: bool
) -> None:
    """In another tab and back, and when the page is loaded anew: pictures, sheet, canvas, words."""
    flow = json.loads((root / "example_workflows" / "Image Set.json").read_text("utf-8"))
    flow["id"] = f"{flow['id'][:-1]}{int(nodes_2)}"
    node = next(n for n in flow["nodes"] if n["type"] == "SeedlingImageSet")
    node["widgets_values"][0], node["widgets_values"][2] = "a cat\na dog", 300 + nodes_2
    size = next(n for n in flow["nodes"] if n["type"] == "SeedlingCanvasSize")
    size["widgets_values"][1] = f"{192 + 32 * nodes_2}x128"
    del node["widgets_values_named"], size["widgets_values_named"]
    hands.set_nodes_2(page, nodes_2)
    hands.open_flow(page, flow)
    hands.run(page)
    page.wait_for_function("app.nodeOutputs['6']?.images?.length === 1", timeout=hands.SLOW)
    page.wait_for_timeout(2000)
    names, sheets, shape = seen = page.evaluate(SEEN)
    assert len(names) == 2 and sheets == 1 and abs(shape - 150 - 25 * nodes_2) <= 3

    mine = page.evaluate("app.extensionManager.workflow.activeWorkflow.path")
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("app.graph.nodes.length === 0", timeout=hands.SLOW)
    page.locator(".workflow-tab", has_text=Path(mine).stem).first.click()
    back = "path => app.extensionManager.workflow.activeWorkflow.path === path"
    page.wait_for_function(back, arg=mine, timeout=hands.SLOW)
    page.wait_for_timeout(2500)
    assert page.evaluate(SEEN) == seen, "in another tab and back"

    page.wait_for_timeout(2000)  # the page keeps drafts half a second after a change
    hands.visit(page, f"http://127.0.0.1:{host.port}")
    page.wait_for_function(back, arg=mine, timeout=hands.SLOW)
    page.wait_for_function(f"{SHOWN}.length === 2", timeout=hands.SLOW)
    page.wait_for_timeout(1500)
    assert page.evaluate(SEEN) == seen, "loaded anew"
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)
    look(page, f"again_{int(nodes_2)}")


def test_a_sampler_that_is_not_here_is_said(page: Any, hands: Any) -> None:
    """A workflow of ComfyUI with another sampler: the name stays, and the answer says what is."""
    values = [1, "fixed", 4, 1.0, "res_multistep", "simple", 1.0]
    flow = {
        "last_node_id": 1, "last_link_id": 0, "version": 0.4, "links": [],
        "nodes": [{"id": 1, "type": "KSampler", "pos": [200, 200], "size": [300, 260],
                   "order": 0, "widgets_values": values}],
    }  # fmt: skip
    hands.open_flow(page, flow)
    asked = "app.graphToPrompt().then(p => p.output['1'].inputs.sampler_name)"
    assert page.evaluate(asked) == "res_multistep"
