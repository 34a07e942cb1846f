"""A 16-bit picture with alpha through an edit in a real ComfyUI, saved by core's own node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfyui

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
EMBEDDED = "seedling-tiny (embedded)"


def test_what_is_locked_keeps_its_16_bits_and_its_alpha(server: Any) -> None:
    """Outside of the region the file has the same values, in all four channels."""
    from seedling.host.images import png_16_bit
    from seedling.model_loaders.pictures import read_16_bit

    stored = np.random.default_rng(2).integers(0, 65536, (70, 90, 4), dtype=np.uint16)
    data = png_16_bit(torch.from_numpy(stored.astype(np.float32)) / 65535, {})
    (server.base / "input").mkdir(exist_ok=True)
    (server.base / "input" / "deep.png").write_bytes(data)

    text = (WORKFLOWS / "text_to_image.api.json").read_text("utf-8")
    graph = json.loads(text.replace(EMBEDDED, "tiny.safetensors"))
    edit = {"vae": ["3", 0], "file": "deep.png", "boxes": "30, 20, 20, 20", "points": "",
            "tolerance": 0.1, "lock": True, "grow": 0, "feather": 4, "context": 0}  # fmt: skip
    graph["4"] = {"class_type": "SeedlingEditRegion", "inputs": edit}
    graph["5"]["inputs"] |= {"references": ["4", 0], "vae": ["3", 0]}
    graph["6"]["inputs"]["latent"] = ["4", 1]
    finish = {"image": ["7", 0], "references": ["4", 0], "width": 0, "height": 0}
    graph["10"] = {"class_type": "SeedlingFinishEdit", "inputs": finish}
    save = {"images": ["10", 0], "filename_prefix": "deep", "format": "png",
            "format.bit_depth": "16-bit", "format.input_color_space": "sRGB"}  # fmt: skip
    graph["9"] = {"class_type": "SaveImageAdvanced", "inputs": save}
    (image,) = server.run(graph)["9"]["images"]

    back = read_16_bit(server.base / "output" / image["subfolder"] / image["filename"])
    assert back is not None and back.shape == (70, 90, 4)
    values = (back * 65535).round().numpy().astype(np.uint16)
    same = (values == stored).all(axis=-1)
    same[20:40, 30:50] = True
    assert same.all() and (values[22:38, 32:48] != stored[22:38, 32:48]).any()
