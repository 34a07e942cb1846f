"""Qwen3-VL without its language head, read before its final norm.

The network is transformers', its layers exchanged for those of an operations namespace. Names of
tensors are transformers' (`model.language_model.*`, `model.visual.*`). transformers is imported
when a network is built, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...layers import See, make_tables, replace_layers
from ...qwen_vl import MERGE, TEMPORAL, Grid, PatchEmbed, positions, published_config
from ...shapes import count

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

PATCH = 16  # pixels per side of a vision patch; a latent token covers the same square


@dataclass(frozen=True)
class EncoderConfig:
    """Widths of the network; the defaults are the published Qwen3-VL-8B."""

    vocab_size: int = 151936
    hidden: int = 4096
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 12288
    theta: float = 5_000_000.0
    eps: float = 1e-6
    vision_hidden: int = 1152
    vision_depth: int = 27
    vision_heads: int = 16
    vision_intermediate: int = 4304
    vision_positions: int = 2304  # a square of learned positions
    deepstack: tuple[int, ...] = (8, 16, 24)  # vision layers that the first text layers read too

    @property
    def mrope(self) -> tuple[int, int, int]:
        """Rotary channel pairs for time, row, column: 24, 20, 20 of 64, others in proportion."""
        half = self.head_dim // 2
        side = round(half * 20 / 64)
        return half - 2 * side, side, side

    @classmethod
    def from_header(cls, checkpoint: Checkpoint) -> EncoderConfig:
        """From canonical names and shapes; `checkpoint.config` for what shapes cannot tell.

        Raises KeyError for a missing tensor, ValueError where shapes and config do not add up.
        """
        shapes = {name: tuple(info.shape) for name, info in checkpoint.names.items()}
        text, vision = published_config(checkpoint.config)
        layer, block = "model.language_model.layers", "model.visual.blocks"
        vocab_size, hidden = shapes["model.language_model.embed_tokens.weight"]
        (head_dim,) = shapes[f"{layer}.0.self_attn.q_norm.weight"]
        positions, vision_hidden = shapes["model.visual.pos_embed.weight"]
        depth = count(shapes, f"{block}.", ".norm1.weight")
        mergers = count(shapes, "model.visual.deepstack_merger_list.", ".norm.weight")
        vision_heads = int(vision.get("num_heads", cls.vision_heads))
        deepstack = tuple(vision.get("deepstack_visual_indexes", _deepstack(depth, mergers)))
        if vision_hidden % (4 * vision_heads) or len(deepstack) != mergers:
            raise ValueError(
                f"The text encoder's vision tower is {vision_hidden} wide with {mergers} DeepStack "
                f"layers, which does not fit {vision_heads} heads and DeepStack at "
                f"{list(deepstack)}; the file needs the config.json that it was published with."
            )
        return cls(
            vocab_size=vocab_size,
            hidden=hidden,
            layers=count(shapes, f"{layer}.", ".self_attn.q_norm.weight"),
            heads=shapes[f"{layer}.0.self_attn.q_proj.weight"][0] // head_dim,
            kv_heads=shapes[f"{layer}.0.self_attn.k_proj.weight"][0] // head_dim,
            head_dim=head_dim,
            intermediate=shapes[f"{layer}.0.mlp.gate_proj.weight"][0],
            theta=float(text.get("rope_theta", cls.theta)),
            eps=float(text.get("rms_norm_eps", cls.eps)),
            vision_hidden=vision_hidden,
            vision_depth=depth,
            vision_heads=vision_heads,
            vision_intermediate=shapes[f"{block}.0.mlp.linear_fc1.weight"][0],
            vision_positions=positions,
            deepstack=deepstack,
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_header` cannot read from shapes, named as in transformers' config.json."""
        return {
            "model_type": "qwen3_vl",
            "text_config": {"rope_theta": self.theta, "rms_norm_eps": self.eps},
            "vision_config": {
                "num_heads": self.vision_heads,
                "deepstack_visual_indexes": list(self.deepstack),
            },
        }


def tiny_config(vocab_size: int, **changes: Any) -> EncoderConfig:
    """Two million weights, for the embedded model and for tests; any field can be changed."""
    tiny = EncoderConfig(
        vocab_size=vocab_size,
        hidden=192,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=32,
        intermediate=512,
        vision_hidden=128,
        vision_depth=2,
        vision_heads=4,
        vision_intermediate=256,
        vision_positions=64,
        deepstack=(0,),
    )
    return replace(tiny, **changes)


def _deepstack(depth: int, mergers: int) -> tuple[int, ...]:
    """The published choices (depth 27: 8B and 32B; depth 24: 2B and 4B), and evenly elsewhere."""
    if (depth, mergers) == (27, 3):
        return (8, 16, 24)
    step = depth // (mergers + 1)
    return tuple(step * (i + 1) - 1 for i in range(mergers))


class Qwen3VL(nn.Module):
    """Token ids and picture patches to the last decoder layer's output, before the final norm."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

        self.config = config
        with torch.device("meta"):
            self.model = Qwen3VLModel(_transformers_config(config))
        text, visual = self.model.language_model, self.model.visual
        text.norm = nn.Identity()
        visual.patch_embed = PatchEmbed(PATCH, config.vision_hidden, device=device, dtype=dtype)
        replace_layers(self.model, operations, device, dtype)
        make_tables(device, (text, "rotary_emb"), (visual, "rotary_pos_emb"))
        self.eval()

    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        patches: Tensor | None = None,
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """Hidden states (B, L, hidden) of rows of equal length, nothing padded.

        `ids` (B, L); `slots` (B, L) True where a vision token goes; `patches` (P, 1536) of all
        pictures, row by row; `grids` rows and columns of patches of each.
        """
        x = self.model.language_model.embed_tokens(ids)
        seen = None if patches is None else self.look(patches.to(x.device, x.dtype), grids)
        return self.read(x, slots, seen, positions(slots, grids))

    def look(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """What the vision tower makes of pictures, each (S, hidden): vision tokens, and features
        for the first text layers. `patches` in the dtype that the network computes in."""
        grid = torch.tensor([(1, h, w) for h, w in grids], device=patches.device)
        # Straight to the tower: transformers' own way casts pixels to the weights' dtype, which
        # for weights that are widened on the fly is not the dtype of the arithmetic.
        seen = self.model.visual(patches, grid_thw=grid)
        return [seen.pooler_output, *seen.deepstack_features]

    def read(
        self,
        x: Tensor,
        slots: Tensor,
        seen: Sequence[Tensor] | None,
        where: Tensor,
        see: See | None = None,
        before: int = 0,
    ) -> Tensor:
        """Hidden states of embedded tokens x (B, L, hidden) at positions `where` (3, B, L).

        `seen` is what `look` saw for the `slots`. `see` keeps keys and values, and returns those of
        all tokens up to these; so many are `before` them.
        """
        text: Any = self.model.language_model
        features = [] if seen is None else [f.to(x.dtype) for f in seen[1:]]
        if seen is not None:
            x = x.masked_scatter(slots[..., None], seen[0].to(x.dtype))
        turn, mask = [part.unsqueeze(1) for part in text.rotary_emb(x, where)], None
        if before:
            mask = torch.ones(x.shape[1], before + x.shape[1], dtype=torch.bool, device=x.device)
            mask = mask.tril(before)
        for index, layer in enumerate(text.layers):
            q, k, v = self._heads(layer.self_attn, layer.input_layernorm(x), turn)
            k, v = see(index, k, v) if see else (k, v)
            x = x + layer.self_attn.o_proj(attend(q, k, v, mask))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if index < len(features):
                x = x.masked_scatter(slots[..., None], x[slots] + features[index])
        return x

    def _heads(self, layer: Any, x: Tensor, turn: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rotated queries and keys, and values, of x (B, L, hidden): (B, heads, L, head_dim)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.config.head_dim))
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = layer.q_norm(q).transpose(1, 2), layer.k_norm(k).transpose(1, 2)
        return rotate_halves(q, *turn), rotate_halves(k, *turn), v.transpose(1, 2)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None, std: float = 0.02) -> Qwen3VL:
        """Draw the weights that training starts from: matrices normal, scales one, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        return self


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, L, head_dim), channel i with channel i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, heads, L, head_dim) to k and v of fewer heads, which it shares, as `mask`
    (L, keys) says, else causal: (B, L, heads * head_dim)."""
    count = q.shape[1] // k.shape[1]
    k, v = (x.unsqueeze(2).expand(-1, -1, count, -1, -1).flatten(1, 2) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


def _transformers_config(config: EncoderConfig) -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config={
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden,
            "intermediate_size": config.intermediate,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.eps,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.theta,
                "mrope_section": list(config.mrope),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": config.vision_depth,
            "hidden_size": config.vision_hidden,
            "intermediate_size": config.vision_intermediate,
            "num_heads": config.vision_heads,
            "out_hidden_size": config.hidden,
            "num_position_embeddings": config.vision_positions,
            "deepstack_visual_indexes": list(config.deepstack),
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
    )
