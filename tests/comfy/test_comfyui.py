"""The pack in a real ComfyUI, through its HTTP API: our pictures are the command line's.

conftest.py beside this file says what it needs.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfyui

TESTS = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((TESTS / "workflows").glob("*.api.json"))
# Those that the command line's own options can say.
SIMPLE = (
    "text_to_image", "edit_a_picture", "compose_from_references", "image_set",
    "same_prompt_many_seeds",
)  # fmt: skip
SAVES = ("SaveImage", "SeedlingImageSet")
RUN = 120.0  # seconds until a prompt is done
EMBEDDED = "seedling-tiny (embedded)"


def workflow(path: Path) -> dict[str, Any]:
    """An example on the tiny random model."""
    return json.loads(path.read_text("utf-8").replace(EMBEDDED, "tiny.safetensors"))


def named(stem: str) -> dict[str, Any]:
    return workflow(TESTS / "workflows" / f"{stem}.api.json")


@pytest.fixture(scope="module")
def pipeline(tiny_model: Any) -> Any:
    from seedling.sampling.pipeline import Pipeline

    return Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)


def made(pipeline: Any, prompt: str, **task: Any) -> list[torch.Tensor]:
    from seedling.sampling.pipeline import Picture, Task

    return [e.pixels for e in pipeline.run(Task(prompt, **task)) if isinstance(e, Picture)]


def eight_bits(image: torch.Tensor) -> np.ndarray:
    """As core's Save Image writes it."""
    return np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)


def by_the_command_line(pipeline: Any, stem: str, graph: dict[str, Any]) -> list[torch.Tensor]:
    """The pictures of an example workflow, made without any node."""
    prompts = [n["inputs"]["prompt"] for n in graph.values() if "prompt" in n["inputs"]]
    if stem == "image_set":
        lines = graph["5"]["inputs"]["prompts"].splitlines()
        return [made(pipeline, line, seed=1 + k)[0] for k, line in enumerate(lines)]
    if stem == "same_prompt_many_seeds":
        return made(pipeline, prompts[0], seed=1, count=4)
    *before, last = prompts
    seen = tuple(made(pipeline, p, seed=k)[0] for k, p in enumerate(before, start=1))
    return made(pipeline, last, references=seen, seed=len(prompts))


def title(path: Path) -> str:
    return path.name.partition(".")[0]


@pytest.mark.parametrize("path", [p for p in WORKFLOWS if title(p) not in SIMPLE], ids=title)
def test_an_example_of_more_nodes_runs(server: Any, path: Path) -> None:
    """What they make is held to the engine in tests/; here that they run on core's own nodes."""
    graph = workflow(path)
    (save,) = [k for k, node in graph.items() if node["class_type"] in SAVES]
    images = server.pictures(graph, save)
    assert images and all(image.std() > 1 for image in images)


@pytest.mark.parametrize("path", [p for p in WORKFLOWS if title(p) in SIMPLE], ids=title)
def test_an_example_makes_the_command_lines_picture(server: Any, pipeline: Any, path: Path) -> None:
    graph = workflow(path)
    (save,) = [k for k, node in graph.items() if node["class_type"] in SAVES]
    images = server.pictures(graph, save)
    wanted = by_the_command_line(pipeline, title(path), graph)
    assert len(images) == len(wanted)
    for image, other in zip(images, wanted, strict=True):
        assert np.array_equal(image, eight_bits(other))


def test_the_embedded_model_runs_untouched(server: Any, root: Path) -> None:
    if not (root / "assets" / "diffusion_models" / "seedling-tiny.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    graph = json.loads(WORKFLOWS[-1].read_text("utf-8"))
    (save,) = [k for k, node in graph.items() if node["class_type"] in SAVES]
    assert server.pictures(graph, save)[0].shape == (128, 128, 3)


def test_every_node_is_there_as_stored(server: Any) -> None:
    """The same schema as over the stand-in: test_nodes.py holds that one to the same file."""
    stored = json.loads((TESTS / "nodes_schema.json").read_text("utf-8"))
    listed = server.ask("/object_info")
    assert {name for name in listed if name.startswith("Seedling")} == set(stored)
    for name, expected in stored.items():
        info = listed[name]
        for group in info["input"].values():
            for key, (_, *more) in group.items():
                options = more[0] if more else {}
                options.pop("tooltip", None)
                if key in ("dit", "encoder", "vae") and "options" in options:
                    del options["options"][1:]
        assert {key: info[key] for key in expected} == expected, name


def test_pages_and_words_are_served(server: Any, root: Path) -> None:
    words = server.ask("/i18n")
    for language in ("en", "zh"):
        assert "SeedlingLoadDiT" in words[language]["nodeDefs"]
    for page in ("SeedlingImageSet.md", "SeedlingImageSet/zh.md"):
        url = f"{server.url}/extensions/seedling-pack/docs/{page}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.read() == (root / "web" / "docs" / page).read_bytes()


def spread(image: np.ndarray) -> float:
    return float(image.std())


def test_core_samplers_run_our_model(server: Any) -> None:
    """KSampler and SamplerCustomAdvanced, with core's text encoding, empty latent and tiled VAE."""
    graph = {key: named("text_to_image")[key] for key in "123"}
    graph |= {
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "a red cat"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": ""}},
        "6": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 2},
        },
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0],
                "latent_image": ["6", 0], "seed": 1, "steps": 4, "cfg": 2.5,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "8": {
            "class_type": "VAEDecodeTiled",
            "inputs": {
                "samples": ["7", 0], "vae": ["3", 0], "tile_size": 64, "overlap": 16,
                "temporal_size": 64, "temporal_overlap": 8,
            },
        },
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        "10": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "11": {
            "class_type": "BasicGuider",
            "inputs": {"model": ["1", 0], "conditioning": ["4", 0]},
        },
        "12": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "13": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
        },
        "14": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["10", 0], "guider": ["11", 0], "sampler": ["12", 0],
                "sigmas": ["13", 0], "latent_image": ["6", 0],
            },
        },
        "15": {"class_type": "VAEDecode", "inputs": {"samples": ["14", 0], "vae": ["3", 0]}},
        "16": {"class_type": "PreviewImage", "inputs": {"images": ["15", 0]}},
        # Our sampler over the same sigmas, without guidance: the same way, by other arithmetic.
        "17": {
            "class_type": "SeedlingFewStepSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["4", 0], "latent": ["6", 0],
                "sigmas": ["13", 0], "seed": 1, "steps": 0, "guidance": 1.0,
                "sampler": "euler", "denoise": 1.0,
            },
        },
        "18": {"class_type": "VAEDecode", "inputs": {"samples": ["17", 0], "vae": ["3", 0]}},
        "19": {"class_type": "PreviewImage", "inputs": {"images": ["18", 0]}},
    }  # fmt: skip
    tiled = server.pictures(graph, "9")
    assert len(tiled) == 2 and all(t.shape == (64, 64, 3) and spread(t) > 1 for t in tiled)
    custom, ours = server.pictures(graph, "16"), server.pictures(graph, "19")
    assert np.abs(custom[0].astype(int) - ours[0].astype(int)).max() <= 1


def test_loras_patch_our_model(server: Any) -> None:
    """Core's loader changes the picture, and without it the old one is back."""
    graph = named("text_to_image")
    graph["9"]["class_type"] = "PreviewImage"
    del graph["9"]["inputs"]["filename_prefix"]
    before = server.pictures(graph, "9")[0]
    lora = {
        "model": ["1", 0], "clip": ["2", 0], "lora_name": "turn.safetensors",
        "strength_model": 1.0, "strength_clip": 1.0,
    }  # fmt: skip
    patched = json.loads(json.dumps(graph))
    patched["20"] = {"class_type": "LoraLoader", "inputs": lora}
    patched["6"]["inputs"]["model"] = ["20", 0]
    patched["5"]["inputs"]["clip"] = ["20", 1]
    assert not np.array_equal(server.pictures(patched, "9")[0], before)
    graph["6"]["inputs"]["seed"] = 1
    assert np.array_equal(server.pictures(graph, "9")[0], before)


def test_a_picture_is_painted_over_where_the_mask_says(server: Any) -> None:
    """VAE Encode, Set Latent Noise Mask and denoise: what is masked out stays."""
    graph = named("text_to_image")
    graph |= {
        "20": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}},
        "21": {"class_type": "VAEEncode", "inputs": {"pixels": ["7", 0], "vae": ["3", 0]}},
        "22": {
            "class_type": "SetLatentNoiseMask",
            "inputs": {"samples": ["21", 0], "mask": ["20", 0]},
        },
        "23": {
            "class_type": "SeedlingFewStepSampler",
            "inputs": {**graph["6"]["inputs"], "latent": ["22", 0], "seed": 9, "denoise": 0.5},
        },
        "24": {"class_type": "VAEDecode", "inputs": {"samples": ["23", 0], "vae": ["3", 0]}},
        "25": {"class_type": "PreviewImage", "inputs": {"images": ["24", 0]}},
        "26": {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0], "vae": ["3", 0]}},
        "27": {"class_type": "PreviewImage", "inputs": {"images": ["26", 0]}},
    }
    kept, untouched = server.pictures(graph, "25"), server.pictures(graph, "27")
    assert np.abs(kept[0].astype(int) - untouched[0].astype(int)).max() <= 1


def test_errors_are_said_in_words(server: Any) -> None:
    graph = named("text_to_image")
    del graph["6"]["inputs"]["negative"]
    history = server.wait(server.queue(graph))
    assert "connect negative of Encode Instruction" in server.failure(history)


def test_a_new_seed_only_samples_again(server: Any) -> None:
    graph = named("text_to_image")
    server.run(graph)
    graph["6"]["inputs"]["seed"] = 4321
    history = server.wait(server.queue(graph))
    cached = dict(history["status"]["messages"])["execution_cached"]["nodes"]
    assert set(cached) == {"1", "2", "3", "4", "5"}


def test_every_step_and_the_schedule_are_shown(server: Any) -> None:
    """Progress for each step of each picture, and the texts on the nodes."""

    async def listen() -> tuple[list[int], str]:
        import aiohttp

        graph = named("text_to_image")
        graph["6"]["inputs"]["seed"], graph["4"]["inputs"]["batch_size"] = 987, 2
        graph["1"]["inputs"]["precision"] = "fp32"  # not cached: the node speaks again
        done, texts = [], ""
        async with aiohttp.ClientSession() as session:
            socket = await session.ws_connect(f"{server.url}/ws?clientId=listener")
            body = {"prompt": graph, "client_id": "listener"}
            await session.post(f"{server.url}/prompt", json=body)
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    texts += message.data.decode("utf-8", "ignore")
                    continue
                content = json.loads(message.data)
                if content["type"] == "progress" and content["data"]["node"] == "6":
                    done.append(content["data"]["value"])
                if content["type"].startswith("execution_") and content["type"][10:] in (
                    "success", "error",
                ):  # fmt: skip
                    return done, texts
        raise AssertionError("the socket closed early")

    done, texts = asyncio.run(asyncio.wait_for(listen(), RUN))
    assert done[-1] == 8 and len(done) >= 2, "core leaves out updates that come too close together"
    assert "Qwen-Image-2.1" in texts and "4 steps, guidance 2.5" in texts


def test_cancelling_stops_within_a_step(server: Any) -> None:
    graph = named("text_to_image")
    graph["6"]["inputs"].update(steps=1000, seed=77)
    prompt = server.queue(graph)
    time.sleep(1.0)
    assert server.ask("/queue")["queue_running"], "a thousand steps take more than a second"
    start = time.monotonic()
    server.ask("/interrupt", {})
    history = server.wait(prompt)
    assert time.monotonic() - start < 1.0
    assert "execution_interrupted" in dict(history["status"]["messages"])
