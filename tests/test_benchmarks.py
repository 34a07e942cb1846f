"""Every benchmark runs, tiny, and finds that the outputs that it compares agree."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

TINY = {
    "batch_prompts": ["--tiny"],
    "bf16_checkpoint": ["--tiny"],
    "bf16_families": ["--tiny"],
    "dit_profile": ["--tiny"],
    "dit_step": ["--tiny"],
    "edit_references": ["--tiny"],
    "flux2_step": ["--tiny"],
    "host_work": ["--tiny"],
    "post_latency": ["--tiny"],
    "quantized_linear": ["--tiny"],
    "quantized_memory": ["--tiny", "--formats", "int8_tensorwise"],
    "quantized_pictures": ["--tiny"],
    "quantized_step": ["--tiny"],
    "prefix_store": ["--tiny"],
    "qwen_image_step": ["--tiny"],
    "streaming_step": ["--tiny"],
    "whole_call": ["--tiny"],
    "vae_decode": ["--width", "8", "--side", "64", "--runs", "2"],
    "vae_strips": ["--tiny"],
}
LONG = {"quantized_pictures"}  # a minute: it quantizes a model in every way


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A benchmark sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in TINY],
)
def test_a_tiny_run_prints_its_table(name: str, monkeypatch, capsys) -> None:
    """It ends without SystemExit, which is what outputs that disagree raise."""
    monkeypatch.setattr(sys, "argv", [name, *TINY[name], "--json"])
    importlib.import_module(f"seedling.benchmarks.{name}").main()
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert tables
    for table in tables:
        assert table["rows"] and table["threads"] == 1 and "load average" in table
        assert all(row.keys() == table["rows"][0].keys() for row in table["rows"])


def test_every_benchmark_is_here(root) -> None:
    commands = {f.stem for f in (root / "benchmarks").glob("[!_]*.py")} - {"protocol"}
    assert commands == {*TINY, "comfyui_step"}  # which tests/comfy runs


def test_a_comparison_with_comfyui_says_that_it_needs_one(monkeypatch, capsys) -> None:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["comfyui_step"])
    importlib.import_module("seedling.benchmarks.comfyui_step").main()
    assert "set COMFYUI_DIR to a checkout" in capsys.readouterr().out


def test_outputs_that_disagree_end_the_run() -> None:
    protocol: Any = importlib.import_module("seedling.benchmarks.protocol")
    theirs = torch.linspace(0, 2, 9)
    assert protocol.difference(theirs + 1e-6, theirs, 1e-5) == pytest.approx(5e-7, rel=0.2)
    for ours in (theirs + 1e-4, theirs * torch.nan):
        with pytest.raises(SystemExit, match="at most 1e-05 is allowed"):
            protocol.difference(ours, theirs, 1e-5)


def test_sides_take_turns() -> None:
    protocol: Any = importlib.import_module("seedling.benchmarks.protocol")
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "AB"}
    times = protocol.interleave(sides, runs=3)
    assert order[-8:] == [*"ABBAABBA"]
    assert all(len(t.seconds) >= 3 and t.shortest <= t.median for t in times.values())
