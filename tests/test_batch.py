"""What a batch is asked for: values, tables, names of inputs, workflows of the editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seedling.host.batch import located, plan
from seedling.host.batch_canvas import convert
from seedling.host.batch_client import checked_url, failure, files_of, refusal, seconds_of
from seedling.host.batch_manifest import Manifest
from seedling.host.batch_values import BatchError, assignment, csv_rows, jsonl_rows, spread
from seedling.host.batch_workflow import Place, find, key_of, read, with_values

INT, FLOAT, TEXT, FLAG = ["INT", {}], ["FLOAT", {}], ["STRING", {}], ["BOOLEAN", {}]
COMBO, NEW_COMBO = [["euler", "dpmpp_2m"], {}], ["COMBO", {"options": ["euler", "dpmpp_2m"]}]

GRAPH: dict[str, Any] = {
    "3": {"class_type": "CLIPTextEncode", "_meta": {"title": "Positive"},
          "inputs": {"text": "a cat", "clip": ["1", 1]}},
    "4": {"class_type": "CLIPTextEncode", "_meta": {"title": "Negative v1.5"},
          "inputs": {"text": "", "clip": ["1", 1]}},
    "5": {"class_type": "KSampler",
          "inputs": {"seed": 1, "cfg": 2, "mode.strength": 0.5, "model": ["1", 0],
                     "sampler_name": "euler", "positive": ["3", 0]}},
}  # fmt: skip


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec", "values"),
    [
        ("7", INT, [7]),
        ("1..4", INT, [1, 2, 3, 4]),
        ("-2..0|9|20..21", INT, [-2, -1, 0, 9, 20, 21]),
        ("18446744073709551615", INT, [2**64 - 1]),
        ("1|2.5", FLOAT, [1.0, 2.5]),
        ("1..3", FLOAT, [1, 2, 3]),
        ("a cat|a dog, 1..3|", TEXT, ["a cat", "a dog, 1..3", ""]),
        (r"a \| b|c\n", TEXT, ["a | b", r"c\n"]),
        ("1..3", TEXT, ["1..3"]),
        ("true|False", FLAG, [True, False]),
        ("dpmpp_2m|euler", COMBO, ["dpmpp_2m", "euler"]),
        ("dpmpp_2m", NEW_COMBO, ["dpmpp_2m"]),
    ],
)
def test_what_a_set_stands_for(text: str, spec: list[Any], values: list[Any]) -> None:
    found = spread("x", text, spec, None)
    assert found == values and [type(v) for v in found] == [type(v) for v in values]


def test_without_the_servers_word_the_workflow_says_the_type() -> None:
    assert spread("x", "2..3", None, 1) == [2, 3]
    assert spread("x", "1..3", None, "a text") == ["1..3"]
    assert spread("x", "0.5", None, 1.0) == [0.5]
    assert spread("x", "[1, 2]", None, [0]) == [[1, 2]]


@pytest.mark.parametrize(
    ("text", "spec", "said"),
    [
        ("x", INT, "takes a whole number; 'x' was given"),
        ("1.5", INT, "takes a whole number; '1.5'"),
        ("", INT, "takes a whole number; ''"),
        ("5..1", INT, "must count up"),
        ("1..1000000", INT, "at most 100000"),
        ("much", FLOAT, "takes a number; 'much'"),
        ("yes", FLAG, "takes true or false; 'yes'"),
        ("heun", COMBO, "takes one of euler, dpmpp_2m; 'heun'"),
        ("heun", NEW_COMBO, "takes one of euler, dpmpp_2m; 'heun'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(text: str, spec: list[Any], said: str) -> None:
    with pytest.raises(BatchError, match=said):
        spread("x", text, spec, None)


def test_an_assignment() -> None:
    assert assignment("prompt=a=b|c") == ("prompt", "a=b|c")
    for text in ("prompt", "=3", " =3"):
        with pytest.raises(BatchError, match="NAME=VALUE"):
            assignment(text)


# ---- tables ------------------------------------------------------------------------------------


def test_a_csv(tmp_path: Path) -> None:
    """A byte order mark, quotes, a line break inside a cell, and empty cells."""
    file = tmp_path / "t.csv"
    file.write_text('\ufeffprompt,seed\n"a cat, ""x""\nand more",1\n雨,\n', "utf-8")
    assert csv_rows(file) == [{"prompt": 'a cat, "x"\nand more', "seed": "1"}, {"prompt": "雨"}]


def test_a_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "a\u2028b", "seed": 1}\n\n{"seed": null, "flag": true}\n', "utf-8")
    assert jsonl_rows(file) == [{"prompt": "a\u2028b", "seed": 1}, {"flag": True}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "needs a first line"),
        ("a.csv", b"prompt,\n1,2\n", "needs a first line"),
        ("a.csv", b"seed,seed\n1,2\n", "two columns of the same name"),
        ("a.csv", b"seed\n", "has no row"),
        ("a.csv", b"seed\n1\n1,2\n", "line 3: more cells"),
        ("a.csv", b"seed\n\xff\n", "not UTF-8"),
        ("a.jsonl", b'{"seed": 1}\n{', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 must be an object"),
        ("a.jsonl", b'{"x": NaN}', "line 1 is not JSON"),
        ("a.jsonl", b"\n\n", "has no row"),
    ],
)
def test_a_table_with_a_fault(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BatchError, match=said):
        (csv_rows if name.endswith("csv") else jsonl_rows)(file)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("seed", ("5", "seed")),
        ("5.seed", ("5", "seed")),
        ("KSampler.seed", ("5", "seed")),
        ("positive.text", ("3", "text")),
        ("Negative v1.5.text", ("4", "text")),
        ("mode.strength", ("5", "mode.strength")),
        ("5.mode.strength", ("5", "mode.strength")),
    ],
)
def test_a_name_and_its_input(name: str, place: tuple[str, str]) -> None:
    assert find(GRAPH, name) == place


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", r"could be 3\.text \(Positive\), 4\.text \(Negative v1\.5\); write one of these"),
        ("model", r"5\.model \(KSampler\), which a wire feeds"),
        ("steps", r"no input 'steps'; it has 3\.text \(Positive\), 4\.text .*5\.sampler_name"),
        ("9.seed", "no input '9.seed'"),
    ],
)
def test_a_name_that_means_nothing_or_two_things(name: str, said: str) -> None:
    with pytest.raises(BatchError, match=said):
        find(GRAPH, name)


def test_two_names_of_one_input_are_refused() -> None:
    with pytest.raises(BatchError, match=r"'seed' and '5\.seed' are the same input"):
        located(GRAPH, ["seed", "5.seed"])


# ---- jobs --------------------------------------------------------------------------------------


def test_the_cross_product() -> None:
    """Rows first, the last set fastest; the workflow itself stays as it is."""
    rows = [{"positive.text": "a"}, {"positive.text": "b", "cfg": "3.5"}]
    info = {"KSampler": {"input": {"required": {"seed": INT, "cfg": FLOAT}}}}
    jobs = plan(GRAPH, info, [("seed", "1..2"), ("sampler_name", "euler|x")], rows)
    assert [tuple(job.values.values()) for job in jobs] == [
        ("a", 1, "euler"), ("a", 1, "x"), ("a", 2, "euler"), ("a", 2, "x"),
        ("b", 3.5, 1, "euler"), ("b", 3.5, 1, "x"), ("b", 3.5, 2, "euler"), ("b", 3.5, 2, "x"),
    ]  # fmt: skip
    last = jobs[-1].graph
    assert last["3"]["inputs"] == {"text": "b", "clip": ["1", 1]}
    assert last["5"]["inputs"]["seed"] == 2 and last["5"]["inputs"]["cfg"] == 3.5
    assert GRAPH["5"]["inputs"]["seed"] == 1 and GRAPH["5"]["inputs"]["cfg"] == 2
    assert [job.number for job in jobs] == list(range(1, 9))
    assert len({job.key for job in jobs}) == 8


def test_a_job_is_known_by_what_it_makes() -> None:
    """Titles do not count, values do; what is asked for twice is two jobs."""
    renamed = {**GRAPH, "3": {**GRAPH["3"], "_meta": {"title": "Other"}}}
    assert key_of(renamed) == key_of(GRAPH)
    assert key_of(with_values(GRAPH, {Place("5", "seed"): 2})) != key_of(GRAPH)
    first, second = plan(GRAPH, {}, [("seed", "1|1")], [{}])
    assert first.key == key_of(GRAPH) and second.key == f"{first.key}-2"


def test_too_many_jobs_are_refused() -> None:
    with pytest.raises(BatchError, match="1000000 jobs"):
        plan(GRAPH, {}, [("seed", "1..1000"), ("cfg", "1..1000")], [{}])


# ---- the editor's format -----------------------------------------------------------------------

INFO: dict[str, Any] = {
    "Load": {"input": {"required": {"file": COMBO}}, "display_name": "Load It"},
    "Paint": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [
                    {"key": "plain", "inputs": {}},
                    {"key": "tuned", "inputs": {"required": {"strength": FLOAT}}}]}],
            },
            "optional": {"image": ["IMAGE", {}], "sizes": ["LIST", {}],
                         "later": ["INT", {"default": 8}], "fed": ["INT", {"forceInput": True}]},
        },
    },
    "Save": {"input": {"required": {"images": ["IMAGE", {}], "prefix": TEXT}}},
}  # fmt: skip


def node(key: int, kind: str, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A node of the canvas; `inputs` are its wires by name."""
    wires = [{"name": n, "type": "IMAGE", "link": link} for n, link in (inputs or {}).items()]
    outputs = [{"name": "out", "type": "IMAGE"}]
    return {"id": key, "type": kind, "inputs": wires, "outputs": outputs, "mode": 0} | more


def canvas(*nodes: dict[str, Any], links: list[Any]) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links, "version": 0.4}


PAINT = {"seed": 5, "control_after_generate": "randomize", "mode": "tuned", "mode.strength": 0.5}


def test_a_canvas_with_names() -> None:
    """Wires go through reroutes and bypassed nodes, muted ones and notes go, titles stay."""
    made = convert(
        canvas(
            node(1, "Load", widgets_values_named={"file": "euler"}, title="Mine"),
            node(2, "Reroute", {"": 10}),
            node(3, "Paint", {"model": 11}, widgets_values_named={**PAINT, "sizes": [1, 2]}),
            node(4, "Paint", {"image": 12}, mode=4, widgets_values_named=PAINT),
            node(5, "Save", {"images": 13}, widgets_values_named={"prefix": "x"}),
            node(6, "Save", {"images": 13}, mode=2, widgets_values_named={"prefix": "y"}),
            node(7, "Note", widgets_values=["hello"]),
            node(8, "PrimitiveNode", widgets_values=[77, "fixed"]),
            node(9, "Paint", {"model": 11, "seed": 14, "image": 15}, widgets_values_named=PAINT),
            links=[[10, 1, 0, 2, 0, "*"], [11, 2, 0, 3, 0, "MODEL"], [12, 3, 0, 4, 0, "IMAGE"],
                   [13, 4, 0, 5, 0, "IMAGE"], [14, 8, 0, 9, 1, "INT"], [15, 6, 0, 9, 2, "IMAGE"]],
        ),
        INFO,
    )  # fmt: skip
    assert list(made) == ["1", "3", "5", "9"]
    assert made["1"]["_meta"]["title"] == "Mine" and made["3"]["_meta"]["title"] == "Paint"
    assert made["3"]["inputs"] == {
        "seed": 5, "mode": "tuned", "mode.strength": 0.5, "sizes": {"__value__": [1, 2]},
        "later": 8, "model": ["1", 0],
    }  # fmt: skip
    assert made["5"]["inputs"] == {"prefix": "x", "images": ["3", 0]}
    assert made["9"]["inputs"]["seed"] == 77 and "image" not in made["9"]["inputs"]


def test_a_canvas_without_names() -> None:
    """The order of the values is trusted when it accounts for all of them, and only then."""
    values = [5, "randomize", "tuned", 0.5, 9]
    made = convert(canvas(node(3, "Paint", widgets_values=values), links=[]), INFO)
    assert made["3"]["inputs"] == {"seed": 5, "mode": "tuned", "mode.strength": 0.5, "later": 9}
    for wrong in (values[:-1], [*values, 1]):
        with pytest.raises(BatchError, match=r'node 3 \(Paint\).*"Save \(API format\)"'):
            convert(canvas(node(3, "Paint", widgets_values=wrong), links=[]), INFO)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (canvas(node(1, "Nothing"), links=[]), "has no node 'Nothing'"),
        (canvas(node(1, "Note"), links=[]), "no node that runs"),
        (canvas(node(1, "Save", {"images": 5}, widgets_values=["x"]), links=[]), "Save .API"),
        (canvas({"id": 1}, links=[]), "Save .API"),
        (
            {**canvas(node(1, "u-u"), links=[]), "definitions": {"subgraphs": [{"id": "u-u"}]}},
            "subgraph.*Save .API format",
        ),
    ],
)
def test_a_canvas_out_of_reach(content: dict[str, Any], said: str) -> None:
    with pytest.raises(BatchError, match=said):
        convert(content, INFO)


def test_files_that_are_workflows_or_not(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    for content in (GRAPH, {"prompt": GRAPH, "client_id": "x"}):
        file.write_text(json.dumps(content))
        assert read(file) == GRAPH
    for text in ("{", "[]", "{}", '{"a": 1}', '{"1": {"class_type": 3}}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(BatchError, match=r"w\.json"):
            read(file)
    with pytest.raises(BatchError, match="cannot be read"):
        read(tmp_path / "none.json")


# ---- the manifest ------------------------------------------------------------------------------


def test_a_job_is_done_when_all_of_it_is_there(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "out", "a")
    manifest.open()
    for name in ("a_00001.png", "a_00002.png", "a_00007.png"):
        (tmp_path / "out" / name).touch()
    pair = [{"job": "two", "file": f"a_0000{k}.png", "picture": k, "of": 2} for k in (1, 2)]
    manifest.add(pair)
    manifest.add([{"job": "half", "file": "a_00001.png", "picture": 1, "of": 2}])
    manifest.add([{"job": "gone", "file": "a_00009.png", "picture": 1, "of": 1}])
    manifest.add([{"job": "bare", "file": None}])
    with open(tmp_path / "out" / "manifest.jsonl", "a") as file:
        file.write('{"job": "cut", "fi')  # a break in the middle of a line
    again = Manifest(tmp_path / "out", "a")
    again.open()
    assert again.done() == {"two", "bare"} and again.number == 7
    again.add([{"job": "new", "file": None}])
    assert again.done() == {"two", "bare", "new"}


# ---- the server's words ------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://x?y=1", ""])
def test_addresses(url: str) -> None:
    assert checked_url("localhost:8188") == "http://localhost:8188"
    assert checked_url("https://x/comfy/") == "https://x/comfy"
    with pytest.raises(BatchError, match="--server takes an address"):
        checked_url(url)


def test_refusals_in_words() -> None:
    """The forms of ComfyUI 0.33's answers."""
    error = {"type": "t", "message": "Prompt has no outputs", "details": ""}
    faults = [{"message": "Value not in list", "details": "ckpt: 'x' not in []"}]
    nodes = {"4": {"class_type": "Loader", "errors": faults, "dependent_outputs": ["9"]}}
    said = refusal(400, json.dumps({"error": error, "node_errors": nodes}))
    assert said == "Node 4 (Loader): Value not in list: ckpt: 'x' not in []"
    assert refusal(400, json.dumps({"error": error, "node_errors": {}})) == "Prompt has no outputs"
    assert refusal(500, "<html>") == "The server answered 500: <html>"


def test_what_a_history_says() -> None:
    outputs = {
        "9": {"images": [{"filename": "a.png", "type": "output"}], "animated": [False]},
        "8": {"images": [{"filename": "t.png", "type": "temp"}], "text": ["x"]},
    }
    times = [["execution_start", {"timestamp": 1000}], ["execution_success", {"timestamp": 3500}]]
    good = {"outputs": outputs, "status": {"status_str": "success", "messages": times}}
    assert failure(good) is None and seconds_of(good) == 2.5
    assert files_of(good) == [("9", {"filename": "a.png", "type": "output"})]
    assert files_of({"outputs": {"8": outputs["8"]}})[0][1]["filename"] == "t.png"
    data = {"node_id": "5", "node_type": "K", "exception_message": "no\nmemory"}
    bad = {"status": {"status_str": "error", "messages": [["execution_error", data]]}}
    assert failure(bad) == "Node 5 (K): no memory"
    bad["status"]["messages"] = [["execution_interrupted", data]]
    assert "cancelled" in str(failure(bad))
