"""`seedling run` against a real ComfyUI. conftest.py beside this file says what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seedling.host.cli import main

pytestmark = pytest.mark.comfyui

TESTS = Path(__file__).resolve().parents[1]
STEM = "text_to_image"
EMBEDDED = "seedling-tiny (embedded)"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def graph() -> dict[str, Any]:
    """An example on the tiny random model."""
    text = (TESTS / "workflows" / f"{STEM}.api.json").read_text("utf-8")
    return json.loads(text.replace(EMBEDDED, "tiny.safetensors"))


def run(server: Any, content: Any, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """`seedling run`; the rows of its manifest."""
    Path("w.json").write_text(json.dumps(content), "utf-8")
    assert main(["run", "w.json", "--server", server.url, "--out", "out", *words]) == code
    lines = Path("out/manifest.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_pictures_come_home_once(server: Any, capsys: Any) -> None:
    """Each is the one that ComfyUI makes of the same graph; a second run makes nothing."""
    words = ["--set", "seed=31..33", "--set", "steps=2"]
    rows = run(server, graph(), *words)
    assert [row["recipe"]["seed"] for row in rows] == [31, 32, 33]
    for row in rows:
        wanted = graph()
        wanted["6"]["inputs"] |= {"seed": row["recipe"]["seed"], "steps": 2}
        (image,) = server.pictures(wanted, "9")
        assert np.array_equal(np.array(Image.open(Path("out", row["file"]))), image)
        assert row["seconds"] > 0 and "6" in row["nodes"]
    before = len(server.ask("/history"))
    assert run(server, graph(), *words) == rows
    assert len(server.ask("/history")) == before
    assert "3 of them done before" in capsys.readouterr().out


def test_failures_have_their_sentence(server: Any, capsys: Any) -> None:
    """One that ComfyUI refuses, one whose node raises; the third is made."""
    made = graph()
    made["4"]["inputs"] |= {"preset": "model"}
    rows = run(server, made, "--set", "steps=3", "--set", "batch_size=0|1", code=1)
    assert len(rows) == 1 and rows[0]["recipe"]["set"]["batch_size"] == 1
    said = capsys.readouterr().err
    assert (
        "1 job failed" in said and "Node 4 (SeedlingCanvasSize): Value 0 smaller than min" in said
    )
    rows = run(server, made, "--set", "steps=3", "--set", "shape=nothing of the kind", code=1)
    said = capsys.readouterr().err
    assert "Node 4 (SeedlingCanvasSize): " in said and len(rows) == 1


def test_the_editors_format_is_understood(server: Any, root: Path) -> None:
    """The example as the editor saves it, by what this ComfyUI says of its nodes."""
    file = root / "example_workflows" / "Text to Image.json"
    if not file.is_file():
        pytest.skip("no example workflow is in this checkout")
    canvas = json.loads(file.read_text("utf-8").replace(EMBEDDED, "tiny.safetensors"))
    (row,) = run(server, canvas, "--set", "seed=41", "--set", "steps=2")
    wanted = graph()
    wanted["6"]["inputs"] |= {"seed": 41, "steps": 2}
    (image,) = server.pictures(wanted, "9")
    assert np.array_equal(np.array(Image.open(Path("out", row["file"]))), image)
