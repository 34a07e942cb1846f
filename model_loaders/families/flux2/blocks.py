"""Layers and blocks of FLUX.2's diffusion transformer; `dit.py` puts them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import Operations
from ...embeddings import TIMESTEP_CHANNELS, timestep_features
from .configs import DiTConfig

# q, k, v (B, tokens, heads, head_dim), not rotated -> (B, tokens of q, dim)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Part = Sequence[Tensor]  # shift, 1 + scale, gate, each (B, 1, dim)


class Embedder(nn.Module):
    """Numbers (B,) in 0..1 -> (B, dim)."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(TIMESTEP_CHANNELS, c.dim, bias=False, **kw)
        self.linear_2 = ops.Linear(c.dim, c.dim, bias=False, **kw)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_features(t).to(dtype))))


class Modulation(nn.Module):
    """Embedding (B, dim) -> shift, 1 + scale, gate for each of `parts` halves of a block."""

    def __init__(self, c: DiTConfig, parts: int, ops: Operations, **kw) -> None:
        super().__init__()
        self.parts = parts
        self.linear = ops.Linear(c.dim, 3 * parts * c.dim, bias=False, **kw)

    def forward(self, embedding: Tensor) -> list[Part]:
        chunks = self.linear(F.silu(embedding))[:, None].chunk(3 * self.parts, dim=-1)
        rows = [chunks[i : i + 3] for i in range(0, len(chunks), 3)]
        return [(shift, 1 + scale, gate) for shift, scale, gate in rows]


class FeedForward(nn.Module):
    """SwiGLU, the gate in the first half of the first layer."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.linear_in = ops.Linear(c.dim, 2 * c.mlp_dim, bias=False, **kw)
        self.linear_out = ops.Linear(c.mlp_dim, c.dim, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(swiglu(self.linear_in(x)))


class JointAttention(nn.Module):
    """Projections and per-head norms of both streams; who sees whom is decided by the caller."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        square = partial(ops.Linear, c.dim, c.dim, bias=False, **kw)
        norm = partial(ops.RMSNorm, c.head_dim, eps=c.eps, **kw)
        self.to_q, self.to_k, self.to_v = square(), square(), square()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = square(), square(), square()
        self.to_out, self.to_add_out = nn.ModuleList([square()]), square()
        self.norm_q, self.norm_k = norm(), norm()
        self.norm_added_q, self.norm_added_k = norm(), norm()

    def picture(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, tokens, dim) -> q, k, v (B, tokens, heads, head_dim) of the picture stream."""
        q, k, v = (self._heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def text(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the text stream."""
        layers = self.add_q_proj, self.add_k_proj, self.add_v_proj
        q, k, v = (self._heads(layer(x)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class DoubleBlock(nn.Module):
    """Text and picture with weights of their own, and one attention over both."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        norm = partial(ops.LayerNorm, c.dim, eps=c.eps, elementwise_affine=False, **kw)
        self.norm1, self.norm1_context = norm(), norm()
        self.attn = JointAttention(c, ops, **kw)
        self.norm2, self.norm2_context = norm(), norm()
        self.ff, self.ff_context = FeedForward(c, ops, **kw), FeedForward(c, ops, **kw)

    def forward(
        self, text: Tensor, x: Tensor, words: list[Part], pictures: list[Part], attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """text (B, L, dim), x (B, tokens, dim) -> the same; `words`, `pictures` modulate them."""
        first = self.attn.text(modulated(self.norm1_context(text), words[0]))
        second = self.attn.picture(modulated(self.norm1(x), pictures[0]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
        y = attend(q, k, v)
        x = self._picture(x, y[:, text.shape[1] :], pictures)
        text = gated(text, words[0], self.attn.to_add_out(y[:, : text.shape[1]]))
        y = self.ff_context(modulated(self.norm2_context(text), words[1]))
        return bounded(gated(text, words[1], y)), x

    def alone(self, x: Tensor, pictures: list[Part], attend: Attend) -> Tensor:
        """x (B, tokens, dim) without any text."""
        y = attend(*self.attn.picture(modulated(self.norm1(x), pictures[0])))
        return self._picture(x, y, pictures)

    def _picture(self, x: Tensor, y: Tensor, pictures: list[Part]) -> Tensor:
        """The picture stream behind its attention y (B, tokens, dim)."""
        x = gated(x, pictures[0], self.attn.to_out[0](y))
        return gated(x, pictures[1], self.ff(modulated(self.norm2(x), pictures[1])))


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side, with one layer in front of and behind both."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.sizes = [3 * c.dim, 2 * c.mlp_dim]
        self.heads = c.heads
        self.to_qkv_mlp_proj = ops.Linear(c.dim, sum(self.sizes), bias=False, **kw)
        self.to_out = ops.Linear(c.dim + c.mlp_dim, c.dim, bias=False, **kw)
        self.norm_q = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)
        self.norm_k = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, tokens, dim) -> q, k, v (B, tokens, heads, head_dim), (B, tokens, 2 mlp_dim)."""
        qkv, mlp = self.to_qkv_mlp_proj(x).split(self.sizes, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.norm_q(q), self.norm_k(k), v, mlp


class SingleBlock(nn.Module):
    """One stream of all tokens."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)
        self.attn = ParallelAttention(c, ops, **kw)

    def forward(self, x: Tensor, part: Part, attend: Attend, rows: slice | None = None) -> Tensor:
        """x (B, tokens, dim) -> the same, or only its `rows`, where nobody reads the others."""
        q, k, v, mlp = self.attn.project(modulated(self.norm(x), part))
        if rows is not None:
            x, q, mlp = x[:, rows], q[:, rows], mlp[:, rows]
        y = torch.cat([attend(q, k, v), swiglu(mlp)], dim=-1)
        return bounded(gated(x, part, self.attn.to_out(y)))


class NormOut(nn.Module):
    """The adaptive norm in front of the output projection."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)
        self.shift = ops.Linear(c.dim, c.dim, bias=False, **kw)
        self.scale = ops.Linear(c.dim, c.dim, bias=False, **kw)

    def modulation(self, embedding: Tensor) -> Part:
        """Embedding (B, dim) -> shift, 1 + scale, each (B, 1, dim)."""
        y = F.silu(embedding)[:, None]
        return self.shift(y), 1 + self.scale(y)

    def forward(self, x: Tensor, part: Part) -> Tensor:
        return modulated(self.norm(x), part)


def modulated(x: Tensor, part: Part) -> Tensor:
    return torch.addcmul(part[0], x, part[1])


def gated(x: Tensor, part: Part, y: Tensor) -> Tensor:
    return torch.addcmul(x, part[2], y)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n): the SiLU of the first half times the second."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def bounded(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
