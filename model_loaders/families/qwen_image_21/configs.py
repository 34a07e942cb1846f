"""Configs of the DiT and the VAE, read from canonical names and shapes.

A config file beside the weights is consulted only for what shapes cannot tell. A header that does
not add up raises KeyError (a tensor that is needed is missing) or ValueError; the loader puts it
into words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...shapes import count, latent_statistics, ratio, rotary_axes, shapes

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from .dit import DiTConfig
    from .vae import VAEConfig

# Published latent statistics (mean, std) of the 64-channel VAE with 96 base channels.
LATENTS_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722,
    1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363,
    2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464,
    -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955,
    -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729,
    -2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505,
    0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)  # fmt: skip
LATENTS_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910,
    3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756,
    3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489,
    3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467,
    3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125,
    3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875,
    3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959,
    3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161,
)  # fmt: skip
PUBLISHED_VAE = (96, 64)  # base channels, latent channels that these belong to


def dit_config(checkpoint: Checkpoint) -> DiTConfig:
    from .dit import DiTConfig

    shape = shapes(checkpoint, 2)
    dim, in_channels = shape("img_in.weight")
    (head_dim,) = shapes(checkpoint, 1)("transformer_blocks.0.attn.norm_q.weight")
    return DiTConfig(
        in_channels=in_channels,
        layers=count(checkpoint.names, "transformer_blocks.", ".attn.norm_q.weight"),
        heads=ratio("img_in.weight", dim, head_dim),
        head_dim=head_dim,
        context_dim=shape("txt_in.in_layer.weight")[1],
        mlp_dim=shape("transformer_blocks.0.img_mlp.out.weight")[1],
        axes=rotary_axes(checkpoint, head_dim),
    )


def vae_config(checkpoint: Checkpoint) -> VAEConfig:
    from .vae import VAEConfig

    shape = shapes(checkpoint, 4)
    base, channels, _, _ = shape("encoder.conv_in.weight")
    down = "encoder.down_blocks."
    stages = count(checkpoint.names, down, ".resnets.0.conv1.weight")
    widths = [shape(f"{down}{i}.resnets.0.conv1.weight")[0] for i in range(stages)]
    mult = tuple(ratio(f"{down}{i}", width, base) for i, width in enumerate(widths))
    z_dim = shape("post_quant_conv.weight")[0]
    published = (LATENTS_MEAN, LATENTS_STD) if (base, z_dim) == PUBLISHED_VAE else None
    mean, std = latent_statistics(checkpoint, z_dim, published)
    patch = math.isqrt(channels // 4)
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base,
        decoder_base_dim=ratio("decoder.conv_in", shape("decoder.conv_in.weight")[0], mult[-1]),
        dim_mult=mult,
        num_res_blocks=count(checkpoint.names, f"{down}0.resnets.", ".conv1.weight"),
        temporal_downsample=tuple(
            f"{down}{i}.downsampler.time_conv.weight" in checkpoint.names for i in range(stages - 1)
        ),
        patch_size=patch if patch > 1 else None,
        latents_mean=mean,
        latents_std=std,
    )
