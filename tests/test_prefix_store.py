"""The prefix store gives what would be computed, bit for bit, and computes nothing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.families.qwen_image_21.encoder import cuts
from seedling.model_loaders.families.qwen_image_21.sequence import runs_of, segments_of
from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Task
from seedling.sampling.prefix_codes import pack
from seedling.sampling.prefix_store import Count, PrefixStore
from seedling.sampling.prefix_trunk import StoredBlock

LONG = "a red cup on the blue table, with a lamp, " * 6  # several blocks of words


def picture_of(seed: int, height: int = 64, width: int = 64, channels: int = 3) -> Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


PICTURES = (picture_of(0), picture_of(1, 96, 64), picture_of(2, 64, 64, 4), picture_of(3, 32, 96))
EDIT = Task("a red cup", PICTURES[:2], (64, 64), steps=2, guidance=1.0, resolution=0)


def pictures(pipeline: Pipeline, task: Task) -> list[Tensor]:
    return [event.pixels for event in pipeline.run(task) if isinstance(event, Picture)]


@pytest.fixture(scope="module")
def parts(tiny_model: Any) -> tuple[Any, Any, Any]:
    return load_dit(tiny_model.dit), load_vae(tiny_model.vae), load_encoder(tiny_model.encoder)


@pytest.fixture
def pipeline(parts: Any) -> Pipeline:
    return Pipeline(*parts, store=PrefixStore(1 << 30))


def counted(pipeline: Pipeline, task: Task) -> dict[str, Count]:
    """What a run asked for."""
    pipeline.store.counts.clear()
    pictures(pipeline, task)
    return dict(pipeline.store.counts)


def computed(pipeline: Pipeline, task: Task) -> dict[str, int]:
    return {kind: seen.computed for kind, seen in counted(pipeline, task).items()}


# ---- what it gives is what would be computed ---------------------------------------------------

CHANGES = st.one_of(
    st.tuples(st.just("prompt"), st.sampled_from(["a", "a red cup", LONG, LONG[:-9] + "bird"])),
    st.tuples(st.just("negative"), st.sampled_from(["", "blue", LONG])),
    st.tuples(st.just("guidance"), st.sampled_from([1.0, 2.5])),
    st.tuples(st.just("seed"), st.integers(0, 3)),
    st.tuples(st.just("size"), st.sampled_from([(64, 64), (96, 32), (40, 70), (160, 128)])),
    st.tuples(
        st.just("references"),
        st.lists(st.sampled_from(range(len(PICTURES))), max_size=3).map(tuple),
    ),
    st.tuples(st.just("resolution"), st.sampled_from([0, 64])),
    st.tuples(st.just("strength"), st.sampled_from([None, 0.5, 1.0])),
    st.tuples(st.just("budget"), st.sampled_from([0, 200_000, 1 << 30])),
    st.tuples(st.just("weight"), st.just(None)),
)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    draw = torch.Generator().manual_seed(0)
    name = "transformer_blocks.0.attn.to_v"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(2, 64, generator=draw),
            f"{name}.lora_B.weight": torch.randn(64, 2, generator=draw),
        },
        path,
    )
    return path


@settings(
    max_examples=40, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(edits=st.lists(CHANGES, min_size=2, max_size=6))
def test_random_edits_give_what_a_fresh_run_gives(
    parts: Any, lora: Path, edits: list[tuple[str, Any]]
) -> None:
    """A pipeline that remembers everything against one that remembers nothing, after each edit."""
    kept = Pipeline(*parts, store=PrefixStore(1 << 30))
    weight = kept.dit.module.txt_in.in_layer.weight
    before, task = weight.clone(), EDIT
    try:
        follow(kept, task, lora, edits)
    finally:
        kept.set_loras([])
        weight.copy_(before)


def follow(kept: Pipeline, task: Task, lora: Path, edits: list[tuple[str, Any]]) -> None:
    for what, value in edits:
        if what == "strength":
            kept.set_loras([] if value is None else [(lora, value)])
        elif what == "budget":
            kept.store.budget = value
        elif what == "weight":
            with torch.no_grad():
                kept.dit.module.txt_in.in_layer.weight[0, 0] += 1
        elif what == "references":
            task = replace(task, references=tuple(PICTURES[i] for i in value))
        else:
            task = replace(task, **{what: value})
        (known,) = pictures(kept, task)
        store, kept.store = kept.store, PrefixStore(0)
        (fresh,) = pictures(kept, task)
        kept.store = store
        assert torch.equal(known, fresh), f"after {edits}: {what} = {value}"


def test_runs_may_take_turns(pipeline: Pipeline, parts: Any) -> None:
    """Two runs at once over one trunk: what makes way comes back as it was."""
    tasks = EDIT, replace(EDIT, references=PICTURES[1:3], guidance=2.5, seed=4)
    alone = [pictures(Pipeline(*parts, store=PrefixStore(0)), task)[0] for task in tasks]
    for store in (PrefixStore(1 << 30), PrefixStore(0)):
        pipeline.store = store
        both = [pipeline.run(task) for task in tasks]
        for _ in range(2):
            assert not any(isinstance(next(run), Picture) for run in both)
        for run, expected in zip(both, alone, strict=True):
            made = next(run)
            assert isinstance(made, Picture) and torch.equal(made.pixels, expected)


def test_a_picture_that_changes_in_place_is_another(pipeline: Pipeline) -> None:
    image = PICTURES[0].clone()
    task = replace(EDIT, references=(image,))
    before = pictures(pipeline, task)[0]
    image[:8] = 0
    after = pictures(pipeline, task)[0]
    pipeline.store.clear()
    assert torch.equal(after, pictures(pipeline, task)[0]) and not torch.equal(after, before)


# ---- nothing is computed twice -----------------------------------------------------------------


def test_what_did_not_change_costs_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(pipeline, EDIT)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(pipeline.vae.module, "encode", refuse)
    monkeypatch.setattr(pipeline.encoder.module.model, "read", refuse)
    monkeypatch.setattr(pipeline.encoder.module.model, "look", refuse)
    monkeypatch.setattr(pipeline.dit.module.txt_in, "forward", refuse)
    for change in ({}, {"seed": 5}, {"size": (96, 128)}, {"count": 3}, {"steps": 1}):
        seen = counted(pipeline, replace(EDIT, **change))
        assert all(count.computed == 0 for count in seen.values())
        assert seen["prefix"].asked > 40 and seen["latents"].asked == 2


def tokens_of(pipeline: Pipeline, prompt: str, count: int) -> list[int]:
    """Tokens of the diffusion model in each block of a prompt with the first `count` pictures."""
    encoder = pipeline.encoder.module
    slots = [p.shape[0] * p.shape[1] // 32**2 for p in PICTURES[:count]]
    ids = encoder.tokenizer.prompt(prompt, slots)
    ends = cuts(ids.slots, ids.dropped)
    starts = [ids.dropped, *ends[:-1]]
    return [
        sum(4 if slot else 1 for slot in ids.slots[a:b]) for a, b in zip(starts, ends, strict=True)
    ]


def test_a_new_prompt_computes_its_own_words(pipeline: Pipeline) -> None:
    """And with a long one, only the blocks of 64 from the first change on: the last has the rest
    of less than 64 with it."""
    pictures(pipeline, EDIT)
    again = computed(pipeline, replace(EDIT, prompt="blue"))
    words = tokens_of(pipeline, "blue", 2)[-1]
    assert words < 20
    assert again == {"latents": 0, "words": words, "prefix": words}
    computed(pipeline, replace(EDIT, prompt=LONG))
    changed = LONG[:-9] + "a bird"
    blocks = tokens_of(pipeline, changed, 2)
    assert len(blocks) >= 4 and blocks[2:-1] == [64] * (len(blocks) - 3)
    assert 64 <= blocks[-1] < 128
    again = computed(pipeline, replace(EDIT, prompt=changed))
    assert again["prefix"] in (blocks[-1], sum(blocks[-2:])) and again["latents"] == 0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 100))
def test_encoder_and_dit_cut_at_the_same_tokens(words: list[int], dropped: int) -> None:
    """Words with a picture between them, behind a system turn that the DiT does not read."""
    slots = [False] * dropped
    for count in words:
        slots += [*[False] * count, *[True] * 2]
    slots += [False] * words[0]
    grids = [(2, 4)] * len(words)
    runs = runs_of(segments_of(torch.tensor(slots[dropped:]), grids))
    ends = cuts(slots, dropped)
    tokens = [sum(4 if slot else 1 for slot in slots[dropped:end]) for end in ends]
    assert tokens == [run[-1].end for run in runs]
    alone = [sum(s.end - s.start for s in run) for run in runs if run[-1].grid is None]
    assert all(size < 128 for size in alone) and runs[0][0].start == 0


def test_from_a_swapped_reference_on_everything_is_new(pipeline: Pipeline) -> None:
    task = replace(EDIT, references=PICTURES[:3])
    pictures(pipeline, task)
    first, second, third, words = tokens_of(pipeline, task.prompt, 3)
    swapped = replace(task, references=(PICTURES[0], picture_of(9, 96, 64), PICTURES[2]))
    again = computed(pipeline, swapped)
    assert again["prefix"] == second + third + words
    assert (again["latents"], again["vision"]) == (1, 1), "the third was seen before"
    back = computed(pipeline, task)
    assert set(back.values()) == {0}
    fewer = computed(pipeline, replace(task, references=PICTURES[:2]))
    assert fewer["prefix"] == words and fewer["latents"] == 0
    turned = computed(pipeline, replace(task, references=PICTURES[2::-1]))
    assert turned["prefix"] == sum(tokens_of(pipeline, task.prompt, 3))
    assert (turned["latents"], turned.get("vision", 0)) == (0, 0)


def test_both_branches_of_guidance_share_the_references(pipeline: Pipeline) -> None:
    seen = counted(pipeline, replace(EDIT, guidance=2.5, negative="blue"))
    first, second, words = tokens_of(pipeline, EDIT.prompt, 2)
    other = tokens_of(pipeline, "blue", 2)[-1]
    assert seen["prefix"].computed == first + second + words + other
    assert seen["prefix"].asked == 2 * (first + second) + words + other


def test_a_lora_and_its_strength_are_part_of_the_key(pipeline: Pipeline, lora: Path) -> None:
    pictures(pipeline, EDIT)
    pipeline.set_loras([(lora, 0.5)])
    with_lora = computed(pipeline, EDIT)
    assert with_lora["prefix"] > 40 and with_lora["words"] == with_lora["latents"] == 0
    pipeline.set_loras([])
    assert computed(pipeline, EDIT)["prefix"] == 0
    pipeline.set_loras([(lora, 0.25)])
    assert computed(pipeline, EDIT)["prefix"] > 40


# ---- memory ------------------------------------------------------------------------------------


def row_bytes(pipeline: Pipeline) -> int:
    config = pipeline.dit.config
    return 2 * config.layers * config.dim * 4


def test_there_is_one_copy_however_many_read(pipeline: Pipeline) -> None:
    """At most 1.05 of the keys and values of prompt, references and target, while a run is on."""
    task = replace(EDIT, references=PICTURES[:3], guidance=2.5, size=(128, 128))
    runs = [pipeline.run(replace(task, seed=seed)) for seed in range(3)]
    for run in runs:
        next(run)
    store, target = pipeline.store, 8 * 8
    trunk = store._trunks[pipeline.dit.module]["prefix"]
    used = sum(tokens_of(pipeline, task.prompt, 3)) + tokens_of(pipeline, "", 3)[-1] + target
    held = used * row_bytes(pipeline)
    heads = pipeline.dit.config.heads
    blocks = [b for b in store.entries.values() if isinstance(b, StoredBlock) and b.own]
    apart = sum(b.bytes for b in blocks if b.own and b.own[0][0].shape[1] == heads)
    assert apart > 0, "the words of the branch that does not read now"
    assert trunk.bytes + apart <= 1.05 * held
    assert store.held <= store.bytes <= 1.05 * (store.held + target * row_bytes(pipeline))


def test_the_budget_is_kept(pipeline: Pipeline) -> None:
    pictures(pipeline, replace(EDIT, references=PICTURES[:3]))
    whole = pipeline.store.held
    budget = pipeline.store.budget = whole * 3 // 4
    for seed in range(20, 26):
        pictures(pipeline, replace(EDIT, references=(picture_of(seed),)))
        assert pipeline.store.bytes <= budget
    latest = computed(pipeline, replace(EDIT, references=(picture_of(25),)))
    assert set(latest.values()) == {0}, "what was used last is still there"
    assert computed(pipeline, EDIT)["latents"] > 0, "what was used first is not"
    pipeline.store.budget = 0
    pictures(pipeline, EDIT)
    assert pipeline.store.bytes == 0 and not pipeline.store.entries


def test_blocks_may_wait_in_the_hosts_memory(pipeline: Pipeline) -> None:
    expected = pictures(pipeline, EDIT)[0]
    pipeline.store = PrefixStore(1 << 30, place="host")
    assert torch.equal(pictures(pipeline, EDIT)[0], expected)
    assert pipeline.store._trunks[pipeline.dit.module]["prefix"].bytes == 0
    assert set(computed(pipeline, EDIT).values()) == {0}
    assert torch.equal(pictures(pipeline, EDIT)[0], expected)


@pytest.mark.parametrize("precision, share, error", [("int8", 0.27, 0.01), ("int4", 0.145, 0.13)])
def test_rounded_blocks_are_smaller_and_tell_their_error(
    pipeline: Pipeline, precision: str, share: float, error: float
) -> None:
    exact = pictures(pipeline, EDIT)[0]
    held = sum(b.bytes for b in blocks_of(pipeline, "prefix"))
    pipeline.store = PrefixStore(1 << 30, precision)
    cold = pictures(pipeline, EDIT)[0]
    assert 0 < pipeline.store.error < error
    assert precision in pipeline.store.report() and "error" in pipeline.store.report()
    assert sum(b.bytes for b in blocks_of(pipeline, "prefix")) <= share * held
    assert set(computed(pipeline, EDIT).values()) == {0}
    assert torch.equal(pictures(pipeline, EDIT)[0], cold), "warm is cold, bit for bit"
    assert 0 < (cold - exact).abs().max() < 0.2


def blocks_of(pipeline: Pipeline, kind: str) -> list[Any]:
    trunk: Any = pipeline.store._trunks[pipeline.dit.module][kind]
    return [b if hasattr(b, "bytes") else b() for b in trunk.blocks]


def test_rounding_is_as_good_as_its_bits() -> None:
    x = torch.randn(1, 2, 50, 64)
    x[0, 0, 0] *= 1e-20
    for bits, limit in ((8, 1 / 120), (4, 1 / 6.5)):
        codes = pack(x, bits)
        back = codes.unpack(torch.empty_like(x))
        groups = x.unflatten(-1, (codes.scales.shape[-1], -1)).abs().amax(-1, keepdim=True)
        missed = (back - x).unflatten(-1, (codes.scales.shape[-1], -1)).abs()
        assert bool((missed <= groups * limit / 2 * 1.05).all())
    with pytest.raises(SamplingError, match="keys of 24 channels cannot be kept in 4 bits"):
        pack(torch.randn(1, 1, 1, 24), 4)


# ---- words -------------------------------------------------------------------------------------


def test_the_report_says_what_was_known(pipeline: Pipeline) -> None:
    pictures(pipeline, EDIT)
    pipeline.store.report()
    pictures(pipeline, EDIT)
    asked = sum(tokens_of(pipeline, EDIT.prompt, 2))
    text = pipeline.store.report()
    assert f"{asked} of {asked} tokens (100%)" in text and "2 of 2 latents (100%)" in text
    assert "kept (1.07 GB)" in text
    assert pipeline.store.report().startswith(text[text.rindex("; ") + 2 :][:4])


@pytest.mark.parametrize(
    "given, words",
    [
        ({"budget": "much"}, "budget of the prefix store is 'much'; write auto, off, or a size"),
        ({"budget": -1}, "budget of the prefix store is '-1'"),
        ({"precision": "fp8"}, "'fp8'; choose one of: exact, int8, int4"),
        ({"place": "disk"}, "'disk'; choose one of: device, host"),
    ],
)
def test_senseless_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        PrefixStore(**given)


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"off": 0, "6 GB": 6 * 10**9, "512MiB": 512 << 20, "1.5g": 1_500_000_000, "7": 7}
    assert {words: PrefixStore(words).budget for words in sizes} == sizes
    auto = PrefixStore("auto")
    assert auto.budget is None and auto.limit > 1 << 20
