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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...embeddings import rotate, rotation
from ...layers import Block, KeptKeys, See, Store, computed
from .blocks import Attend, DoubleBlock, Embedder, Modulation, NormOut, Part, SingleBlock, modulated
from .configs import DiTConfig
from .positions import picture_positions, reference_positions, word_positions
from .variants import GUIDANCE


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

    @property
    def stores(self) -> bool:
        """Whether `prefix` has something for a `layers.Store`."""
        return self.config.cached

    def prefix(
        self,
        text: Tensor,
        slots: Tensor | None = None,
        references: Sequence[Tensor] = (),
        room: int = 0,
        guidance: float = GUIDANCE,
        store: Store | None = None,
    ) -> Prefix:
        """Everything that no step changes.

        `text` (B, L, context_dim) are the encoder's states, among which `slots` for references are
        nowhere; `references` normalised latents (B, C, h, w); `room` is the largest target in
        tokens that will follow (it grows when needed); `guidance` is for networks that read it.
        Cached keys and values that `store` knows are not computed again.
        """
        words = self.context_embedder(text)
        grids = [(r.shape[-2], r.shape[-1]) for r in references]
        tokens = [self.x_embedder(r.flatten(2).transpose(1, 2)) for r in references]
        prefix = Prefix(words, torch.cat([words[:, :0], *tokens], dim=1), grids)
        if self.config.guided:
            number = torch.tensor([guidance], device=text.device, dtype=torch.float32)
            prefix.guidance = self.time_guidance_embed["guidance_embedder"](number, words.dtype)
        if references and self.config.cached:
            block = self._kept_block(prefix, references, guidance)
            room += words.shape[1]
            if store is None or torch.is_grad_enabled():
                prefix.kept = computed([block], room)
            else:
                prefix.kept = store.keep("prefix", self, [block], room)
            prefix.references = prefix.references[:, :0]
        return prefix

    def _kept_block(self, prefix: Prefix, references: Sequence[Tensor], guidance: float) -> Block:
        """The references, which see each other and nothing else, at t = 0."""
        tokens, grids, embedded = prefix.references, prefix.grids, prefix.guidance

        def compute(see: See) -> None:
            x = tokens
            turn = self._rotation(reference_positions(grids), x.device)
            zero = self._modulate(torch.zeros(1, device=x.device), embedded, x.dtype)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = _turned(q, k, v, turn)
                k, v = see(layer, k, v)
                return _merged(F.scaled_dot_product_attention(q, k, v))

            double = cast("list[DoubleBlock]", self.transformer_blocks)
            for layer, block in enumerate(double):
                x = block.alone(x, zero.picture, partial(attend, layer))
            *blocks, last = cast("list[SingleBlock]", self.single_transformer_blocks)
            for layer, block in enumerate(blocks, start=len(double)):
                x = block(x, zero.single, partial(attend, layer))
            # Nobody reads what the last layer makes of the references, only its keys and values.
            q, k, v, _ = last.attn.project(modulated(last.norm(x), zero.single))
            see(self.config.layers - 1, *_turned(q, k, v, turn)[1:])

        read = guidance if self.config.guided else None
        return Block(tokens.shape[1], (read, *references), compute)

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
