"""The sequence that the DiT of Qwen-Image-2.1 reads: who lies where, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...embeddings import grid_positions, rotation
from ...joint import JointKeys
from ...layers import WORDS, KeptKeys

if TYPE_CHECKING:
    from .dit import DiTConfig

SLOT = 4  # latent tokens (2 x 2) per slot of the vision-language encoder


@dataclass(frozen=True)
class Segment:
    """A run of prefix tokens [start, end): text (`grid` None) or one image of `grid` tokens."""

    start: int
    end: int
    grid: tuple[int, int] | None


@dataclass
class Prefix:
    """Text and references in every layer, computed once, read at every step."""

    kept: KeptKeys
    position: int  # rotary position at which the target starts
    rotations: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def turn(self, h: int, w: int, c: DiTConfig, device: torch.device) -> Tensor:
        """Rotations of a target of h x w tokens: (tokens, head_dim / 2)."""
        if (h, w) not in self.rotations:
            positions = grid_positions(self.position, h, w)
            self.rotations[h, w] = rotation(positions, c.axes, c.theta).to(device)
        return self.rotations[h, w]


class JointPrefix(Prefix):
    """Prefixes of pictures that are painted at once and see each other, a row of the batch each.

    A row lies where it would lie alone. The others lie before and behind it as images do, by as
    many images as their `places` are apart.
    """

    def __init__(self, prefixes: Sequence[Prefix], places: Sequence[int], layers: int) -> None:
        keys = JointKeys([prefix.kept for prefix in prefixes], layers)
        super().__init__(keys, prefixes[0].position)
        self.keys, self.places = keys, torch.tensor(places)
        self.starts = torch.tensor([prefix.position for prefix in prefixes])

    def turn(self, h: int, w: int, c: DiTConfig, device: torch.device) -> Tensor:
        """(rows, tokens, head_dim / 2)."""
        if (h, w) not in self.rotations:
            grids = [grid_positions(start, h, w) for start in self.starts.tolist()]
            turns = [rotation(grid, c.axes, c.theta) for grid in grids]
            self.rotations[h, w] = torch.stack(turns).to(device)
            # From where a row lies alone to where it lies for another one; only the frame changes.
            apart = (self.places[None] - self.places[:, None]) * max(h, w)
            moved = (self.starts[:, None] + apart - self.starts[None]).reshape(-1, 1)
            moves = rotation(F.pad(moved, (0, 2)), c.axes, c.theta)
            self.keys.turns = moves.unflatten(0, apart.shape).to(device)
        return self.rotations[h, w]


def segments_of(slots: Tensor, grids: Sequence[tuple[int, int]]) -> list[Segment]:
    """Split the prefix into text runs and image blocks, in latent tokens.

    `slots` (L,) bool marks the encoder's image slots; `grids` are the references' (h, w) in latent
    tokens, in order. Raises ValueError when they do not add up.
    """
    needed = [h * w for h, w in grids]
    found = int(slots.sum())
    if sum(needed) != found * SLOT:
        raise ValueError(
            f"The prompt has {found} image slots ({found * SLOT} latent tokens) but the references "
            f"bring {sum(needed)} tokens in {len(grids)} images; encode the prompt with the same "
            "references, in the same sizes, that are given to the DiT."
        )
    segments: list[Segment] = []
    index, start = 0, 0
    values, lengths = torch.unique_consecutive(slots.cpu(), return_counts=True)
    for is_image, length in zip(values.tolist(), lengths.tolist(), strict=True):
        left = length * SLOT if is_image else length
        while left > 0:
            grid = grids[index] if is_image else None
            step = needed[index] if is_image else left
            segments.append(Segment(start, start + step, grid))
            start, left, index = start + step, left - step, index + bool(is_image)
    return segments


def runs_of(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments as blocks: an image with the words before it, and words alone as `ends_of` says."""
    runs: list[list[Segment]] = []
    open_run: list[Segment] = []
    for segment in segments:
        if segment.grid is not None:
            runs.append([*open_run, segment])
            open_run = []
            continue
        ends = ends_of(segment.start, segment.end)
        parts = pairwise([segment.start, *ends])
        *whole, open_run = [[Segment(start, end, None)] for start, end in parts]
        runs += whole
    return [*runs, open_run] if open_run else runs


def ends_of(start: int, end: int) -> list[int]:
    """Where the blocks of a run of words end: after every `WORDS`, and a rest that is shorter goes
    with the block before it, because it would take as long as all of that."""
    return [*range(start + WORDS, end - WORDS + 1, WORDS), end]


def prefix_positions(segments: Sequence[Segment], position: int = 0) -> tuple[Tensor, int]:
    """Rotary positions (P, 3) of segments from `position` on, and where the next one starts."""
    parts = [torch.empty(0, 3, dtype=torch.long)]
    for segment in segments:
        if segment.grid is None:
            run = torch.arange(position, position + segment.end - segment.start)
            parts.append(run[:, None].expand(-1, 3))
        else:
            parts.append(grid_positions(position, *segment.grid))
        position += advance(segment)
    return torch.cat(parts), position


def advance(segment: Segment) -> int:
    """How far the rotary position moves on."""
    return max(segment.grid) if segment.grid else segment.end - segment.start


def text_mask(segment: Segment, device) -> Tensor | None:
    """Bool (tokens, keys) for a text run: all keys before it, and a causal triangle of its own."""
    if segment.grid is not None:
        return None
    length = segment.end - segment.start
    mask = torch.ones(length, segment.end, dtype=torch.bool, device=device)
    return mask.tril(diagonal=segment.start)
