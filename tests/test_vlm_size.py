"""References that the text encoder sees in another size than the VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seedling.host.cli import main
from seedling.host.recipe import read_recipe
from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.model_loaders.pictures import resize
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Task
from seedling.sampling.prefix_store import PrefixStore


def picture_of(seed: int, height: int = 128, width: int = 128) -> Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


TASK = Task("a red cup", (picture_of(0), picture_of(1, 64, 128)), (64, 64), 2, 1.0, resolution=0)


@pytest.fixture
def pipeline(tiny_model: Any) -> Pipeline:
    parts = load_dit(tiny_model.dit), load_vae(tiny_model.vae), load_encoder(tiny_model.encoder)
    return Pipeline(*parts, store=PrefixStore(1 << 30))


def picture(pipeline: Pipeline, task: Task) -> Tensor:
    (only,) = (event.pixels for event in pipeline.run(task) if isinstance(event, Picture))
    return only


def test_only_what_the_encoder_sees_changes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown the small picture; the DiT gets the large one's latents, and as many tokens."""
    seen: list[Any] = []
    encode = pipeline.encoder.module.encode

    def watched(prompt: str, images: Any, store: Any = None) -> Any:
        seen.append([x.clone() for x in images])
        return encode(prompt, images, store)

    monkeypatch.setattr(pipeline.encoder.module, "encode", watched)
    plain = picture(pipeline, TASK)
    before = dict(pipeline.store.counts)
    pipeline.store.counts.clear()
    small = picture(pipeline, replace(TASK, vlm_resolution=(64, 0)))
    first, second = seen[1]
    assert torch.equal(first, resize(TASK.references[0], (64, 64)))
    assert torch.equal(second, seen[0][1])
    assert pipeline.store.counts["prefix"].asked == before["prefix"].asked
    assert pipeline.store.counts["latents"].computed == 0, "the VAE sees what it saw"
    saved = before["words"].asked - pipeline.store.counts["words"].asked
    assert saved == (128 * 128 - 64 * 64) // 32**2
    assert (small - plain).abs().max() > 1e-3
    fresh = Pipeline(pipeline.dit, pipeline.vae, pipeline.encoder, PrefixStore(0))
    assert torch.equal(picture(fresh, replace(TASK, vlm_resolution=(64, 0))), small)


def test_the_same_size_is_no_change(pipeline: Pipeline) -> None:
    task = replace(TASK, references=TASK.references[:1])
    assert torch.equal(picture(pipeline, replace(task, vlm_resolution=(128,))),
                       picture(pipeline, task))  # fmt: skip


def test_the_last_size_holds_for_those_that_follow(pipeline: Pipeline) -> None:
    task = replace(TASK, references=(*TASK.references, picture_of(2)))
    assert replace(task, vlm_resolution=(64, 96)).vlm_sides == (64, 96, 96)
    assert replace(task, vlm_resolution=(64,)).vlm_sides == (64, 64, 64)
    assert task.vlm_sides == (0, 0, 0)
    assert pipeline.plan(replace(task, vlm_resolution=(64, 0))).vlm_tokens == (4, 8, 16)
    assert pipeline.plan(task).vlm_tokens == ()


@pytest.mark.parametrize("side", [16, 5000, -64])
def test_a_senseless_size_is_refused(pipeline: Pipeline, side: int) -> None:
    with pytest.raises(SamplingError, match=f"cannot see a reference at {side}; .* 32 to 4096"):
        pipeline.plan(replace(TASK, vlm_resolution=(64, side)))


def test_an_encoder_that_does_not_look_says_so(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seedling.model_loaders.families.flux2 import FAMILY

    assert FAMILY.own_size is None
    monkeypatch.setattr(pipeline, "family", replace(pipeline.family, own_size=None))
    with pytest.raises(SamplingError, match="does not look at references; leave out"):
        pipeline.plan(replace(TASK, vlm_resolution=(64,)))


def test_the_command_line_says_the_cost_and_the_recipe_keeps_it(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((128, 128), 90).convert("RGB").save("ref.png")
    weights = ["--dit", tiny_model.dit, "--vae", tiny_model.vae, "--encoder", tiny_model.encoder]
    words = ["a red cup", "--reference", "ref.png", "--resolution", 128, "--steps", 2, *weights]

    def run(*more: object) -> str:
        assert main([str(word) for word in ("generate", *more)]) == 0
        return capsys.readouterr().out

    assert "image 1 at 128 x 128 (64 tokens) with" in run(*words, "--seed", 3, "--out", "a.png")
    said = run(*words, "--seed", 3, "--vlm-resolution", 64, "--out", "b.png")
    assert "image 1 at 128 x 128 (64 tokens, 4 of the text encoder) with" in said
    assert read_recipe(Path("b.png")).vlm_resolution == (64,)
    a, b = (np.array(Image.open(name)) for name in ("a.png", "b.png"))
    assert not np.array_equal(a, b)
    run("--from", "b.png", "--out", "again.png")
    assert np.array_equal(np.array(Image.open("again.png")), b)
