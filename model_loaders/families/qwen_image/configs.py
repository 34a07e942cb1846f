"""Configs of the DiT and the VAE, read from canonical names and shapes.

A config file beside the weights is consulted only for what shapes cannot tell. A header that does
not add up raises KeyError (a tensor that is needed is missing) or ValueError; the loader puts it
into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .variants import LAYERED, ZERO_COND_T

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from .dit import DiTConfig
    from .vae import VAEConfig

MAX_BLOCKS = 1024  # a hostile header must not make us build a million layers
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

    shape = _shapes(checkpoint, 2)
    dim, in_channels = shape("img_in.weight")
    (head_dim,) = _shapes(checkpoint, 1)("transformer_blocks.0.attn.norm_q.weight")
    axes = tuple(map(int, checkpoint.config.get("axes_dims_rope") or _axes(head_dim)))
    if len(axes) != 3 or sum(axes) != head_dim or any(a % 2 for a in axes):
        raise ValueError(f"rotary axes {axes} do not fit heads of {head_dim} channels")
    variant = checkpoint.config["variant"]
    layered = ADDED_TIME in checkpoint.names
    if layered != (variant == LAYERED):
        what = "is" if layered else "is not"
        raise ValueError(
            f"it {what} Qwen-Image-Layered by its tensors, and the variant {variant} was chosen"
        )
    return DiTConfig(
        in_channels=in_channels,
        out_channels=_ratio("proj_out.weight", shape("proj_out.weight")[0], 4),
        layers=_count(checkpoint.names, "transformer_blocks.", ".attn.norm_q.weight"),
        heads=_ratio("img_in.weight", dim, head_dim),
        head_dim=head_dim,
        context_dim=shape("txt_in.weight")[1],
        mlp_dim=shape("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
        axes=axes,
        zero_cond_t=variant in ZERO_COND_T,
        layered=layered,
        variant=variant,
    )


def _axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary channels for frame, height, width: 16, 56, 56 of 128, and so in proportion."""
    side = head_dim * 7 // 16
    return head_dim - 2 * side, side, side


def vae_config(checkpoint: Checkpoint) -> VAEConfig:
    from .vae import VAEConfig

    shape = _shapes(checkpoint, 4)
    base, channels, _, _ = shape("encoder.conv_in.weight")
    down, names = "encoder.down_blocks.", checkpoint.names
    flat = _count(names, down, ".weight", {".conv1", ".resample.1"})
    widths, times, blocks = [], [], 0
    for i in range(flat):  # residual blocks, closed by a halving or by the end of the list
        if f"{down}{i}.conv1.weight" in names:
            width, blocks = shape(f"{down}{i}.conv1.weight")[0], blocks + 1
        else:
            widths.append(shape(f"{down}{i}.resample.1.weight")[0])
            times.append(f"{down}{i}.time_conv.weight" in names)
    if blocks == 0:
        raise KeyError(f"{down}0.conv1.weight")
    widths.append(width)  # pyright: ignore
    z_dim = shape("post_quant_conv.weight")[0]
    mean, std = _statistics(checkpoint, z_dim)
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base,
        dim_mult=tuple(_ratio(f"stage {i}", width, base) for i, width in enumerate(widths)),
        num_res_blocks=_ratio("the encoder's list of blocks", blocks, len(widths)),
        temporal_downsample=tuple(times),
        latents_mean=mean,
        latents_std=std,
        in_channels=channels,
    )


def _statistics(checkpoint: Checkpoint, z_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the latents, (z_dim) each."""
    given = checkpoint.config.get("latents_mean"), checkpoint.config.get("latents_std")
    if all(given):
        mean, std = (tuple(map(float, values)) for values in given if values)
    elif z_dim == len(LATENTS_MEAN):
        mean, std = LATENTS_MEAN, LATENTS_STD
    else:
        raise ValueError(
            f"a VAE with {z_dim} latent channels that is not the published one needs latents_mean "
            "and latents_std in its config"
        )
    fine = len(mean) == len(std) == z_dim and all(map(math.isfinite, mean + std)) and min(std) > 0
    if not fine:
        raise ValueError(f"latents_mean and latents_std must be {z_dim} numbers each, std above 0")
    return mean, std


def _shapes(checkpoint: Checkpoint, rank: int) -> Callable[[str], tuple[int, ...]]:
    """A look-up of shapes that have `rank` sides, none of them 0."""

    def shape(name: str) -> tuple[int, ...]:
        sides = checkpoint.names[name].shape
        if len(sides) != rank or 0 in sides:
            raise ValueError(f"{name} has shape {sides}, needed are {rank} sides above 0")
        return sides

    return shape


def _count(names: Iterable[str], prefix: str, suffix: str, middle: Iterable[str] = ("",)) -> int:
    """How many names are prefix, number, one of `middle`, suffix; ValueError for too many."""
    found = 0
    for part in middle:
        ending = part + suffix
        found += sum(
            name.startswith(prefix)
            and name.endswith(ending)
            and name[len(prefix) : -len(ending)].isdecimal()
            for name in names
        )
    if found == 0:
        raise KeyError(f"{prefix}0{suffix}")
    if found > MAX_BLOCKS:
        raise ValueError(f"{found} blocks {prefix}* are more than {MAX_BLOCKS}")
    return found


def _ratio(what: str, whole: int, part: int) -> int:
    if whole % part:
        raise ValueError(f"{what} has {whole} channels, which is no multiple of {part}")
    return whole // part
