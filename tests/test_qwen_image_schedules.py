"""How Qwen-Image's checkpoints want to be sampled: stored numbers, and which file gets which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders.checkpoint import Checkpoint, open_checkpoint
from seedling.model_loaders.families.qwen_image.schedules import base_of, schedule
from seedling.model_loaders.families.qwen_image.sizes import reference_size
from seedling.sampling.guidance import guided
from seedling.sampling.schedules import sigmas_for


def named(folder: Path, name: str, variant: str, **metadata: str) -> Checkpoint:
    save_file({"x": torch.zeros(1)}, folder / name, metadata or None)
    checkpoint = open_checkpoint(folder / name)
    return Checkpoint(
        checkpoint.path, checkpoint.names, checkpoint.metadata,
        {**checkpoint.config, "variant": variant}, {},
    )  # fmt: skip


# Lists published with Lightning (see the table of models): t -> 3 t / (1 + 2 t).
LISTS = {
    4: [1, 0.9, 0.75, 0.5, 0],
    8: [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0],
}


@pytest.mark.parametrize("steps", LISTS)
@pytest.mark.parametrize(
    "name", ["qwen_image_edit_2509_lightning_{}steps.safetensors", "Qwen-Image-Lightning-{}-steps"]
)
def test_lightning_has_its_own_list(tmp_path: Path, steps: int, name: str) -> None:
    found = schedule(named(tmp_path, name.format(steps), "qwen-image-edit-2509"))
    assert (found.steps, found.guidance, found.name) == (steps, 1.0, f"lightning {steps}")
    torch.testing.assert_close(
        sigmas_for(found, None, 4096), torch.tensor(LISTS[steps]), rtol=0, atol=5e-5
    )
    assert f'"lightning" and {steps}' in found.reason


def test_metadata_say_lightning_too(tmp_path: Path) -> None:
    card = {"description": "merged with Qwen-Image-Lightning-8steps-V1.1"}
    assert schedule(named(tmp_path, "a.safetensors", "qwen-image", **card)).steps == 8
    assert schedule(named(tmp_path, "lightning.safetensors", "qwen-image")).steps == 4
    assert (
        "no steps, so 4" in schedule(named(tmp_path, "lightning.safetensors", "qwen-image")).reason
    )


@pytest.mark.parametrize(
    ("variant", "steps", "guidance", "rescale"),
    [
        ("qwen-image", 50, 4.0, True),
        ("qwen-image-edit-2511", 40, 4.0, True),
        ("qwen-image-layered", 50, 4.0, False),
    ],
)
def test_base_models(
    tmp_path: Path, variant: str, steps: int, guidance: float, rescale: bool
) -> None:
    found = schedule(named(tmp_path, "a.safetensors", variant))
    assert (found.steps, found.guidance, found.norm_rescale) == (steps, guidance, rescale)


SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
    "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("tokens", [256, 4096, 6889])
def test_sigmas_are_those_of_diffusers(tokens: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    times = np.linspace(1, 1 / 20, 20)
    scheduler.set_timesteps(sigmas=times, mu=0.5 + 0.4 * (tokens - 256) / (8192 - 256))
    ours = sigmas_for(base_of("qwen-image"), 20, tokens)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=2e-6)

    changes = {"shift_terminal": False, "time_shift_type": "linear"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **changes})
    scheduler.set_timesteps(sigmas=times, mu=(tokens / 256) ** 0.5)
    ours = sigmas_for(base_of("qwen-image-layered"), 20, tokens)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=2e-6)


def test_guidance_keeps_the_length_of_a_token() -> None:
    """As in diffusers: per token of 2 x 2 latents, in their packed order."""
    from seedling.model_loaders.families.qwen_image.dit import pack

    positive, negative = torch.randn(2, 1, 4, 6, 10).unbind()
    combined = pack(negative + 4.0 * (positive - negative))
    length = pack(positive).norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
    ours = guided(positive, negative, 4.0, rescale=2)
    torch.testing.assert_close(pack(ours), combined * length)
    assert torch.equal(guided(positive, negative, 1.0, rescale=2), positive)


def test_references_keep_their_size_or_get_the_models_area() -> None:
    assert reference_size(1000, 750) == (1184, 896)
    assert reference_size(4000, 3000, 384 * 384) == (448, 320)
    assert reference_size(1000, 750, 0) == (1008, 752)
    assert reference_size(1024, 512, 0) == (1024, 512)
    with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
        reference_size(0, 5)
