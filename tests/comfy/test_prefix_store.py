"""The prefix store in a real ComfyUI: what its nodes say, and that patches never meet old keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.comfyui

EDIT = Path(__file__).resolve().parents[1] / "workflows" / "edit_a_picture.api.json"


@pytest.fixture
def edit() -> tuple[dict[str, Any], str, str, str]:
    """The graph, and which nodes of it read, sample and save the edit."""
    text = EDIT.read_text("utf-8").replace("seedling-tiny (embedded)", "tiny.safetensors")
    graph = json.loads(text)
    (save,) = [k for k, n in graph.items() if n["class_type"] == "SaveImage"]
    graph[save]["class_type"] = "PreviewImage"
    del graph[save]["inputs"]["filename_prefix"]
    decode = graph[save]["inputs"]["images"][0]
    sample = graph[decode]["inputs"]["samples"][0]
    read = graph[sample]["inputs"]["positive"][0]
    return graph, read, sample, save


def said(server: Any, graph: dict[str, Any], node: str) -> str:
    """The text on a node after a run."""
    history = server.wait(server.queue(graph))
    return "\n".join(history["outputs"][node]["text"])


def test_the_sampler_says_what_was_known(server: Any, edit: Any) -> None:
    graph, read, sample, _ = edit
    said(server, graph, sample)
    graph[sample]["inputs"]["seed"] = 41
    assert "tokens (100%)" in said(server, graph, sample), "another seed reads nothing again"
    graph[read]["inputs"]["prompt"] = "make the circle green, and nothing else"
    text = said(server, graph, sample)
    share = int(text.split(" tokens (")[1].split("%")[0])
    assert 30 < share < 100, "the reference was known, the words were not"
    graph[sample]["inputs"]["cache"] = "off"
    assert "0 B kept" in said(server, graph, sample)


def test_a_lora_never_meets_keys_of_other_weights(server: Any, edit: Any) -> None:
    """Strengths in turn, over warm stores; in the end each picture is what it was."""
    graph, _, sample, save = edit
    model = graph[sample]["inputs"]["model"]
    graph["90"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": model, "lora_name": "turn.safetensors", "strength_model": 1.0},
    }
    graph[sample]["inputs"]["model"] = ["90", 0]
    seen: dict[float, np.ndarray] = {}
    for seed, strength in enumerate((1.0, 0.5, 0.0, 1.0, 0.5, 0.0)):
        graph["90"]["inputs"]["strength_model"] = strength
        graph[sample]["inputs"]["cache"] = f"{1 + seed}GB"  # so that the sampler runs again
        (picture,) = server.pictures(graph, save)
        assert np.array_equal(seen.setdefault(strength, picture), picture)
    assert not np.array_equal(seen[1.0], seen[0.0]) and not np.array_equal(seen[1.0], seen[0.5])
