"""Networks larger than the card: blocks' weights wait in the host's memory, two are on the card.

While one block computes, the weights of the next are copied on a stream of their own into the other
of two rooms on the device. A block's weights are one run of pinned memory, so that is one copy. The
rest of the network (embeddings, norms, biases) stays on the device, and as many blocks as the
budget allows. What is computed is the same, bit for bit.

For one thread at a time; not inside ComfyUI, whose memory manager does this itself. On a CPU as the
device everything runs the same way, without streams: for tests.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Holder

ALIGNED = 256  # bytes, as CUDA's own allocations


class RoomError(ValueError):
    """The budget is below the least that works. A whole sentence."""


@dataclass
class Spot:
    """Where a streamed tensor is registered, and where it lies in its block's run of bytes."""

    registry: dict[str, Any]  # a module's `_parameters` or `_buffers`
    name: str
    start: int
    like: Tensor  # on the meta device
    places: list[Tensor]  # it in the host's memory, in the first room, in the second

    def add(self, run: Tensor) -> None:
        """One more place: where it lies in `run`."""
        part = run[self.start : self.start + self.like.nbytes]
        tensor = part.view(self.like.dtype).view(self.like.shape)
        is_parameter = isinstance(self.registry[self.name], nn.Parameter)
        self.places.append(nn.Parameter(tensor, False) if is_parameter else tensor)

    def put(self, place: int) -> None:
        self.registry[self.name] = self.places[place]


@dataclass
class Block:
    """A run of bytes in the host's memory, and the tensors in it."""

    host: Tensor
    spots: list[Spot]


@dataclass
class Room:
    """Place for one block on the device, `number` 1 or 2; `holds`: which one, -1 for none yet."""

    run: Tensor
    number: int
    holds: int = -1
    copied: Any = None  # an event: the block is there
    used: Any = None  # an event: the last work on it is done


class Streamer:
    """What brings the blocks of one network to its device; `stream` makes it."""

    def __init__(self, blocks: list[Block], device: torch.device, resident: int) -> None:
        self.blocks, self.device = blocks, device
        self.resident = resident  # bytes of everything on the device but the two rooms
        size = max(len(block.host) for block in blocks)
        with torch.inference_mode(False):  # so that they can be written to in and out of it
            runs = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
            for spot in [spot for block in blocks for spot in block.spots]:
                for run in runs:
                    spot.add(run)
        self.rooms = [Room(run, number) for number, run in enumerate(runs, start=1)]
        self.current: Room | None = None
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Of weights on the device."""
        return self.resident + sum(room.run.nbytes for room in self.rooms)

    @property
    def waiting(self) -> int:
        """Bytes of weights in the host's memory."""
        return sum(block.host.nbytes for block in self.blocks)

    def enter(self, index: int) -> None:
        """Make block `index` ready for what is computed next, and fetch the one behind it."""
        if self.current is not None and self.current.holds == index:
            return
        here = next((room for room in self.rooms if room.holds == index), None)
        if here is None:  # the first time, or out of order
            here = next(room for room in self.rooms if room is not self.current)
            self._fetch(index, here)
        if self.side is not None:
            now = torch.cuda.current_stream(self.device)
            if self.current is not None:  # all that was computed in it is in this stream by now
                self.current.used = now.record_event()
            now.wait_event(here.copied)
        self.current = here
        other = next(room for room in self.rooms if room is not here)
        following = (index + 1) % len(self.blocks)
        if other.holds != following:
            self._fetch(following, other)

    def _fetch(self, index: int, room: Room) -> None:
        if room.holds >= 0:
            for spot in self.blocks[room.holds].spots:
                spot.put(0)
        block = self.blocks[index]
        room.holds = index
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            if self.side is not None and room.used is not None:
                self.side.wait_event(room.used)
            room.run[: len(block.host)].copy_(block.host, non_blocking=True)
            if self.side is not None:
                room.copied = self.side.record_event()
        for spot in block.spots:
            spot.put(room.number)


def stream(
    network: nn.Module, device: torch.device | str, budget: int | None = None
) -> Streamer | None:
    """Move `network`, whose weights are on the CPU, to `device`, but for blocks that exceed
    `budget` bytes of weights; these will be streamed. None: the least that works, which is two
    blocks and the rest.

    Blocks are the elements of the network's `ModuleList`s, in the order in which they stand there.
    Returns None where everything fits, and is then on the device. Raises RoomError.
    """
    device = torch.device(device)
    found = blocks_of(network)
    sizes = [sum(_padded(t.nbytes) for *_, t in tensors_of(block)) for block in found]
    whole = sum(t.nbytes for t in {id(t): t for t in _all(network)}.values())
    # Two rooms for two blocks would be everything.
    least = whole - sum(sizes) + 2 * max(sizes) if len(found) > 2 else whole
    budget = least if budget is None else budget
    if budget >= whole:
        _move(network, device, set())
        return None
    if budget < least:
        raise RoomError(
            f"{budget / 1e9:.3g} GB are too little for this network: streamed, it takes "
            f"{gigabytes(least)} GB for weights (two blocks and what is no block), and whole "
            f"{whole / 1e9:.3g} GB."
        )
    chosen = _chosen(sizes, budget - least)
    blocks, streamed = [], set[int]()
    for index in chosen:
        packed, names = _packed(found[index], device)
        blocks.append(packed)
        streamed |= names
    _move(network, device, streamed)
    moved = [spot.like.nbytes for block in blocks for spot in block.spots]
    resident = whole - sum(moved)
    made = Streamer(blocks, device, resident)
    for order, index in enumerate(chosen):
        _watch(found[index], made, order)
    return made


def gigabytes(size: int) -> str:
    """Bytes in GB, three digits, rounded up: who types that number has enough."""
    step = 10 ** max(len(str(size)) - 3, 0)
    return f"{-(-size // step) * step / 1e9:.3g}"


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules that hold weights, in order."""
    found: list[nn.Module] = []
    lists: list[str] = []
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            lists.append(path)
            found += [element for element in module if any(True for _ in tensors_of(element))]
    return found


def tensors_of(block: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """What is streamed of a block: its layers' tensors with two sides or more. With each the layer
    before whose work it must be there, its registry and its name.

    Vectors stay on the device: they are small, and LoRAs exchange them.
    """
    for layer in _layers(block):
        for module in layer.modules():
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is not None and tensor.ndim > 1 and tensor.numel():
                        yield layer, registry, name, tensor


def _layers(block: nn.Module) -> Iterator[nn.Module]:
    """Modules that work on their own: those without parts, and quantized layers."""
    if isinstance(block, Holder) or not any(True for _ in block.children()):
        yield block
        return
    for child in block.children():
        yield from _layers(child)


def _all(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _chosen(sizes: list[int], spare: int) -> list[int]:
    """Which blocks are streamed, spread evenly, so that copies have time between them; `spare`
    bytes are left for blocks that stay."""
    count, keep = len(sizes), 0
    while keep < count - 3 and (keep + 1) * max(sizes) <= spare:
        keep += 1
    moved = count - keep
    return [i for i in range(count) if (i + 1) * moved // count > i * moved // count]


@torch.no_grad()
def _packed(block: nn.Module, device: torch.device) -> tuple[Block, set[int]]:
    """The block's tensors in one run of memory, registered there; and what they are now."""
    found = list(tensors_of(block))
    host = _pinned(sum(_padded(t.nbytes) for *_, t in found), device)
    spots, start = [], 0
    for layer, registry, name, tensor in found:
        like = torch.empty_like(tensor, device="meta").contiguous()
        spot = Spot(registry, name, start, like, [])
        spot.add(host)
        spot.places[0].copy_(tensor)
        spot.put(0)
        spots.append(spot)
        start += _padded(tensor.nbytes)
        if isinstance(layer, Holder):
            layer.layout.passing = True
            for part in layer.layout.modules():
                part.passing = True  # pyright: ignore[reportArgumentType]
    return Block(host, spots), {id(spot.registry[spot.name]) for spot in spots}


def _pinned(size: int, device: torch.device) -> Tensor:
    """Memory that a card can copy from while it computes. torch's own pinned memory comes in
    powers of two, so up to half of it would be wasted; this registers what was allocated."""
    with torch.inference_mode(False):
        room = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(room.data_ptr(), size, 0)):
            return room  # no more may be pinned: the copy waits, but it copies
        weakref.finalize(room.untyped_storage(), runtime.cudaHostUnregister, room.data_ptr())
    return room


def _move(network: nn.Module, device: torch.device, streamed: set[int]) -> None:
    """Everything but `streamed` to the device; of layers whose weights move, the device is told."""
    for module in network.modules():
        for registry in (module._parameters, module._buffers):
            into: dict[str, Any] = registry
            for name, tensor in registry.items():
                if tensor is None or id(tensor) in streamed:
                    continue
                moved = tensor.detach().to(device)
                is_parameter = isinstance(tensor, nn.Parameter)
                into[name] = nn.Parameter(moved, False) if is_parameter else moved


def _watch(block: nn.Module, streamer: Streamer, index: int) -> None:
    """Bring the block whenever one of its layers is about to work: networks call parts of a block
    on their own too."""

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        streamer.enter(index)

    for layer in {id(layer): layer for layer, *_ in tensors_of(block)}.values():
        layer.home = streamer.device  # pyright: ignore[reportArgumentType]
        layer.register_forward_pre_hook(enter)
