"""Configs of the DiT and the VAE, read from canonical names and shapes.

A config file beside the weights is consulted only for what shapes cannot tell. A header that does
not add up raises KeyError (a tensor that is needed is missing) or ValueError; the loader puts it
into words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...shapes import count, ratio, shapes
from .variants import is_cached

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from .vae import VAEConfig

GUIDED = "time_guidance_embed.guidance_embedder.linear_1.weight"
AXES = 4  # time, row, column, word


@dataclass(frozen=True)
class DiTConfig:
    """Widths of the network; the defaults are klein 4B."""

    in_channels: int = 128
    double: int = 5  # blocks of two streams
    single: int = 20  # blocks of one
    heads: int = 24
    head_dim: int = 128
    context_dim: int = 7680
    mlp_dim: int = 9216
    guided: bool = False  # reads the guidance, as the time
    cached: bool = False  # references at t = 0 that see only each other
    axes: tuple[int, ...] = (32, 32, 32, 32)  # rotary channels for time, row, column, word
    theta: float = 2000.0
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        return self.double + self.single


def dit_config(checkpoint: Checkpoint) -> DiTConfig:
    matrix = shapes(checkpoint, 2)
    dim, in_channels = matrix("x_embedder.weight")
    (head_dim,) = shapes(checkpoint, 1)("transformer_blocks.0.attn.norm_q.weight")
    axes = tuple(map(int, checkpoint.config.get("axes_dims_rope") or (head_dim // AXES,) * AXES))
    if len(axes) != AXES or sum(axes) != head_dim or any(a % 2 for a in axes):
        raise ValueError(f"rotary axes {axes} do not fit heads of {head_dim} channels")
    return DiTConfig(
        in_channels=in_channels,
        double=count(checkpoint.names, "transformer_blocks.", ".attn.norm_added_q.weight"),
        single=count(checkpoint.names, "single_transformer_blocks.", ".attn.norm_q.weight"),
        heads=ratio("x_embedder.weight", dim, head_dim),
        head_dim=head_dim,
        context_dim=matrix("context_embedder.weight")[1],
        mlp_dim=matrix("transformer_blocks.0.ff.linear_out.weight")[1],
        guided=GUIDED in checkpoint.names,
        cached=is_cached(checkpoint),
        axes=axes,
    )


def published_dits() -> dict[str, DiTConfig]:
    """The networks that BFL has published, base, distilled and cached being alike."""
    return {
        "FLUX.2 klein 4B": DiTConfig(),
        "FLUX.2 klein 9B": DiTConfig(
            double=8, single=24, heads=32, context_dim=12288, mlp_dim=12288
        ),
        "FLUX.2 dev": DiTConfig(
            double=8, single=48, heads=48, context_dim=15360, mlp_dim=18432, guided=True
        ),
    }


def vae_config(checkpoint: Checkpoint) -> VAEConfig:
    from .vae import VAEConfig

    kernel, names = shapes(checkpoint, 4), checkpoint.names
    down, up = "encoder.down_blocks.", "decoder.up_blocks."
    stages = count(names, down, ".resnets.0.conv1.weight")
    decoder = [kernel(f"{up}{i}.resnets.0.conv1.weight")[0] for i in range(stages)]
    return VAEConfig(
        channels=kernel("decoder.conv_in.weight")[1],
        in_channels=kernel("encoder.conv_in.weight")[1],
        widths=tuple(kernel(f"{down}{i}.resnets.0.conv1.weight")[0] for i in range(stages)),
        decoder_widths=tuple(decoder[::-1]),
        blocks=count(names, f"{down}0.resnets.", ".conv1.weight"),
        groups=int(checkpoint.config.get("norm_num_groups") or 32),
        quant_conv="quant_conv.weight" in names,
        post_quant_conv="post_quant_conv.weight" in names,
        eps=float(checkpoint.config.get("batch_norm_eps") or 1e-4),
    )
