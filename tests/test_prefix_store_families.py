"""The prefix store in families of other attention: kept where it is exact, nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.model_loaders.families.flux2.configs import DiTConfig as FluxConfig
from seedling.model_loaders.families.flux2.dit import DiT as Flux
from seedling.model_loaders.family import read_once
from seedling.sampling.prefix_store import PrefixStore

CONFIG = FluxConfig(
    in_channels=8, double=1, single=2, heads=2, head_dim=32, context_dim=24, mlp_dim=192,
    axes=(8, 8, 8, 8), cached=True,
)  # fmt: skip


def drawn(config: Any, network: Any) -> Any:
    torch.manual_seed(0)
    dit = network(config).eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return dit


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(1, 8, h, w) for h, w in sizes]


@torch.no_grad()
def test_klein_kv_keeps_its_references_over_prompts_seeds_and_sizes() -> None:
    dit, store = drawn(CONFIG, Flux), PrefixStore(1 << 30)
    references = pictures((4, 4), (3, 5))
    for words, size in ((5, (4, 6)), (9, (2, 2)), (5, (8, 8))):
        text, x = torch.randn(1, words, 24), torch.randn(1, 8, *size)
        kept = dit.prefix(text, None, references, 24, store=store)
        fresh = dit.prefix(text, None, references, 24)
        time = torch.tensor([0.6])
        assert torch.equal(dit(x, time, kept), dit(x, time, fresh))
    assert (store.counts["prefix"].asked, store.counts["prefix"].computed) == (3 * 31, 31)
    dit.prefix(torch.randn(1, 5, 24), None, references[::-1], 24, store=store)
    assert store.counts["prefix"].computed == 2 * 31, "they see each other: order matters to all"


@torch.no_grad()
def test_where_references_look_at_the_target_nothing_is_kept() -> None:
    dit, store = drawn(replace(CONFIG, cached=False), Flux), PrefixStore(1 << 30)
    dit.prefix(torch.randn(1, 5, 24), None, pictures((4, 4)), 24, store=store)
    assert not store.counts and not store.entries


def test_a_prompt_is_read_once_for_each_way_to_read_it() -> None:
    class Encoder:
        read = 0

        def encode(self, prompt: str, images: Any, area: int = 1) -> Tensor:
            self.read += 1
            return torch.full((1, 4), float(len(prompt) * area))

    encoder, store, image = Encoder(), PrefixStore(1 << 20), torch.rand(4, 4, 3)
    asked: list[tuple[str, list[Tensor], dict[str, int]]] = [
        ("a", [], {}), ("a", [], {}), ("a", [image], {}), ("a", [image.clone()], {}),
        ("a", [image], {"area": 2}), ("ab", [], {}),
    ]  # fmt: skip
    got = [float(read_once(store, encoder, p, i, **how)[0, 0]) for p, i, how in asked]
    assert got == [1, 1, 1, 1, 2, 2] and encoder.read == 4
    read_once(None, encoder, "a", [])
    assert encoder.read == 5


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_blocks_move_between_device_and_host() -> None:
    dit = drawn(CONFIG, Flux).cuda()
    text, references = torch.randn(1, 5, 24).cuda(), [x.cuda() for x in pictures((4, 4))]
    x, time = torch.randn(1, 8, 4, 4).cuda(), torch.tensor([0.5]).cuda()
    expected = dit(x, time, dit.prefix(text, None, references, 16))
    store = PrefixStore("auto", place="host")
    for _ in range(2):
        made = dit(x, time, dit.prefix(text, None, references, 16, store=store))
        assert torch.equal(made, expected)
        store.trim()
    assert store.counts["prefix"].computed == 16
    assert next(iter(store.entries.values())).own[0][0].is_pinned()  # type: ignore[union-attr]
