"""Weights that a run needs for a moment: they stay in the file and are read from it in passing.

Layers that only turn the time of a step into numbers are such: a network computes those numbers for
a whole schedule before the first step. Their parameters are mapped from the file, wherever the
network is, so no memory holds them; `Lender.each` reads one layer after the other into the same
memory for the time that it works. A quantized weight is read as it is stored, so it multiplies as
if it had stayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..quant.layouts import ALL, Layout, Rows
from ..quant.linear import Buffer, QuantizedLinear
from .checkpoint import parts_of, staging_buffer
from .detection import PLAIN
from .quantized import layout_of_tensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, TensorInfo
    from .family import Component

CPU = torch.device("cpu")


class Lent(Layout):
    """A quantized weight in the file, of which nothing is in memory between two turns."""

    format = "lent"

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        super().__init__(checkpoint.names[key].shape)  # pyright: ignore[reportArgumentType]
        self.checkpoint, self.key = checkpoint, key
        self.keep(stored=torch.empty(0))

    def read(self, device: torch.device = CPU) -> Layout:
        """The layout as the file has it, in memory of its own."""
        return layout_of_tensor(self.checkpoint, self.key, device, copied=True)

    def weight(self, rows: Rows = ALL) -> Tensor:
        return self.read().weight(rows)


class Lender:
    """Lends the layers of `component.lent` in `module` their weights, in `dtype` on `device`.

    Quantized ones stay in their layout, whatever `dtype` is. From its construction on all are out
    of `module`, so whoever fills it does not see them; `into` puts them back.
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
            known = all(info is not None and self._readable(info) for info in infos)
            if own and known and component.lent and component.lent.fullmatch(path):
                self.keys[layer] = own
                for leaf, _ in own:
                    layer.register_parameter(leaf, None)

    @staticmethod
    def _readable(info: TensorInfo) -> bool:
        return info.dtype in PLAIN or (info.form is not None and len(info.shape) == 2)

    @property
    def bytes(self) -> int:
        """In the file: what is not in memory."""
        infos = [self.checkpoint.names[key] for own in self.keys.values() for _, key in own]
        return sum(part.end - part.begin for info in infos for part in parts_of(info))

    def into(self, module: nn.Module) -> tuple[str, ...]:
        """Give the layers their parameters again: mapped from the file, on the CPU, as stored.

        From now on `module.each` lends them. A note for the user, if there is anything to tell.
        """
        if not self.keys:
            return ()
        for layer, own in list(self.keys.items()):
            plain = {k: self.checkpoint.tensor(key) for k, key in own if not self._form(key)}
            coded = [key for _, key in own if self._form(key)]
            if coded:
                del self.keys[layer]
                lent, bias = Lent(self.checkpoint, coded[0]), plain.get("bias")
                layer = QuantizedLinear(lent, bias, Buffer())
                module.set_submodule(coded[0].rpartition(".")[0], layer)
                self.keys[layer] = own
            else:
                for leaf, values in plain.items():
                    self._put(layer, leaf, values)
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
        buffer, wide = staging_buffer(self.device), Buffer()
        for module in modules:
            layers = [layer for layer in module.modules() if layer in self.keys]
            kept = [(dict(layer.named_parameters(recurse=False)), _lent(layer)) for layer in layers]
            try:
                for layer in layers:
                    self._fill(layer, room, buffer)
                    if isinstance(layer, QuantizedLinear):
                        layer.buffer = wide
                yield module
            finally:
                for layer, (own, lent) in zip(layers, kept, strict=True):
                    for leaf, parameter in own.items():
                        layer.register_parameter(leaf, parameter)
                    if isinstance(layer, QuantizedLinear) and lent is not None:
                        layer.layout, layer.buffer = lent, Buffer()

    def _fill(
        self, layer: nn.Module, room: dict[tuple[torch.Size, torch.dtype], Tensor], buffer: Tensor
    ) -> None:
        for leaf, key in self.keys[layer]:
            if (lent := _lent(layer)) is not None and leaf == "weight":
                layer.layout = lent.read(self.device)
                self._put(layer, leaf, torch.empty(0, device=self.device))
                continue
            dtype = self.dtype or self.checkpoint.torch_dtype(key)
            like = torch.Size(self.checkpoint.names[key].shape), dtype
            if like not in room:
                room[like] = torch.empty(like[0], dtype=dtype, device=self.device)
            self.checkpoint.copy_into(key, room[like], buffer)
            self._put(layer, leaf, room[like])

    def _form(self, key: str) -> bool:
        return self.checkpoint.names[key].form is not None

    @staticmethod
    def _put(layer: nn.Module, leaf: str, values: Tensor) -> None:
        layer.register_parameter(leaf, nn.Parameter(values, requires_grad=False))


def _lent(layer: nn.Module) -> Lent | None:
    layout = getattr(layer, "layout", None)
    return layout if isinstance(layout, Lent) else None
