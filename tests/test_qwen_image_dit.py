"""The DiT of Qwen-Image against diffusers on the same random weights, fp32."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.families.qwen_image.dit import DiT, DiTConfig, pack, unpack
from seedling.quant.operations import widened

oracle_module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")

CONFIG = DiTConfig(
    in_channels=16, out_channels=4, layers=3, heads=2, head_dim=32, context_dim=24, mlp_dim=256,
    axes=(4, 14, 14),
)  # fmt: skip
WORDS = 7
KINDS = {
    "plain": CONFIG,
    "zero_cond_t": replace(CONFIG, zero_cond_t=True),
    "layered": replace(CONFIG, layered=True),
}


def oracle_and_ours(config: DiTConfig) -> tuple[torch.nn.Module, DiT]:
    torch.manual_seed(0)
    oracle = oracle_module.QwenImageTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_dim,
        axes_dims_rope=config.axes,
        zero_cond_t=config.zero_cond_t,
        use_additional_t_cond=config.layered,
        use_layer3d_rope=config.layered,
    ).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = DiT(config)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, ours.eval()


def latents(*grids: tuple[int, int]) -> list[Tensor]:
    """Random latents of so many tokens."""
    return [torch.randn(1, CONFIG.out_channels, 2 * h, 2 * w) for h, w in grids]


def oracle_velocity(oracle: Any, x: Tensor, t: float, text: Tensor, references: list[Tensor]):
    """Their velocity of x (frames, C, h, w), in their order of tokens."""
    packed = torch.cat([pack(r).flatten(0, 1)[None] for r in (x, *references)], dim=1)
    target = pack(x).shape[0] * pack(x).shape[1]
    shapes = [(1, r.shape[2] // 2, r.shape[3] // 2) for r in (*x.split(1), *references)]
    out = oracle(
        hidden_states=packed,
        encoder_hidden_states=text,
        timestep=torch.tensor([t]),
        img_shapes=[shapes],
        additional_t_cond=torch.tensor([0]),
        return_dict=False,
    )[0][:, :target]
    grid = (x.shape[2] // 2, x.shape[3] // 2)
    return unpack(out.unflatten(1, (len(x), -1))[0], grid)


def error(ours: Tensor, theirs: Tensor) -> float:
    """In parts of the range; `pytest -rP` shows them all."""
    found = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    logging.warning("error %.1e", found)
    return found


def test_packing_is_that_of_diffusers() -> None:
    pipelines = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage")
    (x,) = latents((3, 5))
    theirs = pipelines.QwenImagePipeline._pack_latents(x, 1, 4, 6, 10)
    assert torch.equal(pack(x), theirs)
    assert torch.equal(unpack(theirs, (3, 5)), x)


@pytest.mark.parametrize("kind", ["plain", "zero_cond_t"])
@pytest.mark.parametrize("target", [(4, 4), (3, 5), (1, 9)])
@pytest.mark.parametrize("grids", [[], [(4, 4)], [(2, 3), (7, 1), (5, 5), (1, 8)]])
@torch.no_grad()
def test_velocity_equals_diffusers(grids: list, target: tuple, kind: str) -> None:
    oracle, ours = oracle_and_ours(KINDS[kind])
    text, references = torch.randn(1, WORDS, CONFIG.context_dim), latents(*grids)
    prefix = ours.prefix(text, references=references)
    for time in (1.0, 0.61, 0.02):
        (x,) = latents(target)
        theirs = oracle_velocity(oracle, x, time, text, references)
        assert error(ours(x, torch.tensor([time]), prefix), theirs) < 1e-4


@pytest.mark.parametrize("frames", [1, 3, 5])
@torch.no_grad()
def test_layers_are_one_sequence(frames: int) -> None:
    oracle, ours = oracle_and_ours(KINDS["layered"])
    text, references = torch.randn(1, WORDS, CONFIG.context_dim), latents((3, 5))
    x = torch.cat(latents(*[(3, 5)] * frames))
    got = ours(x, torch.full((frames,), 0.7), ours.prefix(text, references=references))
    assert error(got, oracle_velocity(oracle, x, 0.7, text, references)) < 1e-4
    # The text starts behind the last frame where there are more frames than half the side.
    assert error(got, oracle_velocity(oracle, x, 0.6, text, references)) > 1e-3


@torch.no_grad()
def test_zero_cond_t_changes_only_what_references_do() -> None:
    oracle, ours = oracle_and_ours(KINDS["zero_cond_t"])
    plain = DiT(CONFIG)
    plain.load_state_dict(ours.state_dict())
    text, (x, reference), t = torch.randn(1, 5, 24), latents((4, 4), (4, 4)), torch.tensor([0.5])
    without = [dit(x, t, dit.prefix(text)) for dit in (ours, plain)]
    assert torch.equal(*without)
    with_one = [dit(x, t, dit.prefix(text, references=[reference])) for dit in (ours, plain)]
    assert error(*with_one) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_modulations_of_a_schedule_are_those_of_its_steps_bit_for_bit(kind: str) -> None:
    _, ours = oracle_and_ours(KINDS[kind])
    text, references = torch.randn(1, WORDS, CONFIG.context_dim), latents((4, 3))
    prefix, times = ours.prefix(text, references=references), (1.0, 0.83, 0.02)
    table = ours.modulations(times, torch.float32)
    steps = [(x, t, ours(x, torch.tensor([t]), prefix)) for t in times for x in latents((4, 4))]
    for block in ours.blocks:  # with the table no step reads these weights
        block.img_mod = block.txt_mod = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    ours.time_text_embed = ours.norm_out.linear = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for (x, t, before), modulation in zip(steps, table, strict=True):
        assert torch.equal(ours(x, torch.tensor([t]), prefix, modulation), before)
    six = CONFIG.layers * 2 * 6 * CONFIG.dim * 4
    assert [m.bytes for m in table] == [six + 2 * CONFIG.dim * 4] * 3


@torch.no_grad()
def test_equal_sizes_stand_on_one_grid() -> None:
    """A token of the target and the token of a reference at its place differ in the frame only."""
    from seedling.model_loaders.families.qwen_image.dit import positions

    for grid in [(4, 4), (3, 5), (1, 9)]:
        where = positions(WORDS, [grid], [grid, grid], False)[WORDS:].unflatten(0, (3, -1))
        assert torch.equal(where[0, :, 1:], where[1, :, 1:])
        assert torch.equal(where[0, :, 1:], where[2, :, 1:])
        assert where[:, 0, 0].tolist() == [0, 1, 2]


@torch.no_grad()
def test_16_bit_weights_widened_and_a_batch_over_one_prefix() -> None:
    _, ours = oracle_and_ours(CONFIG)
    half = {k: v.to(torch.bfloat16) for k, v in ours.state_dict().items()}
    ours.load_state_dict(half)  # fp32 with the values of bf16
    wide = DiT(CONFIG, widened(), dtype=torch.bfloat16)
    wide.load_state_dict(half)
    text, references = torch.randn(1, WORDS, CONFIG.context_dim), latents((2, 2))
    x, t = torch.cat(latents((4, 3), (4, 3))), torch.tensor([0.9, 0.2])
    prefix = ours.prefix(text, references=references)
    together = ours(x, t, prefix)
    assert error(wide(x, t, wide.prefix(text, references=references)), together) < 1e-5
    for i in range(2):
        alone = ours(x[i : i + 1], t[i : i + 1], prefix)
        assert error(together[i : i + 1], alone) < 1e-5


def test_latents_that_are_no_tokens_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="latents of 5 x 4 cannot be cut into squares of 2 x 2"):
        pack(torch.zeros(1, 4, 4, 5))
