"""A workflow as the editor saves it, made into API format with what the server says of its nodes.

The names of the values come from `widgets_values_named`, which newer editors write; older files
only have their order, which is trusted when it accounts for every value. What the page's own code
would have to work out (subgraphs, nodes of other packs' scripts) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .batch_values import BatchError
from .batch_workflow import EXPORT, Graph, Info

NOTES = ("Note", "MarkdownNote")
ACTIVE, MUTED, BYPASSED = 0, 2, 4  # a node's mode
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # the widget behind a seed
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
Node = Mapping[str, Any]


def convert(canvas: Mapping[str, Any], info: Info) -> Graph:
    """The workflow in API format. BatchError when it does not carry enough."""
    try:
        return Canvas(canvas, info).graph()
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BatchError(
            f"The workflow cannot be read ({type(error).__name__}: {error}); {EXPORT}."
        ) from error


class Canvas:
    """A saved canvas: its nodes by id, its wires by id as (node, output)."""

    def __init__(self, canvas: Mapping[str, Any], info: Info) -> None:
        self.info = info
        self.nodes: dict[str, Node] = {str(node["id"]): node for node in canvas["nodes"]}
        inner = {str(s["id"]) for s in (canvas.get("definitions") or {}).get("subgraphs") or ()}
        for node in self.nodes.values():
            if node["type"] in inner:
                raise BatchError(f"The workflow has a subgraph, which needs the editor: {EXPORT}.")
        self.links: dict[int, tuple[str, int]] = {}
        for link in canvas.get("links") or ():
            whole = isinstance(link, Mapping)
            number, node, output = (
                (link["id"], link["origin_id"], link["origin_slot"]) if whole else link[:3]
            )
            self.links[number] = (str(node), output)

    def graph(self) -> Graph:
        made: Graph = {}
        for key, node in self.nodes.items():
            kind = node["type"]
            if kind in (*NOTES, "Reroute", "PrimitiveNode") or self.mode(node) != ACTIVE:
                continue
            if kind not in self.info:
                raise BatchError(
                    f"The server has no node {kind!r}; install its pack there, or take it out of "
                    "the workflow."
                )
            inputs = self.widgets(node)
            for entry in node.get("inputs") or ():
                if entry.get("link") is not None:
                    inputs.pop(entry["name"], None)
                    source = self.source(entry["link"])
                    if source is not None:
                        inputs[entry["name"]] = source
            called = node.get("title") or self.info[kind].get("display_name") or kind
            made[key] = {"class_type": kind, "inputs": inputs, "_meta": {"title": called}}
        if not made:
            raise BatchError("The workflow has no node that runs; add one, or unmute it.")
        return made

    @staticmethod
    def mode(node: Node) -> int:
        """Muted, bypassed or active; the modes of other hosts count as active."""
        mode = node.get("mode")
        return mode if mode in (MUTED, BYPASSED) else ACTIVE

    # ---- wires ---------------------------------------------------------------------------------

    def source(self, link: int | None) -> Any:
        """What feeds a wire: [node, output], a primitive's value, or None for nothing."""
        seen: set[str] = set()
        while link is not None:
            key, output = self.links[link]
            node = self.nodes[key]
            if key in seen:
                raise BatchError(f"The wires of the workflow run in a circle at node {key}.")
            seen.add(key)
            if self.mode(node) == MUTED:
                return None
            if node["type"] == "PrimitiveNode":
                value = (node.get("widgets_values") or [None])[0]
                return {"__value__": value} if isinstance(value, list) else value
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif self.mode(node) == BYPASSED:
                link = self.bypass(node, output)
            else:
                return [key, output]
        return None

    @staticmethod
    def bypass(node: Node, output: int) -> int | None:
        """The wire that goes on through a bypassed node: the input opposite, else one as typed."""
        kind = node["outputs"][output]["type"]
        inputs = list(node.get("inputs") or ())
        opposite = inputs[output : output + 1]
        for entry in [*opposite, *inputs]:
            if entry["type"] in (kind, "*") or kind == "*":
                return entry.get("link")
        return None

    # ---- values --------------------------------------------------------------------------------

    def widgets(self, node: Node) -> dict[str, Any]:
        """The values that the node's widgets hold, by input."""
        named = node.get("widgets_values_named")
        values = node.get("widgets_values")
        if not isinstance(named, Mapping):
            if isinstance(values, Mapping):  # some packs save them by name
                named = values
            else:
                return self.by_order(node, list(values or ()))
        found: dict[str, Any] = {}
        for name, spec in declared(self.info[node["type"]].get("input") or {}, named):
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
            if name in named:
                found[name] = wrapped(named[name])
            elif is_widget(spec) and "default" in options:
                found[name] = wrapped(options["default"])  # as the page does for a newer input
        return found

    def by_order(self, node: Node, values: list[Any]) -> dict[str, Any]:
        """Values without names: in the order of the inputs, controls and buttons in between."""
        found: dict[str, Any] = {}
        left = list(values)
        for name, spec in declared(self.info[node["type"]].get("input") or {}, found):
            if not is_widget(spec):
                continue
            if not left:
                raise self.unclear(node)
            found[name] = wrapped(left.pop(0))
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
            control = options.get("control_after_generate") or name in ("seed", "noise_seed")
            if control and left and left[0] in CONTROLS:
                left.pop(0)
            if any(key.endswith("_upload") for key in options) and left:
                left.pop(0)  # the upload button
        if left:
            raise self.unclear(node)
        return found

    @staticmethod
    def unclear(node: Node) -> BatchError:
        return BatchError(
            f"The values of node {node['id']} ({node['type']}) are saved without names, and do not "
            f"match what the server says of it: {EXPORT}."
        )


def declared(
    groups: Mapping[str, Any], chosen: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, list[Any]]]:
    """Inputs as (path, [type, options]), those of a chosen option behind their combo.

    `chosen` is read as it is at that moment: a caller may fill it while it goes on.
    """
    for group in ("required", "optional"):
        for name, spec in (groups.get(group) or {}).items():
            path = prefix + name
            yield path, spec
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                for option in spec[1].get("options", ()):
                    if option["key"] == chosen.get(path):
                        yield from declared(option.get("inputs") or {}, chosen, f"{path}.")


def is_widget(spec: list[Any]) -> bool:
    """Whether an input holds a value of its own."""
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
    return (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput")


def wrapped(value: Any) -> Any:
    """As the page sends it: a list would be taken for a wire."""
    return {"__value__": value} if isinstance(value, list) else value
