"""Configs of the DiT and the VAE, read from canonical names and shapes.

A config file beside the weights is consulted only for what shapes cannot tell. A header that does
not add up raises KeyError (a tensor that is needed is missing) or ValueError; the loader puts it
into words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...shapes import count, latent_statistics, ratio, rotary_axes, shapes
from .variants import LAYERED, ZERO_COND_T

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from .dit import DiTConfig
    from .vae import VAEConfig

ADDED_TIME = "time_text_embed.addition_t_embedding.weight"  # only Qwen-Image-Layered has it

# Published latent statistics (mean, std) of the 16-channel VAE, which are Wan 2.1's.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def dit_config(checkpoint: Checkpoint) -> DiTConfig:
    from .dit import DiTConfig

    shape = shapes(checkpoint, 2)
    dim, in_channels = shape("img_in.weight")
    (head_dim,) = shapes(checkpoint, 1)("transformer_blocks.0.attn.norm_q.weight")
    variant = checkpoint.config["variant"]
    layered = ADDED_TIME in checkpoint.names
    if layered != (variant == LAYERED):
        what = "is" if layered else "is not"
        raise ValueError(
            f"it {what} Qwen-Image-Layered by its tensors, and the variant {variant} was chosen"
        )
    return DiTConfig(
        in_channels=in_channels,
        out_channels=ratio("proj_out.weight", shape("proj_out.weight")[0], 4),
        layers=count(checkpoint.names, "transformer_blocks.", ".attn.norm_q.weight"),
        heads=ratio("img_in.weight", dim, head_dim),
        head_dim=head_dim,
        context_dim=shape("txt_in.weight")[1],
        mlp_dim=shape("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
        axes=rotary_axes(checkpoint, head_dim),
        zero_cond_t=variant in ZERO_COND_T,
        layered=layered,
        variant=variant,
    )


def vae_config(checkpoint: Checkpoint) -> VAEConfig:
    from .vae import VAEConfig

    shape = shapes(checkpoint, 4)
    base, channels, _, _ = shape("encoder.conv_in.weight")
    down, names = "encoder.down_blocks.", checkpoint.names
    flat = count(names, down, ".conv1.weight", ".resample.1.weight")
    width, widths, times, blocks = base, [], [], 0
    for i in range(flat):  # residual blocks, closed by a halving or by the end of the list
        if f"{down}{i}.conv1.weight" in names:
            width, blocks = shape(f"{down}{i}.conv1.weight")[0], blocks + 1
        else:
            widths.append(shape(f"{down}{i}.resample.1.weight")[0])
            times.append(f"{down}{i}.time_conv.weight" in names)
    if blocks == 0:
        raise KeyError(f"{down}0.conv1.weight")
    widths.append(width)
    z_dim = shape("post_quant_conv.weight")[0]
    published = (LATENTS_MEAN, LATENTS_STD) if z_dim == len(LATENTS_MEAN) else None
    mean, std = latent_statistics(checkpoint, z_dim, published)
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base,
        dim_mult=tuple(ratio(f"stage {i}", width, base) for i, width in enumerate(widths)),
        num_res_blocks=ratio("the encoder's list of blocks", blocks, len(widths)),
        temporal_downsample=tuple(times),
        latents_mean=mean,
        latents_std=std,
        in_channels=channels,
    )
