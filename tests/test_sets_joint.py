"""Joint sets: pictures that are painted at once, each behind its own prefix, and see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.embeddings import grid_positions, rotation
from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Progress, Task
from seedling.sampling.prefix_store import PrefixStore
from seedling.sampling.sets import Failure, plan_set, run_set
from seedling.sampling.task import Member

LONG = "a red cup on the blue table, with a lamp, " * 4  # two blocks of words
CONFIG = DiTConfig(
    in_channels=8, layers=3, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)


def picture_of(seed: int) -> Tensor:
    return torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(seed))


TASK = Task("", (picture_of(0), picture_of(1)), steps=2, guidance=1.0)
MEMBERS = Member("a red cup", 5, 0), Member(LONG, 6, 1), Member("at night", 7, 2)


@pytest.fixture
def pipeline(tiny_model: Any) -> Pipeline:
    parts = load_dit(tiny_model.dit), load_vae(tiny_model.vae), load_encoder(tiny_model.encoder)
    return Pipeline(*parts, store=PrefixStore(1 << 30))


def pictures(events: Iterator[Any]) -> list[Tensor]:
    return [event.pixels for event in events if isinstance(event, Picture)]


def painted(pipeline: Pipeline, *members: Member, **more: Any) -> list[Tensor]:
    return pictures(pipeline.run(replace(TASK, together=members, **more)))


# ---- what it is --------------------------------------------------------------------------------


@torch.no_grad()
def test_every_row_sees_its_prefix_and_all_rows_where_they_lie() -> None:
    """Against a network that turns each key once, by its whole position as a row sees it."""
    torch.manual_seed(0)
    dit, (h, w) = DiT(CONFIG).eval(), (4, 6)
    for weight in dit.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    reference, x = torch.randn(1, 8, 4, 4), torch.randn(3, 8, h, w)
    prefixes = []
    for words in (3, 9, 3):
        slots = torch.tensor([False, *[True] * 4, *[False] * words])
        text = torch.randn(1, len(slots), CONFIG.context_dim)
        prefixes.append(dit.prefix(text, slots, [reference]))
    places = (4, 0, 1)
    made = dit(x, torch.full((3,), 0.7), dit.joint(prefixes, places))

    def turn(viewer: int, other: int) -> Tensor:
        apart = (places[other] - places[viewer]) * max(h, w)
        grid = grid_positions(prefixes[viewer].position + apart, h, w)
        return rotation(grid, CONFIG.axes, CONFIG.theta)

    tokens = [dit.img_in(row.flatten(1).T[None]) for row in x]
    embedding, (scale1, gate1, scale2, gate2) = dit._modulate(torch.tensor([0.7]), torch.float32)
    blocks: list[Any] = [*dit.transformer_blocks]
    for layer, block in enumerate(blocks):
        normed = [block.img_norm1(row) * scale1 for row in tokens]
        out = []
        for k, prefix in enumerate(prefixes):
            keys, values = (y[:, :, : prefix.kept.length] for y in prefix.kept.layer(layer))
            pairs = [block.attn.keys_values(normed[j], turn(k, j)) for j in range(3)]
            keys = torch.cat([keys, *(pair[0] for pair in pairs)], dim=2)
            values = torch.cat([values, *(pair[1] for pair in pairs)], dim=2)
            q = block.attn.queries(normed[k], turn(k, k))
            shares = (q @ keys.transpose(2, 3) / CONFIG.head_dim**0.5).softmax(dim=-1)
            row = tokens[k] + gate1 * block.attn.merge(shares @ values)
            out.append(row + gate2 * block.img_mlp(block.img_norm2(row) * scale2))
        tokens = out
    expected = torch.cat([dit.proj_out(dit.norm_out(row, embedding)) for row in tokens])
    expected = expected.transpose(1, 2).unflatten(2, (h, w))
    assert (made - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("shown", [0, 2])
def test_one_alone_is_an_independent_picture(
    pipeline: Pipeline, guidance: float, shown: int
) -> None:
    """Bit for bit."""
    task = replace(TASK, references=TASK.references[:shown], guidance=guidance, negative="blue")
    (alone,) = pictures(pipeline.run(replace(task, prompt="a red cup", seed=5)))
    (only,) = pictures(pipeline.run(replace(task, together=(Member("a red cup", 5, 3),))))
    assert torch.equal(only, alone)


def test_permuted_members_are_permuted_pictures(pipeline: Pipeline) -> None:
    one, two, three = painted(pipeline, *MEMBERS)
    turned = painted(pipeline, MEMBERS[2], MEMBERS[0], MEMBERS[1])
    for ours, theirs in zip(turned, (three, one, two), strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    moved = painted(pipeline, replace(MEMBERS[0], place=9), *MEMBERS[1:])
    assert (moved[0] - one).abs().max() > 1e-4, "a place has a say"


def test_they_see_each_other(pipeline: Pipeline) -> None:
    one, two, three = painted(pipeline, *MEMBERS)
    (alone,) = painted(pipeline, MEMBERS[0])
    assert (one - alone).abs().max() > 1e-3
    other, same, _ = painted(pipeline, replace(MEMBERS[0], seed=99), *MEMBERS[1:])
    assert (same - two).abs().max() > 1e-4 and (other - one).abs().max() > 1e-2


# ---- over the store ----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_warm_is_cold(pipeline: Pipeline, guidance: float) -> None:
    more = {"guidance": guidance, "negative": "blue"}
    cold = painted(pipeline, *MEMBERS, **more)
    pipeline.store.counts.clear()
    warm = painted(pipeline, *MEMBERS, **more)
    assert {kind: seen.computed for kind, seen in pipeline.store.counts.items()} == {
        "latents": 0, "words": 0, "prefix": 0,
    }  # fmt: skip
    pipeline.store = PrefixStore(0)
    for ours, known, fresh in zip(cold, warm, painted(pipeline, *MEMBERS, **more), strict=True):
        assert torch.equal(ours, known) and torch.equal(ours, fresh)


def test_references_are_read_once_for_all(pipeline: Pipeline) -> None:
    painted(pipeline, *MEMBERS)
    seen = pipeline.store.counts
    assert (seen["latents"].computed, seen["vision"].computed) == (2, 2)
    both = 2 * 16  # latent tokens of the references, which the first member reads for all
    assert seen["prefix"].asked - seen["prefix"].computed >= (len(MEMBERS) - 1) * both


def test_it_shares_a_store_with_other_runs(pipeline: Pipeline) -> None:
    """Blocks that another run moves away are put back at every step."""
    tasks = replace(TASK, together=MEMBERS), replace(TASK, prompt=LONG, references=())
    alone = [pictures(pipeline.run(task)) for task in tasks]
    both = [pipeline.run(task) for task in tasks]
    for _ in range(TASK.steps or 0):
        assert all(isinstance(next(run), Progress) for run in both)
    for run, expected in zip(both, alone, strict=True):
        for ours, theirs in zip(pictures(run), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_rounded_prefixes_serve_too(pipeline: Pipeline) -> None:
    exact = painted(pipeline, *MEMBERS)
    pipeline.store = PrefixStore(1 << 30, "int8")
    rounded = painted(pipeline, *MEMBERS)
    off = max(float((a - b).abs().max()) for a, b in zip(exact, rounded, strict=True))
    assert 0 < off < 0.2
    assert all(map(torch.equal, painted(pipeline, *MEMBERS), rounded))


# ---- sets --------------------------------------------------------------------------------------


def test_a_joint_set_paints_all_at_once(pipeline: Pipeline) -> None:
    plan = plan_set("a red cup\na blue cup\nin a house", seeing="joint", seed=5, references=2)
    events = list(run_set(pipeline, TASK, plan))
    assert [type(event) for event in events] == [Progress] * 2 + [Picture] * 3
    made = [event for event in events if isinstance(event, Picture)]
    assert [(p.index, p.seed) for p in made] == [(0, 5), (1, 6), (2, 7)]
    members = [Member(prompt, 5 + k, k) for k, prompt in enumerate(plan.prompts)]
    expected = painted(pipeline, *members, size=(64, 64))
    assert all(torch.equal(p.pixels, other) for p, other in zip(made, expected, strict=True))


def test_a_failure_keeps_what_was_decoded(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = pipeline.vae.module.decode, []

    def failing(latents: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(latents)

    monkeypatch.setattr(pipeline.vae.module, "decode", failing)
    events = list(run_set(pipeline, TASK, plan_set("a\nb\nc", seeing="joint")))
    assert [type(event) for event in events[2:]] == [Picture, Failure]
    failure = events[-1]
    assert isinstance(failure, Failure) and failure.text == "picture 2 failed: out of memory."


@pytest.mark.parametrize(
    "given, words",
    [
        ({"count": 14, "references": 2}, "2 references and 14 pictures that see each other"),
        ({"count": 3, "start": 1}, "painted at once cannot go on from finished ones"),
    ],
)
def test_a_joint_set_that_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        plan_set("a", seeing="joint", **given)


def test_a_batch_of_joint_sets_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(SamplingError, match="are one of each; set count to 1"):
        pipeline.plan(replace(TASK, together=MEMBERS, count=2))


def test_a_model_that_cannot_says_so(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other family: none of their networks has a `joint`."""
    from seedling.model_loaders.families.flux2.dit import DiT as Flux2
    from seedling.model_loaders.families.qwen_image.dit import DiT as QwenImage

    assert not hasattr(Flux2, "joint") and not hasattr(QwenImage, "joint")
    monkeypatch.delattr(DiT, "joint")
    with pytest.raises(SamplingError, match=r"cannot paint pictures at once .* \(joint\); choose"):
        run_set(pipeline, TASK, plan_set("a\nb", seeing="joint"))
