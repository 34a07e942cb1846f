"""A picture of each example workflow, made by the workflow itself in a studio."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from canvas import to_api
from PIL import Image, ImageOps

SIDE = 512  # pixels; the editor shows them smaller
INSET, BORDER, GAP = 128, 4, 12
PATIENCE = 120.0  # seconds for one workflow


def host_tools() -> Any:
    path = Path(__file__).resolve().parents[1] / "host_tools.py"
    spec = importlib.util.spec_from_file_location("host_tools", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_all(root: Path) -> None:
    """Run every example workflow of `root` and write its .jpg beside it."""
    with tempfile.TemporaryDirectory() as home:
        host = host_tools().Host(Path(home), Path("all")).start()
        try:
            infos = host.get("/api/object_info")[1]
            for path in sorted((root / "example_workflows").glob("*.json")):
                graph = to_api(json.loads(path.read_text(encoding="utf-8")), infos)
                saved, shown = run(host, graph)
                sheet(saved, shown).save(path.with_suffix(".jpg"), quality=90, optimize=True)
                sys.stderr.write(f"{path.stem}: {len(saved)} saved, {len(shown)} shown\n")
        finally:
            host.stop()


def run(host: Any, graph: dict[str, Any]) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures that a graph saves, and those that it only shows."""
    history = host.finished(host.queue(graph), PATIENCE)
    if history["status"]["status_str"] != "success":
        raise SystemExit(f"the workflow failed: {history['status']['messages'][-1]}")
    found: dict[str, list[Image.Image]] = {"output": [], "temp": []}
    for node in sorted(history["outputs"], key=lambda name: int(name.partition(".")[0])):
        for image in history["outputs"][node].get("images", ()):
            path = host.home / image["type"] / image["subfolder"] / image["filename"]
            found[image["type"]].append(Image.open(path).convert("RGB"))
    return found["output"], found["temp"]


def sheet(saved: Sequence[Image.Image], shown: Sequence[Image.Image]) -> Image.Image:
    """The result, or four of them in a square; what it was made from lies in its lower corner."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    columns = 1 if len(saved) == 1 else 2
    side = (SIDE - BORDER * (columns - 1)) // columns
    for number, picture in enumerate(saved[: columns**2]):
        row, column = divmod(number, columns)
        page.paste(fitted(picture, side), (column * (side + BORDER), row * (side + BORDER)))
    for number, picture in enumerate(shown):
        framed = ImageOps.expand(fitted(picture, INSET), BORDER, "white")
        left = GAP + number * (framed.width + GAP)
        page.paste(framed, (left, SIDE - GAP - framed.height))
    return page


def fitted(picture: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
