"""How many bytes of tensors a piece of code has alive at its worst moment."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all tensors made inside, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if tensor(t)}
        for t in filter(tensor, tree_leaves(out)):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.live and key not in given:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def peak(run: Any, *args: Any, **kwargs: Any) -> int:
    """The bytes of all tensors that `run(...)` makes, when they are most; views count once."""
    with LiveBytes() as bytes_:
        run(*args, **kwargs)
    return bytes_.peak
