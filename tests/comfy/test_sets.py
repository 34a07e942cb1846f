"""An Image Set in a real ComfyUI: each picture saved when it is done, and kept when one stops."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.comfyui

TESTS = Path(__file__).resolve().parents[1]
EMBEDDED = "seedling-tiny (embedded)"
PROMPTS = "a cat\na dog\na hat\na cup"
STEPS = 60  # of each picture: time to stop in the middle


def graph(name: str, seeing: str, **more: Any) -> dict[str, Any]:
    """The example "Image Set" on the tiny random model."""
    text = (TESTS / "workflows" / "image_set.api.json").read_text("utf-8")
    found = json.loads(text.replace(EMBEDDED, "tiny.safetensors"))
    del found["6"]
    found["4"]["inputs"]["shape"] = "64x64"
    found["5"]["inputs"].update(
        {"prompts": PROMPTS, "steps": STEPS, "guidance": 1.0, "seeing": seeing, "save_as": name},
        **more,
    )
    return found


def files(server: Any, name: str) -> list[str]:
    return sorted(path.name for path in (server.base / "output").glob(f"{name}_*.png"))


def saved_of(output: dict[str, Any] | None, name: str) -> int:
    """How many pictures of the set a node has shown."""
    named = [image["filename"] for image in (output or {}).get("images", ())]
    return sum(file.startswith(f"{name}_") for file in named)


async def heard(server: Any, prompt: dict[str, Any], name: str, after: int | None) -> list[Any]:
    """What the page is told of a job; `after`: stop it when so many pictures are there."""
    import aiohttp

    messages: list[Any] = []
    async with aiohttp.ClientSession() as session:
        socket = await session.ws_connect(f"{server.url}/ws?clientId=sets")
        body = {"prompt": prompt, "client_id": "sets"}
        answer = await (await session.post(f"{server.url}/prompt", json=body)).json()
        job, done = answer["prompt_id"], 0
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            kind, data = (content := json.loads(message.data))["type"], content["data"]
            if data.get("prompt_id") != job:
                continue
            messages.append((kind, data))
            if kind == "executed" and (of_set := saved_of(data["output"], name)):
                done += of_set
                assert len(files(server, name)) >= done, "it is a file when the page is told"
                if after:
                    assert server.ask(f"/history/{job}") == {}, "and the job goes on"
                if done == after:
                    await session.post(f"{server.url}/interrupt", json={})
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                return messages
    raise AssertionError("the socket closed early")


def run(server: Any, prompt: dict[str, Any], name: str, after: int | None = None) -> list[Any]:
    return asyncio.run(asyncio.wait_for(heard(server, prompt, name, after), 120))


def named(history: dict[str, Any]) -> list[str]:
    """The pictures in the history of a job."""
    shown = [image for o in history["outputs"].values() for image in o.get("images", ())]
    return [image["filename"] for image in shown]


def of(messages: list[Any], kind: str) -> list[Any]:
    return [data for name, data in messages if name == kind]


def test_a_stopped_set_keeps_what_is_done_and_goes_on(server: Any, tiny_model: Any) -> None:
    from seedling.sampling.pipeline import Picture, Pipeline, Task
    from seedling.sampling.sets import plan_set, run_set

    prompt = graph("story", "the pictures before it")
    messages = run(server, prompt, "story", after=2)
    assert messages[-1][0] == "execution_interrupted" and messages[-1][1]["node_id"] == "5"
    pictures = [data for data in of(messages, "executed") if "images" in data["output"]]
    assert [data["display_node"] for data in pictures] == ["5", "5"]
    history = server.wait(messages[-1][1]["prompt_id"])
    assert len(named(history)) == 2 == len(files(server, "story"))

    messages = run(server, prompt, "story")
    assert messages[-1][0] == "execution_success"
    ran = [data["node"] for data in of(messages, "executing")]
    assert "5.0.2" not in ran and {"5.0.3", "5.0.4"} <= set(ran), "it goes on with the third"
    history = server.wait(messages[-1][1]["prompt_id"])
    assert sorted(named(history)) == files(server, "story"), "all of them, each once"
    assert len(named(history)) == 4

    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    plan = plan_set(PROMPTS, seeing="sequential", seed=1)
    task = Task("", size=(64, 64), steps=STEPS, guidance=1.0)
    wanted = [e for e in run_set(pipeline, task, plan) if isinstance(e, Picture)]
    for name, picture in zip(files(server, "story"), wanted, strict=True):
        with Image.open(server.base / "output" / name) as image:
            values = np.clip(255 * picture.pixels.numpy(), 0, 255).astype(np.uint8)
            assert np.array_equal(np.array(image), values)
            assert json.loads(image.info["prompt"]) == prompt, "each carries its graph"


def test_a_changed_line_paints_only_its_picture(server: Any) -> None:
    run(server, graph("lines", "references only", steps=2), "lines")
    other = graph("lines", "references only", steps=2, prompts="a cat\na dog\na CAP\na cup")
    ran = [data["node"] for data in of(run(server, other, "lines"), "executing")]
    assert {"5", "5.0.3", "5.0.3.shown"} <= set(ran) and not {"5.0.1", "5.0.2", "5.0.4"} & set(ran)
    assert len(files(server, "lines")) == 5


def test_a_set_that_is_too_long_is_refused_before_its_first_picture(server: Any) -> None:
    """A model with a sequence of 15 at most: what is wrong is said before anything is painted."""
    prompt = graph("sixteen", "the pictures before it", count=16)
    messages = run(server, prompt, "sixteen")
    assert messages[-1][0] == "execution_error" and messages[-1][1]["node_id"] == "5"
    assert "more than 15" in messages[-1][1]["exception_message"] and not files(server, "sixteen")


def test_a_set_takes_each_item_of_a_wired_list(server: Any) -> None:
    """Two lists of references, one call each: two sets of two pictures, not two of four."""
    prompt = graph("first", "references only", prompts="a cat\na dog", steps=2)
    prompt["6"] = {
        "class_type": "SeedlingReferences",
        "inputs": {"size": "model", "strip": "", "images.image_1": ["5", 0]},
    }
    second = {**prompt["5"]["inputs"], "references": ["6", 0], "save_as": "second"}
    prompt["7"] = {"class_type": "SeedlingImageSet", "inputs": second}
    server.run(prompt)
    assert len(files(server, "first")) == 2 and len(files(server, "second")) == 4


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_joint_set_is_the_engine_s(server: Any, tiny_model: Any) -> None:
    """All at once, with a reference, guidance and a negative prompt: the same bits, each a file."""
    import torch

    from seedling.sampling.pipeline import Picture, Pipeline, Task
    from seedling.sampling.sets import plan_set, run_set

    seen = server.base / "input" / "seen.png"
    values = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(seen)
    prompt = graph(
        "joint", "each other, all at once", prompts="a cat\na dog\na hat", steps=3, guidance=2.5,
        negative="blue",
    )  # fmt: skip
    prompt["8"] = {"class_type": "LoadImage", "inputs": {"image": "seen.png"}}
    prompt["6"] = {
        "class_type": "SeedlingReferences",
        "inputs": {"size": "own", "strip": "", "images.image_1": ["8", 0]},
    }
    prompt["5"]["inputs"]["references"] = ["6", 0]
    prompt["7"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 1]}}
    prompt["9"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["5", 0], "filename_prefix": "joined"},
    }
    messages = run(server, prompt, "joint")
    assert messages[-1][0] == "execution_success"
    shown = [data for data in of(messages, "executed") if "images" in (data["output"] or {})]
    (of_set,) = (data for data in shown if data["display_node"] == "5")
    assert [image["filename"] for image in of_set["output"]["images"]] == files(server, "joint")
    assert len(files(server, "joint")) == 3 == len(files(server, "joined"))

    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    plan = plan_set(prompt["5"]["inputs"]["prompts"], seeing="joint", seed=1, references=1)
    picture = torch.from_numpy(values).float() / 255
    task = Task("", (picture,), size=(64, 64), steps=3, guidance=2.5, negative="blue", resolution=0)
    wanted = [e.pixels for e in run_set(pipeline, task, plan) if isinstance(e, Picture)]
    assert len(wanted) == 3
    named = zip(files(server, "joint"), files(server, "joined"), wanted, strict=True)
    for name, other, made in named:
        saved = np.clip(255 * made.numpy(), 0, 255).astype(np.uint8)
        assert np.array_equal(pixels(server.base / "output" / name), saved)
        assert np.array_equal(pixels(server.base / "output" / other), saved), "as a list, too"


def test_a_job_that_changes_nothing_makes_nothing(server: Any) -> None:
    """ComfyUI sends again what a cached node itself had shown; a set's pictures are shown by nodes
    that it unfolds into, and a set whose result is known does not unfold. Those of core are sent.
    """
    prompt = graph("twice", "references only", prompts="a cat\na dog", steps=2)
    prompt["7"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 1]}}
    run(server, prompt, "twice")
    messages = run(server, prompt, "twice")
    assert messages[-1][0] == "execution_success" and len(files(server, "twice")) == 2
    assert {"4", "5", "7"} <= set(of(messages, "execution_cached")[0]["nodes"])
    assert not [data for data in of(messages, "executing") if data["node"] is not None]
    sent = {data["node"]: data["output"] for data in of(messages, "executed")}
    assert sent["5"] is None and "images" in sent["7"]
    assert sent["4"]["text"][0].startswith("64 x 64 pixels"), "and the words of Canvas Size"
