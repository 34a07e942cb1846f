"""The diffusion transformer of Qwen-Image: two streams of tokens, text and pictures, that attend
to each other in every layer.

The picture stream is the target, then the references. All tokens see all others, so text and
references change with every step and nothing of them can be kept between steps but what goes in:
`DiT.prefix` computes that once. What a step's time does to every layer depends on nothing else:
`DiT.modulations` computes it for a whole schedule, after which a run reads none of the weights for
it, a third of the network.

Names and shapes are the published ones (diffusers' `QwenImageTransformer2DModel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...embeddings import TIMESTEP_CHANNELS, rotate, rotation, timestep_features
from .positions import PATCH, Grid, pack, positions, unpack

Six = Sequence[Tensor]  # shift, 1 + scale, gate of attention, then of the MLP; (B, 1, dim) each
Part = tuple[slice, Six]  # some tokens and what is done to them


@dataclass(frozen=True)
class DiTConfig:
    """Widths of the network; the defaults are the published 20B model."""

    in_channels: int = 64  # of a token: 2 x 2 latents
    out_channels: int = 16  # of a latent
    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    context_dim: int = 3584
    mlp_dim: int = 12288
    axes: tuple[int, int, int] = (16, 56, 56)  # rotary channels for frame, height, width
    theta: float = 10000.0
    eps: float = 1e-6
    zero_cond_t: bool = False  # references are modulated at t = 0
    layered: bool = False  # a batch is the layers of one picture
    variant: str = "qwen-image"

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Modulation:
    """What one time does in every layer: to pictures, to text, and before the last projection.

    `still` is what t = 0 does to pictures, where the references are modulated so; all times of a
    schedule share it.
    """

    image: Sequence[Six]
    text: Sequence[Six]
    out: tuple[Tensor, Tensor]  # 1 + scale, shift
    still: Sequence[Six] | None = None

    @property
    def bytes(self) -> int:
        six = [tensor for layers in (self.image, self.text) for layer in layers for tensor in layer]
        return sum(t.numel() * t.element_size() for t in (*six, *self.out))


@dataclass
class Prefix:
    """What no step changes: text and references as tokens, and what a step needs to know of them.

    `text` (B, L, dim), `references` (B, R, dim) or None, `grids` theirs; `still` is what t = 0 does
    to the references in every layer, where they are modulated so: known from the first step on.
    """

    text: Tensor
    references: Tensor | None
    grids: tuple[Grid, ...]
    still: Sequence[Six] | None = None
    rotations: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


def six(params: Tensor) -> Six:
    """shift, 1 + scale, gate, shift, 1 + scale, gate (B, 1, dim) of a layer's (B, 6 dim)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = params[:, None].chunk(6, dim=-1)
    return shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2


def modulate(x: Tensor, parts: Sequence[Part], first: int) -> Tensor:
    """Normalised x (B, tokens, dim), scaled and shifted; `first` is 0 for attention, 3 for MLP."""
    done = [torch.addcmul(m[first], x[:, where], m[first + 1]) for where, m in parts]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def add_gated(x: Tensor, y: Tensor, parts: Sequence[Part], first: int) -> Tensor:
    """x + gate * y, token by token."""
    done = [torch.addcmul(x[:, where], m[first + 2], y[:, where]) for where, m in parts]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) in 0..1 -> (B, dim)."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(TIMESTEP_CHANNELS, c.dim, **kw)
        self.linear_2 = ops.Linear(c.dim, c.dim, **kw)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_features(t).to(dtype))))


class TimeEmbedding(nn.Module):
    """The embedding of a time; a layered model adds that of its kind of picture, the first of 2."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(c, ops, **kw)
        self.addition_t_embedding = ops.Embedding(2, c.dim, **kw) if c.layered else None

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.timestep_embedder(t, dtype)
        if self.addition_t_embedding is None:
            return x
        kind = torch.zeros(1, dtype=torch.long, device=x.device)
        return x + self.addition_t_embedding(kind).to(x.dtype)


class Attention(nn.Module):
    """Joint attention: projections and per-head norms of each stream, one attention for both."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.to_q = ops.Linear(c.dim, c.dim, **kw)
        self.to_k = ops.Linear(c.dim, c.dim, **kw)
        self.to_v = ops.Linear(c.dim, c.dim, **kw)
        self.add_q_proj = ops.Linear(c.dim, c.dim, **kw)
        self.add_k_proj = ops.Linear(c.dim, c.dim, **kw)
        self.add_v_proj = ops.Linear(c.dim, c.dim, **kw)
        self.to_out = nn.ModuleList([ops.Linear(c.dim, c.dim, **kw)])
        self.to_add_out = ops.Linear(c.dim, c.dim, **kw)
        self.norm_q = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)
        self.norm_k = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)
        self.norm_added_q = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)
        self.norm_added_k = ops.RMSNorm(c.head_dim, eps=c.eps, **kw)

    def forward(
        self, text: Tensor, image: Tensor, turn: Tensor, only: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """Text (B, L, dim) and pictures (B, N, dim) after attention to both.

        With `only`, nobody reads more of it than the first `only` picture tokens.
        """
        words, end = text.shape[1], None if only is None else text.shape[1] + only

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        q = self.norm_q(heads(self.to_q(image[:, :only])))
        if only is None:
            q = torch.cat([self.norm_added_q(heads(self.add_q_proj(text))), q], dim=1)
        k = [self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image)))]
        v = torch.cat([heads(self.add_v_proj(text)), heads(self.to_v(image))], dim=1)
        q = rotate(q, turn if only is None else turn[words:end])
        k = rotate(torch.cat(k, dim=1), turn)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x.transpose(1, 2).flatten(2)
        if only is not None:
            return None, self.to_out[0](x)
        return self.to_add_out(x[:, :words]), self.to_out[0](x[:, words:])


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; published as the first and the third layer of a list."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        widen = nn.ModuleDict({"proj": ops.Linear(c.dim, c.mlp_dim, **kw)})
        self.net = nn.ModuleDict({"0": widen, "2": ops.Linear(c.mlp_dim, c.dim, **kw)})

    def forward(self, x: Tensor) -> Tensor:
        widen = cast("nn.ModuleDict", self.net["0"])["proj"]
        return self.net["2"](F.gelu(widen(x), approximate="tanh"))


class Block(nn.Module):
    """Joint attention, then a feed-forward per stream, each scaled, shifted and gated by time."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), ops.Linear(c.dim, 6 * c.dim, **kw))
        self.txt_mod = nn.Sequential(nn.SiLU(), ops.Linear(c.dim, 6 * c.dim, **kw))
        plain = {"eps": c.eps, "elementwise_affine": False, **kw}
        self.img_norm1 = ops.LayerNorm(c.dim, **plain)
        self.img_norm2 = ops.LayerNorm(c.dim, **plain)
        self.txt_norm1 = ops.LayerNorm(c.dim, **plain)
        self.txt_norm2 = ops.LayerNorm(c.dim, **plain)
        self.attn = Attention(c, ops, **kw)
        self.img_mlp = FeedForward(c, ops, **kw)
        self.txt_mlp = FeedForward(c, ops, **kw)

    def forward(
        self, text: Tensor, image: Tensor, words: Six, parts: Sequence[Part], turn: Tensor,
        only: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both streams, one layer on; `only`: in the last layer, the tokens of the target."""
        said: list[Part] = [(slice(None), words)]
        told, seen = self.attn(
            modulate(self.txt_norm1(text), said, 0),
            modulate(self.img_norm1(image), parts, 0),
            turn,
            only,
        )
        if only is not None:
            image, parts = image[:, :only], parts[:1]
        image = add_gated(image, seen, parts, 0)
        made = self.img_mlp(modulate(self.img_norm2(image), parts, 3))
        image = within_half(add_gated(image, made, parts, 3))
        if told is None:
            return text, image
        text = add_gated(text, told, said, 0)
        made = self.txt_mlp(modulate(self.txt_norm2(text), said, 3))
        return within_half(add_gated(text, made, said, 3)), image


def within_half(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class NormOut(nn.Module):
    """The adaptive norm in front of the output projection."""

    def __init__(self, c: DiTConfig, ops: Operations, **kw: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(c.dim, 2 * c.dim, **kw)
        self.norm = ops.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False, **kw)

    def modulation(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.linear(F.silu(embedding))[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = modulation
        return torch.addcmul(shift, self.norm(x), scale)


class DiT(nn.Module):
    """Latents and a prefix in, velocity (noise - picture) out."""

    def __init__(
        self, config: DiTConfig, operations: Operations = TORCH, device=None, dtype=None
    ) -> None:
        super().__init__()
        c, kw = config, {"device": device, "dtype": dtype}
        self.config = config
        self.time_text_embed = TimeEmbedding(c, operations, **kw)
        self.txt_norm = operations.RMSNorm(c.context_dim, eps=c.eps, **kw)
        self.img_in = operations.Linear(c.in_channels, c.dim, **kw)
        self.txt_in = operations.Linear(c.context_dim, c.dim, **kw)
        self.transformer_blocks = nn.ModuleList(
            [Block(c, operations, **kw) for _ in range(c.layers)]
        )
        self.norm_out = NormOut(c, operations, **kw)
        self.proj_out = operations.Linear(c.dim, PATCH * PATCH * c.out_channels, **kw)
        # Gives the layers that compute modulations, one by one (model_loaders/lending.py).
        self.each: Callable[[Iterable[nn.Module]], Iterable[nn.Module]] = iter
        self.adapted = 0  # counts the changes of what hangs beside the layers (quant/lora.py)
        self._known: tuple[Any, list[Modulation]] = (None, [])

    @property
    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.transformer_blocks)

    def modulations(self, times: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """What each time, 1 = pure noise, does in every layer, computed in `dtype`.

        Exactly what `forward` computes for itself at that time: row by row, because a product of
        several rows adds in another order. Layer by layer, so each weight is needed only once; of
        lent weights the last answer is kept.
        """
        key = (tuple(times), dtype, self.adapted)
        if self._known[0] == key:
            return self._known[1]
        device = next(self.time_text_embed.parameters()).device
        always = [0.0] if self.config.zero_cond_t else []
        embed = [
            self.time_text_embed(torch.tensor([t], dtype=torch.float32, device=device), dtype)
            for t in (*times, *always)
        ]
        out = [self.norm_out.modulation(e) for e in embed]
        image, text = self._layers(embed)
        still = image[-1] if always else None
        made = [Modulation(image[i], text[i], out[i], still) for i in range(len(times))]
        if self.each is not iter:  # nobody else writes to weights that are lent
            self._known = (key, made)
        return made

    def _layers(self, embed: Sequence[Tensor]) -> tuple[list[Sequence[Six]], list[Sequence[Six]]]:
        """What each embedding of times (B, dim) does in every layer: to pictures, and to text."""
        layers = (layer for block in self.blocks for layer in (block.img_mod, block.txt_mod))
        made = [[six(layer(e)) for e in embed] for layer in self.each(layers)]
        return list(zip(*made[::2], strict=True)), list(zip(*made[1::2], strict=True))

    def prefix(
        self,
        text: Tensor,
        slots: Tensor | None = None,
        references: Sequence[Tensor] = (),
        room: int = 0,
    ) -> Prefix:
        """Embed text (B, L, context_dim) and references (B, C, h, w), normalised latents, once.

        `slots` and `room` are what other DiTs need: nothing is put among the text here, and nothing
        is kept for the target.
        """
        packed = [self.img_in(pack(x)) for x in references]
        return Prefix(
            text=self.txt_in(self.txt_norm(text)),
            references=torch.cat(packed, dim=1) if packed else None,
            grids=tuple((x.shape[-2] // PATCH, x.shape[-1] // PATCH) for x in references),
        )

    def forward(
        self, x: Tensor, t: Tensor, prefix: Prefix, modulation: Modulation | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) of latents x (B, C, h, w) at times t (B,), 1 = pure noise.

        The prefix has batch B, or 1 to be shared by all. In a layered model the batch is one
        picture's layers, at one time. `modulation` is that of `t`, where it is computed already.
        """
        frames, _, h, w = x.shape
        grid, layered = (h // PATCH, w // PATCH), self.config.layered
        tokens = pack(x)
        if layered:
            tokens, t = tokens.flatten(0, 1)[None], t[:1]
        image = self.img_in(tokens)
        batch, target = image.shape[:2]
        text = prefix.text.expand(batch, -1, -1)
        if prefix.references is not None:
            image = torch.cat([image, prefix.references.expand(batch, -1, -1)], dim=1)
        turn = self._turn(prefix, grid, frames if layered else 1).to(x.device)
        if modulation is None:
            modulation = self._modulation(t, image.dtype)
        if self.config.zero_cond_t and prefix.references is not None and prefix.still is None:
            prefix.still = modulation.still or self.modulations([0.0], image.dtype)[0].still
        last = self.config.layers - 1
        for layer, block in enumerate(self.transformer_blocks):
            parts: list[Part] = [(slice(None), modulation.image[layer])]
            if prefix.still is not None:
                parts = [
                    (slice(0, target), modulation.image[layer]),
                    (slice(target, None), prefix.still[layer]),
                ]
            words = modulation.text[layer]
            text, image = block(text, image, words, parts, turn, target if layer == last else None)
        out = self.proj_out(self.norm_out(image, modulation.out))
        return unpack(out.unflatten(1, (frames, -1))[0] if layered else out, grid)

    def _modulation(self, t: Tensor, dtype: torch.dtype) -> Modulation:
        """That of the times t (B,), which need not be equal."""
        embedding = self.time_text_embed(t, dtype)
        image, text = self._layers([embedding])
        return Modulation(image[0], text[0], self.norm_out.modulation(embedding))

    def _turn(self, prefix: Prefix, grid: Grid, frames: int) -> Tensor:
        """The rotations of a run's tokens, computed at its first step."""
        key = (frames, *grid)
        if key not in prefix.rotations:
            c, words = self.config, prefix.text.shape[1]
            where = positions(words, [grid] * frames, prefix.grids, c.layered)
            turn = rotation(where, c.axes, c.theta)
            prefix.rotations[key] = turn.to(prefix.text.device)
        return prefix.rotations[key]
