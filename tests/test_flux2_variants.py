"""Which FLUX.2 a file is, under which terms, and how it is sampled: told from its header alone."""

from __future__ import annotations

import json
import math
import struct
from functools import lru_cache
from pathlib import Path

import pytest

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.detection import Found, config_of, detect, schedule_of
from seedling.model_loaders.families.flux2.configs import published_dits
from seedling.model_loaders.families.flux2.dit import DiT
from seedling.model_loaders.families.flux2.variants import VARIANTS
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import find
from seedling.sampling.schedules import sigmas_for

Table = dict[str, tuple[int, ...]]
TITLES = {"4b": "FLUX.2 klein 4B", "9b": "FLUX.2 klein 9B", "dev": "FLUX.2 dev"}


@lru_cache
def dit(size: str) -> Table:
    """Names and shapes of a published size, in full."""
    module = DiT(published_dits()[TITLES[size]], device="meta")
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def sparse(path: Path, shapes: Table) -> Path:
    """A safetensors file of any size, in bf16, whose tensors take no room on the disk."""
    entries, position = {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * 2
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


def found_in(path: Path) -> Found:
    found = detect(open_checkpoint(path))
    assert found is not None and found.family.name == "flux2"
    return found


@pytest.mark.parametrize(
    ("size", "name", "variant", "commercial"),
    [
        ("4b", "flux-2-klein-4b", "klein-4b", True),
        ("4b", "flux-2-klein-base-4b-fp8", "klein-base-4b", True),
        ("4b", "somebodys_mix", "klein-4b", True),
        ("4b", "baseball_kvetch", "klein-4b", True),  # words within words
        ("4b", "klein-kv", "klein-4b", True),  # never published
        ("9b", "flux-2-klein-9b", "klein-9b", False),
        ("9b", "FLUX.2-klein-base-9B", "klein-base-9b", False),
        ("9b", "flux-2-klein-9b-kv", "klein-9b-kv", False),
        ("dev", "flux2-dev", "dev", False),
    ],
)
def test_variants_are_recognised_with_their_terms(tmp_path, size, name, variant, commercial):
    report = inspect(sparse(tmp_path / f"{name}.safetensors", dit(size)))
    assert report.problems == () and report.exit_code == 0
    assert (report.family, report.component) == ("flux2", "dit")
    assert (report.variant, report.commercial) == (variant, commercial)
    assert VARIANTS[variant] in report.words()
    found = found_in(tmp_path / f"{name}.safetensors")
    assert config_of(found).cached == (variant == "klein-9b-kv")
    schedule = schedule_of(found)
    undistilled = variant == "dev" or "base" in variant
    assert (schedule.steps, schedule.guidance) == ((50, 4.0) if undistilled else (4, 1.0))
    assert schedule.embedded_guidance == (variant == "dev")


def test_a_pipelines_folder_knows_more_than_a_name(tmp_path):
    for index, variant in [
        ({"_class_name": "Flux2KleinKVPipeline"}, "klein-9b-kv"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": False}, "klein-base-9b"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, "klein-9b"),
    ]:
        folder = tmp_path / "base-kv" / "transformer"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "model_index.json").write_text(json.dumps(index))
        sparse(folder / "diffusion_pytorch_model.safetensors", dit("9b"))
        assert found_in(folder).checkpoint.config["variant"] == variant


def test_the_user_may_know_better(tmp_path):
    path = sparse(tmp_path / "mix.safetensors", dit("9b"))
    (note,) = inspect(path).notes
    assert note.startswith("Taken for FLUX.2 klein 9B: nothing in the file or its name says")
    assert "choose so under variant (--variant on the command line)" in note
    (note,) = inspect(sparse(tmp_path / "flux-2-klein-9b.safetensors", dit("9b"))).notes
    assert note == 'Taken for FLUX.2 klein 9B: "klein" is in its name, "base" and "kv" are not.'
    found = find("dit", path, "klein-9b-kv")
    assert config_of(found).cached and schedule_of(found).reason == "chosen"
    with pytest.raises(CheckpointError, match="can be klein-9b or klein-base-9b or klein-9b-kv"):
        find("dit", path, "klein-4b")
    with pytest.raises(CheckpointError, match="no variant schnell"):
        find("dit", path, "schnell")


@pytest.mark.parametrize(
    ("tokens", "steps", "sigmas"),
    [  # stored: 4 steps at 1024 x 1024 and 2048 x 2048
        (4096, 4, [1, 0.9674, 0.9081, 0.7672, 0]),
        (16384, 4, [1, 0.9870, 0.9619, 0.8939, 0]),
    ],
)
def test_schedules_are_the_published_ones(tmp_path, tokens, steps, sigmas):
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2")
    schedule = schedule_of(found_in(sparse(tmp_path / "klein.safetensors", dit("4b"))))
    assert sigmas_for(schedule, None, tokens).tolist() == pytest.approx(sigmas, abs=6e-5)
    mu = schedule.mu
    assert mu is not None
    for count in (20, 4096, 4300, 4301, 16384):
        for many in (4, 28, 50):
            assert mu(count, many) == pytest.approx(
                pipeline.compute_empirical_mu(count, many), abs=1e-12
            )
    assert mu(4096, 4) == pytest.approx(2.2912, abs=1e-4)
    assert len(sigmas_for(schedule, 4, tokens, denoise=0.5)) == 5
