"""What the host lets in: requests with faults (G6), pages of other sites (G10), too much (G12)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


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
JSON, count_graph, one = tools.JSON, tools.count_graph, tools.one
NODE = {"class_type": "TestCount", "inputs": {"value": ["1", 0]}}

# Bodies of POST /prompt. Each is refused with a sentence; none is a 5xx.
BODIES: dict[str, bytes] = {
    "empty": b"", "not JSON": b"{", "a list": b"[]", "null": b"null", "a number": b"1",
    "a text": b'"x"', "not UTF-8": b'{"prompt": "\xff"}', "NaN": b'{"prompt": NaN}',
    "deep": b"[" * 200_000, "deep object": b'{"prompt":' * 20_000 + b"1" + b"}" * 20_000,
    "long integer": b'{"prompt": ' + b"9" * 5000 + b"}", "infinite": b'{"number": 1e999}',
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    "no prompt": {},
    "prompt null": {"prompt": None},
    "prompt list": {"prompt": []},
    "prompt empty": {"prompt": {}},
    "node null": {"prompt": {"1": None}},
    "node list": {"prompt": {"1": []}},
    "no class": {"prompt": {"1": {"inputs": {}}}},
    "class number": {"prompt": {"1": {"class_type": 1, "inputs": {}}}},
    "class unknown": {"prompt": one("Nothing")},
    "inputs list": {"prompt": {"1": {"class_type": "TestCount", "inputs": []}}},
    "inputs null": {"prompt": {"1": {"class_type": "TestCount", "inputs": None}}},
    "meta list": {"prompt": {"1": {"class_type": 3, "_meta": []}}},
    "no output": {"prompt": one("TestNoise", seed=1, size=8)},
    "link to nothing": {"prompt": {"2": NODE}},
    "link to itself": {"prompt": {"1": NODE}},
    "link too far": {"prompt": count_graph(1) | {"2": {**NODE, "inputs": {"value": ["1", 7]}}}},
    "link negative": {"prompt": count_graph(1) | {"2": {**NODE, "inputs": {"value": ["1", -1]}}}},
    "wrong type": {
        "prompt": count_graph(1)
                  | {"2": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
                                    "3": {"class_type": "TestList", "inputs": {"count": 1}}},
        "partial_execution_targets": ["2"],
    },
    "too small": {"prompt": count_graph(-1)},
    "too big": {"prompt": count_graph(1, 10_000)},
    "not a number": {"prompt": count_graph("x")},
    "number null": {"prompt": count_graph(None)},
    "number list": {"prompt": count_graph([])},
    "no choice": {"prompt": one("TestBad", way="no")},
    "choice list": {"prompt": one("TestBad", way=["raise", []])},
    "missing": {"prompt": one("TestBad")},
    "unknown dynamic": {"prompt": one("TestDynamic", **{"mode": "plain", "numbers.n9": 1})},
    "no option": {"prompt": one("TestDynamic", **{"mode": "x", "numbers.n0": 1})},
    "stale option": {
        "prompt": one("TestDynamic", **{"mode": "plain", "mode.strength": 1, "numbers.n0": 1})
    },
    "client object": {"prompt": count_graph(1), "client_id": {"a": 1}},
    "client long": {"prompt": count_graph(1), "client_id": "x" * 1000},
    "extra list": {"prompt": count_graph(1), "extra_data": [1]},
    "pnginfo text": {"prompt": count_graph(1), "extra_data": {"extra_pnginfo": "x"}},
    "id text": {"prompt": count_graph(1), "prompt_id": "../x"},
    "id upper": {"prompt": count_graph(1), "prompt_id": "00000000-0000-4000-8000-00000000000A"},
    "number text": {"prompt": count_graph(1), "number": "1"},
    "number huge": {"prompt": count_graph(1), "number": 10**400},
    "targets text": {"prompt": count_graph(1), "partial_execution_targets": "2"},
    "targets unknown": {"prompt": count_graph(1), "partial_execution_targets": ["9"]},
    "load nothing": {"prompt": one("LoadImage", image="no.png")},
    "latent too large": {
        "prompt": {"1": {"class_type": "EmptyLatentImage",
                         "inputs": {"width": 16384, "height": 16384, "batch_size": 4096}},
                   "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_prompt(host: Any, name: str) -> None:
    status, _, data = host.ask("POST", "/api/prompt", BODIES[name], JSON)
    assert status == 400 and json.loads(data)["error"]["message"]


@pytest.mark.parametrize("name", VALUES)
def test_a_prompt_with_a_fault(host: Any, name: str) -> None:
    """Refused as the page expects it: a sentence, and the place when a node is at fault."""
    status, answer = host.post("/api/prompt", VALUES[name])
    assert status == 400, answer
    assert answer["error"]["message"] and isinstance(answer["node_errors"], dict)
    if answer["error"]["type"] == "prompt_outputs_failed_validation":
        (entry, *_) = answer["node_errors"].values()
        assert entry["errors"][0]["message"] and entry["dependent_outputs"]


def test_one_good_output_runs(host: Any) -> None:
    """One good and one bad output: taken, with the errors of the bad one, as ComfyUI does."""
    both = count_graph(21) | {"5": {"class_type": "TestBad", "inputs": {"way": "no"}}}
    status, answer = host.post("/api/prompt", {"prompt": both})
    assert status == 200 and list(answer["node_errors"]) == ["5"]
    assert list(host.finished(answer["prompt_id"])["outputs"]) == ["2"]


def test_a_ring_is_named(host: Any) -> None:
    ring = {
        "1": {"class_type": "TestCount", "inputs": {"value": ["2", 0]}},
        "2": {"class_type": "TestCount", "inputs": {"value": ["1", 0]}},
    }
    status, answer = host.post("/api/prompt", {"prompt": ring})
    kinds = {e["type"] for entry in answer["node_errors"].values() for e in entry["errors"]}
    assert status == 400 and kinds == {"dependency_cycle"}


ODD = [
    ("GET", "/history?max_items=abc"), ("GET", "/api/jobs?limit=" + "9" * 21),
    ("GET", "/api/jobs?status=odd"), ("GET", "/api/jobs/nothing"), ("GET", "/api/view"),
    ("GET", "/api/view?filename=x&type=zzz"), ("GET", "/api/object_info/Nothing"),
    ("GET", "/internal/files/zzz"), ("GET", "/api/models/zzz"), ("GET", "/api/nothing/at/all"),
    ("GET", "/api/global_subgraphs/0"), ("GET", "/api/userdata"), ("GET", "/api/userdata?dir=no"),
    ("GET", "/ws"), ("POST", "/api/view"), ("PUT", "/api/prompt"),
    ("GET", "/api/view?filename=%00"),
    ("GET", "/templates/y.json"), ("DELETE", "/api/userdata/none.json"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ODD)
def test_odd_requests_are_no_fault_of_ours(host: Any, method: str, path: str) -> None:
    assert host.ask(method, path, b"" if method != "GET" else None, JSON)[0] < 500


@pytest.mark.parametrize(
    "path", ["/free", "/interrupt", "/queue", "/history", "/jobs/cancel", "/settings"]
)
@pytest.mark.parametrize(
    "body", [b"[]", b"1", b'{"delete": 5, "prompt_id": {}, "job_ids": 1}', b"\xff"]
)
def test_other_posts(host: Any, path: str, body: bytes) -> None:
    assert host.ask("POST", path, body, JSON)[0] < 500


@pytest.mark.parametrize("name", ["x" * 9000, "nul\x00.png"], ids=["long", "control"])
def test_a_form_with_bad_headers(host: Any, name: str) -> None:
    """The headers of a part are the sender's too."""
    status, answer = host.upload(name, b"x")
    assert status == 400 and answer["error"]["message"].startswith("The body cannot be read")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["1", "2", "class_type", "inputs", "value", "seed", "prompt", "client_id"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    path=st.sampled_from(["/prompt", "/queue", "/history", "/interrupt", "/free", "/jobs/cancel"]),
    value=anything, inputs=anything,
)  # fmt: skip
def test_generated_posts_are_answered(host: Any, path: str, value: Any, inputs: Any) -> None:
    """No body whatever makes a 5xx."""
    node = {
        "class_type": "TestDynamic",
        "inputs": inputs if isinstance(inputs, dict) else {"mode": inputs},
    }
    body = {"prompt": {"1": node}, "number": value} if path == "/prompt" else value
    assert host.post(path, body)[0] < 500


# ---- browsers (G10) ----------------------------------------------------------------------------

HERE = "127.0.0.1:{port}"
OURS = "http://127.0.0.1:{port}"
OTHER = "http://localhost:{port}"
EVIL = "http://evil.example"
TEXT = {"Content-Type": "text/plain"}
TABLE: list[tuple[str, str, dict[str, str], int]] = [
    ("plain script", "GET", {}, 200),
    ("localhost", "GET", {"Host": "localhost:{port}"}, 200),
    ("IPv6", "GET", {"Host": "[::1]:{port}"}, 200),
    ("our page", "GET", {"Host": HERE, "Origin": OURS, "Sec-Fetch-Site": "same-origin"}, 200),
    ("typed address", "GET", {"Host": HERE, "Sec-Fetch-Site": "none"}, 200),
    ("rebound name", "GET", {"Host": "evil.example"}, 403),
    ("rebound with port", "GET", {"Host": "evil.example:{port}"}, 403),
    ("rebound and Origin", "POST", {"Host": "evil.example", "Origin": EVIL, **JSON}, 403),
    ("name that begins like ours", "GET", {"Host": "127.0.0.1.evil.example"}, 403),
    ("name that ends like ours", "GET", {"Host": "evil-localhost"}, 403),
    ("other loopback", "GET", {"Host": "127.0.0.2:{port}"}, 403),
    ("no name", "GET", {"Host": ""}, 403),
    ("all addresses", "GET", {"Host": "0.0.0.0:{port}"}, 403),
    ("foreign Origin", "POST", {"Host": HERE, "Origin": EVIL, **JSON}, 403),
    ("foreign Origin reads", "GET", {"Host": HERE, "Origin": EVIL}, 403),
    ("Origin null", "POST", {"Host": HERE, "Origin": "null", **JSON}, 403),
    ("Origin null reads", "GET", {"Host": HERE, "Origin": "null"}, 403),
    ("Origin empty", "POST", {"Host": HERE, "Origin": "", **JSON}, 403),
    ("other port", "POST", {"Host": HERE, "Origin": "http://127.0.0.1:1", **JSON}, 403),
    ("other loopback name", "POST", {"Host": HERE, "Origin": OTHER, **JSON}, 403),
    ("file page", "POST", {"Host": HERE, "Origin": "file://", **JSON}, 403),
    ("extension", "POST", {"Host": HERE, "Origin": "chrome-extension://abc", **JSON}, 403),
    ("cross-site image", "GET", {"Host": HERE, "Sec-Fetch-Site": "cross-site"}, 403),
    ("same-site page", "GET", {"Host": HERE, "Sec-Fetch-Site": "same-site"}, 403),
    ("cross-site form", "POST", {"Host": HERE, "Sec-Fetch-Site": "cross-site", **JSON}, 403),
    ("text form", "POST", {"Host": HERE, "Content-Type": "text/plain"}, 415),
    ("url form", "POST", {"Host": HERE, "Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("multipart form", "POST", {"Host": HERE, "Content-Type": "multipart/form-data"}, 415),
    ("no type", "POST", {"Host": HERE}, 415),
    ("text from our page", "POST", {"Host": HERE, "Origin": OURS, **TEXT}, 415),
    ("compressed", "POST", {"Host": HERE, "Content-Encoding": "gzip", **JSON}, 415),
    ("JSON", "POST", {"Host": HERE, **JSON}, 200),
    ("JSON with charset", "POST", {"Host": HERE, "Content-Type": "application/json; a=b"}, 200),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_who_may_ask(host: Any, row: tuple[str, str, dict[str, str], int]) -> None:
    _, method, headers, wanted = row
    named = {key: value.replace("{port}", str(host.port)) for key, value in headers.items()}
    path = "/api/queue"
    assert host.ask(method, path, b"{}" if method == "POST" else None, named)[0] == wanted


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": EVIL}])
def test_the_socket_has_the_same_doors(host: Any, headers: dict[str, str]) -> None:
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    assert host.ask("GET", "/ws", None, upgrade | headers)[0] == 403


def test_settings_of_the_page_need_its_origin(host: Any) -> None:
    """The page stores settings as text: fine from its own origin, refused without."""
    page = {"Origin": f"http://127.0.0.1:{host.port}", "Content-Type": "text/plain"}
    assert host.ask("POST", "/api/settings/Comfy.TutorialCompleted", b"true", page)[0] == 200
    assert host.get("/api/settings/Comfy.TutorialCompleted") == (200, True)
    del page["Origin"]
    assert host.ask("POST", "/api/settings/X", b"1", page)[0] == 415
    assert host.ask("POST", "/api/settings/X", b"NaN", JSON)[0] == 400


# ---- too much (G12) ----------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_huge_body_is_refused_early(host: Any, declared: bool) -> None:
    before, start = host.memory(), time.monotonic()
    headers = {**JSON, "Content-Length": str(2**32)} if declared else {**JSON}
    if declared:
        status = host.ask("POST", "/api/prompt", None, headers)[0]
    else:
        status = host.ask("POST", "/api/prompt", b" " * (17 * 2**20), headers)[0]
    assert status == 413
    assert time.monotonic() - start < 2
    assert host.memory() - before < 32 * 2**20


def test_a_compressed_bomb_is_not_opened(host: Any) -> None:
    bomb = gzip.compress(b"0" * 2**24)
    before, start = host.memory(), time.monotonic()
    status = host.ask("POST", "/api/prompt", bomb, {**JSON, "Content-Encoding": "gzip"})[0]
    assert status == 415 and time.monotonic() - start < 0.5
    assert host.memory() - before < 32 * 2**20
