"""No node can keep the host from the next job (G7), and none is run twice for the same inputs."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def load(name: str) -> Any:
    """A neighbour of this file; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


tools = load("host_tools")
host = tools.host
count_graph, error_of, one = tools.count_graph, tools.error_of, tools.one

SAYS = {
    "raise": "fails on purpose", "exit": "1", "keyboard": "KeyboardInterrupt",
    "memory": "MemoryError", "kill": "signal 9", "quit": "exit code 3", "recursion": "recursion",
    "unprintable": "Unprintable", "float32": "'value' is not JSON", "bytes": "'value' is not JSON",
    "nan": "'value' is not JSON", "set": "'value' is not JSON", "long": "characters; at most",
    "outputs": "promises 1", "async": "an async node failed",
}  # fmt: skip


@pytest.mark.parametrize("way", SAYS)
def test_a_bad_node_ends_its_job_and_no_other(host: Any, way: str) -> None:
    """The job says error and why; the next one is done within 2 s."""
    bad = host.queue(one("TestBad", way=way))
    good = host.queue(count_graph(hash(way) % 1000 + 1))
    ended = host.finished(bad)
    start = time.monotonic()
    assert ended["status"]["status_str"] == "error"
    assert SAYS[way] in error_of(ended)
    after = host.finished(good)
    assert after["status"]["status_str"] == "success"
    assert time.monotonic() - start < 2.0


def test_a_stray_node_and_a_deep_chain_are_no_danger(host: Any) -> None:
    """A node without inputs, and 1,200 in a row: the anchor's worker never recovers from these."""
    stray = count_graph(901) | {"9": {"class_type": "TestNoise"}}
    assert host.finished(host.queue(stray))["status"]["completed"]
    chain = count_graph(902)
    for number in range(3, 1203):
        source = [str(number - 1), 0]
        chain[str(number)] = {"class_type": "TestCount", "inputs": {"value": source}}
    ended = host.finished(host.queue(chain), 60)
    assert ended["status"]["completed"] and len(ended["outputs"]) == 1201


def test_one_id_three_times(host: Any) -> None:
    job_id = "00000000-0000-4000-8000-000000000001"
    answers = [
        host.post("/api/prompt", {"prompt": count_graph(903), "prompt_id": job_id, "number": 1})
        for _ in range(3)
    ]
    assert [status for status, _ in answers] == [200, 400, 400]
    assert host.finished(job_id)["status"]["completed"]


def test_a_cancelled_job_stops_within_a_step(host: Any) -> None:
    job = host.queue(one("TestSteps", steps=1000, seconds=0.02))
    running(host, job)
    start = time.monotonic()
    assert host.post("/api/interrupt", {})[0] == 200
    ended = host.finished(job)
    assert time.monotonic() - start < 1.0
    assert ended["status"]["messages"][-1][0] == "execution_interrupted"
    assert host.get(f"/api/jobs/{job}")[1]["status"] == "cancelled"


def test_a_node_that_does_not_listen_loses_its_process(host: Any) -> None:
    """Cancelled, it goes on; after the grace (1 s here) its process is ended and a new one runs."""
    job = host.queue(one("TestBad", way="deaf"))
    running(host, job)
    start = time.monotonic()
    host.post(f"/api/jobs/{job}/cancel", {})
    ended = host.finished(job)
    assert ended["status"]["messages"][-1][0] == "execution_interrupted"
    assert host.finished(host.queue(count_graph(904)))["status"]["completed"]
    assert time.monotonic() - start < 1.0 + 2.0


def test_interrupting_another_job_does_nothing(host: Any) -> None:
    job = host.queue(one("TestSteps", steps=20, seconds=0.02))
    running(host, job)
    host.post("/api/interrupt", {"prompt_id": "00000000-0000-4000-8000-00000000dead"})
    assert host.finished(job)["status"]["completed"]


def running(host: Any, job: str) -> None:
    deadline = time.monotonic() + 10
    while [row[1] for row in host.get("/api/queue")[1]["queue_running"]] != [job]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)


def runs(history: dict) -> list[int]:
    return [output["runs"][0] for output in history["outputs"].values()]


def test_the_same_inputs_run_once(host: Any) -> None:
    """A second run of one prompt runs nothing, and shows again what it showed."""
    first = host.finished(host.queue(count_graph(905)))
    again = host.finished(host.queue(count_graph(905)))
    assert runs(first) == runs(again)
    assert again["status"]["messages"][1][1]["nodes"] == ["1", "2"]


def test_other_ids_and_other_order_are_the_same_inputs(host: Any) -> None:
    first = host.finished(host.queue(count_graph(906)))
    other = {
        "b": {"class_type": "TestCount", "inputs": {"value": ["a", 0]}},
        "a": {"class_type": "TestNoise", "inputs": {"size": 8, "seed": 906}},
    }
    assert runs(host.finished(host.queue(other))) == runs(first)


def test_a_changed_seed_runs_only_what_hangs_on_it(host: Any) -> None:
    def graph(seed: int) -> dict:
        more = {
            "3": {"class_type": "TestNoise", "inputs": {"seed": 907, "size": 8}},
            "4": {"class_type": "TestCount", "inputs": {"value": ["3", 0]}},
        }
        return count_graph(seed) | more

    host.finished(host.queue(graph(908)))
    second = host.finished(host.queue(graph(909)))
    assert second["status"]["messages"][1][1]["nodes"] == ["3", "4"]


def test_free_forgets_everything(host: Any) -> None:
    first = host.finished(host.queue(count_graph(910)))
    host.post("/api/free", {"unload_models": True})
    assert runs(host.finished(host.queue(count_graph(910)))) != runs(first)


def test_lists_and_dynamic_inputs(host: Any) -> None:
    listed = {
        "1": {"class_type": "TestList", "inputs": {"count": 3}},
        "2": {"class_type": "TestCount", "inputs": {"value": ["1", 0]}},
        "3": {
            "class_type": "TestDynamic",
            "inputs": {
                "numbers.n0": 4, "numbers.n2": 5, "mode": "tuned", "mode.strength": 0.25,
            },
        },
    }  # fmt: skip
    ended = host.finished(host.queue(listed))
    assert len(ended["outputs"]["2"]["runs"]) == 3
    got = ended["outputs"]["3"]["got"][0]
    assert got["numbers"] == {"n0": 4, "n2": 5}
    assert got["mode"] == {"mode": "tuned", "strength": 0.25}
    assert got["refs"] == {}
