"""The embedded VAE's encoder as one matrix, and as the file that was exported from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from seedling.training import projection
from seedling.training.autoencoder import linear_vae
from seedling.training.projection import Projection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, wanted = tmp_path_factory.mktemp("run"), projection.pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "pictures", lambda rng, count: wanted(rng, 40))
        Projection(folder)
    return folder


def test_latents_are_those_of_the_vae_it_is_written_into(run: Path) -> None:
    pixels = projection.pictures(np.random.default_rng(5), 3)
    with torch.no_grad():
        torch.testing.assert_close(
            Projection(run).encode(pixels), linear_vae(Projection(run)).encode(pixels),
            atol=0.01, rtol=5e-3,
        )  # fmt: skip


def test_a_run_without_one_reads_it_from_the_exported_vae(run: Path, tmp_path: Path) -> None:
    known, file = Projection(run), tmp_path / "vae.safetensors"
    vae = linear_vae(known)
    config = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(vae.config).items()
    }
    save_file(vae.state_dict(), file, metadata={"config": json.dumps(config)})
    small = projection.pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "pictures", lambda rng, count: small(rng, 10))
        again = Projection(tmp_path / "new", file)
    pixels = projection.pictures(np.random.default_rng(6), 2)
    torch.testing.assert_close(again.scale, known.scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.encode(pixels), known.encode(pixels), atol=1e-3, rtol=0)


def test_its_colours_are_the_mean_colours_of_patches(run: Path) -> None:
    made, pixels = Projection(run), projection.pictures(np.random.default_rng(7), 4)
    factors, bias = made.colours()
    shown = torch.einsum("bchw,cd->bdhw", made.encode(pixels), factors) + bias[:, None, None]
    error = (shown - F.avg_pool2d(pixels[:, :3], projection.PATCH)).abs().mean()
    assert error < 0.02
