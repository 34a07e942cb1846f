"""`seedling run` against a studio: every job is made once, whatever breaks on the way."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seedling.host.cli import main


def load(name: str) -> Any:
    """A neighbour of this file; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


tools = load("host_tools")
host = tools.host
SAVE = {
    "1": {"class_type": "TestNoise", "inputs": {"seed": 0, "size": 8, "count": 1}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}
SLOW = {  # each picture takes a second and more
    **SAVE,
    "3": {"class_type": "TestSteps", "inputs": {"steps": 10, "seconds": 0.1}},
}
BAD = {**SAVE, "3": {"class_type": "TestBad", "inputs": {"way": "raise", "salt": 0}}}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def workflow(graph: dict[str, Any]) -> str:
    Path("w.api.json").write_text(json.dumps(graph))
    return "w.api.json"


def run(host: Any, graph: dict[str, Any], *words: object, code: int = 0) -> None:
    """`seedling run` in this process, into out/."""
    server = ["--server", f"http://127.0.0.1:{host.port}", "--out", "out"]
    assert main(["run", workflow(graph), *map(str, words), *server]) == code


def rows(folder: str = "out") -> list[dict[str, Any]]:
    lines = Path(folder, "manifest.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def noise(seed: int, count: int = 1) -> np.ndarray:
    """What TestNoise makes of a seed, (count, 8, 8, 3) in 8 bits."""
    values = torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    return np.clip(255.0 * values.numpy(), 0, 255).astype(np.uint8)


def is_as_told(row: dict[str, Any]) -> bool:
    """Whether a picture is the one that its row says."""
    pixels = np.array(Image.open(io.BytesIO(Path("out", row["file"]).read_bytes())))
    return np.array_equal(pixels, noise(row["recipe"]["seed"], row["of"])[row["picture"] - 1])


def ended(host: Any) -> int:
    """How many jobs the server has run."""
    return host.get("/api/jobs?status=completed,failed,cancelled&limit=1")[1]["pagination"]["total"]


def test_every_combination_is_made_and_told(host: Any) -> None:
    before = ended(host)
    run(host, SAVE, "--set", "seed=1..3", "--set", "TestNoise.count=1|2",
        "--set", "filename_prefix=a/b")  # fmt: skip
    made = rows()
    assert ended(host) - before == 6 and len(made) == 9
    assert [row["file"] for row in made] == [f"w_{k:05d}.png" for k in range(1, 10)]
    assert all(is_as_told(row) for row in made)
    assert sorted(os.listdir("out")) == ["manifest.jsonl", *(row["file"] for row in made)]
    pairs = {(r["recipe"]["set"]["seed"], r["recipe"]["set"]["TestNoise.count"]) for r in made}
    assert pairs == {(s, c) for s in (1, 2, 3) for c in (1, 2)}
    for row in made:
        entry = host.get(f"/api/history/{row['recipe']['prompt_id']}")[1]
        (history,) = entry.values()
        assert history["prompt"][2]["1"]["inputs"]["seed"] == row["recipe"]["seed"]
        assert history["outputs"]["2"]["images"][0]["subfolder"] == "a"
        assert 0 <= row["seconds"] < 60 and row["node"] == "2"


def test_the_same_command_makes_what_is_missing(host: Any, capsys: Any) -> None:
    """A picture that is gone, a line that was cut off, values that are new; nothing else."""
    run(host, SAVE, "--set", "seed=11..14")
    before = ended(host)
    run(host, SAVE, "--set", "seed=11..14")
    assert ended(host) == before and len(rows()) == 4
    assert "4 of them done before" in capsys.readouterr().out
    first = next(row for row in rows() if row["recipe"]["seed"] == 12)
    Path("out", first["file"]).unlink()
    text = Path("out/manifest.jsonl").read_text()
    cut = json.loads(text.splitlines()[-1])["recipe"]["seed"]
    Path("out/manifest.jsonl").write_text(text[:-30])
    run(host, SAVE, "--set", "seed=11..15")
    lines = Path("out/manifest.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines if line.endswith("}")]
    assert [row["recipe"]["seed"] for row in made[3:]] == sorted({12, cut, 15})
    assert all(is_as_told(row) for row in made if row["file"] != first["file"])


def test_rows_of_a_table(host: Any) -> None:
    Path("t.csv").write_text("1.seed,TestNoise.count\n21,\n22,2\n")
    run(host, SAVE, "--csv", "t.csv", "--set", "size=8")
    Path("t.jsonl").write_text('{"seed": 23}\n{"seed": 24, "filename_prefix": "雨"}\n', "utf-8")
    run(host, SAVE, "--jsonl", "t.jsonl")
    made = rows()
    assert [row["recipe"]["seed"] for row in made] == [21, 22, 22, 23, 24]
    assert all(is_as_told(row) for row in made)
    assert made[-1]["recipe"]["set"] == {"seed": 24, "filename_prefix": "雨"}


def test_failures_are_listed_and_tried_again(host: Any, capsys: Any) -> None:
    """A node that raises, a worker that dies, a value that is refused; the others are made."""
    words = ["--set", "seed=31|32", "--set", "way=raise|quit|async", "--set", "salt=-1"]
    graph = {**BAD, "3": {**BAD["3"], "inputs": {"way": "raise", "salt": 0}}}
    before = ended(host)
    run(host, graph, *words, code=1)
    said = capsys.readouterr().err
    assert "6 jobs failed" in said and "job 1 (seed=31, way=raise, salt=-1), and 1 more: " in said
    assert "Node 3 (TestBad): This node fails on purpose; choose another." in said
    assert "Node 3 (TestBad): an async node failed" in said
    assert "The process that runs the nodes ended" in said and "Traceback" not in said
    assert ended(host) - before == 6
    run(host, SAVE, "--set", "seed=33|-1|34", code=1)
    said = capsys.readouterr().err
    assert "1 job failed" in said and "(seed=-1)" in said and "Node 1 (TestNoise): " in said
    assert [row["recipe"]["seed"] for row in rows()] == [33, 34]
    run(host, SAVE, "--set", "seed=33|-1|34", code=1)
    assert [row["recipe"]["seed"] for row in rows()] == [33, 34]


def test_half_of_a_workflow_is_not_made_in_silence(host: Any, capsys: Any) -> None:
    """The server would run the good output and only mention the bad one."""
    run(host, BAD, "--set", "seed=-1|35", "--set", "way=async", code=1)
    assert capsys.readouterr().err.count("job ") >= 2
    assert not Path("out/manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "seed"], "NAME=VALUE"),
        (["--set", "steps=3"], "no input 'steps'; it has 1.seed (TestNoise)"),
        (["--set", "images=3"], "which a wire feeds"),
        (["--set", "seed=x"], "seed takes a whole number; 'x' was given"),
        (["--set", "seed=1", "--set", "seed=2"], "seed is set twice"),
        (["--set", "seed=1", "--csv", "t.csv"], "seed is set by --set and by the table"),
        (["--csv", "none.csv"], "none.csv cannot be read"),
        (["--out", "w.api.json/x"], "choose another folder with --out"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    host: Any, capsys: Any, words: list[str], said: str
) -> None:
    Path("t.csv").write_text("seed\n3\n")
    before = ended(host)
    server = ["--server", f"http://127.0.0.1:{host.port}"]
    assert main(["run", workflow(SAVE), "--out", "out", *server, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("seedling: ") and error.count("\n") == 1 and said in error
    assert ended(host) == before


def test_nobody_there(capsys: Any) -> None:
    assert main(["run", workflow(SAVE), "--server", "127.0.0.1:9"]) == 2
    assert "No ComfyUI or studio answers at http://127.0.0.1:9" in capsys.readouterr().err


# ---- breaks ------------------------------------------------------------------------------------


def begun(host: Any, *words: str) -> subprocess.Popen[str]:
    """`seedling run` of SLOW as a process, when it has made its first picture."""
    command = [sys.executable, "-m", "seedling.host.cli", "run", workflow(SLOW), "--out", "out"]
    process = subprocess.Popen(
        [*command, "--server", f"http://127.0.0.1:{host.port}", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What a shell begins in the background inherits a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if Path("out/manifest.jsonl").exists():
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def test_ctrl_c_leaves_a_state_to_go_on_from(host: Any) -> None:
    """Nothing of ours stays in the queue, and the next run makes the rest."""
    process = begun(host, "--set", "seed=41..45")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "The same command goes on from here" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while (
        host.get("/api/prompt")[1]["exec_info"]["queue_remaining"] and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    queue = host.get("/api/queue")[1]
    assert queue == {"queue_running": [], "queue_pending": []}
    kept = len(rows())
    assert 1 <= kept < 5
    run(host, SLOW, "--set", "seed=41..45")
    assert sorted(row["recipe"]["seed"] for row in rows()) == [41, 42, 43, 44, 45]
    assert all(is_as_told(row) for row in rows())


def test_a_killed_run_finds_its_jobs_again(host: Any) -> None:
    """kill -9 of the command: what the server makes meanwhile is fetched, not made twice."""
    before = ended(host)
    process = begun(host, "--set", "seed=51..56")
    process.kill()
    process.wait()
    time.sleep(1.5)
    run(host, SLOW, "--set", "seed=51..56")
    assert sorted(row["recipe"]["seed"] for row in rows()) == [51, 52, 53, 54, 55, 56]
    assert all(is_as_told(row) for row in rows())
    assert ended(host) - before == 6
    assert not Path("out/queued.jsonl").exists()


class Fixed(tools.Host):
    """A studio that comes back under its old port."""

    def start(self) -> Any:
        if not self.port:
            return super().start()
        script = Path(__file__).with_name("studio") / "host_process.py"
        command = [sys.executable, str(script), str(self.home), str(self.port)]
        with open(self.home / "stderr", "ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors)
        return self


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Any]:
    home = tmp_path / "studio"
    home.mkdir()
    running = Fixed(home)
    try:
        yield running.start().warm()
    finally:
        running.stop()


def test_a_server_that_is_killed_is_waited_for(mortal: Any) -> None:
    """kill -9 of the server, which comes back with its queue: all made, none twice."""
    process = begun(mortal, "--set", "seed=61..65")
    mortal.kill()
    time.sleep(0.5)
    mortal.start()
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert sorted(row["recipe"]["seed"] for row in rows()) == [61, 62, 63, 64, 65]
    assert all(is_as_told(row) for row in rows())
    assert ended(mortal) == 6  # with the one of warm()


def test_a_server_that_stays_away(mortal: Any, monkeypatch: Any, capsys: Any) -> None:
    """Exit code 1 and a sentence; what is there can be gone on from."""
    from seedling.host import batch_client

    process = begun(mortal, "--set", "seed=71..73")
    process.kill()
    process.wait()
    monkeypatch.setattr(batch_client.Client.__init__, "__defaults__", (1.0,))
    original = batch_client.Client.queue

    async def dies(self: Any, *arguments: Any) -> str:
        mortal.kill()
        return await original(self, *arguments)

    monkeypatch.setattr(batch_client.Client, "queue", dies)
    run(mortal, SLOW, "--set", "seed=71..79", code=1)
    said = capsys.readouterr().err
    assert "has not answered for 1 s" in said and "the same command goes on" in said


# ---- the editor's format, and an engine of its own ---------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio that serves the pack's own nodes too."""
    home = tmp_path_factory.mktemp("all")
    running = tools.Host(home, Path("all")).start()
    try:
        yield running
    finally:
        running.stop()


def test_examples_of_the_editor_are_understood(nodes: Any, root: Path) -> None:
    """Each example in the editor's format becomes what is stored as its API format."""
    from seedling.host.batch_canvas import convert

    canvas = load("workflows/canvas")  # it fills in what was appended to nodes since
    info = nodes.get("/api/object_info")[1]
    found = sorted((root / "example_workflows").glob("*.json"))
    if not found:
        pytest.skip("no example workflow is in this checkout")
    for file in found:
        stem = file.stem.lower().replace(",", "").replace(" ", "_")
        stored = json.loads((root / "tests" / "workflows" / f"{stem}.api.json").read_text("utf-8"))
        made = convert(json.loads(file.read_text("utf-8")), info)
        assert bare(made) == canvas.completed(bare(stored), info), file.name


def bare(graph: dict[str, Any]) -> dict[str, Any]:
    return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in graph.items()}


def test_without_a_server_an_engine_runs_for_the_batch(tmp_path: Path, capsys: Any) -> None:
    """Its input folder is the studio's; afterwards the studio's queue is free again."""
    (tmp_path / "home" / "input").mkdir(parents=True)
    for name in ("a", "b"):
        Image.effect_noise((8, 8), 80).convert("RGB").save(f"home/input/{name}.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    words = ["run", workflow(graph), "--set", "image=a.png|b.png", "--home", "home"]
    assert main(words) == 0
    made = rows("w_batch")
    assert [row["recipe"]["set"]["image"] for row in made] == ["a.png", "b.png"]
    for row in made:
        source = Image.open(Path("home/input", row["recipe"]["set"]["image"]))
        assert np.array_equal(np.array(Image.open(Path("w_batch", row["file"]))), np.array(source))
    assert main(words) == 0 and "2 of them done before" in capsys.readouterr().out
