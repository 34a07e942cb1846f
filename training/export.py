"""Write the trained networks as the three published-format files of the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .projection import Projection
from .runs import Run

NAME = "seedling-tiny"
CARD = {"title": "Seedling Tiny (embedded demonstration model)", "licence": "Apache-2.0"}
SAMPLING = {
    "resolution": 128,
    "schedule": {"steps": 16, "guidance": 3.0},
}


def export(folder: Path, assets: Path, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """Averaged weights of a run -> diffusion_models/, vae/ and text_encoders/ under `assets`."""
    student, vae = Run(folder, "student").load(), Run(folder, "vae").load()
    if student is None or vae is None:
        raise FileNotFoundError(
            f"{folder} holds no trained student.pt and vae.pt; train them first."
        )
    weights = student["average"]
    factors, bias = Projection(folder, assets / "vae" / f"{NAME}.safetensors").colours()
    previews = {"latent_rgb_factors": _rounded(factors), "latent_rgb_bias": _rounded(bias)}
    dit = SAMPLING | previews | student["dit"]
    written = [
        _write(assets / "diffusion_models", _part(weights, "dit."), dit, dtype),
        _write(assets / "vae", vae.get("average", vae["weights"]), vae["config"], dtype),
        _write(assets / "text_encoders", _part(weights, "encoder."), student["encoder"], dtype),
    ]
    tokenizer = assets / "text_encoders" / f"{NAME}.tokenizer.json"
    shutil.copyfile(folder / "tokenizer.json", tokenizer)
    return [*written, tokenizer]


def _rounded(values: Tensor) -> list:
    return [_rounded(v) if v.ndim else round(float(v), 5) for v in values]


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _write(folder: Path, weights: dict[str, Tensor], config: dict, dtype: torch.dtype) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.safetensors"
    tensors = {k: v.to(dtype).contiguous() for k, v in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", "config": json.dumps(CARD | config)})
    return path
