"""Qwen2.5-VL without its language head, as the text encoder of Qwen-Image.

The network is transformers', its layers exchanged for those of an operations namespace. Names of
tensors are transformers' (`model.language_model.*`, `model.visual.*`). transformers is imported
when a network is built, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...layers import make_tables, replace_layers
from ...qwen_vl import MERGE, TEMPORAL, Grid, PatchEmbed, positions, published_config
from ...shapes import count

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

PATCH = 14  # pixels per side of a vision patch
HEAD_DIM = 128  # of the text part; no shape tells it


@dataclass(frozen=True)
class EncoderConfig:
    """Widths of the network; the defaults are the published Qwen2.5-VL-7B."""

    vocab_size: int = 152064
    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    intermediate: int = 18944
    theta: float = 1_000_000.0
    eps: float = 1e-6
    vision_hidden: int = 1280
    vision_depth: int = 32
    vision_heads: int = 16
    vision_intermediate: int = 3420
    vision_window: int = 112  # pixels per side within which most vision layers look
    vision_full: tuple[int, ...] = (7, 15, 23, 31)  # vision layers that look at all of the picture

    @property
    def mrope(self) -> tuple[int, int, int]:
        """Rotary channel pairs for time, row, column: 16, 24, 24 of 64, others in proportion."""
        half = self.hidden // self.heads // 2
        side = round(half * 24 / 64)
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
        heads = int(text.get("num_attention_heads", hidden // HEAD_DIM))
        vision_hidden = shapes["model.visual.patch_embed.proj.weight"][0]
        vision_heads = int(vision.get("num_heads", cls.vision_heads))
        if hidden % (2 * heads) or vision_hidden % (4 * vision_heads):
            raise ValueError(
                f"{heads} heads of {hidden} channels and {vision_heads} of {vision_hidden} in its "
                "vision tower do not fit; the file needs the config.json that it was published with"
            )
        kv = shapes[f"{layer}.0.self_attn.k_proj.weight"][0]
        return cls(
            vocab_size=vocab_size,
            hidden=hidden,
            layers=count(shapes, f"{layer}.", ".self_attn.q_proj.bias"),
            heads=heads,
            kv_heads=kv * heads // hidden,
            intermediate=shapes[f"{layer}.0.mlp.gate_proj.weight"][0],
            theta=float(text.get("rope_theta", cls.theta)),
            eps=float(text.get("rms_norm_eps", cls.eps)),
            vision_hidden=vision_hidden,
            vision_depth=count(shapes, f"{block}.", ".norm1.weight"),
            vision_heads=vision_heads,
            vision_intermediate=shapes[f"{block}.0.mlp.gate_proj.weight"][0],
            vision_window=int(vision.get("window_size", cls.vision_window)),
            vision_full=tuple(vision.get("fullatt_block_indexes", cls.vision_full)),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_header` cannot read from shapes, named as in transformers' config.json."""
        return {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "num_attention_heads": self.heads,
                "rope_theta": self.theta,
                "rms_norm_eps": self.eps,
            },
            "vision_config": {
                "num_heads": self.vision_heads,
                "window_size": self.vision_window,
                "fullatt_block_indexes": list(self.vision_full),
            },
        }


def tiny_config(vocab_size: int, **changes: Any) -> EncoderConfig:
    """A few hundred thousand weights, for tests; any field can be changed."""
    tiny = EncoderConfig(
        vocab_size=vocab_size, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96,
        vision_hidden=32, vision_depth=3, vision_heads=2, vision_intermediate=64, vision_window=56,
        vision_full=(1,),
    )  # fmt: skip
    return replace(tiny, **changes)


class Qwen25VL(nn.Module):
    """Token ids and picture patches to the last decoder layer's output, after the final norm."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

        self.config = config
        with torch.device("meta"):
            self.model = Qwen2_5_VLModel(_transformers_config(config))
        text, visual = self.model.language_model, self.model.visual
        visual.patch_embed = PatchEmbed(  # pyright: ignore[reportAttributeAccessIssue]
            PATCH, config.vision_hidden, bias=False, device=device, dtype=dtype
        )
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

        `ids` (B, L); `slots` (B, L) True where a vision token goes; `patches` (P, 1176) of all
        pictures, row by row; `grids` rows and columns of patches of each.
        """
        text = self.model.language_model
        x = text.embed_tokens(ids)
        if patches is not None:
            grid = torch.tensor([(1, h, w) for h, w in grids], device=ids.device)
            # Straight to the tower: transformers' own way casts pixels to the weights' dtype,
            # which for weights that are widened on the fly is not the dtype of the arithmetic.
            seen = self.model.visual(patches.to(x.device, x.dtype), grid_thw=grid)
            x = x.masked_scatter(slots[..., None], seen.pooler_output.to(x.dtype))
        output = text(inputs_embeds=x, position_ids=positions(slots, grids), use_cache=False)
        return output.last_hidden_state


def _transformers_config(config: EncoderConfig) -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden,
            "intermediate_size": config.intermediate,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "rms_norm_eps": config.eps,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.theta,
                "mrope_section": list(config.mrope),
            },
        },
        vision_config={
            "depth": config.vision_depth,
            "hidden_size": config.vision_hidden,
            "intermediate_size": config.vision_intermediate,
            "num_heads": config.vision_heads,
            "out_hidden_size": config.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "window_size": config.vision_window,
            "fullatt_block_indexes": list(config.vision_full),
        },
    )
