"""What was computed of prompts and references, kept for the next step, seed, size and prompt.

In some families text and references never look at the target (DESIGN, section 6), so their keys and
values stay true for every target, and those of a block for everything that may follow it. The store
knows a block by a hash of its content, of all blocks before it and of the weights, so a block that
is found is the block that would be computed. The text encoder's own blocks, what its vision tower
makes of a picture, and latents of pictures are kept by the same rule, in the same room.

`PrefixStore` belongs to whoever owns the networks (a `Pipeline`, a MODEL): nothing is global.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..model_loaders.layers import Block
from . import SamplingError
from .prefix_codes import BITS
from .prefix_memory import free_memory, read_size, size_words
from .prefix_trunk import CodedTrunk, ExactTrunk, StoredBlock, Trunk, TrunkKeys

PRECISIONS = ("exact", *BITS)
PLACES = ("device", "host")
UNITS = {"prefix": "tokens", "words": "tokens read", "prompts": "prompts read",
         "vision": "pictures seen", "latents": "latents"}  # fmt: skip


@dataclass
class Count:
    """How much of a kind was asked for, and how much of it had to be computed."""

    asked: int = 0
    computed: int = 0


@dataclass(eq=False)
class Recalled:
    value: Any
    bytes: int


class PrefixStore:
    """Least recently used first out, within one budget.

    `budget` is bytes ("off" and 0: nothing outlives a run, "6 GB") or "auto", half of what would
    be free without the store. `precision` "exact", or "int8" and "int4" for the keys and values of
    the diffusion model, whose `error` is then measured. `place` "device", or "host": between runs,
    and while others are read, blocks lie in the pinned memory of the host.
    """

    def __init__(
        self, budget: int | str = "auto", precision: str = "exact", place: str = "device"
    ) -> None:
        for name, value, known in (
            ("precision", precision, PRECISIONS), ("place", place, PLACES),
        ):  # fmt: skip
            if value not in known:
                raise SamplingError(
                    f"the {name} of the prefix store is '{value}'; choose one of: "
                    f"{', '.join(known)}."
                )
        self.budget: int | None = None if budget == "auto" else read_size(budget)
        self.precision, self.place = precision, place
        self.entries: OrderedDict[bytes, StoredBlock | Recalled] = OrderedDict()
        self.counts: dict[str, Count] = {}
        self._trunks: WeakKeyDictionary[Any, dict[str, Trunk]] = WeakKeyDictionary()
        self._owners: WeakKeyDictionary[Any, tuple[int, tuple]] = WeakKeyDictionary()
        self._used: set[bytes] = set()  # since the run began
        self._numbers = count()
        self._known: dict[int, tuple[Tensor, bytes]] | None = None
        self._changes: dict[int, int] = {}
        self._device = torch.device("cpu")

    @classmethod
    def of(cls, words: str) -> PrefixStore:
        """From one line: "auto", "off", "6 GB", "auto:int8", "6GB:int4:host"."""
        budget, *rest = [word.strip() for word in words.split(":")]
        named = {"place" if word in PLACES else "precision": word for word in rest}
        return cls(budget, **named)

    # ---- what networks ask (`model_loaders.layers.Store`) --------------------------------------

    def keep(self, kind: str, owner: Any, blocks: Sequence[Block], room: int) -> TrunkKeys:
        """Keys and values of these blocks, computed from the first one on that is not known."""
        key, keys = self._root(kind, owner), []
        for block in blocks:
            key = self._hash(key, block.content)
            keys.append(key)
        self._used.update(keys)
        chain: list[StoredBlock] = []
        for key in keys:
            found = self.entries.get(key)
            if not isinstance(found, StoredBlock):
                break
            chain.append(found)
        seen = self.counts.setdefault(kind, Count())
        whole, known = sum(block.tokens for block in blocks), len(chain)
        seen.asked += whole
        trunk = self._trunk(kind, owner)
        trunk.lay(chain, whole + room - (chain[-1].end if chain else 0))
        trunk.may_shrink = False
        for key, block in zip(keys[known:], blocks[known:], strict=True):
            stored = StoredBlock(chain[-1].end if chain else 0, block.tokens)
            self._make_room(self._expected(chain, block))
            stored.output = block.compute(partial(trunk.see, stored))
            stored.bytes += _bytes(stored.output)
            trunk.add(stored)
            chain.append(stored)
            self.entries[key] = stored
            seen.computed += block.tokens
        for key in reversed(keys):  # what all build on is the last to go
            self.entries.move_to_end(key)
        self._make_room()
        return TrunkKeys(trunk, chain)

    def recall(
        self, kind: str, owner: Any, content: tuple[Any, ...], compute: Callable[[], Any]
    ) -> Any:
        """What `compute` returns, tensors in tuples or lists, for this content."""
        key = self._hash(self._root(kind, owner), content)
        seen = self.counts.setdefault(kind, Count())
        seen.asked += 1
        found = self.entries.get(key)
        if not isinstance(found, Recalled):
            value = compute()
            found = Recalled(value, _bytes(value))
            seen.computed += 1
            self.entries[key] = found
        self._used.add(key)
        self.entries.move_to_end(key)
        self._make_room()
        return found.value

    # ---- what owners of networks say -----------------------------------------------------------

    def mark(self, owner: Any, *facts: Any) -> None:
        """Say what else decides what `owner` computes: strengths of LoRAs, patches."""
        number, _ = self._owners.get(owner, (None, ()))
        self._owners[owner] = (next(self._numbers) if number is None else number, facts)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Until the end of the block nobody changes a tensor: each is looked at once."""
        self._known = {}
        self._changes.clear()
        try:
            yield
        finally:
            self._known = None

    def trim(self) -> None:
        """The run is over: keep within the budget, and in the place where blocks are to lie.

        Until then nothing goes that was asked for since the last time.
        """
        self._used.clear()
        for trunk in self._all_trunks():
            trunk.may_shrink = True
        limit = self.limit
        if self.bytes > limit:
            self._let_go(limit)
        if self.bytes > limit or self.place == "host":
            for trunk in self._all_trunks():
                trunk.clear()  # blocks that are still wanted move to memory of their own

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        for trunk in self._all_trunks():
            trunk.clear()

    # ---- what users see ------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Bytes of all that is stored, without free room for targets."""
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def bytes(self) -> int:
        """Bytes of memory: what is stored, and free room for targets."""
        loose = [e for e in self.entries.values() if not isinstance(e, StoredBlock)]
        blocks = [e for e in self.entries.values() if isinstance(e, StoredBlock)]
        apart = sum(b.bytes if b.own or b.codes else _bytes(b.output) for b in blocks)
        trunks = sum(trunk.bytes for trunk in self._all_trunks())
        return sum(e.bytes for e in loose) + apart + trunks

    @property
    def limit(self) -> int:
        """The budget in bytes, now."""
        if self.budget is not None:
            return self.budget
        return (self.bytes + free_memory(self._device)) // 2

    @property
    def error(self) -> float:
        """Of rounded keys and values, relative, root mean square; 0 when they are exact."""
        losses = [trunk.loss for trunk in self._all_trunks() if isinstance(trunk, CodedTrunk)]
        return max((loss.relative for loss in losses), default=0.0)

    def report(self) -> str:
        """One line: what the last runs found here since the last report, and what it holds."""
        parts = []
        for kind, unit in UNITS.items():
            seen = self.counts.get(kind)
            if seen and seen.asked:
                found = seen.asked - seen.computed
                parts.append(f"{found} of {seen.asked} {unit} ({found / seen.asked:.0%})")
        self.counts.clear()
        known = f"known before: {', '.join(parts)}; " if parts else ""
        limit = "auto" if self.budget is None else size_words(self.budget)
        text = f"{known}{size_words(self.held)} kept ({limit})"
        if self.precision != "exact" and self.error:
            text += f", {self.precision} with an error of {self.error:.2%}"
        return text

    # ---- inside --------------------------------------------------------------------------------

    def _root(self, kind: str, owner: Any) -> bytes:
        if owner not in self._owners:
            self.mark(owner)
        number, facts = self._owners[owner]
        seen = self._changes.get(number) if self._known is not None else None
        if seen is None:
            seen = self._changes[number] = changes(owner)
        return self._hash(b"", (kind, number, facts, seen))

    def _trunk(self, kind: str, owner: Any) -> Trunk:
        trunks = self._trunks.setdefault(owner, {})
        if kind not in trunks:
            host = self.place == "host"
            coded = kind == "prefix" and self.precision in BITS
            trunks[kind] = CodedTrunk(BITS[self.precision], host) if coded else ExactTrunk(host)
        return trunks[kind]

    def _all_trunks(self) -> list[Trunk]:
        return [trunk for trunks in self._trunks.values() for trunk in trunks.values()]

    def _expected(self, chain: Sequence[StoredBlock], block: Block) -> int:
        """Bytes that a block will take, going by the one before it."""
        return chain[-1].bytes // chain[-1].tokens * block.tokens if chain else 0

    def _make_room(self, wanted: int = 0) -> None:
        """Let go of what was not asked for longest, but of nothing that this run has asked for."""
        limit, held = self.limit - wanted, self.held
        spare = max(self.bytes - held, 0)  # free room for targets
        if held + spare > limit:
            self._let_go(limit - spare)

    def _let_go(self, limit: int) -> None:
        held = self.held
        for key in [key for key in self.entries if key not in self._used]:
            if held <= limit:
                return
            held -= self.entries.pop(key).bytes

    def _hash(self, before: bytes, content: tuple[Any, ...]) -> bytes:
        state = hashlib.blake2b(before, digest_size=20)
        self._feed(state, content)
        return state.digest()

    def _feed(self, state: Any, part: Any) -> None:
        if isinstance(part, Tensor):
            self._device = part.device if part.device.type != "cpu" else self._device
            state.update(self._hash_of(part))
        elif isinstance(part, tuple | list) and not all(isinstance(item, int) for item in part):
            state.update(b"(%d" % len(part))
            for item in part:
                self._feed(state, item)
        else:
            state.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")

    def _hash_of(self, x: Tensor) -> bytes:
        known = self._known.get(id(x)) if self._known is not None else None
        if known is not None and known[0] is x:
            return known[1]
        state = hashlib.blake2b(repr((x.dtype, x.shape, str(x.device))).encode(), digest_size=20)
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(flat.numpy().data)
        if self._known is not None:
            self._known[id(x)] = (x, state.digest())
        return state.digest()


def changes(owner: Any) -> int:
    """Grows with every operation that changes a weight of a network in place."""
    network = owner if isinstance(owner, nn.Module) else getattr(owner, "model", None)
    if not isinstance(network, nn.Module):
        return 0
    weights = [*network.parameters(), *network.buffers()]
    return sum(0 if w.is_inference() else w._version for w in weights)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(map(_bytes, vars(value).values()))
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
