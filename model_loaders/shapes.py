"""Reading a network's widths off the shapes in a header.

A header that does not add up raises KeyError (a tensor that is needed is missing) or ValueError;
the loader puts it into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Numbers = tuple[float, ...]
MAX_BLOCKS = 1024  # a hostile header must not make us build a million layers


def shapes(checkpoint: Checkpoint, rank: int) -> Callable[[str], tuple[int, ...]]:
    """A look-up of shapes that have `rank` sides, none of them 0."""

    def shape(name: str) -> tuple[int, ...]:
        sides = checkpoint.names[name].shape
        if len(sides) != rank or 0 in sides:
            raise ValueError(f"{name} has shape {sides}, needed are {rank} sides above 0")
        return sides

    return shape


def count(names: Iterable[str], prefix: str, *suffixes: str) -> int:
    """How many names are `prefix`, a number, one of `suffixes`: from 1 to MAX_BLOCKS."""
    found = sum(
        name.startswith(prefix)
        and name.endswith(suffix)
        and name[len(prefix) : -len(suffix)].isdecimal()
        for name in names
        for suffix in suffixes
    )
    if found == 0:
        raise KeyError(f"{prefix}0{suffixes[0]}")
    if found > MAX_BLOCKS:
        raise ValueError(f"{found} blocks {prefix}* are more than {MAX_BLOCKS}")
    return found


def ratio(what: str, whole: int, part: int) -> int:
    if whole % part:
        raise ValueError(f"{what} has {whole} channels, which is no multiple of {part}")
    return whole // part


def rotary_axes(checkpoint: Checkpoint, head_dim: int) -> tuple[int, int, int]:
    """Rotary channels for frame, height, width: as the config says, or 16, 56, 56 of 128."""
    side = head_dim * 7 // 16
    said = checkpoint.config.get("axes_dims_rope") or (head_dim - 2 * side, side, side)
    axes = tuple(map(int, said))
    if len(axes) != 3 or sum(axes) != head_dim or any(a % 2 for a in axes):
        raise ValueError(f"rotary axes {axes} do not fit heads of {head_dim} channels")
    return axes


def latent_statistics(
    checkpoint: Checkpoint, z_dim: int, published: tuple[Numbers, Numbers] | None
) -> tuple[Numbers, Numbers]:
    """Mean and standard deviation of the latents, (z_dim) each: the config's, or `published`."""
    given = checkpoint.config.get("latents_mean"), checkpoint.config.get("latents_std")
    if all(given):
        mean, std = (tuple(map(float, values)) for values in given if values)
    elif published is not None:
        mean, std = published
    else:
        raise ValueError(
            f"a VAE with {z_dim} latent channels that is not the published one needs latents_mean "
            "and latents_std in its config"
        )
    fine = len(mean) == len(std) == z_dim and all(map(math.isfinite, mean + std)) and min(std) > 0
    if not fine:
        raise ValueError(f"latents_mean and latents_std must be {z_dim} numbers each, std above 0")
    return mean, std
