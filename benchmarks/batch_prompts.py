"""`seedling run` with 500 prompts on the embedded model: what the host costs beside the nodes.

Every job is another prompt and another seed through the example "Text to Image", on an engine that
the command starts itself. The host's part of a job is the time from one finished job to the next
without the time in which nodes ran, by the events of the websocket. What the host does between two
nodes of a job counts as the nodes' there, so a second batch has nodes that do nothing: all of its
time is the host's. Wall time: what else runs on the machine is in it, so medians count. Beside it
stands the processor time of client and server for such a job, which a busy machine distorts least.
"""

from __future__ import annotations

import csv
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .protocol import arguments, show

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "example_workflows" / "Text to Image.json"
SAMPLER = "Sampler"  # in the class of the node that samples
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("star", "circle", "square", "triangle", "heart", "ring", "cross", "diamond")
PLACES = ("left of", "right of", "above", "below")
BAR = 15.0  # ms a job


def prompts(count: int) -> list[str]:
    """So many different prompts."""
    things = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    pairs = [(one, other) for one, other in itertools.product(things, things) if one != other]
    words = [f"a {one} {PLACES[k % 4]} a {other}" for k, (one, other) in enumerate(pairs)]
    return words[:: max(1, len(words) // count)][:count]


def idle_graph() -> dict[str, dict]:
    """As many nodes as run for a picture, none of which does anything."""
    sources = {"1": "a text", "2": ["1", 0], "3": ["2", 0], "4": ["3", 0]}
    return {
        key: {"class_type": "PreviewAny", "inputs": {"source": source}}
        for key, source in sources.items()
    }


def table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(workflow: Path, rows: Path, folder: Path) -> list[dict]:
    """Run a batch; its manifest, in the order of ending."""
    command = [sys.executable, "-m", "seedling.host.cli", "run", str(workflow), "--csv", str(rows)]
    command += ["--home", str(folder / "home"), "--out", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"seedling run ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = (folder / "out" / "manifest.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def figures(name: str, manifest: list[dict], sampling: str | None) -> dict[str, object]:
    """A row of the table; the first job, which loads the models, does not count."""
    walls, nodes, samplers = [], [], []
    for before, row in itertools.pairwise(manifest):
        walls.append(1000 * (row["done"] - before["done"]))
        nodes.append(1000 * sum(row["nodes"].values()))
        samplers.append(1000 * row["nodes"].get(sampling, 0.0))
    host = [wall - node for wall, node in zip(walls, nodes, strict=True)]
    whole = sampling is None  # the nodes do nothing: all is the host's
    return {
        "batch": name,
        "jobs": len(manifest),
        "jobs a minute": 60_000 / statistics.fmean(walls),
        "ms a job": statistics.median(walls),
        "sampling": statistics.median(samplers),
        "other nodes": 0.0 if whole else statistics.median(nodes) - statistics.median(samplers),
        "host, median": statistics.median(walls if whole else host),
        "host, mean": statistics.fmean(walls if whole else host),
    }


def processor() -> float:
    """Seconds of all programs that were run here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def idle_batch(folder: Path, count: int) -> tuple[list[dict], float]:
    """Jobs that do nothing: the manifest, and the processor time of the run in seconds."""
    folder.mkdir()
    workflow = folder / "idle.json"
    workflow.write_text(json.dumps(idle_graph()))
    jobs = [{"1.source": f"text {k}"} for k in range(count)]
    before = processor()
    manifest = run(workflow, table(folder / "jobs.csv", jobs), folder)
    return manifest, processor() - before


def measure(count: int) -> list[dict[str, object]]:
    """The batch of prompts, and the one that does nothing."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "pictures"
        folder.mkdir()
        jobs = [{"prompt": text, "seed": k} for k, text in enumerate(prompts(count), start=1)]
        pictures = run(EXAMPLE, table(folder / "jobs.csv", jobs), folder)
        canvas = json.loads(EXAMPLE.read_text("utf-8"))
        (sampler,) = [str(n["id"]) for n in canvas["nodes"] if SAMPLER in n["type"]]
        _, start = idle_batch(Path(made) / "start", 2)  # what starting and ending costs
        idle, whole = idle_batch(Path(made) / "idle", 2 + count)
    spent = 1000 * (whole - start) / count
    return [
        figures("pictures", pictures, sampler) | {"host, processor": None},
        figures("nodes that do nothing", idle, None) | {"host, processor": spent},
    ]


def main() -> None:
    args = arguments(__doc__, tiny={"prompts": 3}, prompts=500)
    rows = measure(args.prompts)
    worst = max(float(str(row["host, median"])) for row in rows)
    note = f"milliseconds; the host's median is to be at most {BAR:.0f}: {worst:.1f}, "
    title = f"seedling run, {args.prompts} prompts on the embedded model, wall time"
    show(title, rows, args.json, [note + ("met" if worst <= BAR else "missed")])


if __name__ == "__main__":
    main()
