"""The same pictures as the command line: our nodes and core's on a tiny model, in the host."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seedling.host.nodes_sampler import simple_sigmas
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


def test_the_simple_schedule() -> None:
    """Stored: core's scheduler "simple" for a flow with mu 1.15, 4 steps, and its tail."""
    sigmas = simple_sigmas(1.15, 4)
    assert sigmas == pytest.approx([1.0, 0.904530, 0.759511, 0.512840, 0.0], abs=1e-5)
    assert simple_sigmas(1.15, 2, 0.5) == pytest.approx([0.759511, 0.512840, 0.0], abs=1e-5)
    assert simple_sigmas(1.15, 4, 0.0) == []
