"""The reference strip in a real browser: order, numbers, on and off, files, links, subgraphs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MODES = pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])
REFERENCES = "app.rootGraph.nodes.find(n => n.type === 'SeedlingReferences')"
LIST = f"{REFERENCES}.widgets.find(w => w.name === 'strip').value"
TILES = ".seedling-strip-tile"


def load_image(node: int, name: str, link: int, x: int, y: int) -> dict[str, Any]:
    return {"id": node, "type": "LoadImage", "pos": [x, y], "size": [220, 300], "order": node,
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [link]},
                        {"name": "MASK", "type": "MASK", "links": None}],
            "widgets_values": [name, "image"]}  # fmt: skip


def flow(strip: str = "") -> dict[str, Any]:
    """Three pictures wired to a References node with this list, and a node that wants them."""
    inputs = [{"name": f"images.image_{n}", "type": "IMAGE", "link": n} for n in (1, 2, 3)]
    node = {"id": 4, "type": "SeedlingReferences", "pos": [820, 140], "size": [340, 330],
            "order": 4, "inputs": inputs, "widgets_values": ["own", strip],
            "outputs": [{"name": "references", "type": "SEEDLING_REFERENCES",
                         "links": [4]}]}  # fmt: skip
    shown = {"id": 5, "type": "PreviewAny", "pos": [1200, 140], "order": 5,
             "inputs": [{"name": "source", "type": "*", "link": 4}]}  # fmt: skip
    names = [("image-1.png", 90, 120), ("image-2.png", 90, 480), ("photo.png", 340, 480)]
    images = [load_image(n, name, n, x, y) for n, (name, x, y) in enumerate(names, start=1)]
    links: list[Any] = [[n, n, 0, 4, n - 1, "IMAGE"] for n in (1, 2, 3)]
    links.append([4, 4, 0, 5, 0, "SEEDLING_REFERENCES"])
    return {
        "last_node_id": 5, "last_link_id": 4, "version": 0.4, "links": links,
        "nodes": [*images, node, shown],
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictures(host: Any, root: Path) -> Path:
    """The demo's pictures, in the studio's input folder."""
    demo = root / "assets" / "demo"
    for name in ("image-1.png", "image-2.png", "photo.png"):
        (host.home / "input" / name).write_bytes((demo / name).read_bytes())
    return demo


@pytest.fixture
def strip(page: Any, hands: Any, pictures: Path, nodes_2: bool) -> Any:
    """The page with the three pictures wired and their strip shown."""
    hands.set_nodes_2(page, nodes_2)
    hands.open_flow(page, flow())
    wait_for(page, hands, "image 1: image-1.png", "image 2: image-2.png", "image 3: photo.png")
    return page


def look(page: Any, name: str) -> None:
    """Keep what is to be seen, in the folder $SCREENSHOTS if there is one."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def labels(page: Any) -> list[str]:
    found = f"[...document.querySelectorAll('{TILES}')].map(t => t.getAttribute('aria-label'))"
    return page.evaluate(found)


def wait_for(page: Any, hands: Any, *wanted: str) -> None:
    """Until the tiles say this, in this order."""
    deadline = time.monotonic() + hands.SLOW / 1000
    while (now := labels(page)) != list(wanted) and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert now == list(wanted)


def listed(page: Any) -> Any:
    """The list in the node's own input: what is saved and queued."""
    text = page.evaluate(LIST)
    return json.loads(text) if text else []


def queued(page: Any) -> dict[str, Any]:
    """The inputs of the References node as they would be queued."""
    asked = "app.graphToPrompt().then(p => Object.values(p.output))"
    return next(n for n in page.evaluate(asked) if n["class_type"] == "SeedlingReferences")[
        "inputs"
    ]


def read(page: Any, hands: Any) -> list[str]:
    """The pictures that the node counts when it runs."""
    page.wait_for_function("app.nodeOutputs['4']?.text", timeout=hands.SLOW)
    told = page.evaluate("app.nodeOutputs['4'].text[0]")
    return [line.split(":")[0] for line in told.splitlines()]


@MODES
def test_the_mouse_reorders(strip: Any, hands: Any) -> None:
    """The first tile dragged onto the last; the node stays where it is."""
    place = strip.evaluate(f"[...{REFERENCES}.pos]")
    assert listed(strip) == []
    tiles = strip.locator(TILES)
    hands.drag(strip, hands.centre(tiles.nth(0)), hands.centre(tiles.nth(2)))
    wait_for(strip, hands, "image 1: image-2.png", "image 2: photo.png", "image 3: image-1.png")
    assert listed(strip) == ["image_2", "image_3", "image_1"]
    assert strip.evaluate(f"[...{REFERENCES}.pos]") == place
    assert json.loads(queued(strip)["strip"]) == ["image_2", "image_3", "image_1"]


@MODES
def test_the_list_in_words_is_out_of_sight(strip: Any) -> None:
    """The strip's own text box is among the advanced inputs."""
    assert strip.locator("textarea[placeholder=strip]:visible").count() == 0


@MODES
def test_the_keyboard_reorders_toggles_and_undoes(strip: Any, hands: Any) -> None:
    strip.locator(TILES).nth(0).focus()
    strip.keyboard.press("ArrowRight")
    strip.keyboard.press("Shift+ArrowRight")
    wait_for(strip, hands, "image 1: image-1.png", "image 2: photo.png", "image 3: image-2.png")
    strip.keyboard.press("Shift+Home")
    strip.keyboard.press("Space")
    wait_for(strip, hands, "image-2.png, left out", "image 1: image-1.png", "image 2: photo.png")
    assert listed(strip) == [{"image": "image_2", "on": False}, "image_1", "image_3"]
    strip.keyboard.press("Control+z")
    wait_for(strip, hands, "image 1: image-2.png", "image 2: image-1.png", "image 3: photo.png")
    strip.locator(TILES).nth(0).focus()
    strip.keyboard.press("Space")
    wait_for(strip, hands, "image-2.png, left out", "image 1: image-1.png", "image 2: photo.png")
    strip.keyboard.press("Enter")
    wait_for(strip, hands, "image 1: image-2.png", "image 2: image-1.png", "image 3: photo.png")
    strip.keyboard.press("Delete")  # a wired picture stays, and so does the node
    wait_for(strip, hands, "image 1: image-2.png", "image 2: image-1.png", "image 3: photo.png")
    strip.locator(".seedling-strip-badge").nth(1).click()
    wait_for(strip, hands, "image 1: image-2.png", "image-1.png, left out", "image 2: photo.png")


@MODES
def test_a_tile_opens_its_settings(strip: Any, hands: Any) -> None:
    """By double click and by key; what is set is on the list, and Escape goes back to the tile."""
    form = ".seedling-strip-settings"
    assert strip.locator(form).is_hidden()
    strip.locator(TILES).nth(1).dblclick(position={"x": 36, "y": 40})
    strip.locator(f"{form} input").nth(0).fill("anna")
    strip.locator(f"{form} input").nth(1).fill("the style")
    strip.locator(f"{form} select").nth(0).select_option("own")
    strip.locator(f"{form} select").nth(1).select_option("384")
    masks = strip.locator(f"{form} select").nth(2).locator("option").all_inner_texts()
    assert masks == ["its own", "none"]
    strip.locator(f"{form} input[type=range]").fill("0.5")
    entry: dict[str, Any] = {"image": "image_2", "name": "anna", "role": "the style"}
    entry |= {"size": "own", "vlm_size": 384}
    strip.wait_for_function(f"{LIST}.includes('0.5')", timeout=hands.SLOW)
    assert listed(strip) == ["image_1", {**entry, "strength": 0.5}, "image_3"]
    look(strip, f"settings_{int(strip.evaluate('LiteGraph.vueNodesMode'))}")
    strip.locator(f"{form} select").nth(1).select_option("model")  # as ever: nothing is written
    strip.wait_for_function(f"!{LIST}.includes('vlm_size')", timeout=hands.SLOW)
    strip.keyboard.press("Escape")
    assert strip.locator(form).is_hidden()
    focused = "document.activeElement.getAttribute('aria-label')"
    assert strip.evaluate(focused) == "image 2: image-2.png"
    strip.keyboard.press("F2")
    assert strip.locator(f"{form} input").nth(0).input_value() == "anna"
    strip.keyboard.press("Delete")  # in the field; the node stays
    assert strip.locator(TILES).count() == 3


@MODES
def test_files_are_dropped_pasted_and_run(
    strip: Any, hands: Any, host: Any, pictures: Path, nodes_2: bool
) -> None:
    """They land in the input folder and on the list, and the node reads them."""
    count = strip.evaluate("app.graph.nodes.length")
    box = strip.locator(".seedling-strip").bounding_box()
    name = f"dropped{int(nodes_2)}.png"
    (host.home / name).write_bytes((pictures / "scene.png").read_bytes())
    hands.drop_file(strip, (box["x"] + box["width"] - 30, box["y"] + 40), host.home / name)
    wired = ["image 1: image-1.png", "image 2: image-2.png", "image 3: photo.png"]
    wait_for(strip, hands, *wired, f"image 4: {name}")
    strip.locator(TILES).nth(0).focus()
    hands.paste_file(strip, pictures / "scene.png")
    wait_for(strip, hands, *wired, f"image 4: {name}", "image 5: scene.png")
    assert (host.home / "input" / name).is_file()
    assert strip.evaluate("app.graph.nodes.length") == count  # nobody made a Load Image of them
    strip.locator(TILES).nth(4).focus()
    strip.keyboard.press("Delete")
    wait_for(strip, hands, *wired, f"image 4: {name}")
    assert listed(strip) == ["image_1", "image_2", "image_3", name]
    hands.run(strip)
    assert read(strip, hands) == ["image 1", "image 2", "image 3", "image 4"]


@MODES
def test_what_is_no_picture_is_refused(strip: Any, hands: Any, host: Any, pictures: Path) -> None:
    strip.evaluate("app.extensionManager.toast.removeAll()")
    (host.home / "notes.txt").write_text("not a picture")
    (host.home / "torn.png").write_bytes((pictures / "photo.png").read_bytes()[:400])
    at = hands.centre(strip.locator(TILES).nth(1))
    hands.drop_file(strip, at, host.home / "notes.txt", "text/plain")
    strip.get_by_text("notes.txt is not a picture.").first.wait_for(timeout=hands.SLOW)
    hands.drop_file(strip, at, host.home / "torn.png")
    strip.get_by_text("torn.png was not taken").first.wait_for(timeout=hands.SLOW)
    assert listed(strip) == []


@MODES
def test_the_list_follows_its_links(strip: Any, hands: Any) -> None:
    """An input that is unplugged closes the gap: the others keep their place and settings."""
    strip.locator(TILES).nth(2).focus()
    strip.keyboard.press("Shift+Home")
    strip.keyboard.press("Space")
    wait_for(strip, hands, "photo.png, left out", "image 1: image-1.png", "image 2: image-2.png")
    strip.evaluate(f"{REFERENCES}.disconnectInput(0)")
    wait_for(strip, hands, "photo.png, left out", "image 1: image-2.png")
    # The page closes the gap a frame later.
    closed = '[{"image":"image_2","on":false},"image_1"]'
    strip.wait_for_function(f"text => {LIST} === text", arg=closed, timeout=hands.SLOW)
    strip.evaluate(f"{REFERENCES}.disconnectInput(1)")
    wait_for(strip, hands, "image 1: image-2.png")
    strip.evaluate("app.graph.getNodeById(2).widgets[0].value = 'photo.png'")
    wait_for(strip, hands, "image 1: photo.png")


@MODES
def test_masks_stay_with_their_pictures(strip: Any, hands: Any) -> None:
    """Whatever is unplugged and moves up: the mask of image 2 is that of the same picture."""
    strip.evaluate(f"""() => {{
        const slot = name => {REFERENCES}.inputs.findIndex(input => input.name === name);
        app.graph.getNodeById(1).connect(1, {REFERENCES}, slot('masks.mask_1'));
        app.graph.getNodeById(2).connect(1, {REFERENCES}, slot('masks.mask_2'));
    }}""")
    masks = f"{REFERENCES}.inputs.filter(i => i.name.startsWith('masks.') && i.link != null)"
    strip.wait_for_function(f"{masks}.length === 2", timeout=hands.SLOW)
    strip.wait_for_timeout(700)
    assert listed(strip) == []
    strip.evaluate(f"{REFERENCES}.disconnectInput(0)")  # image_1 goes, its mask stays wired
    wait_for(strip, hands, "image 1: image-2.png", "image 2: photo.png")
    kept = [{"image": "image_1", "mask": "mask_2"}, {"image": "image_2", "mask": "none"}]
    text = json.dumps(kept, separators=(",", ":"))
    strip.wait_for_function(f"text => {LIST} === text", arg=text, timeout=hands.SLOW)
    strip.evaluate(f"""() => {{
        const slot = {REFERENCES}.inputs.findIndex(input => input.name === 'masks.mask_1');
        {REFERENCES}.disconnectInput(slot);
    }}""")
    # mask_2 moves up to mask_1, which is the number of its picture: nothing is to be written.
    strip.wait_for_function(f"{LIST} === ''", timeout=hands.SLOW)
    assert queued(strip)["masks.mask_1"] == ["2", 1]


@MODES
def test_saving_and_copying_keep_the_list(strip: Any, hands: Any) -> None:
    strip.locator(TILES).nth(0).focus()
    strip.keyboard.press("Shift+End")
    strip.keyboard.press("Space")
    told = ["image 1: image-2.png", "image 2: photo.png", "image-1.png, left out"]
    wait_for(strip, hands, *told)
    saved = strip.evaluate("app.graph.serialize()")
    node = next(n for n in saved["nodes"] if n["type"] == "SeedlingReferences")
    assert node["widgets_values"][0] == "own" and len(node["widgets_values"]) == 2
    strip.evaluate("app.graph.clear()")
    strip.wait_for_function(f"!document.querySelector('{TILES}')", timeout=hands.SLOW)
    hands.open_flow(strip, saved)
    wait_for(strip, hands, *told)
    strip.evaluate(f"""() => {{
        app.canvas.selectNode({REFERENCES});
        app.canvas.copyToClipboard();
        app.canvas.pasteFromClipboard();
    }}""")
    copies = "app.graph.nodes.filter(n => n.type === 'SeedlingReferences')"
    strip.wait_for_function(f"{copies}.length === 2", timeout=hands.SLOW)
    texts = strip.evaluate(f"{copies}.map(n => n.widgets.find(w => w.name === 'strip').value)")
    assert (
        texts[0]
        == texts[1]
        == json.dumps(
            ["image_2", "image_3", {"image": "image_1", "on": False}], separators=(",", ":")
        )
    )


@MODES
def test_it_works_inside_a_subgraph(strip: Any, hands: Any) -> None:
    """With pictures from inside and, through the wall, from outside."""
    strip.evaluate(f"""() => {{
        const inside = new Set([{REFERENCES}, app.graph.getNodeById(3)]);
        const {{ node }} = app.graph.convertToSubgraph(inside);
        app.canvas.openSubgraph(node.subgraph, node);
    }}""")
    inner = "app.canvas.graph.nodes.find(n => n.type === 'SeedlingReferences')"
    strip.wait_for_function(f"app.canvas.graph !== app.rootGraph && {inner}", timeout=hands.SLOW)
    strip.evaluate(f"app.canvas.ds.scale = 1; app.canvas.centerOnNode({inner})")
    wait_for(strip, hands, "image 1: image-1.png", "image 2: image-2.png", "image 3: photo.png")
    strip.wait_for_timeout(500)
    tiles = strip.locator(TILES)
    hands.drag(strip, hands.centre(tiles.nth(2)), hands.centre(tiles.nth(0)))
    wait_for(strip, hands, "image 1: photo.png", "image 2: image-1.png", "image 3: image-2.png")
    assert json.loads(queued(strip)["strip"]) == ["image_3", "image_1", "image_2"]
    strip.evaluate("app.canvas.setGraph(app.rootGraph)")


@pytest.mark.parametrize("nodes_2", [True])
def test_a_list_from_elsewhere_is_left_alone(strip: Any, hands: Any) -> None:
    """Text that is no list, and a list that comes through a wire: shown as such, not changed."""
    strip.evaluate(f"{LIST} = '[1, 2'")
    strip.get_by_text("not a JSON list").first.wait_for(timeout=hands.SLOW)
    strip.locator(TILES).nth(0).focus()
    strip.keyboard.press("Space")
    assert strip.evaluate(LIST) == "[1, 2"


def test_the_node_works_without_the_scripts(page: Any, hands: Any, host: Any) -> None:
    """Last: the page is loaded anew with every script of the pack missing."""
    page.route("**/extensions/seedling/**", lambda route: route.abort())
    hands.visit(page, f"http://127.0.0.1:{host.port}")
    strip = '["image_3", {"image": "image_1", "on": false}, "image_2"]'
    hands.open_flow(page, flow(strip))
    assert page.locator(TILES).count() == 0
    assert queued(page)["strip"] == strip
    assert queued(page)["images.image_3"] == ["3", 0]
    hands.run(page)
    assert read(page, hands) == ["image 1", "image 2"]
