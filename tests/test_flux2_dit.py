"""The DiT of FLUX.2 against diffusers on the same random weights, fp32."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.families.flux2.dit import DiT, DiTConfig
from seedling.model_loaders.families.flux2.positions import picture_positions, reference_positions

transformer_flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")

CONFIG = DiTConfig(
    in_channels=8, double=2, single=3, heads=2, head_dim=16, context_dim=24, mlp_dim=96,
    axes=(4, 4, 4, 4),
)  # fmt: skip
WORDS = 7
GRIDS = [[], [(4, 6)], [(3, 5), (4, 6), (2, 2), (6, 1)]]


def split_norm_out(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights under our names: its `norm_out.linear` is scale above shift."""
    weights = dict(weights)
    scale, shift = weights.pop("norm_out.linear.weight").chunk(2)
    return {**weights, "norm_out.scale.weight": scale, "norm_out.shift.weight": shift}


def oracle_and_ours(config: DiTConfig = CONFIG) -> tuple[torch.nn.Module, DiT]:
    torch.manual_seed(0)
    oracle = transformer_flux2.Flux2Transformer2DModel(
        in_channels=config.in_channels, num_layers=config.double, num_single_layers=config.single,
        attention_head_dim=config.head_dim, num_attention_heads=config.heads,
        joint_attention_dim=config.context_dim, axes_dims_rope=config.axes,
        guidance_embeds=config.guided,
    ).eval()  # fmt: skip
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = DiT(config)
    ours.load_state_dict(split_norm_out(oracle.state_dict()), strict=True)
    if config.cached:
        for block in oracle.transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
        for block in oracle.single_transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return oracle, ours.eval()


def ids(time: int, height: int, width: int) -> Tensor:
    """Position ids as the published pipelines make them."""
    one = torch.arange(1)
    return torch.cartesian_prod(one + time, torch.arange(height), torch.arange(width), one)


def packed(latents: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten(2).transpose(1, 2) for x in latents], dim=1)


def oracle_velocity(oracle, x, t, text, references=(), **extra) -> Tensor:
    """The published pipelines' call, without a cache."""
    h, w = x.shape[-2:]
    own = [ids(10 * i, *r.shape[-2:]) for i, r in enumerate(references, start=1)]
    pictures, positions = [x, *references], [ids(0, h, w), *own]
    words = torch.arange(text.shape[1])
    out = oracle(
        hidden_states=packed(pictures), encoder_hidden_states=text, timestep=t,
        img_ids=torch.cat(positions), txt_ids=torch.nn.functional.pad(words[:, None], (3, 0)),
        return_dict=False, **extra,
    )  # fmt: skip
    return out[0][:, : h * w].transpose(1, 2).unflatten(2, (h, w))


def error(ours: Tensor, theirs: Tensor) -> float:
    """In parts of the range; `pytest -rP` shows them all."""
    found = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    logging.warning("error %.1e", found)
    return found


def drawn(grids, batch: int = 1) -> tuple[Tensor, list[Tensor]]:
    text = torch.randn(batch, WORDS, CONFIG.context_dim)
    return text, [torch.randn(batch, CONFIG.in_channels, h, w) for h, w in grids]


@pytest.mark.parametrize("target", [(4, 6), (5, 3)])
@pytest.mark.parametrize("grids", GRIDS, ids=len)
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_velocity_equals_diffusers(grids, target, guided):
    oracle, ours = oracle_and_ours(replace(CONFIG, guided=guided))
    text, references = drawn(grids)
    prefix = ours.prefix(text, None, references, guidance=3.0)
    extra = {"guidance": torch.tensor([3.0])} if guided else {}
    for time in (1.0, 0.61, 0.02):
        x, t = torch.randn(1, CONFIG.in_channels, *target), torch.tensor([time])
        theirs = oracle_velocity(oracle, x, t, text, references, **extra)
        got = ours(x, t, prefix)
        assert error(got, theirs) < 1e-4
        (known,) = ours.modulations([time], x.dtype)
        assert (known is None) == guided and torch.equal(ours(x, t, prefix, known), got)


@pytest.mark.parametrize("grids", GRIDS, ids=len)
@torch.no_grad()
def test_cached_references_equal_diffusers(grids):
    """One prefix is what diffusers computes anew in any step, and what it reads from its cache."""
    oracle, ours = oracle_and_ours(replace(CONFIG, cached=True))
    text, references = drawn(grids)
    prefix = ours.prefix(text, None, references)
    x, t = torch.randn(1, CONFIG.in_channels, 4, 6), torch.tensor([1.0])
    if not grids:
        assert error(ours(x, t, prefix), oracle_velocity(oracle, x, t, text)) < 1e-4
        return
    h, w = x.shape[-2:]
    own = [ids(10 * i, *r.shape[-2:]) for i, r in enumerate(references, start=1)]
    call = {"encoder_hidden_states": text, "return_dict": False}
    call["txt_ids"] = torch.nn.functional.pad(torch.arange(WORDS)[:, None], (3, 0))
    many = packed(references).shape[1]
    cache = None
    for time in (1.0, 0.61, 0.02):
        x, t = torch.randn(1, CONFIG.in_channels, 4, 6), torch.tensor([time])
        got = ours(x, t, prefix)
        out, new = oracle(
            hidden_states=packed([*references, x]), timestep=t, kv_cache_mode="extract",
            img_ids=torch.cat([*own, ids(0, h, w)]), num_ref_tokens=many, **call,
        )  # fmt: skip
        assert error(got, out.transpose(1, 2).unflatten(2, (h, w))) < 1e-4
        cache = cache or new
        out = oracle(
            hidden_states=packed([x]), timestep=t, img_ids=ids(0, h, w), kv_cache=cache,
            kv_cache_mode="cached", **call,
        )  # fmt: skip
        assert error(got, out[0].transpose(1, 2).unflatten(2, (h, w))) < 1e-4


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_one_prefix_serves_every_step_size_and_batch(cached):
    _, ours = oracle_and_ours(replace(CONFIG, cached=cached))
    text, references = drawn([(4, 4), (3, 2)])
    shared = ours.prefix(text, None, references)
    x, t = torch.randn(3, CONFIG.in_channels, 4, 6), torch.tensor([0.9, 0.5, 0.1])
    together = ours(x, t, shared)
    ours(torch.randn(1, CONFIG.in_channels, 8, 8), t[:1], shared)  # another size in between
    for i in range(3):
        fresh = ours.prefix(text, None, references, room=24)
        alone = ours(x[i : i + 1], t[i : i + 1], fresh)
        assert torch.equal(alone, ours(x[i : i + 1], t[i : i + 1], shared))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_the_path_with_gradients_is_the_same_function(cached):
    _, ours = oracle_and_ours(replace(CONFIG, cached=cached))
    text, references = drawn([(4, 4)], batch=2)
    x, t = torch.randn(2, CONFIG.in_channels, 4, 6), torch.tensor([0.9, 0.5])
    trained = ours(x, t, ours.prefix(text, None, references))
    with torch.no_grad():
        torch.testing.assert_close(trained, ours(x, t, ours.prefix(text, None, references)))
    trained.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


@torch.no_grad()
def test_a_reference_of_the_targets_size_lies_on_its_grid():
    """Same rows and columns, whatever the number of references; only the times differ."""
    target = picture_positions(0, 5, 3)
    first, second = reference_positions([(5, 3), (5, 3)]).split(15)
    assert torch.equal(first[:, 1:], target[:, 1:]) and torch.equal(second[:, 1:], target[:, 1:])
    assert target[:, 0].unique().tolist() == [0]
    assert first[:, 0].unique().tolist() == [10] and second[:, 0].unique().tolist() == [20]
