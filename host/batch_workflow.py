"""The workflow of a batch: read from a file, and the inputs that a name may mean in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .batch_values import BatchError

Graph = dict[str, dict[str, Any]]  # a workflow in API format: node id -> class_type, inputs
Info = Mapping[str, Any]  # what GET /object_info answers
EXPORT = 'in the editor choose "Export (API)", in older ones "Save (API format)", and run that file'


class Place(NamedTuple):
    """An input of a node."""

    node: str
    input: str


def read(path: Path) -> Any:
    """The JSON of a workflow file, in either format. BatchError when it is none."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{path} is not the JSON of a workflow: {str(error)[:200]}.") from error
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        content = content["prompt"]  # the body of a POST /prompt
    if not is_canvas(content) and not is_graph(content):
        raise BatchError(f"{path} is not a workflow: {EXPORT}.")
    return content


def is_graph(content: Any) -> bool:
    """Whether this is a workflow in API format."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs", {}), dict)
            for node in content.values()
        )
    )


def is_canvas(content: Any) -> bool:
    """Whether this is a workflow as the editor saves it."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("nodes"), list)
        and isinstance(content.get("links", []), list)
    )


def is_link(value: Any) -> bool:
    """Whether a value is a wire: [node id, number of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def title(node: Mapping[str, Any]) -> str:
    """What the editor calls a node; its class where the file does not say."""
    meta = node.get("_meta")
    named = meta.get("title") if isinstance(meta, dict) else None
    return named if isinstance(named, str) and named else node["class_type"]


def find(graph: Graph, name: str) -> Place:
    """The input that `name` means: its own name, `node title.input` or `node id.input`.

    BatchError lists the candidates when there are several, and all names when there is none.
    """
    found, wired = [], []
    for place in places(graph):
        node = graph[place.node]
        if name == place.input or _dotted(name, place, title(node)):
            (wired if is_link(node["inputs"][place.input]) else found).append(place)
    if len(found) == 1:
        return found[0]
    if found:
        raise BatchError(f"{name!r} could be {_listed(graph, found)}; write one of these instead.")
    if wired:
        raise BatchError(
            f"{name!r} is {_listed(graph, wired)}, which a wire feeds; set the input of the node "
            "at the wire's other end."
        )
    free = [p for p in places(graph) if not is_link(graph[p.node]["inputs"][p.input])]
    raise BatchError(f"The workflow has no input {name!r}; it has {_listed(graph, free)}.")


def places(graph: Graph) -> list[Place]:
    """Every input that the workflow has a value or a wire for."""
    return [Place(key, name) for key, node in graph.items() for name in node.get("inputs", {})]


def _dotted(name: str, place: Place, called: str) -> bool:
    """Whether this is `id.input` or `title.input`; both may have dots of their own."""
    head = name.removesuffix(f".{place.input}")
    return head != name and (head == place.node or head.casefold() == called.casefold())


def _listed(graph: Graph, found: list[Place]) -> str:
    return ", ".join(f"{p.node}.{p.input} ({title(graph[p.node])})" for p in found[:40])


def spec_of(info: Info, graph: Graph, place: Place) -> list[Any] | None:
    """The entry of an input in /object_info; None for one that unfolds from another."""
    groups = (info.get(graph[place.node]["class_type"]) or {}).get("input") or {}
    for group in ("required", "optional"):
        spec = (groups.get(group) or {}).get(place.input)
        if isinstance(spec, list) and spec:
            return spec
    return None


def with_values(graph: Graph, values: Mapping[Place, Any]) -> Graph:
    """A copy of the workflow with other values."""
    changed = {key: {**node, "inputs": dict(node.get("inputs", {}))} for key, node in graph.items()}
    for place, value in values.items():
        # As the editor does: a list would be taken for a wire.
        wrapped = {"__value__": value} if isinstance(value, list) else value
        changed[place.node]["inputs"][place.input] = wrapped
    return changed


def key_of(graph: Graph) -> str:
    """A name for a job that is the same whenever the job is; titles do not count."""
    bare = {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in graph.items()}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def values_of(graph: Graph, names: tuple[str, ...]) -> Any:
    """The values of all inputs of these names: one as it is, several as a list, None without."""
    found = [
        graph[p.node]["inputs"][p.input]
        for p in places(graph)
        if p.input in names and not is_link(graph[p.node]["inputs"][p.input])
    ]
    return found[0] if len(found) == 1 else found or None
