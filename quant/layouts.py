"""How a quantized weight is stored, how it multiplies, how it becomes full precision.

A `Layout` holds the tensors of one layer's weight (out, in) as the file has them. All a layer asks
of it is here; a format is one subclass, and `layout_of` finds it by its name in files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .machine import WIDENED, Rule, choose, machine_of

Rows = slice | Tensor
ALL = slice(None)


class LayoutError(ValueError):
    """Tensors that are not what their format says. The message is the rest of a sentence."""


class Layout(nn.Module):
    """One quantized weight of `shape` (out, in). Subclasses keep their tensors as buffers.

    Some formats store W in another basis, W = S T with T cheap to apply to what is multiplied:
    `values` are rows of S, `inputs` applies T. `extra` is what is added to S T x.
    """

    format: str = ""  # as files call it
    reorders = False  # whether its tensors are others than those of the file
    full = False  # the file wants inputs that are not rounded
    together = 1 << 17  # weights that become numbers at a time on a CPU: what stays in its cache
    passing = False  # its tensors come and go, so nothing made of them can be kept
    shape: tuple[int, int]
    stored: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    def values(self, rows: Rows = ALL) -> Tensor:
        """Rows of the stored matrix (n, in) in fp32. A format defines this or `write`."""
        stored = self.stored[rows]
        out = torch.empty(len(stored), self.shape[1], device=stored.device)
        self.write(out, rows)
        return out

    def write(self, out: Tensor, rows: Rows = ALL) -> None:
        """`values` into `out` (n, in), contiguous, of any floating-point dtype."""
        out.copy_(self.values(rows))

    def inputs(self, x: Tensor) -> Tensor:
        """x (..., in) in the basis of `values`."""
        return x

    def extra(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` (..., out) with what the format adds beside its matrix."""
        return y

    def weight(self, rows: Rows = ALL) -> Tensor:
        """Rows of the weight itself (n, in) in fp32."""
        return self.values(rows)

    def product(self, x: Tensor) -> Tensor | None:
        """S T x (..., out) by a product of this machine; None where values are needed for it."""
        rule = self.rule
        return None if rule is WIDENED or not x.numel() else self.multiply(rule.function, x)

    def multiply(self, function: str, x: Tensor) -> Tensor:
        """`product` by the function that a rule of `machine.RULES` names for the format."""
        raise NotImplementedError

    @property
    def rule(self) -> Rule:
        """How the machine that holds it multiplies it."""
        machine = machine_of(next(self.buffers()).device)
        return choose(self.kind, machine, self.shape, self.full)

    @property
    def kind(self) -> str:
        """What `machine.RULES` calls it."""
        return self.format

    @property
    def native(self) -> str:
        """The product that this machine has for it, in words; empty for none."""
        return "" if self.rule is WIDENED else self.rule.words

    @property
    def bytes(self) -> int:
        """Of memory that the weight takes."""
        return sum(t.nbytes for t in self.buffers())

    def keep(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable, recurse: bool = True) -> Layout:  # type: ignore[override]
        """Moves to another device; numbers stay as they are stored, whatever dtype is asked for."""
        for child in self.children():
            child._apply(fn)
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                same = moved.dtype == tensor.dtype
                self._buffers[name] = moved if same else tensor.to(moved.device)
        return self


class Plain(Layout):
    """A weight that is not quantized, where one is needed as a layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight[0].numel()))
        self.keep(stored=weight.reshape(self.shape))

    def values(self, rows: Rows = ALL) -> Tensor:
        return self.stored[rows].float()


class Joined(Layout):
    """Layers one below the other, which a file keeps apart."""

    def __init__(self, layers: Sequence[Layout]) -> None:
        super().__init__((sum(layer.shape[0] for layer in layers), layers[0].shape[1]))
        self.layers = nn.ModuleList(layers)

    def values(self, rows: Rows = ALL) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])  # type: ignore[union-attr]
        found, first = [], 0
        for layer in self.layers:
            count = layer.shape[0]  # type: ignore[index]
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                found.append(layer.values(slice(low, high)))  # type: ignore[operator]
            first += count
        return torch.cat(found)


class Parts:
    """The tensors of one layer, checked as a layout takes them.

    `rows` of `out` in all: where a file fuses layers, this one is only some rows of what is stored,
    and `tensors` are for all of them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        rows: tuple[int, int] | None = None,
        out: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors, self.shape = tensors, shape
        self.rows, self.out = rows, out or shape[0]
        self.settings = settings or {}

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """A tensor as it is stored, None where there is none; bytes are read as `dtype`."""
        tensor = self.tensors.get(name)
        if tensor is not None and dtype is not None and tensor.dtype != dtype:
            if tensor.dtype.itemsize != 1 or dtype.itemsize != 1:
                raise LayoutError(f"has {name} as {_name(tensor.dtype)}, needed is {_name(dtype)}")
            tensor = tensor.view(dtype)
        return tensor

    def need(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.get(name, dtype)
        if tensor is None:
            raise LayoutError(f"lacks {name}")
        return tensor

    def numbers(self, name: str, *sides: int) -> Tensor:
        """Floating-point numbers, all finite; with so many `sides`, if any are said."""
        tensor = self.need(name)
        if not tensor.is_floating_point() or (sides and tensor.ndim not in sides):
            raise LayoutError(f"has {name} as {_name(tensor.dtype)} of {tuple(tensor.shape)}")
        if not torch.isfinite(tensor.float()).all():
            raise LayoutError(f"has {name} that are no numbers")
        return tensor

    def weight(self, dtype: torch.dtype, width: int) -> Tensor:
        """The main tensor as (out, width), cut to this layer's rows."""
        tensor = self.need("weight", dtype)
        if tensor.numel() != self.out * width or (tensor.ndim > 1 and len(tensor) != self.out):
            raise LayoutError(
                f"has a weight of {tuple(tensor.shape)}, needed are {self.out} x {width}"
            )
        return self.cut(tensor.reshape(self.out, width))

    def scales(self, name: str, *columns: int) -> Tensor:
        """Numbers for each output (out, *columns), or one for all (1, 1), finite, in fp32."""
        tensor = self.need(name)
        if tensor.numel() == 1 and not columns:
            tensor = tensor.reshape(1, 1)
        elif tensor.numel() == self.out * max(columns or (1,)):
            tensor = self.cut(tensor.reshape(self.out, -1))
        else:
            wanted = f"{self.out} x {columns[0]}" if columns else f"1 or {self.out}"
            raise LayoutError(f"has {name} of {tuple(tensor.shape)}, needed are {wanted} numbers")
        if not torch.isfinite(tensor.float()).all():
            raise LayoutError(f"has {name} that are no numbers")
        return tensor

    def scalar(self, name: str) -> Tensor:
        tensor = self.need(name)
        if tensor.numel() != 1 or not torch.isfinite(tensor.float()).all():
            raise LayoutError(f"has {name} of {tuple(tensor.shape)}, needed is one number")
        return tensor.reshape(()).float()

    def cut(self, tensor: Tensor) -> Tensor:
        """This layer's rows of a tensor for all rows."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def setting(self, name: str, default: Any) -> Any:
        """A setting of the same kind as its default; some files put them under "params"."""
        inner = self.settings.get("params")
        inner = inner if isinstance(inner, Mapping) else {}
        value = self.settings.get(name, inner.get(name, default))
        if not isinstance(value, type(default)):
            raise LayoutError(f"has the setting {name} = {value!r}, which is no {_kind(default)}")
        return value

    def needs_multiple(self, size: int, what: str) -> None:
        if size < 1 or self.shape[1] % size:
            raise LayoutError(f"has {self.shape[1]} inputs, no multiple of its {what} {size}")


def _kind(value: Any) -> str:
    return {bool: "yes or no", int: "whole number", str: "text"}.get(type(value), "number")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layouts() -> dict[str, type[Layout]]:
    """Every format that can be read, by its name in files."""
    from . import awq, bitsandbytes, floats, gguf, integers, svdquant

    classes = (
        floats.Float8, floats.Float8E5M2, floats.MXFloat8, floats.NVFloat4,
        integers.Int8, integers.Int4, integers.GroupedInt4,
        bitsandbytes.FourBit, bitsandbytes.NF4, bitsandbytes.Int8Rows,
        svdquant.SVDQuant, svdquant.SVDQuantFP4, svdquant.Vector, svdquant.ShiftedVector,
        awq.AWQ, awq.AWQVector, gguf.GGUF, gguf.Stacked,
    )  # fmt: skip
    return {kind.format: kind for kind in classes}


def layout_of(format: str, parts: Parts) -> Layout:
    """The layout of a weight. Raises LayoutError for an unknown format, or tensors that misfit."""
    known = layouts()
    if format not in known:
        readable = ", ".join(sorted(name for name in known))
        raise LayoutError(f"has the unknown format {format!r}; readable are {readable}")
    return known[format](parts)  # type: ignore[arg-type]
