"""Reading a network's widths off the shapes in a header.

A header that does not add up raises KeyError (a tensor that is needed is missing) or ValueError;
the loader puts it into words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MAX_BLOCKS = 1024  # a hostile header must not make us build a million layers


def shapes(checkpoint: Checkpoint, rank: int) -> Callable[[str], tuple[int, ...]]:
    """A look-up of shapes that have `rank` sides, none of them 0."""

    def shape(name: str) -> tuple[int, ...]:
        sides = checkpoint.names[name].shape
        if len(sides) != rank or 0 in sides:
            raise ValueError(f"{name} has shape {sides}, needed are {rank} sides above 0")
        return sides

    return shape


def count(names: Iterable[str], prefix: str, suffix: str) -> int:
    """How many names there are with this beginning and end, at least one."""
    found = sum(name.startswith(prefix) and name.endswith(suffix) for name in names)
    if found == 0:
        raise KeyError(f"{prefix}0{suffix}")
    if found > MAX_BLOCKS:
        raise ValueError(f"{found} blocks {prefix}* are more than {MAX_BLOCKS}")
    return found


def ratio(what: str, whole: int, part: int) -> int:
    if whole % part:
        raise ValueError(f"{what} has {whole} channels, which is no multiple of {part}")
    return whole // part
