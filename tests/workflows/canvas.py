"""API JSON to the editor's JSON and back: what the editor (1.49) saves, and what it would queue.

An API graph is {id: {"class_type", "inputs": {name: value or [id, slot]}}}. A canvas is litegraph's
save format 0.4: nodes with slots and positional widget values, links as
[link, origin, origin slot, target, target slot, type].
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
CONTROL = "control_after_generate"  # the widget behind a seed; it is not part of the API's inputs
VIRTUAL = ("Note", "MarkdownNote")  # nodes of the page alone
INSIDE, OUTSIDE = -10, -20  # a subgraph's own inputs and outputs, as origin and target of links
OPTIONAL, LIST = 7, 6  # litegraph's shapes of slots
GREEN = {"color": "#232", "bgcolor": "#353"}  # litegraph's palette: where one writes
YELLOW = {"color": "#432", "bgcolor": "#653"}  # and where one reads
BLUE = "#3f789e"  # of groups
NAMESPACE = uuid.UUID("6f1c1a52-6f7c-5d0a-9d4c-5eed11a60001")

# Heights of nodes that ran, with their text and their preview, as the editor (1.49) shows them: the
# larger of those that it draws and those of Nodes 2.0. The browser's tests hold them to the page.
RAN = {
    "SeedlingLoadDiT": 174, "SeedlingLoadEncoder": 174, "SeedlingLoadVAE": 174,
    "SeedlingCanvasSize": 502, "SeedlingEncodeInstruction": 278, "SeedlingFewStepSampler": 558,
    "SeedlingReferences": 304, "SeedlingImageSet": 860, "SeedlingEditRegion": 470,
    "SeedlingControlSignal": 218, "SeedlingPreservationReport": 190, "SeedlingFinishEdit": 110,
    "VAEDecode": 54, "PreviewImage": 266, "SaveImage": 330,
}  # fmt: skip
ROW = 20  # of a socket; RAN has none for the pictures of References


class Box(NamedTuple):
    """x, y, width, height in the canvas's pixels. A node's title bar lies 30 above its y."""

    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class Layout:
    """Where everything is; `control` is what happens to a node's seed after a run."""

    nodes: Mapping[str, Box]
    groups: Mapping[str, Box] = field(default_factory=dict)
    notes: Mapping[str, Box] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    control: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """An input of a subgraph: the inner inputs (node id, name) that it feeds."""

    name: str
    feeds: tuple[tuple[str, str], ...]
    label: str = ""


@dataclass(frozen=True)
class Blueprint:
    """A subgraph made of the nodes that `layout` places; `output` is (name, node id, slot)."""

    name: str
    description: str
    aliases: tuple[str, ...]
    ports: tuple[Port, ...]
    output: tuple[str, str, int]
    layout: Layout


class Slot(NamedTuple):
    name: str
    kind: str
    optional: bool
    options: Json

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")


# ---- what a node has ---------------------------------------------------------------------------


def slots(info: Json, wired: Iterable[str]) -> list[Slot]:
    """The inputs of a node in the order in which the editor saves them: sockets, then widgets.

    A growing input has its slots up to the first empty one behind those that are wired.
    """
    found: list[Slot] = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            if kind != "COMFY_AUTOGROW_V3":
                kind = "COMBO" if isinstance(kind, list) else kind
                found.append(Slot(name, kind, group == "optional", options))
                continue
            template = options["template"]
            ((inner, *_),) = template["input"]["required"].values()
            names = [f"{name}.{part}" for part in template["names"]]
            last = max((n for n, part in enumerate(names) if part in wired), default=-1)
            found += [Slot(part, inner, True, {}) for part in names[: last + 2]]
    return sorted(found, key=lambda slot: slot.is_widget)


def default(slot: Slot) -> Any:
    """What a widget shows before anybody touches it."""
    return slot.options.get("default", next(iter(slot.options.get("options", ())), None))


def completed(api: Json, infos: Json) -> Json:
    """An API graph with every widget's value, as the editor queues it: inputs may come later."""
    made = {}
    for key, node in api.items():
        widgets = [slot for slot in slots(infos[node["class_type"]], ()) if slot.is_widget]
        made[key] = {**node, "inputs": {s.name: default(s) for s in widgets} | node["inputs"]}
    return made


def values(info: Json, inputs: Json, control: str) -> tuple[list[Any], Json]:
    """A node's widget values in the editor's order, and by name."""
    named: Json = {}
    for slot in slots(info, ()):
        if slot.is_widget:
            given = inputs.get(slot.name, default(slot))
            named[slot.name] = default(slot) if is_link(given) else given
            if slot.options.get(CONTROL):
                named[CONTROL] = control
    return list(named.values()), named


def is_link(value: Any) -> bool:
    return isinstance(value, list)


# ---- to the canvas -----------------------------------------------------------------------------


class Canvas:
    """A canvas being built: nodes first, then links."""

    def __init__(self, api: Json, infos: Json, layout: Layout, properties: Mapping[str, Json],
                 ports: Iterable[Port] = ()):  # fmt: skip
        self.layout, self.links = layout, list[list[Any]]()
        kept = {key: api[key] for key in layout.nodes}
        wired = {key: set(node["inputs"]) for key, node in kept.items()}
        for key, name in (feed for port in ports for feed in port.feeds):
            wired[key].add(name)
        self.slots = {k: slots(infos[node["class_type"]], wired[k]) for k, node in kept.items()}
        self.nodes = [self.node(k, n, infos[n["class_type"]], properties) for k, n in kept.items()]
        self.by_id = {str(node["id"]): node for node in self.nodes}
        for key, node in kept.items():
            for index, slot in enumerate(self.slots[key]):
                value = node["inputs"].get(slot.name)
                if is_link(value) and value[0] in kept:
                    self.wire(int(value[0]), value[1], int(key), index)

    def node(self, key: str, api: Json, info: Json, properties: Mapping[str, Json]) -> Json:
        kind, place = api["class_type"], self.layout.nodes[key]
        pictures = sum(slot.name.startswith("images.") for slot in self.slots[key])
        height = max(place.h, RAN[kind] + ROW * max(0, pictures - 1))  # so that nothing moves later
        positional, named = values(info, api["inputs"], self.layout.control.get(key, "randomize"))
        outputs = zip(info["output"], info["output_name"], info["output_is_list"], strict=True)
        node = {
            "id": int(key), "type": kind, "pos": [place.x, place.y], "size": [place.w, height],
            "flags": {}, "order": 0, "mode": 0,
            "inputs": [input_slot(slot) for slot in self.slots[key]],
            "outputs": [
                {"name": name, "type": type_, **({"shape": LIST} if many else {}), "links": []}
                for type_, name, many in outputs
            ],
            "properties": {"Node name for S&R": kind, **properties[kind]},
        }  # fmt: skip
        if named:
            node |= {"widgets_values": positional, "widgets_values_named": named}
        if key in self.layout.titles:
            node["title"] = self.layout.titles[key]
        if any(slot.options.get("dynamicPrompts") for slot in self.slots[key]):
            node |= GREEN
        return node

    def wire(self, origin: int, origin_slot: int, target: int, target_slot: int) -> int:
        """Add a link; its number."""
        number = len(self.links) + 1
        if origin == INSIDE:
            kind = self.by_id[str(target)]["inputs"][target_slot]["type"]
        else:
            out = self.by_id[str(origin)]["outputs"][origin_slot]
            kind = out["type"]
            out["links"].append(number)
        if target != OUTSIDE:
            self.by_id[str(target)]["inputs"][target_slot]["link"] = number
        self.links.append([number, origin, origin_slot, target, target_slot, kind])
        return number

    def slot(self, key: str, name: str) -> int:
        return next(n for n, slot in enumerate(self.slots[key]) if slot.name == name)

    def add_notes(self) -> None:
        first = max(int(key) for key in self.by_id) + 1
        for number, (text, place) in enumerate(self.layout.notes.items(), start=first):
            note = {
                "id": number, "type": "MarkdownNote", "pos": [place.x, place.y],
                "size": [place.w, place.h], "flags": {}, "order": 0, "mode": 0,
                "inputs": [], "outputs": [], "title": "Note", "properties": {},
                "widgets_values": [text], "widgets_values_named": {"text": text}, **YELLOW,
            }  # fmt: skip
            self.nodes.append(note)

    def set_order(self) -> None:
        """Number the nodes as they would run: those without inputs first, as they are listed."""
        inner = [link for link in self.links if link[1] != INSIDE and link[3] != OUTSIDE]
        waits = {node["id"]: 0 for node in self.nodes}
        for link in inner:
            waits[link[3]] += 1
        ready, order = deque(key for key, count in waits.items() if not count), 0
        by_id = {node["id"]: node for node in self.nodes}
        while ready:
            key = ready.popleft()
            by_id[key]["order"] = order
            order += 1
            for link in (found for found in inner if found[1] == key):
                waits[link[3]] -= 1
                if not waits[link[3]]:
                    ready.append(link[3])

    def groups(self) -> list[Json]:
        return [
            {"id": number, "title": title, "bounding": list(place), "color": BLUE, "flags": {}}
            for number, (title, place) in enumerate(self.layout.groups.items(), start=1)
        ]  # fmt: skip


def input_slot(slot: Slot) -> Json:
    found: Json = {"name": slot.name, "type": slot.kind, "link": None}
    if slot.is_widget:
        found["widget"] = {"name": slot.name}
    elif "." in slot.name:
        found["label"] = slot.name.partition(".")[2]
    return found | ({"shape": OPTIONAL} if slot.optional else {})


def workflow(name: str, api: Json, infos: Json, layout: Layout, properties: Mapping) -> Json:
    """The canvas of an API graph."""
    canvas = Canvas(api, infos, layout, properties)
    canvas.add_notes()
    canvas.set_order()
    return {
        "id": str(uuid.uuid5(NAMESPACE, name)), "revision": 0,
        "last_node_id": max(node["id"] for node in canvas.nodes),
        "last_link_id": len(canvas.links), "nodes": canvas.nodes, "links": canvas.links,
        "groups": canvas.groups(), "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def blueprint(plan: Blueprint, api: Json, infos: Json, properties: Mapping[str, Json]) -> Json:
    """A canvas with one node, which is a subgraph: what the node library offers."""
    canvas = Canvas(api, infos, plan.layout, properties, plan.ports)
    inputs = [port_slot(canvas, number, port) for number, port in enumerate(plan.ports)]
    out_name, out_node, out_slot = plan.output
    out_link = canvas.wire(int(out_node), out_slot, OUTSIDE, 0)
    canvas.set_order()
    identity, last = str(uuid.uuid5(NAMESPACE, plan.name)), max(int(k) for k in canvas.by_id)
    places = plan.layout.nodes.values()
    left, right = min(p.x for p in places) - 220, max(p.x + p.w for p in places) + 100
    for number, slot in enumerate(inputs):
        slot["pos"] = [left + 100, 20 + 20 * number]
    kind = canvas.links[out_link - 1][5]
    output = {"id": str(uuid.uuid5(NAMESPACE, f"{plan.name}/out")), "name": out_name, "type": kind,
              "linkIds": [out_link], "pos": [right + 20, 20]}  # fmt: skip
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    subgraph = {
        "id": identity, "version": 1, "revision": 0, "config": {}, "name": plan.name,
        "state": {"lastGroupId": len(plan.layout.groups), "lastNodeId": last,
                  "lastLinkId": len(canvas.links), "lastRerouteId": 0},
        "inputNode": {"id": INSIDE, "bounding": [left, 0, 120, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right, 0, 120, 60]},
        "inputs": inputs, "outputs": [output], "widgets": [],
        "nodes": canvas.nodes, "groups": canvas.groups(),
        "links": [dict(zip(names, link, strict=True)) for link in canvas.links],
        "extra": {}, "category": "Seedling", "description": plan.description,
    }  # fmt: skip
    node = outer_node(plan, last + 1, identity, canvas)
    return {
        "id": str(uuid.uuid5(NAMESPACE, f"{plan.name}/canvas")), "revision": 0,
        "last_node_id": last + 1, "last_link_id": 0, "nodes": [node], "links": [],
        "version": 0.4, "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": plan.description,
                  "BlueprintSearchAliases": list(plan.aliases)},
    }  # fmt: skip


def port_slot(canvas: Canvas, number: int, port: Port) -> Json:
    """Wire a subgraph's input to what it feeds."""
    links = [
        canvas.wire(INSIDE, number, int(node), canvas.slot(node, name)) for node, name in port.feeds
    ]
    slot: Json = {
        "id": str(uuid.uuid5(NAMESPACE, f"{port.feeds}")), "name": port.name,
        "type": canvas.links[links[0] - 1][5], "linkIds": links,
    }  # fmt: skip
    return slot | ({"label": port.label} if port.label else {})


def outer_node(plan: Blueprint, number: int, identity: str, canvas: Canvas) -> Json:
    """The subgraph as a node: its ports, and the values that the inner widgets have."""
    inputs, named = [], {}
    for port in plan.ports:
        node, name = port.feeds[0]
        inner = canvas.slots[node][canvas.slot(node, name)]
        slot = input_slot(inner._replace(name=port.name))
        inputs.append(slot | ({"label": port.label} if port.label else {}))
        if inner.is_widget:
            named[port.name] = canvas.by_id[node]["widgets_values_named"][name]
    name, key, index = plan.output
    kind = canvas.by_id[key]["outputs"][index]["type"]
    return {
        "id": number, "type": identity, "pos": [0, 0], "size": [400, 400], "flags": {}, "order": 0,
        "mode": 0, "inputs": inputs, "outputs": [{"name": name, "type": kind, "links": []}],
        "title": plan.name, "properties": {}, "widgets_values": list(named.values()),
        "widgets_values_named": named,
    }  # fmt: skip


# ---- and back ----------------------------------------------------------------------------------


def to_api(canvas: Json, infos: Json) -> Json:
    """What the editor would queue of a canvas without subgraphs that are used."""
    links = {link[0]: link for link in canvas["links"]}
    return {
        str(node["id"]): api_node(node, infos[node["type"]], links)
        for node in canvas["nodes"]
        if node["type"] not in VIRTUAL
    }


def api_node(node: Json, info: Json, links: Mapping[int, list[Any]]) -> Json:
    given = iter(node.get("widgets_values", ()))
    inputs: Json = {}
    for slot in slots(info, ()):
        if slot.is_widget:
            inputs[slot.name] = next(given)
            if slot.options.get(CONTROL):
                next(given)
    assert not list(given), f"node {node['id']} has more values than widgets"
    for slot in node["inputs"]:
        if slot["link"] is not None:
            _, origin, origin_slot, *_ = links[slot["link"]]
            inputs[slot["name"]] = [str(origin), origin_slot]
    return {"class_type": node["type"], "inputs": inputs}


def subgraph_to_api(definition: Json, infos: Json) -> tuple[Json, Json]:
    """The inner nodes of a subgraph as API nodes, and {input's name: what it feeds}."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[name] for name in names] for link in definition["links"]]
    flat = to_api({"nodes": definition["nodes"], "links": links}, infos)
    by_id = {str(node["id"]): node for node in definition["nodes"]}
    ports: Json = {slot["name"]: [] for slot in definition["inputs"]}
    for _, origin, origin_slot, target, target_slot, _ in links:
        if origin == INSIDE:
            name = by_id[str(target)]["inputs"][target_slot]["name"]
            ports[definition["inputs"][origin_slot]["name"]].append((str(target), name))
            del flat[str(target)]["inputs"][name]
    return flat, ports
