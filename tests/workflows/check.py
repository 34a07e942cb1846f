"""What is wrong with a canvas: unknown nodes, links that do not meet, values out of range."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from canvas import CONTROL, INSIDE, OUTSIDE, RAN, VIRTUAL, Box, Json, slots

TITLE = 30  # pixels above a node's y
CONTROLS = ("fixed", "increment", "decrement", "randomize")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
TYPES: dict[str, tuple[type, ...]] = {
    "INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,),
}  # fmt: skip


def faults(canvas: Json, infos: Json) -> list[str]:
    """A sentence for each fault of a canvas or of a subgraph's definition."""
    found = []
    for node in canvas["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        if node["type"] not in infos:
            found.append(f"node {node['id']} is a {node['type']}, which is not there")
            continue
        found += [f"node {node['id']}: {text}" for text in node_faults(node, infos[node["type"]])]
    ids = [node["id"] for node in canvas["nodes"]]
    if len(set(ids)) < len(ids) or max(ids) > last_id(canvas):
        found.append("the nodes' ids are not unique, or larger than the last one")
    return found + link_faults(canvas) + overlaps(canvas)


def last_id(canvas: Json) -> int:
    return canvas["state"]["lastNodeId"] if "state" in canvas else canvas["last_node_id"]


def node_faults(node: Json, info: Json) -> Iterable[str]:
    names = {slot["name"] for slot in node["inputs"]}
    wired = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
    wanted = slots(info, wired)
    if names != {slot.name for slot in wanted}:
        yield f"its inputs are {sorted(names)}"
    if node["size"][1] < RAN[node["type"]]:
        yield f"it is {node['size'][1]} high, and will be {RAN[node['type']]} when it ran"
    if [slot["type"] for slot in node["outputs"]] != info["output"]:
        yield f"its outputs are {[slot['type'] for slot in node['outputs']]}"
    values = list(node.get("widgets_values", ()))
    named = dict(node.get("widgets_values_named", {}))
    if list(named.values()) != values:
        yield "its values by name are not those by order"
    for slot in wanted:
        if slot.is_widget:
            yield from value_faults(slot.name, slot.kind, slot.options, named.pop(slot.name, None))
            if slot.options.get(CONTROL) and named.pop(CONTROL, None) not in CONTROLS:
                yield f"after a run its {slot.name} would do nothing that is known"
        elif not slot.optional and slot.name not in wired:
            yield f"nothing is wired to {slot.name}"
    if named:
        yield f"it has values for {sorted(named)}"


def value_faults(name: str, kind: str, options: Json, value: Any) -> Iterable[str]:
    if kind == "COMBO":
        if value not in options["options"]:
            yield f"{name} is {value!r}, which is no choice"
        return
    if not isinstance(value, TYPES[kind]) or (kind != "BOOLEAN" and isinstance(value, bool)):
        yield f"{name} is {value!r}, not {kind}"
    elif kind in ("INT", "FLOAT"):
        if not options.get("min", value) <= value <= options.get("max", value):
            yield f"{name} is {value}, out of range"


def link_faults(canvas: Json) -> list[str]:
    """Every link is known at both ends, and joins what has one type."""
    nodes = {node["id"]: node for node in canvas["nodes"]}
    links = [
        tuple(link[n] for n in LINK) if isinstance(link, dict) else link for link in canvas["links"]
    ]
    ports = {INSIDE: canvas.get("inputs", ()), OUTSIDE: canvas.get("outputs", ())}
    found, ends = [], set()
    for number, origin, origin_slot, target, target_slot, kind in links:
        try:
            start = ports[INSIDE] if origin == INSIDE else nodes[origin]["outputs"]
            end = ports[OUTSIDE] if target == OUTSIDE else nodes[target]["inputs"]
            start, end = start[origin_slot], end[target_slot]
        except (KeyError, IndexError):
            found.append(f"link {number} leads nowhere")
            continue
        leaves = number in start["linkIds" if origin == INSIDE else "links"]
        arrives = number in end["linkIds"] if target == OUTSIDE else end["link"] == number
        if not (leaves and arrives and start["type"] == end["type"] == kind):
            found.append(f"link {number} is not the one that its ends know")
        ends.add(number)
    known = [slot["link"] for node in nodes.values() for slot in node["inputs"]]
    known += [n for node in nodes.values() for slot in node["outputs"] for n in slot["links"]]
    known += [n for slot in (*ports[INSIDE], *ports[OUTSIDE]) for n in slot["linkIds"]]
    lost = {n for n in known if n is not None} - ends
    return found + [f"link {number} is not in the list" for number in sorted(lost)]


def overlaps(canvas: Json) -> list[str]:
    """Nodes on nodes, groups on groups, and nodes across the edge of a group."""
    nodes = [
        (f"node {node['id']}", Box(x, y - TITLE, w, h + TITLE))
        for node in canvas["nodes"]
        for (x, y), (w, h) in ((node["pos"], node["size"]),)
    ]
    groups = [(f"group {group['title']!r}", Box(*group["bounding"])) for group in canvas["groups"]]
    found = []
    for listed in (nodes, groups):
        for number, (name, box) in enumerate(listed):
            found += [f"{name} lies on {n}" for n, other in listed[number + 1 :] if cut(box, other)]
    for name, box in nodes:
        found += [f"{name} leaves {n}" for n, g in groups if cut(box, g) and not inside(box, g)]
    return found


def cut(a: Box, b: Box) -> bool:
    return a.x < b.x + b.w and b.x < a.x + a.w and a.y < b.y + b.h and b.y < a.y + a.h


def inside(a: Box, b: Box) -> bool:
    return a.x >= b.x and a.y >= b.y and a.x + a.w <= b.x + b.w and a.y + a.h <= b.y + b.h
