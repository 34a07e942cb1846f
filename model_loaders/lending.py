"""Weights that a run needs for a moment: they stay in the file and are read from it in passing.

Layers that only turn the time of a step into numbers are such: a network computes those numbers for
a whole schedule before the first step. Their parameters are mapped from the file, wherever the
network is, so no memory holds them; `Lender.each` reads one layer after the other into the same
memory for the time that it works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checkpoint import staging_buffer
from .detection import PLAIN

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .family import Component


class Lender:
    """Lends the layers of `component.lent` in `module` their weights, in `dtype` on `device`.

    From its construction on they are out of `module`, so whoever fills it does not see them;
    `into` puts them back. A quantized layer is not lent: it stays where it is loaded.
    """

    def __init__(
        self,
        module: nn.Module,
        component: Component,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.keys: dict[nn.Module, list[tuple[str, str]]] = {}  # layer -> its (parameter, key)
        for path, layer in module.named_modules():
            own = [(leaf, f"{path}.{leaf}") for leaf in dict(layer.named_parameters(recurse=False))]
            infos = [checkpoint.names.get(key) for _, key in own]
            plain = all(info is not None and info.dtype in PLAIN for info in infos)
            if own and plain and component.lent and component.lent.fullmatch(path):
                self.keys[layer] = own
                for leaf, _ in own:
                    layer.register_parameter(leaf, None)

    @property
    def bytes(self) -> int:
        """In the file: what is not in memory."""
        infos = [self.checkpoint.names[key] for own in self.keys.values() for _, key in own]
        return sum(info.end - info.begin for info in infos)

    def into(self, module: nn.Module) -> tuple[str, ...]:
        """Give the layers their parameters again: mapped from the file, on the CPU, as stored.

        From now on `module.each` lends them. A note for the user, if there is anything to tell.
        """
        if not self.keys:
            return ()
        for layer, own in self.keys.items():
            for leaf, key in own:
                self._put(layer, leaf, self.checkpoint.tensor(key))
        module.each = self.each  # pyright: ignore[reportArgumentType]
        return (
            f"{self.bytes / 1e9:.3g} GB of its weights only turn times into numbers, once for a "
            "whole schedule; they stay in the file.",
        )

    def each(self, modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Each of `modules` ready to work, until the next one is asked for.

        Raises CheckpointError when the file has changed since it was opened.
        """
        room: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        buffer = staging_buffer(self.device)
        for module in modules:
            layers = [layer for layer in module.modules() if layer in self.keys]
            kept = [dict(layer.named_parameters(recurse=False)) for layer in layers]
            try:
                for layer in layers:
                    self._fill(layer, room, buffer)
                yield module
            finally:
                for layer, own in zip(layers, kept, strict=True):
                    for leaf, parameter in own.items():
                        layer.register_parameter(leaf, parameter)  # pyright: ignore[reportArgumentType]

    def _fill(
        self, layer: nn.Module, room: dict[tuple[torch.Size, torch.dtype], Tensor], buffer: Tensor
    ) -> None:
        for leaf, key in self.keys[layer]:
            dtype = self.dtype or self.checkpoint.torch_dtype(key)
            like = torch.Size(self.checkpoint.names[key].shape), dtype
            if like not in room:
                room[like] = torch.empty(like[0], dtype=dtype, device=self.device)
            self.checkpoint.copy_into(key, room[like], buffer)
            self._put(layer, leaf, room[like])

    @staticmethod
    def _put(layer: nn.Module, leaf: str, values: Tensor) -> None:
        layer.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
