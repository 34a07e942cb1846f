"""Image sets: what is planned, what each picture sees, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Progress, Task
from seedling.sampling.prefix_store import PrefixStore
from seedling.sampling.sets import (
    Failure,
    contact_sheet,
    count_of,
    in_turn,
    plan_set,
    prompts_of,
    run_set,
)

PROMPTS = "a red cup\na blue cup\nin a house"


def picture_of(seed: int) -> Tensor:
    return torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipeline(tiny_model: Any) -> Pipeline:
    parts = load_dit(tiny_model.dit), load_vae(tiny_model.vae), load_encoder(tiny_model.encoder)
    return Pipeline(*parts, store=PrefixStore(1 << 30))


TASK = Task("", (picture_of(0), picture_of(1)), steps=2, guidance=1.0)


def pictures(events: Iterator[Any]) -> list[Picture]:
    return [event for event in events if isinstance(event, Picture)]


def alone(pipeline: Pipeline, task: Task) -> Tensor:
    (only,) = pictures(pipeline.run(task))
    return only.pixels


# ---- plans -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, prompts",
    [
        ("a cat\n\n a dog ", ["a cat", "a dog"]),
        ("1. a cat\n2. a dog", ["a cat", "a dog"]),
        ("A fox in ink.\n1) asleep\n   by the fire\n2) awake", ["A fox in ink. asleep by the fire",
                                                                "A fox in ink. awake"]),
        ("Panel 1: rain\nPanel 2: sun", ["rain", "sun"]),
        ("第1张：下雨\n第2张：晴天", ["下雨", "晴天"]),
        ("图1、山\n图2、海", ["山", "海"]),
        ("- 1. one\n- 2. two", ["one", "two"]),
        ("12:30 on a clock\n1.5 litres of milk", ["12:30 on a clock", "1.5 litres of milk"]),
        ("3 cats\n4 dogs", ["3 cats", "4 dogs"]),
        ("1. a cat\n3. a dog", ["1. a cat", "3. a dog"]),
        ("", []),
    ],
)  # fmt: skip
def test_prompts_are_lines_or_a_numbered_list(text: str, prompts: list[str]) -> None:
    assert prompts_of(text) == prompts


@pytest.mark.parametrize(
    "text, count",
    [("a cat", 1), ("a\nb\nc", 3), ("a story in four panels", 4), ("6 comic panels of a fox", 6),
     ("画四格漫画", 4), ("两张图", 2), ("twelve angry men", 1), ("900 pictures", 1),
     ("80 images", 64), ("two pictures\n1. a\n2. b\n3. c", 3)],
)  # fmt: skip
def test_the_prompt_says_how_many(text: str, count: int) -> None:
    assert count_of(text) == count and len(plan_set(text)) == count


def test_prompts_start_over_and_seeds_count_up_or_stay() -> None:
    plan = plan_set("a\nb", 3, seed=2**64 - 1)
    assert (plan.prompts, plan.seeds) == (("a", "b", "a"), (2**64 - 1, 0, 1))
    assert plan_set("a\nb", 3, seed=7, same_seed=True).seeds == (7, 7, 7)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"text": " \n"}, "there is no prompt"),
        ({"seeing": "all"}, "painted 'all' by this model; choose one of: independent, sequ"),
        ({"count": 65}, "1 to 64 pictures, 65 were asked for"),
        ({"count": 14, "seeing": "sequential", "references": 2}, "2 references and 14 .* 15"),
        ({"count": 3, "start": 3}, "has 3 pictures and cannot begin with picture 4"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        plan_set(**{"text": "a", **given})
    assert len(plan_set("a", 13, "sequential", references=2)) == 13


# ---- what each picture sees --------------------------------------------------------------------


def test_each_picture_is_what_it_is_alone(pipeline: Pipeline) -> None:
    made = pictures(run_set(pipeline, TASK, plan_set(PROMPTS, seed=5)))
    assert [(p.index, p.seed) for p in made] == [(0, 5), (1, 6), (2, 7)]
    for picture, prompt in zip(made, PROMPTS.splitlines(), strict=True):
        task = replace(TASK, prompt=prompt, seed=picture.seed)
        assert torch.equal(picture.pixels, alone(pipeline, task))


def test_in_sequence_each_is_a_reference_of_the_next(pipeline: Pipeline) -> None:
    made = pictures(run_set(pipeline, TASK, plan_set(PROMPTS, seeing="sequential", seed=5)))
    seen: tuple[Tensor, ...] = ()
    fresh = Pipeline(pipeline.dit, pipeline.vae, pipeline.encoder, PrefixStore(0))
    for picture, prompt in zip(made, PROMPTS.splitlines(), strict=True):
        task = replace(TASK, prompt=prompt, seed=picture.seed, references=(*TASK.references, *seen))
        assert torch.equal(picture.pixels, alone(fresh, task))
        seen = (*seen, picture.pixels)


def test_in_sequence_only_the_new_picture_and_the_words_are_read(pipeline: Pipeline) -> None:
    plan = plan_set("a cup", 4, "sequential")
    counts: list[dict[str, int]] = []
    for event in run_set(pipeline, TASK, plan):
        if isinstance(event, Picture):
            counts.append({kind: c.computed for kind, c in pipeline.store.counts.items()})
            pipeline.store.counts.clear()
    first, *later = counts
    assert (first["latents"], first["vision"]) == (2, 2)
    for seen in later:
        assert (seen["latents"], seen["vision"]) == (1, 1)
        assert seen["prefix"] < first["prefix"], "one picture and the words, not all again"
    assert later[0] == later[1] == later[2]


def test_without_references_all_have_the_size_of_the_first(pipeline: Pipeline) -> None:
    task = Task("", steps=1, guidance=1.0, size=(96, 32))
    made = pictures(run_set(pipeline, task, plan_set("a", 2, "sequential")))
    assert [p.pixels.shape for p in made] == [(32, 96, 3)] * 2


# ---- stopping, failing, going on ---------------------------------------------------------------


def test_a_set_goes_on_where_it_was_stopped(pipeline: Pipeline) -> None:
    for seeing in ("independent", "sequential"):
        whole = pictures(run_set(pipeline, TASK, plan_set(PROMPTS, seeing=seeing)))
        events = run_set(pipeline, TASK, plan_set(PROMPTS, seeing=seeing))
        first = next(event for event in events if isinstance(event, Picture))
        events.close()  # type: ignore[attr-defined]
        rest = plan_set(PROMPTS, seeing=seeing, start=1)
        later = pictures(run_set(pipeline, TASK, rest, [first.pixels]))
        assert [p.index for p in later] == [1, 2]
        for ours, theirs in zip([first, *later], whole, strict=True):
            assert torch.equal(ours.pixels, theirs.pixels)


def test_pictures_come_before_the_next_is_begun(pipeline: Pipeline) -> None:
    events = run_set(pipeline, TASK, plan_set(PROMPTS))
    kinds = [(type(event).__name__, getattr(event, "image", None)) for event in events]
    one = [("Progress", 0), ("Progress", 0), ("Picture", None)]
    assert kinds[:3] == one and kinds[3] == ("Progress", 1)
    assert issubclass(Progress, object) and len(kinds) == 9


@pytest.mark.parametrize("seeing, made", [("independent", [0, 2]), ("sequential", [0])])
def test_a_failure_leaves_what_is_done(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, seeing: str, made: list[int]
) -> None:
    decode, calls = pipeline.vae.module.decode, []

    def failing(latents: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory.\nmore of it")
        return decode(latents)

    monkeypatch.setattr(pipeline.vae.module, "decode", failing)
    events = [
        e for e in run_set(pipeline, TASK, plan_set(PROMPTS, seeing=seeing))
        if not isinstance(e, Progress)
    ]  # fmt: skip
    assert [e.index for e in events if isinstance(e, Picture)] == made
    (failure,) = (e for e in events if isinstance(e, Failure))
    assert failure.text == "picture 2 failed: out of memory."


def test_a_sequence_needs_what_it_goes_on_from() -> None:
    plan = plan_set(PROMPTS, seeing="sequential", start=2)
    with pytest.raises(
        SamplingError, match="picture 3 .* the 2 before it are needed; 1 were given"
    ):
        next(in_turn(plan, lambda k, before: iter(()), [picture_of(0)]))


def test_cancelling_is_no_failure() -> None:
    class Cancelled(Exception):
        pass

    def make(k: int, before: Any) -> Iterator[Picture]:
        raise Cancelled
        yield

    with pytest.raises(Cancelled):
        next(in_turn(plan_set("a"), make))


# ---- contact sheet -----------------------------------------------------------------------------


def test_a_contact_sheet_shows_all_in_order() -> None:
    colours = [torch.full((64, 32, 3), k / 10) for k in range(3)]
    colours.append(torch.cat([torch.zeros(16, 64, 3), torch.zeros(16, 64, 1)], dim=-1))
    sheet = contact_sheet(colours, side=32, gap=4)
    assert sheet.shape == (2 * 32 + 3 * 4, 2 * 32 + 3 * 4, 3)
    middle = [(4 + 16, 4 + 16), (4 + 16, 40 + 16), (40 + 16, 4 + 16), (40 + 16, 40 + 16)]
    shown = [round(float(sheet[y, x, 0]), 4) for y, x in middle]
    assert shown == [0.0, 0.1, 0.2, 1.0], "transparent is white"
    assert torch.equal(sheet[:4], torch.ones_like(sheet[:4]))
    with pytest.raises(SamplingError, match="at least one picture"):
        contact_sheet([])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("combine image 2 and image 3", 1),
        ("put the star of image 2 in pictures of snow", 1),
        ("like the picture 4 images above", 1),
        ("a story in twenty-four panels", 1),
        ("a story in four panels", 4),
        ("a 4-panel story of three cats", 4),
        ("six small pictures of a fox", 6),
        ("画十二张图", 12),
        ("二十张", 20),
        ("二十四格漫画", 24),
        ("两张图片", 2),
        ("像第三张那样", 1),
        ("12张", 12),
    ],
)
def test_numbers_that_are_counts_and_others(text: str, count: int) -> None:
    assert count_of(text) == count
