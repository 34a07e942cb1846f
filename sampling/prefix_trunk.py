"""Where the blocks of a prefix lie while a network reads them.

Attention wants the keys of a layer in one piece, and a store wants each block once. So the blocks
that are being read lie one behind the other in a `Trunk`, with room for the target's own keys and
values behind them, and the trunk is their only memory. A block that has to make way is moved out,
and moved back when it is wanted: between two prompts over the same references only words move.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from ..model_loaders.layers import KeptKeys
from .prefix_codes import Codes, Loss, pack

SPARE = 50  # a trunk may be larger than needed by 1 part in so many, so that words may come and go


@dataclass(eq=False)
class StoredBlock:
    """Keys and values of tokens from `start` on. `own`: a pair for each layer, while they are not
    in a trunk."""

    start: int
    tokens: int
    output: Tensor | None = None
    own: list[tuple[Tensor, Tensor]] | None = None
    codes: list[tuple[Codes, Codes]] = field(default_factory=list)
    bytes: int = 0

    @property
    def end(self) -> int:
        return self.start + self.tokens


class Trunk(Protocol):
    """Holds a chain of blocks, each behind the one before it."""

    def lay(self, blocks: Sequence[StoredBlock], room: int) -> None:
        """Make these the blocks that are read, with so many free tokens behind them."""
        ...

    def see(self, block: StoredBlock, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a new block, behind those that lie here, has in a layer (1, heads, tokens,
        head_dim); all keys and values up to its end."""
        ...

    def add(self, block: StoredBlock) -> None:
        """The new block has been through all layers: it lies here now."""
        ...

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The buffers of a layer (1, heads, tokens + room, head_dim)."""
        ...

    def clear(self) -> None:
        """Move all blocks that anybody still has out, and free the buffers."""
        ...

    may_shrink: bool  # whether the next `lay` may give memory back

    @property
    def bytes(self) -> int:
        """Of the buffers, the free room included."""
        ...


class ExactTrunk:
    """Every layer has a buffer. `host`: blocks that make way go to (pinned) memory of the host."""

    def __init__(self, host: bool = False) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.host, self.device = host, torch.device("cpu")
        self.blocks: list[weakref.ref[StoredBlock]] = []
        self.length = self.capacity = 0
        self.may_shrink = False

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def lay(self, blocks: Sequence[StoredBlock], room: int) -> None:
        same = 0
        for ref, block in zip(self.blocks, blocks, strict=False):
            if ref() is not block:
                break
            same += 1
        for ref in self.blocks[same:]:
            if (block := ref()) is not None:
                self._move_out(block)
        self.blocks = self.blocks[:same]
        self.length = blocks[same - 1].end if same else 0
        self._fit((blocks[-1].end if blocks else 0) + room)
        for block in blocks[same:]:
            self._move_in(block)

    def see(self, block: StoredBlock, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.device = k.device
        self._write(block, layer, k, v)
        block.bytes += k.nbytes + v.nbytes
        if not block.start:
            return k, v
        keys, values = self.layer(layer)
        return keys[:, :, : block.end], values[:, :, : block.end]

    def add(self, block: StoredBlock) -> None:
        self.blocks.append(weakref.ref(block))
        self.length = block.end

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.keys[index], self.values[index]

    def clear(self) -> None:
        self.lay((), 0)
        self.keys.clear()
        self.values.clear()
        self.capacity = 0

    def _write(self, block: StoredBlock, layer: int, k: Tensor, v: Tensor) -> None:
        for buffers, x in ((self.keys, k), (self.values, v)):
            shape = (*x.shape[:2], self.capacity, x.shape[3])
            if layer == len(buffers):
                buffers.append(torch.empty(shape, dtype=x.dtype, device=self.device))
            elif not block.start and (buffers[layer].shape, buffers[layer].dtype) != (
                shape,
                x.dtype,
            ):  # another precision or batch: nothing that lies here is read any more
                buffers[layer] = torch.empty(shape, dtype=x.dtype, device=self.device)
            buffers[layer][:, :, block.start : block.end] = x

    def _fit(self, tokens: int) -> None:
        """Bring the buffers, one after the other, to so many tokens, or a few more."""
        wanted = tokens + tokens // SPARE
        if tokens <= self.capacity and not (self.may_shrink and wanted * 1.02 < self.capacity):
            return
        self.capacity = wanted
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_empty(*old.shape[:2], wanted, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                buffers[layer] = new

    def _move_out(self, block: StoredBlock) -> None:
        rows = slice(block.start, block.end)
        block.own = [
            (self._apart(k[:, :, rows]), self._apart(v[:, :, rows]))
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    def _apart(self, x: Tensor) -> Tensor:
        if self.host and x.device.type == "cuda":
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
        return x.clone(memory_format=torch.contiguous_format)

    def _move_in(self, block: StoredBlock) -> None:
        assert block.own is not None, "a block lies in one trunk, or it has memory of its own"
        for layer, (k, v) in enumerate(block.own):
            self._write(block, layer, k, v)
        block.own = None
        self.add(block)


class CodedTrunk:
    """Blocks stay packed where they are; one buffer, of one layer, is all that is unpacked."""

    def __init__(self, bits: int, host: bool = False) -> None:
        self.bits, self.host, self.loss = bits, host, Loss()
        self.blocks: list[StoredBlock] = []
        self.room: list[Tensor] = []  # keys and values of one layer
        self.length = self.capacity = 0
        self.may_shrink = False

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.room)

    def lay(self, blocks: Sequence[StoredBlock], room: int) -> None:
        self.blocks = list(blocks)
        self.length = self.blocks[-1].end if self.blocks else 0
        if self.length + room > self.capacity or self.may_shrink:
            self.capacity = self.length + room
            self.room = [x[:, :, :0] for x in self.room]  # what they are like is still known

    def see(self, block: StoredBlock, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.room or (not block.start and not layer):
            self.room = [k[:, :, :0], v[:, :, :0]]
        pair = pack(k, self.bits), pack(v, self.bits)
        for x, codes in zip((k, v), pair, strict=True):
            self.loss.add(x, codes)
        block.codes.append((pair[0].to("cpu"), pair[1].to("cpu")) if self.host else pair)
        block.bytes += sum(codes.bytes for codes in pair)
        keys, values = self.layer(layer)
        keys[:, :, block.start : block.end], values[:, :, block.start : block.end] = k, v
        return keys[:, :, : block.end], values[:, :, : block.end]

    def add(self, block: StoredBlock) -> None:
        self.blocks.append(block)
        self.length = block.end

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        if self.room[0].shape[2] != self.capacity:
            self.room = [x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in self.room]
        keys, values = self.room
        for block in self.blocks:
            for codes, out in zip(block.codes[index], (keys, values), strict=True):
                codes.to(out.device).unpack(out[:, :, block.start : block.end])
        return keys, values

    def clear(self) -> None:
        self.lay((), 0)
        self.room, self.capacity = [x[:, :, :0].clone() for x in self.room], 0


class TrunkKeys(KeptKeys):
    """The keys and values of a chain of blocks; many of them may share a trunk, in turn."""

    def __init__(self, trunk: Trunk, blocks: Sequence[StoredBlock]) -> None:
        super().__init__([], [], blocks[-1].end, tuple(block.output for block in blocks))
        self.trunk, self.blocks = trunk, tuple(blocks)

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self.blocks)

    def common(self, other: KeptKeys) -> int:
        if not isinstance(other, TrunkKeys) or other.trunk is not self.trunk:
            return 0
        pairs = zip(self.blocks, other.blocks, strict=False)
        same = list(takewhile(lambda pair: pair[0] is pair[1], pairs))
        return same[-1][0].end if same else 0

    def reserve(self, tokens: int) -> None:
        self.trunk.lay(self.blocks, tokens)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.trunk.layer(index)
