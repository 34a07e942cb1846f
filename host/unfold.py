"""Nodes that unfold into others (`expand`): those run in the same job, on behalf of the first.

Each is kept under its own key, so that a job which was stopped, and is queued again, makes only
what is missing. What they show is shown on the node of the page that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .cache import keys
from .standin.io import NodeOutput
from .validate import ancestors, is_link

if TYPE_CHECKING:
    from .executor import Run

MOST_NODES = 2000  # of one answer


class UnfoldError(ValueError):
    """A node that unfolds into what cannot run."""


class Graph:
    """The nodes of a job: those that were queued, and those that they unfolded into."""

    def __init__(self, prompt: Mapping[str, Any]) -> None:
        self.nodes = dict(prompt)
        self.parents: dict[str, str] = {}

    def get_node(self, node_id: str) -> dict[str, Any]:
        """As ComfyUI's DynamicPrompt has it."""
        return self.nodes[node_id]

    def real(self, node_id: str) -> str:
        """The queued node that a node stands for."""
        while node_id in self.parents:
            node_id = self.parents[node_id]
        return node_id

    def add(self, parent: str, nodes: Mapping[str, Any]) -> None:
        for node_id, node in nodes.items():
            if node_id in self.nodes:
                raise UnfoldError(f"The node unfolds into '{node_id}', which is there already.")
            self.nodes[node_id] = node
            self.parents[node_id] = parent


def unfold(run: Run, parent: str, answer: NodeOutput) -> tuple[Any, ...]:
    """Run what an answer unfolds into; what it then stands for. Failed when a node fails.

    As in ComfyUI a wire to a list becomes as many values as that has, one behind the other.
    """
    made = answer.expand or {}
    if len(made) > MOST_NODES:
        raise UnfoldError(f"The node unfolds into {len(made)} nodes; at most {MOST_NODES} run.")
    for kind in {node["class_type"] for node in made.values()}:
        if kind not in run.library:
            raise UnfoldError(f"The node unfolds into a '{kind}', which this host does not have.")
        run.schemas[kind] = run.library[kind].schema()
    run.graph.add(parent, made)
    wanted = [
        node_id for node_id in made if run.schemas[made[node_id]["class_type"]].is_output_node
    ]
    wanted += [value[0] for value in answer.args if is_link(value)]
    order: dict[str, None] = {}
    for node_id in wanted:
        needed, ring = ancestors(run.graph.nodes, node_id)
        if ring:
            raise UnfoldError(f"The node unfolds into a ring at '{ring}'.")
        order |= dict.fromkeys(needed)
    new = [node_id for node_id in order if node_id not in run.results]
    run.names = keys(
        run.graph.nodes, new, run.schemas, run.constants, run.executor.cache.run, run.names
    )
    for node_id in new:
        run.step(node_id)
    items = [
        run.results[value[0]].outputs[value[1]] if is_link(value) else [value]
        for value in answer.args
    ]
    return tuple(value for several in items for value in several)
