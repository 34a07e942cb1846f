"""The trainer's cheaper attention, rotation and blocks give what the engine's own give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seedling.model_loaders import embeddings
from seedling.model_loaders.families.qwen_image_21 import dit
from seedling.training import speed

CONFIG = dit.DiTConfig(
    in_channels=8, layers=2, heads=4, head_dim=16, context_dim=32, mlp_dim=48, axes=(4, 6, 6)
)


def qkv(keys: int, kv_heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, n, 16) for h, n in ((4, 5), (kv_heads, keys), (kv_heads, keys))]


@pytest.mark.parametrize("case", ["plain", "mask", "bias", "causal", "groups"])
def test_attention_is_torchs(case: str) -> None:
    options: dict = {
        "plain": {},
        "mask": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(2)},
        "bias": {"attn_mask": torch.randn(5, 7)},
        "causal": {"is_causal": True},
        "groups": {"enable_gqa": True},
    }[case]
    q, k, v = qkv(5 if case == "causal" else 7, 2 if case == "groups" else 4)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(speed.attention(q, k, v, **options), wanted, atol=1e-5, rtol=0)


def test_rotation_is_the_engines() -> None:
    x, positions = torch.randn(2, 6, 4, 16), embeddings.grid_positions(3, 2, 3)
    turn = dit.rotation(positions, CONFIG.axes, CONFIG.theta)
    torch.testing.assert_close(speed.rotate(x, turn), dit.rotate(x, turn), atol=1e-6, rtol=0)


def test_split_blocks_are_the_engines_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    network = dit.DiT(CONFIG)
    text, x, t = torch.randn(2, 5, 32), torch.randn(2, 8, 2, 3), torch.rand(2)
    slots = torch.zeros(5, dtype=torch.bool)

    def run() -> torch.Tensor:
        prefix = network.prefix(text, slots)
        out = network(x, t, prefix)
        network.zero_grad()
        out.square().sum().backward()
        gradient = network.get_parameter("transformer_blocks.0.attn.to_k.weight").grad
        assert gradient is not None
        return torch.cat([out.detach().flatten(), gradient.flatten()])

    wanted = run()
    monkeypatch.setattr(dit, "rotate", dit.rotate)
    monkeypatch.setattr(dit.Block, "forward", dit.Block.forward)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(speed.shutil, "which", lambda name: name)
    speed.compile_training()
    assert F.scaled_dot_product_attention is speed.attention
    torch.testing.assert_close(run(), wanted, atol=1e-4, rtol=1e-4)
