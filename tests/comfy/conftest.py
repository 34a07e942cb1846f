"""A ComfyUI that runs the pack, for the tests in this folder.

COMFYUI_DIR names a checkout of ComfyUI 0.33 or later. COMFYUI_PYTHON runs it, a Python that has
ComfyUI's requirements (default: the one that runs the tests).
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

START, RUN = 240.0, 120.0  # seconds until it answers, and until a prompt is done

# Runs in ComfyUI's Python, which knows no package seedling: the checkout, as ComfyUI would load it.
LOAD_PACK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("seedling", {file!r})
sys.modules["seedling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["seedling"])
"""
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# BFL's layers of a FLUX.2 with one block of each kind, and which of ours they are, in order.
LAYERS = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "double_blocks.0.img_attn.qkv": [f"{BLOCK}.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{BLOCK}.attn.to_out.0"],
    "double_blocks.0.img_attn.norm.query_norm": [f"{BLOCK}.attn.norm_q"],
    "double_blocks.0.img_attn.norm.key_norm": [f"{BLOCK}.attn.norm_k"],
    "double_blocks.0.img_mlp.0": [f"{BLOCK}.ff.linear_in"],
    "double_blocks.0.img_mlp.2": [f"{BLOCK}.ff.linear_out"],
    "double_blocks.0.txt_attn.qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.txt_attn.proj": [f"{BLOCK}.attn.to_add_out"],
    "double_blocks.0.txt_attn.norm.query_norm": [f"{BLOCK}.attn.norm_added_q"],
    "double_blocks.0.txt_attn.norm.key_norm": [f"{BLOCK}.attn.norm_added_k"],
    "double_blocks.0.txt_mlp.0": [f"{BLOCK}.ff_context.linear_in"],
    "double_blocks.0.txt_mlp.2": [f"{BLOCK}.ff_context.linear_out"],
    "single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": [f"{SINGLE}.attn.to_out"],
    "single_blocks.0.norm.query_norm": [f"{SINGLE}.attn.norm_q"],
    "single_blocks.0.norm.key_norm": [f"{SINGLE}.attn.norm_k"],
    "final_layer.adaLN_modulation.1": ["norm_out.shift", "norm_out.scale"],
    "final_layer.linear": ["proj_out"],
}


class Install(NamedTuple):
    """How to run ComfyUI."""

    python: str
    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def layers() -> dict[str, list[str]]:
    return LAYERS


@pytest.fixture(scope="session")
def comfyui(root: Path) -> Install:
    load = LOAD_PACK.format(file=str(root / "__init__.py"))
    return Install(
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        Path(os.environ["COMFYUI_DIR"]).resolve(),
        # As many threads as here, or the last bits of sums would differ.
        {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "LOAD_PACK": load},
    )


@dataclass
class Server:
    """A ComfyUI that runs."""

    url: str
    base: Path

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content.strip() else None

    def queue(self, graph: dict[str, Any]) -> str:
        try:
            return self.ask("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def wait(self, prompt: str) -> dict[str, Any]:
        end = time.monotonic() + RUN
        while time.monotonic() < end:
            history = self.ask(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            time.sleep(0.05)
        raise AssertionError("the prompt was not done in time")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """The outputs of every node, or an AssertionError with what went wrong."""
        history = self.wait(self.queue(graph))
        assert history["status"]["status_str"] == "success", self.failure(history)
        return history["outputs"]

    def pictures(self, graph: dict[str, Any], node: str) -> list[np.ndarray]:
        """What a Save or Preview Image node or a set showed, (H, W, C) in 8 bits."""
        from PIL import Image

        shown, outputs = [], self.run(graph)
        names = [name for name in outputs if name.partition(".")[0] == node]  # "5.0.1.shown" of 5
        for image in (image for name in names for image in outputs[name]["images"]):
            query = urllib.parse.urlencode(image)
            with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
                shown.append(np.array(Image.open(io.BytesIO(answer.read()))))
        return shown

    @staticmethod
    def failure(history: dict[str, Any]) -> str:
        """The message of the node that failed, with all that ComfyUI knows."""
        messages = dict(history["status"]["messages"])
        return str(messages.get("execution_error", messages))


@pytest.fixture(scope="session")
def server(
    comfyui: Install, root: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    tiny.tiny_model(base / "models")
    write_lora(base / "models" / "loras" / "turn.safetensors")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "seedling-pack").symlink_to(root, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        comfyui.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--disable-api-nodes", "--disable-all-custom-nodes",
        "--whitelist-custom-nodes", "seedling-pack",
        "--database-url", "sqlite:///:memory:", "--base-directory", str(base),
    ]  # fmt: skip
    with open(base / "log.txt", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=comfyui.folder,
            env=comfyui.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    running = Server(f"http://127.0.0.1:{port}", base)
    try:
        until_it_answers(running, process)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def until_it_answers(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            server.ask("/system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError((server.base / "log.txt").read_text()[-4000:])


def write_lora(path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    name = "diffusion_model.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
