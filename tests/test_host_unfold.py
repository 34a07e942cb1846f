"""What a node may not unfold into; what it may is in test_host_pictures.py, with image sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from seedling.host.standin.io import NodeOutput
from seedling.host.unfold import MOST_NODES, Graph, UnfoldError, unfold


def run_of(*kinds: str) -> Any:
    """A job of one node "1", in a host that has these kinds of nodes."""
    schema = SimpleNamespace(is_output_node=True)
    entry = SimpleNamespace(schema=lambda: schema)
    graph = Graph({"1": {"class_type": "Whole", "inputs": {}}})
    return SimpleNamespace(library=dict.fromkeys(kinds, entry), schemas={}, graph=graph)


def node(**inputs: Any) -> dict[str, Any]:
    return {"class_type": "Part", "inputs": inputs}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"1.a": {"class_type": "Other", "inputs": {}}}, "'Other', which this host does not have"),
        ({"1": node()}, "unfolds into '1', which is there already"),
        ({"1.a": node(x=["1.b", 0]), "1.b": node(x=["1.a", 0])}, "unfolds into a ring at '1."),
        ({f"1.{n}": node() for n in range(MOST_NODES + 1)}, "at most 2000 run"),
    ],
    ids=["unknown", "twice", "ring", "many"],
)
def test_what_cannot_run_is_said(made: dict[str, Any], words: str) -> None:
    with pytest.raises(UnfoldError, match=words):
        unfold(run_of("Part"), "1", NodeOutput(expand=made))


def test_a_node_stands_for_the_one_that_was_queued() -> None:
    graph = Graph({"5": node()})
    graph.add("5", {"5.0.1": node()})
    graph.add("5.0.1", {"5.0.1.0.1": node()})
    assert [graph.real(name) for name in ("5", "5.0.1", "5.0.1.0.1")] == ["5", "5", "5"]
    assert graph.parents["5.0.1.0.1"] == "5.0.1"
