"""The diffusion transformer of Qwen-Image-2.1: one stream of tokens, a causal prefix, a target.

The sequence is text with each reference's latent tokens spliced in at its slots, then the target.
Text is causal, an image sees everything before it and itself, nothing before the target sees the
target, and everything but the target is modulated at t = 0. So the prefix's keys and values are
the same for every step, seed and target size: `DiT.prefix` computes them once, `DiT.forward` runs
the target alone against them, exactly. Nor do they depend on what follows: `DiT.prefix` works in
blocks that a store can keep, and always in the same ones, so that what a store gave is what would
have been computed, bit for bit.

Names and shapes are the published ones (diffusers' `QwenImage21Transformer2DModel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...embeddings import TIMESTEP_CHANNELS, rotate, rotation, timestep_features
from ...layers import Block as KeptBlock
from ...layers import See, Store, computed
from .sequence import (
    JointPrefix,
    Prefix,
    Segment,
    advance,
    prefix_positions,
    runs_of,
    segments_of,
    text_mask,
)


@dataclass(frozen=True)
class DiTConfig:
    """Widths of the network; the defaults are the published 7B model."""

    in_channels: int = 64
    layers: int = 32
    heads: int = 32
    head_dim: int = 128
    context_dim: int = 4096
    mlp_dim: int = 12288
    axes: tuple[int, int, int] = (16, 56, 56)  # rotary channels for frame, height, width
    theta: float = 10000.0
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


class ZeroCenteredRMSNorm(nn.Module):
    """RMS norm whose stored weight is scale - 1, computed in fp32."""

    def __init__(self, dim: int, eps: float, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class TextIn(nn.Module):
    """Encoder states (B, L, context_dim) -> tokens (B, L, dim)."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.text_norm = ZeroCenteredRMSNorm(c.context_dim, c.eps, **kw)
        self.in_layer = ops.Linear(c.context_dim, c.dim, bias=False, **kw)
        self.out_layer = ops.Linear(c.dim, c.dim, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) in 0..1 -> (B, dim)."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(TIMESTEP_CHANNELS, c.dim, bias=False, **kw)
        self.linear_2 = ops.Linear(c.dim, c.dim, bias=False, **kw)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_features(t).to(dtype))))


class Attention(nn.Module):
    """Projections and per-head norms; who sees whom is decided by the caller."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.to_q = ops.Linear(c.dim, c.dim, bias=False, **kw)
        self.to_k = ops.Linear(c.dim, c.dim, bias=False, **kw)
        self.to_v = ops.Linear(c.dim, c.dim, bias=False, **kw)
        self.to_out = nn.ModuleList([ops.Linear(c.dim, c.dim, bias=False, **kw)])
        self.norm_q = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)
        self.norm_k = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)

    def queries(self, x: Tensor, turn: Tensor) -> Tensor:
        """x (B, tokens, dim) -> rotated queries (B, heads, tokens, head_dim)."""
        q = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim)))
        return rotate(q, turn).transpose(1, 2)

    def keys_values(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, tokens, dim) -> rotated keys, and values, each (B, heads, tokens, head_dim)."""
        k = self.norm_k(self.to_k(x).unflatten(-1, (-1, self.head_dim)))
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))
        return rotate(k, turn).transpose(1, 2), v.transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Attention output (B, heads, tokens, head_dim) -> (B, tokens, dim)."""
        return self.to_out[0](x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.proj = ops.Linear(c.dim, c.mlp_dim, bias=False, **kw)
        self.gate_layer = ops.Linear(c.dim, c.mlp_dim, bias=False, **kw)
        self.out = ops.Linear(c.mlp_dim, c.dim, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        gate, y = self.gate_layer(x), self.proj(x)
        if torch.is_grad_enabled():
            return self.out(F.silu(gate) * y)
        return self.out(F.silu(gate, inplace=True).mul_(y))


class Block(nn.Module):
    """Attention and feed-forward, both scaled and gated by the one shared modulation."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.img_norm1 = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)
        self.attn = Attention(c, ops, **kw)
        self.img_norm2 = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)
        self.img_mlp = FeedForward(c, ops, **kw)

    def forward(self, x: Tensor, modulation: Sequence[Tensor], turn: Tensor, attend) -> Tensor:
        """x (B, tokens, dim); `attend(q, k, v)` returns (B, heads, tokens, head_dim)."""
        scale1, gate1, scale2, gate2 = modulation
        h = self.img_norm1(x) * scale1
        h = attend(self.attn.queries(h, turn), *self.attn.keys_values(h, turn))
        x = torch.addcmul(x, gate1, self.attn.merge(h))
        x = torch.addcmul(x, gate2, self.img_mlp(self.img_norm2(x) * scale2))
        return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class NormOut(nn.Module):
    """The scale-only adaptive norm in front of the output projection."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.linear = ops.Linear(c.dim, c.dim, bias=False, **kw)
        self.norm = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.linear(F.silu(embedding))[:, None])


class DiT(nn.Module):
    """Latents and a prefix in, velocity (noise - picture) out."""

    stores = True  # `prefix` has something for a `layers.Store`

    def __init__(
        self, config: DiTConfig, operations: Operations = TORCH, device=None, dtype=None
    ) -> None:
        super().__init__()
        c, kw = config, {"device": device, "dtype": dtype}
        self.config = config
        self.time_text_embed = nn.ModuleDict(
            {"timestep_embedder": TimestepEmbedder(c, operations, **kw)}
        )
        self.txt_in = TextIn(c, operations, **kw)
        self.img_in = operations.Linear(c.in_channels, c.dim, bias=False, **kw)
        self.modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(c.dim, 4 * c.dim, bias=False, **kw)
        )
        self.transformer_blocks = nn.ModuleList(
            [Block(c, operations, **kw) for _ in range(c.layers)]
        )
        self.norm_out = NormOut(c, operations, **kw)
        self.proj_out = operations.Linear(c.dim, c.in_channels, bias=False, **kw)

    def _modulate(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Timestep embedding (B, dim); [1 + scale, gate] x 2, each (B, 1, dim), for all blocks."""
        embedding = self.time_text_embed["timestep_embedder"](t, dtype)
        scale1, gate1, scale2, gate2 = self.modulation(embedding)[:, None].chunk(4, dim=-1)
        return embedding, [1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()]

    def prefix(
        self,
        text: Tensor,
        slots: Tensor,
        references: Sequence[Tensor] = (),
        room: int = 0,
        store: Store | None = None,
    ) -> Prefix:
        """Run text and references through the network once.

        `text` (B, L, context_dim) are the encoder's states, slots included; `slots` (L,) bool;
        `references` are normalised latents (B, C, h, w), one per image in the order of the slots;
        `room` is the largest target in tokens that will follow (it grows when needed). What `store`
        knows is not computed again. With gradients everything runs at once, and nothing is stored.
        """
        segments = segments_of(slots, [(r.shape[-2], r.shape[-1]) for r in references])
        words, images = text[:, ~slots], iter(references)
        blocks, position, word = [], 0, 0
        for run in [segments] if torch.is_grad_enabled() else runs_of(segments):
            count = sum(s.end - s.start for s in run if s.grid is None)
            shown = [next(images) for s in run if s.grid is not None]
            blocks.append(self._block(run, words[:, word : word + count], shown, position))
            position, word = position + sum(map(advance, run)), word + count
        if store is None or torch.is_grad_enabled():
            return Prefix(computed(blocks, room), position)
        return Prefix(store.keep("prefix", self, blocks, room), position)

    def _block(
        self, run: list[Segment], words: Tensor, images: list[Tensor], position: int
    ) -> KeptBlock:
        """Segments that run through the network together: `words` (B, n, context_dim), `images`
        (B, C, h, w), from the rotary position `position` on."""

        def compute(see: See) -> None:
            tokens, first = self._embed(run, words, images), run[0].start
            positions, _ = prefix_positions(run, position)
            turn = rotation(positions, self.config.axes, self.config.theta).to(words.device)
            _, modulation = self._modulate(torch.zeros(1, device=words.device), tokens.dtype)
            masks = [text_mask(s, words.device) for s in run]

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                k, v = see(layer, k, v)
                parts = [
                    F.scaled_dot_product_attention(
                        q[:, :, s.start - first : s.end - first],
                        k[:, :, : s.end],
                        v[:, :, : s.end],
                        attn_mask=mask,
                    )
                    for s, mask in zip(run, masks, strict=True)
                ]
                return torch.cat(parts, dim=2)

            blocks: list[Any] = [*self.transformer_blocks]
            for layer, block in enumerate(blocks[:-1]):
                tokens = block(tokens, modulation, turn, partial(attend, layer))
            # Nobody reads what the last layer makes of a prefix, only its keys and values.
            last = blocks[-1]
            k, v = last.attn.keys_values(last.img_norm1(tokens) * modulation[0], turn)
            see(len(blocks) - 1, k, v)

        layout = tuple((s.end - s.start, s.grid) for s in run)
        return KeptBlock(run[-1].end - run[0].start, (layout, words, *images), compute)

    def _embed(self, run: list[Segment], words: Tensor, images: list[Tensor]) -> Tensor:
        """The tokens (B, n, dim) of a block."""
        runs = [s.end - s.start for s in run if s.grid is None]
        texts = iter(self.txt_in(words).split(runs, dim=1) if runs else ())
        shown = iter([self.img_in(x.flatten(2).transpose(1, 2)) for x in images])
        return torch.cat([next(shown if s.grid else texts) for s in run], dim=1)

    def joint(self, prefixes: Sequence[Prefix], places: Sequence[int]) -> Prefix:
        """What `forward` reads to paint a batch of pictures that see each other, row k behind
        `prefixes[k]` at `places[k]` of their order. All have one size. No gradients."""
        return JointPrefix(prefixes, places, self.config.layers)

    def forward(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """Velocity (B, C, h, w) of latents x (B, C, h, w) at times t (B,), 1 = pure noise.

        The prefix has batch B, or 1 to be shared by all (read in place, one copy for all of them).
        """
        b, _, h, w = x.shape
        turn = prefix.turn(h, w, self.config, x.device)
        tokens = self.img_in(x.flatten(2).transpose(1, 2))
        embedding, modulation = self._modulate(t, tokens.dtype)
        if not torch.is_grad_enabled():
            prefix.kept.reserve(h * w)
        for layer, block in enumerate(self.transformer_blocks):
            attend = partial(prefix.kept.attend, layer)
            tokens = block(tokens, modulation, turn, attend)
        out = self.proj_out(self.norm_out(tokens, embedding))
        return out.transpose(1, 2).unflatten(2, (h, w))
