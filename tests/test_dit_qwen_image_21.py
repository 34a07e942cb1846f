"""The DiT of Qwen-Image-2.1 against diffusers on the same random weights, fp32."""

from __future__ import annotations

import math

import pytest
import torch

from seedling.model_loaders.embeddings import grid_positions
from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.families.qwen_image_21.sequence import (
    SLOT,
    prefix_positions,
    segments_of,
)

transformer_qwenimage21 = pytest.importorskip(
    "diffusers.models.transformers.transformer_qwenimage21"
)

CONFIG = DiTConfig(
    in_channels=8, layers=3, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)


def oracle_and_ours() -> tuple[torch.nn.Module, DiT]:
    torch.manual_seed(0)
    oracle = transformer_qwenimage21.QwenImage21Transformer2DModel(
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.in_channels,
        num_layers=CONFIG.layers,
        attention_head_dim=CONFIG.head_dim,
        num_attention_heads=CONFIG.heads,
        context_in_dim=CONFIG.context_dim,
        mlp_ratio=3,
        axes_dims_rope=CONFIG.axes,
    ).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = DiT(CONFIG)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, ours.eval()


def conversation(grids: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random encoder states and slots: words, then every image between words, then words."""
    slots = [False] * 5
    for h, w in grids:
        slots += [False, *[True] * (h * w // 4), False]
    slots += [False] * 7
    return torch.randn(1, len(slots), CONFIG.context_dim), torch.tensor(slots)


def oracle_velocity(oracle, x, t, text, slots, references, cache=None, mode=None):
    grids = [(r.shape[-2], r.shape[-1]) for r in [*references, x]]
    packed = torch.cat([r.flatten(2).transpose(1, 2) for r in [*references, x]], dim=1)
    target = math.prod(grids[-1])
    mask = torch.cat([slots, torch.ones(target // 4, dtype=torch.bool)])[None]
    out = oracle(
        hidden_states=packed,
        encoder_hidden_states=text,
        timestep=t,
        img_shapes=[[(1, h, w) for h, w in grids]],
        img_mask=mask,
        kv_cache=cache,
        kv_cache_mode=mode,
        return_dict=False,
    )[0]
    return out[:, -target:].transpose(1, 2).unflatten(2, grids[-1])


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("target", [(4, 4), (6, 10), (2, 14)])
@pytest.mark.parametrize("grids", [[], [(4, 4)], [(2, 6), (6, 2), (10, 6)]])
@torch.no_grad()
def test_velocity_equals_diffusers(grids, target):
    oracle, ours = oracle_and_ours()
    text, slots = conversation(grids)
    references = [torch.randn(1, CONFIG.in_channels, h, w) for h, w in grids]
    prefix = ours.prefix(text, slots, references)
    cache = transformer_qwenimage21.QwenImage21KVCache(CONFIG.layers)
    for mode, time in [("extract", 1.0), ("cached", 0.61), ("cached", 0.02)]:
        x, t = torch.randn(1, CONFIG.in_channels, *target), torch.tensor([time])
        got = ours(x, t, prefix)
        assert error(got, oracle_velocity(oracle, x, t, text, slots, references)) < 1e-4
        theirs = oracle_velocity(oracle, x, t, text, slots, references, cache, mode)
        assert error(got, theirs) < 1e-4


@torch.no_grad()
def test_one_prefix_serves_every_step_size_and_batch_bit_for_bit():
    _, ours = oracle_and_ours()
    grids = [(4, 4), (6, 2)]
    text, slots = conversation(grids)
    references = [torch.randn(1, CONFIG.in_channels, h, w) for h, w in grids]
    shared = ours.prefix(text, slots, references)
    x, t = torch.randn(3, CONFIG.in_channels, 4, 6), torch.tensor([0.9, 0.5, 0.1])
    together = ours(x, t, shared)
    ours(torch.randn(1, CONFIG.in_channels, 8, 8), t[:1], shared)  # another size in between
    for i in range(3):
        fresh = ours.prefix(text, slots, references, room=24)
        alone = ours(x[i : i + 1], t[i : i + 1], fresh)
        assert torch.equal(alone, ours(x[i : i + 1], t[i : i + 1], shared))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_the_path_with_gradients_is_the_same_function():
    _, ours = oracle_and_ours()
    text, slots = conversation([(4, 4)])
    text, reference = text.expand(2, -1, -1), torch.randn(2, CONFIG.in_channels, 4, 4)
    x, t = torch.randn(2, CONFIG.in_channels, 4, 6), torch.tensor([0.9, 0.5])
    trained = ours(x, t, ours.prefix(text, slots, [reference]))
    with torch.no_grad():
        torch.testing.assert_close(trained, ours(x, t, ours.prefix(text, slots, [reference])))
    trained.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_adjacent_references_stay_separate_blocks():
    slots = torch.tensor([False, True, True, True, False])
    segments = segments_of(slots, [(2, 4), (2, 2)])
    assert [(s.start, s.end, s.grid) for s in segments] == [
        (0, 1, None),
        (1, 9, (2, 4)),
        (9, 13, (2, 2)),
        (13, 14, None),
    ]


def test_slots_and_references_that_do_not_match_are_refused_in_words():
    with pytest.raises(ValueError, match="2 image slots .8 latent tokens. but .* 16 tokens"):
        segments_of(torch.tensor([False, True, True]), [(4, 4)])


def test_published_names_and_shapes_are_all_accounted_for():
    with torch.device("meta"):
        published = transformer_qwenimage21.QwenImage21Transformer2DModel()
    ours = DiT(DiTConfig(), device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(7.1e9, rel=0.01)


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 2)])
def test_equal_sizes_stand_on_one_grid(grid: tuple[int, int]) -> None:
    """A token of the target and those of references at its place differ in the frame only."""
    picture = [True] * (grid[0] * grid[1] // SLOT)
    slots = torch.tensor([False, *picture, False, False, *picture, False])
    segments = segments_of(slots, [grid, grid])
    positions, frame = prefix_positions(segments)
    target = grid_positions(frame, *grid)
    for reference in (s for s in segments if s.grid is not None):
        where = positions[reference.start : reference.end]
        assert torch.equal(where[:, 1:], target[:, 1:])
        assert (where[:, 0] < frame).all()
