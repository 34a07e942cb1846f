"""How a checkpoint wants to be sampled, and under which terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.family import Schedule
from seedling.model_loaders.load import load_dit

DIT = DiTConfig(
    in_channels=8, layers=2, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return DiT(DIT)


def save_dit(path: Path, dit: DiT, config: dict | None = None, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata |= {"config": json.dumps(config)} if config else {}
    save_file(dit.state_dict(), path, metadata)
    return path


def schedule_of(path: Path) -> Schedule:
    schedule = load_dit(path).schedule
    assert schedule is not None
    return schedule


def sigmas_of(schedule: Schedule) -> list[float]:
    return list(schedule.sigmas or ())


TURBO = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0]


def test_the_base_schedule_is_the_published_one(tmp_path, dit):
    schedule = schedule_of(save_dit(tmp_path / "x.safetensors", dit))
    assert (schedule.name, schedule.steps, schedule.guidance) == ("base", 40, 1.0)
    assert (schedule.base_shift, schedule.max_shift, schedule.terminal) == (0.5, 0.9, 0.02)
    assert (schedule.base_tokens, schedule.max_tokens, schedule.sigmas) == (256, 8192, None)


def test_turbo_is_known_by_its_sigmas(tmp_path, dit):
    folder = tmp_path / "pipe"
    save_dit(folder / "transformer" / "x.safetensors", dit)
    (folder / "model_index.json").write_text(json.dumps({"sample_sigmas": TURBO[:-1]}))
    for path in (folder, folder / "transformer", folder / "transformer" / "x.safetensors"):
        schedule = schedule_of(path)
        assert (schedule.name, schedule.steps) == ("turbo", 8)
        assert sigmas_of(schedule) == TURBO and "model_index.json" in schedule.reason
    path = save_dit(tmp_path / "y.safetensors", dit, sample_sigmas=json.dumps(TURBO))
    schedule = schedule_of(path)
    assert sigmas_of(schedule) == TURBO and "metadata" in schedule.reason


def test_a_name_is_only_a_hint_and_says_so(tmp_path, dit):
    schedule = schedule_of(save_dit(tmp_path / "Qwen-Turbo-8.safetensors", dit))
    assert sigmas_of(schedule) == TURBO and 'called "turbo"' in schedule.reason
    schedule = schedule_of(save_dit(tmp_path / "viggle-turbo-6step.safetensors", dit))
    assert (schedule.steps, schedule.sigmas, schedule.terminal) == (6, None, None)


def test_a_file_of_its_own_says_how_and_under_which_terms(tmp_path, dit):
    config = {
        "schedule": {"name": "seedling-tiny", "steps": 12, "guidance": 2.5, "terminal": None},
        "resolution": 128, "title": "Seedling tiny", "licence": "Apache-2.0",
    }  # fmt: skip
    loaded = load_dit(save_dit(tmp_path / "turbo.safetensors", dit, config=config))
    schedule = loaded.schedule
    assert schedule is not None
    assert (schedule.name, schedule.steps, schedule.guidance) == ("seedling-tiny", 12, 2.5)
    assert schedule.terminal is None and schedule.sigmas is None
    assert "config" in schedule.reason
    assert loaded.licence.name == "Apache-2.0" and loaded.licence.commercial
    config["schedule"] = {"sigmas": [1.0, 0.5]}
    schedule = schedule_of(save_dit(tmp_path / "z.safetensors", dit, config=config))
    assert schedule.sigmas == (1.0, 0.5, 0.0) and schedule.steps == 2


def test_the_licence_is_the_familys_where_nothing_else_is_said(tmp_path, dit):
    loaded = load_dit(save_dit(tmp_path / "x.safetensors", dit))
    assert loaded.licence.name == "Qwen Research Licence" and not loaded.licence.commercial
    assert "Built with Qwen" in loaded.licence.notice
