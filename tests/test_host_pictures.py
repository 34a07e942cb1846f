"""The same pictures as the command line: our nodes and core's on a tiny model, in the host."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image

from seedling.host.images import png_16_bit
from seedling.host.nodes_sampler import simple_sigmas
from seedling.model_loaders.pictures import read_16_bit
from seedling.sampling.pipeline import Picture, Pipeline, Task


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
FOLDERS = {"dit": "diffusion_models", "vae": "vae", "encoder": "text_encoders"}


@pytest.fixture(scope="module")
def host(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio with the tiny model among its models."""
    home = tmp_path_factory.mktemp("studio")
    for part, folder in FOLDERS.items():
        source = Path(getattr(tiny_model, part))
        shutil.copytree(source.parent, home / "models" / folder, dirs_exist_ok=True)
    running = tools.Host(home, Path("all")).start().warm()
    running.files = {part: Path(getattr(tiny_model, part)).name for part in FOLDERS}
    yield running
    running.stop()


def graph(host: Any, seed: int, middle: dict[str, Any]) -> dict[str, Any]:
    """Loaders, text, size, the sampler in `middle` as node 6, decode, save."""
    nodes = {
        "1": ("SeedlingLoadDiT", {"dit": host.files["dit"]}),
        "2": ("SeedlingLoadEncoder", {"encoder": host.files["encoder"]}),
        "3": ("SeedlingLoadVAE", {"vae": host.files["vae"]}),
        "4": ("CLIPTextEncode", {"text": "a red star", "clip": ["2", 0]}),
        "9": ("CLIPTextEncode", {"text": "", "clip": ["2", 0]}),
        "5": ("EmptySD3LatentImage", {"width": 64, "height": 96, "batch_size": 1}),
        "6": (middle["class_type"], middle["inputs"] | {"model": ["1", 0], "positive": ["4", 0]}),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["3", 0]}),
        "8": ("SaveImage", {"images": ["7", 0], "filename_prefix": f"seed{seed}"}),
    }
    prompt = {k: {"class_type": kind, "inputs": dict(v)} for k, (kind, v) in nodes.items()}
    for node in prompt.values():  # what has a default and was left out
        info = host.get(f"/api/object_info/{node['class_type']}")[1][node["class_type"]]
        for name, (_, options) in info["input"]["required"].items():
            choices = options.get("options") or [None]
            fallback = options.get("default", choices[0])
            if fallback is not None:
                node["inputs"].setdefault(name, fallback)
    return prompt


def pixels(host: Any, ended: dict[str, Any]) -> np.ndarray:
    assert ended["status"]["completed"], tools.error_of(ended)
    (image,) = ended["outputs"]["8"]["images"]
    data = host.ask("GET", f"/api/view?filename={image['filename']}&type=output")[2]
    return np.asarray(Image.open(io.BytesIO(data)))


def test_our_nodes_make_the_command_line_s_picture(host: Any, tiny_model: Any) -> None:
    """Bit for bit, in the file. A changed seed then loads and encodes nothing again."""
    middle = {"class_type": "SeedlingFewStepSampler", "inputs": {}}
    middle["inputs"] |= {"latent": ["5", 0], "negative": ["9", 0], "seed": 3}
    seen = pixels(host, host.finished(host.queue(graph(host, 3, middle)), 90))
    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    task = Task("a red star", size=(64, 96), seed=3)
    (made,) = [event for event in pipeline.run(task) if isinstance(event, Picture)]
    wanted = (made.pixels * 255).clamp(0, 255).byte().numpy()
    assert seen.shape == wanted.shape
    assert np.array_equal(seen, wanted)
    middle["inputs"]["seed"] = 4
    again = host.finished(host.queue(graph(host, 4, middle)), 90)
    assert set(again["status"]["messages"][1][1]["nodes"]) == {"1", "2", "3", "4", "5", "9"}


def test_ksampler_runs_our_model(host: Any) -> None:
    inputs = {"latent_image": ["5", 0], "negative": ["4", 0], "seed": 3, "steps": 3, "cfg": 1.0}
    middle = {"class_type": "KSampler", "inputs": inputs}
    assert pixels(host, host.finished(host.queue(graph(host, 5, middle)), 90)).shape[:2] == (96, 64)


@pytest.mark.parametrize("name, value", [("sampler_name", "res_multistep"), ("scheduler", "beta")])
def test_what_only_comfyui_has_is_said(host: Any, name: str, value: str) -> None:
    """A workflow of ComfyUI is refused when it is queued, with what there is."""
    inputs = {"latent_image": ["5", 0], "negative": ["4", 0], "seed": 3, name: value}
    middle = {"class_type": "KSampler", "inputs": inputs}
    status, answer = host.post("/api/prompt", {"prompt": graph(host, 5, middle)})
    assert status == 400
    said = answer["node_errors"]["6"]["errors"][0]["details"]
    known = {"sampler_name": "euler, dpmpp_2m", "scheduler": "simple"}[name]
    assert f"'{value}', only {known}" in said and "or run the workflow in ComfyUI" in said


def test_the_simple_schedule() -> None:
    """Stored: core's scheduler "simple" for a flow with mu 1.15, 4 steps, and its tail."""
    sigmas = simple_sigmas(1.15, 4)
    assert sigmas == pytest.approx([1.0, 0.904530, 0.759511, 0.512840, 0.0], abs=1e-5)
    assert simple_sigmas(1.15, 2, 0.5) == pytest.approx([0.759511, 0.512840, 0.0], abs=1e-5)
    assert simple_sigmas(1.15, 4, 0.0) == []


# ---- 16 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_16_bit_png_is_what_another_reader_reads(tmp_path: Path, channels: int) -> None:
    """All 65,536 values, and the text."""
    import kornia_rs.io as kornia_io  # pyright: ignore[reportMissingModuleSource]

    values = np.random.default_rng(1).permutation(65536 * channels) % 65536
    stored = values.reshape(128, 512, channels).astype(np.uint16)
    data = png_16_bit(torch.from_numpy(stored.astype(np.float32)) / 65535, {"prompt": "{}"})
    (tmp_path / "deep.png").write_bytes(data)
    kind = {1: "mono", 3: "rgb", 4: "rgba"}[channels]
    back = kornia_io.read_image_png_u16(str(tmp_path / "deep.png"), kind)
    assert np.array_equal(back.reshape(stored.shape), stored)
    with Image.open(tmp_path / "deep.png") as image:
        image.load()
        assert image.info["prompt"] == "{}" and image.size == (512, 128)


def test_an_edit_keeps_16_bits_and_alpha_outside_of_its_region(host: Any) -> None:
    """From the file through every node to the file: the same bits."""
    stored = np.random.default_rng(2).integers(0, 65536, (70, 90, 4), dtype=np.uint16)
    deep = png_16_bit(torch.from_numpy(stored.astype(np.float32)) / 65535, {})
    (host.home / "input" / "deep.png").write_bytes(deep)
    sampler = {"positive": ["5", 0], "latent": ["4", 1], "seed": 3, "guidance": 1.0}
    prompt = graph(host, 1, {"class_type": "SeedlingFewStepSampler", "inputs": sampler})
    more = {
        "4": ("SeedlingEditRegion", {"vae": ["3", 0], "file": "deep.png", "boxes": "30, 20, 20, 20",
                                     "points": "", "tolerance": 0.1, "lock": True, "grow": 0,
                                     "feather": 4, "context": 0}),
        "5": ("SeedlingEncodeInstruction", {"clip": ["2", 0], "prompt": "a cat", "negative": "",
                                            "references": ["4", 0], "vae": ["3", 0]}),
        "9": ("SeedlingFinishEdit", {"image": ["7", 0], "references": ["4", 0],
                                     "width": 0, "height": 0}),
        "8": ("SaveImageAdvanced", {"images": ["9", 0], "filename_prefix": "deep", "format": "png",
                                    "format.bit_depth": "16-bit",
                                    "format.input_color_space": "sRGB"}),
    }  # fmt: skip
    prompt |= {k: {"class_type": kind, "inputs": inputs} for k, (kind, inputs) in more.items()}
    prompt["6"]["inputs"] |= sampler
    ended = host.finished(host.queue(prompt), 90)
    assert ended["status"]["completed"], tools.error_of(ended)
    assert ended["outputs"]["8"]["images"][0]["filename"] == "deep_00001.png"
    back = read_16_bit(host.home / "output" / "deep_00001.png")
    assert back is not None and back.shape == (70, 90, 4)
    values = (back * 65535).round().numpy().astype(np.uint16)
    same = (values == stored).all(axis=-1)
    same[20:40, 30:50] = True
    assert same.all() and (values[22:38, 32:48] != stored[22:38, 32:48]).any()


# ---- sets --------------------------------------------------------------------------------------

STEPS = 40  # of each picture: time to stop in the middle


def set_graph(host: Any, seeing: str, **more: Any) -> dict[str, Any]:
    """Four pictures, saved as "story"."""
    loaders = {key: graph(host, 1, {"class_type": "KSampler", "inputs": {}})[key] for key in "123"}
    size = {"preset": "model", "shape": "64x64", "batch_size": 1, "model": ["1", 0]}
    return loaders | {
        "4": {"class_type": "SeedlingCanvasSize", "inputs": size},
        "5": {
            "class_type": "SeedlingImageSet",
            "inputs": {
                "model": ["1", 0], "clip": ["2", 0], "vae": ["3", 0], "latent": ["4", 0],
                "prompts": "a cat\na dog\na hat\na cup", "count": 0, "seed": 7, "steps": STEPS,
                "guidance": 1.0, "sampler": "euler", "seeing": seeing, "output": "list",
                "negative": "", "save_as": "story/panel", **more,
            },
        },
    }  # fmt: skip


async def stopped(
    host: Any, prompt: dict[str, Any], after: int
) -> tuple[str, list[dict[str, Any]]]:
    """Queue a set and cancel it when so many pictures are there; the job and what was heard."""
    async with aiohttp.ClientSession() as session:
        page = await tools.Page(host, session).connect()
        job = host.queue(prompt, client_id=page.sid)
        for number in range(1, after + 1):
            await page.until("executed", display_node="5", node=f"5.0.{number}.shown")
            saved = sorted((host.home / "output" / "story").glob("panel_*.png"))
            assert len(saved) >= number and host.get(f"/api/history/{job}")[1] == {}
        host.post("/api/interrupt", {"prompt_id": job})
        await page.until("execution_interrupted")
        return job, page.heard


def test_a_stopped_set_keeps_what_is_done_and_goes_on(host: Any, tiny_model: Any) -> None:
    from seedling.sampling.sets import plan_set, run_set

    prompt = set_graph(host, "the pictures before it")
    job, heard = asyncio.run(stopped(host, prompt, 2))
    ended = host.finished(job)
    assert ended["status"]["status_str"] == "error"
    shown = [node for node, output in ended["outputs"].items() if "images" in output]
    assert shown == [f"5.0.{k}.shown" for k in range(1, len(shown) + 1)] and len(shown) in (2, 3)
    assert {ended["meta"][node]["display_node"] for node in shown} == {"5"}
    where = [m["data"]["display_node"] for m in heard if m["type"] == "executing"]
    assert "5" in where and set(where) <= {"1", "2", "3", "4", "5"}, "the page knows no other nodes"
    messages = dict(ended["status"]["messages"])
    assert messages["execution_interrupted"]["node_id"] == "5"

    again = host.finished(host.queue(prompt))
    assert again["status"]["status_str"] == "success"
    files = [e for output in again["outputs"].values() for e in output.get("images", ())]
    names = [entry["filename"] for entry in files]
    assert names == [f"panel_{k:05}_.png" for k in range(1, 5)], "the old ones and the new ones"
    once_more = host.finished(host.queue(prompt))
    assert once_more["outputs"] == again["outputs"], "nothing is made twice, all of it is shown"

    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    task = Task("", size=(64, 64), steps=STEPS, guidance=1.0)
    plan = plan_set("a cat\na dog\na hat\na cup", seeing="sequential", seed=7)
    wanted = [e for e in run_set(pipeline, task, plan) if isinstance(e, Picture)]
    for name, picture in zip(names, wanted, strict=True):
        with Image.open(host.home / "output" / "story" / name) as image:
            values = np.clip(255 * picture.pixels.numpy(), 0, 255).astype(np.uint8)
            assert np.array_equal(np.array(image), values) and "prompt" in image.info


def test_a_changed_line_paints_only_its_picture(host: Any) -> None:
    more = {"steps": 2, "save_as": ""}
    host.finished(host.queue(set_graph(host, "references only", **more)))

    async def again(prompts: str) -> list[str]:
        async with aiohttp.ClientSession() as session:
            page = await tools.Page(host, session).connect()
            prompt = set_graph(host, "references only", prompts=prompts, **more)
            host.queue(prompt, client_id=page.sid)
            await page.until("execution_success")
            return [m["data"]["node"] for m in page.heard if m["type"] == "executing"]

    ran = asyncio.run(again("a cat\na dog\na CAP\na cup"))
    assert [node for node in ran if node] == ["5", "5.0.3", "5.0.3.shown", "5.0.all"]


def test_a_set_takes_each_item_of_a_wired_list(host: Any) -> None:
    """Two lists of references, one call each: two sets of two pictures, not two of four."""
    prompt = set_graph(host, "references only", prompts="a cat\na dog", steps=2, seed=8)
    prompt["4"]["inputs"]["batch_size"] = 1
    prompt |= {
        "6": {"class_type": "SeedlingReferences",
              "inputs": {"size": "model", "strip": "", "images.image_1": ["5", 0]}},
        "7": {"class_type": "SeedlingImageSet",
              "inputs": {**prompt["5"]["inputs"], "references": ["6", 0], "save_as": "second"}},
    }  # fmt: skip
    ended = host.finished(host.queue(prompt))
    assert ended["status"]["status_str"] == "success", ended["status"]["messages"][-1]
    second = [node for node in ended["outputs"] if node.startswith("7.")]
    assert second == [f"7.{call}.{k}.shown" for call in (0, 1) for k in (1, 2)]
    assert all(len(ended["outputs"][node]["images"]) == 1 for node in second)
