"""The diffusion transformer of FLUX.2: two streams that attend together, then one stream.

The sequence is text, the target's latent tokens, then those of the references, everybody sees
everybody. All blocks of a kind share one modulation by the time. References stand at the target's
rows and columns but at other times (10, 20, ...), so a reference of the target's size lies on the
target's grid.

In the variant with cached references (klein 9B-KV) references are modulated at t = 0 and see only
each other: `DiT.prefix` runs them through the network once, and a step runs text and target alone
against their keys and values, exactly.

Names and shapes are those of diffusers' `Flux2Transformer2DModel`, but for `norm_out`, whose two
halves are layers of their own: published files hold them in two different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...embeddings import TIMESTEP_CHANNELS, rotate, rotation, timestep_features
from ...layers import KeptKeys
from .configs import DiTConfig
from .positions import picture_positions, reference_positions, word_positions
from .variants import GUIDANCE

# q, k, v (B, tokens, heads, head_dim), not rotated -> (B, tokens of q, dim)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Part = Sequence[Tensor]  # shift, 1 + scale, gate, each (B, 1, dim)


@dataclass(frozen=True)
class Modulations:
    """What a time does in all blocks: to text and pictures in double blocks, in single blocks, and
    in front of the output."""

    text: list[Part]
    picture: list[Part]
    single: Part
    out: Part


@dataclass
class Prefix:
    """What no step changes: everything but the target and the time.

    `text` (B, L, dim) and `references` (B, R, dim) are tokens behind the input projections;
    `guidance` (1, dim) is its embedding, None for networks without. `kept` are the references' keys
    and values where they are cached; `references` are empty then. `rotations` are those of the
    whole sequence by the target's size.
    """

    text: Tensor
    references: Tensor
    grids: list[tuple[int, int]]  # rows and columns of each reference among `references`
    guidance: Tensor | None = None
    kept: KeptKeys | None = None
    rotations: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the stored prefix."""
        tokens = sum(x.numel() * x.element_size() for x in (self.text, self.references))
        return tokens + (self.kept.bytes if self.kept else 0)


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


class DiT(nn.Module):
    """Latents and a prefix in, velocity (noise - picture) out."""

    def __init__(
        self, config: DiTConfig, operations: Operations = TORCH, device=None, dtype=None
    ) -> None:
        super().__init__()
        c, ops, kw = config, operations, {"device": device, "dtype": dtype}
        self.config = config
        self.time_guidance_embed = nn.ModuleDict({"timestep_embedder": Embedder(c, ops, **kw)})
        if c.guided:
            self.time_guidance_embed["guidance_embedder"] = Embedder(c, ops, **kw)
        self.double_stream_modulation_img = Modulation(c, 2, ops, **kw)
        self.double_stream_modulation_txt = Modulation(c, 2, ops, **kw)
        self.single_stream_modulation = Modulation(c, 1, ops, **kw)
        self.x_embedder = ops.Linear(c.in_channels, c.dim, bias=False, **kw)
        self.context_embedder = ops.Linear(c.context_dim, c.dim, bias=False, **kw)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(c, ops, **kw) for _ in range(c.double))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(c, ops, **kw) for _ in range(c.single)
        )
        self.norm_out = NormOut(c, ops, **kw)
        self.proj_out = ops.Linear(c.dim, c.in_channels, bias=False, **kw)

    def prefix(
        self,
        text: Tensor,
        slots: Tensor | None = None,
        references: Sequence[Tensor] = (),
        room: int = 0,
        guidance: float = GUIDANCE,
    ) -> Prefix:
        """Everything that no step changes.

        `text` (B, L, context_dim) are the encoder's states, among which `slots` for references are
        nowhere; `references` normalised latents (B, C, h, w); `room` is the largest target in
        tokens that will follow (it grows when needed); `guidance` is for networks that read it.
        """
        words = self.context_embedder(text)
        grids = [(r.shape[-2], r.shape[-1]) for r in references]
        tokens = [self.x_embedder(r.flatten(2).transpose(1, 2)) for r in references]
        prefix = Prefix(words, torch.cat([words[:, :0], *tokens], dim=1), grids)
        if self.config.guided:
            number = torch.tensor([guidance], device=text.device, dtype=torch.float32)
            prefix.guidance = self.time_guidance_embed["guidance_embedder"](number, words.dtype)
        if references and self.config.cached:
            self._keep(prefix, room + words.shape[1])
        return prefix

    def _keep(self, prefix: Prefix, room: int) -> None:
        """Exchange the references' tokens for their keys and values in every layer, at t = 0."""
        x = prefix.references
        turn = self._rotation(reference_positions(prefix.grids), x.device)
        zero = self._modulate(torch.zeros(1, device=x.device), prefix.guidance, x.dtype)
        kept = KeptKeys([], [], x.shape[1])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = _turned(q, k, v, turn)
            kept.keep(k, v, room)
            return _merged(F.scaled_dot_product_attention(q, k, v))

        for block in cast("list[DoubleBlock]", self.transformer_blocks):
            x = block.alone(x, zero.picture, attend)
        *blocks, last = cast("list[SingleBlock]", self.single_transformer_blocks)
        for block in blocks:
            x = block(x, zero.single, attend)
        # Nobody reads what the last layer makes of the references, only its keys and values.
        q, k, v, _ = last.attn.project(modulated(last.norm(x), zero.single))
        kept.keep(*_turned(q, k, v, turn)[1:], room)
        prefix.references, prefix.kept = prefix.references[:, :0], kept

    def modulations(self, times: Sequence[float], dtype: torch.dtype) -> list[Modulations | None]:
        """What each time does in every block, as `forward` computes it for itself; None where that
        takes the guidance too."""
        if self.config.guided:
            return [None] * len(times)
        device = next(self.parameters()).device
        return [self._modulate(torch.tensor([t], device=device), None, dtype) for t in times]

    def _modulate(self, t: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Modulations:
        """At times t (B,), with the guidance (1, dim) where the network reads it."""
        embedding = self.time_guidance_embed["timestep_embedder"](t, dtype)
        if guidance is not None:
            embedding = embedding + guidance
        (single,) = self.single_stream_modulation(embedding)
        return Modulations(
            self.double_stream_modulation_txt(embedding),
            self.double_stream_modulation_img(embedding),
            single,
            self.norm_out.modulation(embedding),
        )

    def forward(
        self, x: Tensor, t: Tensor, prefix: Prefix, known: Modulations | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) of latents x (B, C, h, w) at times t (B,), 1 = pure noise.

        The prefix has batch B, or 1 for all; `known` is what `modulations` says of t.
        """
        b, _, h, w = x.shape
        turn = self._whole_rotation(prefix, h, w)
        tokens = self.x_embedder(x.flatten(2).transpose(1, 2))
        text = prefix.text.expand(b, -1, -1)
        if prefix.references.shape[1]:
            tokens = torch.cat([tokens, prefix.references.expand(b, -1, -1)], dim=1)
        by = known or self._modulate(t, prefix.guidance, tokens.dtype)
        if prefix.kept and not torch.is_grad_enabled():
            prefix.kept.reserve(text.shape[1] + tokens.shape[1])
        target = slice(text.shape[1], text.shape[1] + h * w)

        def attention(layer: int, rows: slice | None = None) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = _turned(q, k, v, turn, rows)
                if prefix.kept:
                    return _merged(prefix.kept.attend(layer, q, k, v))
                return _merged(F.scaled_dot_product_attention(q, k, v))

            return attend

        for layer, block in enumerate(self.transformer_blocks):
            text, tokens = block(text, tokens, by.text, by.picture, attention(layer))
        tokens, last = torch.cat([text, tokens], dim=1), self.config.layers - 1
        for layer, block in enumerate(self.single_transformer_blocks, start=self.config.double):
            rows = target if layer == last else None
            tokens = block(tokens, by.single, attention(layer, rows), rows)
        out = self.proj_out(self.norm_out(tokens, by.out))
        return out.transpose(1, 2).unflatten(2, (h, w))

    def _whole_rotation(self, prefix: Prefix, height: int, width: int) -> Tensor:
        """Rotations of the sequence for a target of height x width tokens, computed once."""
        if (height, width) not in prefix.rotations:
            parts = [word_positions(prefix.text.shape[1]), picture_positions(0, height, width)]
            if prefix.kept is None:
                parts.append(reference_positions(prefix.grids))
            turn = self._rotation(torch.cat(parts), prefix.text.device)
            prefix.rotations[height, width] = turn
        return prefix.rotations[height, width]

    def _rotation(self, positions: Tensor, device: torch.device) -> Tensor:
        return rotation(positions, self.config.axes, self.config.theta).to(device)


def _turned(
    q: Tensor, k: Tensor, v: Tensor, turn: Tensor, rows: slice | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k, and v, as (B, heads, tokens, head_dim); q are those of `rows` only."""
    q = rotate(q, turn if rows is None else turn[rows])
    return q.transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """(B, heads, tokens, head_dim) -> (B, tokens, dim)."""
    return x.transpose(1, 2).flatten(2)
