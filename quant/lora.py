"""LoRA and its relatives beside a layer's multiply: y = W x + b + sum of strength * delta(x).

Nothing is merged: the weights stay as they are, in whatever form their layer keeps them, so a
strength can change at any time, removal leaves no trace, and no layer needs to know. `Adapters`
hangs the deltas onto a network's linear layers as forward hooks, which every namespace of
`operations` calls.

A delta is written down in the form in which it was trained, with W's shape (out, in):

    LowRank      up (out, r) @ down (r, in)                           LoRA, arXiv:2106.09685
    Kronecker    w1 (a, b) x w2 (c, d), out = a c, in = b d           LoKr, arXiv:2309.14859
    Hadamard     (w1_a @ w1_b) * (w2_a @ w2_b)                        LoHa, arXiv:2108.06098
    Full         a whole difference of weights
    Shift        a difference of biases
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import Layout

BLOCK = 1 << 24  # elements of a delta that are written out at a time


class Delta(Protocol):
    """A difference of weights (out, in), never written out where that can be avoided."""

    @property
    def out(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """What it adds: x (..., in) -> (..., out), in x's dtype."""
        ...

    def rows(self, start: int, stop: int) -> Delta:
        """The same for a range of outputs."""
        ...

    def matrix(self) -> Tensor:
        """Written out in fp32 (out, in)."""
        ...

    def to(self, device: torch.device) -> Delta: ...


@dataclass(frozen=True)
class LowRank:
    down: Tensor
    up: Tensor
    scale: float = 1.0  # alpha / rank

    @property
    def out(self) -> int:
        return self.up.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x)) * self.scale, self.up.to(x))

    def rows(self, start: int, stop: int) -> LowRank:
        return replace(self, up=self.up[start:stop])

    def matrix(self) -> Tensor:
        return self.up.float() @ self.down.float() * self.scale

    def to(self, device: torch.device) -> LowRank:
        return replace(self, down=self.down.to(device), up=self.up.to(device))


@dataclass(frozen=True)
class Kronecker:
    """`w1` and `w2` are products of the matrices they hold; `part` is a range of the outputs."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0
    part: tuple[int, int] | None = None

    @property
    def out(self) -> int:
        start, stop = self.part or (0, self.w1[0].shape[0] * self.w2[0].shape[0])
        return stop - start

    def __call__(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (self.w1[-1].shape[1], self.w2[-1].shape[1]))  # (..., b, d)
        y = _through(self.w2, y).transpose(-1, -2)  # (..., c, b)
        y = _through(self.w1, y).transpose(-1, -2).flatten(-2) * self.scale
        return y if self.part is None else y[..., self.part[0] : self.part[1]]

    def rows(self, start: int, stop: int) -> Kronecker:
        begin, block = (self.part or (0, 0))[0], self.w2[0].shape[0]
        start, stop = begin + start, begin + stop
        if start % block or stop % block:
            return replace(self, part=(start, stop))
        first = self.w1[0][start // block : stop // block]
        return replace(self, w1=(first, *self.w1[1:]), part=None)

    def matrix(self) -> Tensor:
        w1, w2 = (reduce(torch.mm, [f.float() for f in w]) for w in (self.w1, self.w2))
        whole = torch.kron(w1, w2) * self.scale
        return whole if self.part is None else whole[self.part[0] : self.part[1]]

    def to(self, device: torch.device) -> Kronecker:
        w1, w2 = (tuple(f.to(device) for f in w) for w in (self.w1, self.w2))
        return replace(self, w1=w1, w2=w2)


@dataclass(frozen=True)
class Hadamard:
    """A product by elements has full rank, so it is written out for each call, block by block."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    @property
    def out(self) -> int:
        return self.w1_a.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        w1_b, w2_b = self.w1_b.to(x) * self.scale, self.w2_b.to(x)
        step = max(1, BLOCK // w1_b.shape[1])
        parts = [
            F.linear(x, (a1.to(x) @ w1_b).mul_(a2.to(x) @ w2_b))
            for a1, a2 in zip(self.w1_a.split(step), self.w2_a.split(step), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows(self, start: int, stop: int) -> Hadamard:
        return replace(self, w1_a=self.w1_a[start:stop], w2_a=self.w2_a[start:stop])

    def matrix(self) -> Tensor:
        left = self.w1_a.float() @ self.w1_b.float()
        return left * (self.w2_a.float() @ self.w2_b.float()) * self.scale

    def to(self, device: torch.device) -> Hadamard:
        moved = (t.to(device) for t in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        return Hadamard(*moved, scale=self.scale)


@dataclass(frozen=True)
class Full:
    weight: Tensor

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x))

    def rows(self, start: int, stop: int) -> Full:
        return Full(self.weight[start:stop])

    def matrix(self) -> Tensor:
        return self.weight.float()

    def to(self, device: torch.device) -> Full:
        return Full(self.weight.to(device))


@dataclass(frozen=True)
class Shift:
    """Of the bias (out,), also where the layer has none."""

    values: Tensor

    @property
    def out(self) -> int:
        return self.values.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.values.to(x)

    def rows(self, start: int, stop: int) -> Shift:
        return Shift(self.values[start:stop])

    def matrix(self) -> Tensor:
        return self.values.float()

    def to(self, device: torch.device) -> Shift:
        return Shift(self.values.to(device))


@dataclass(frozen=True)
class Branch:
    """A delta on the outputs `rows` of a layer (None: all).

    `magnitude` (out,) makes it a DoRA (arXiv:2402.09353): the rows of W + delta are scaled to these
    lengths.
    """

    delta: Delta
    rows: tuple[int, int] | None = None
    magnitude: Tensor | None = None


@dataclass
class _Beside:
    """The forward hook of one layer: branches of all adapters, by the adapter's name."""

    branches: dict[Hashable, list[Branch]]
    strengths: Mapping[Hashable, float]  # the network's, shared by all layers
    handle: Any = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        active = [
            (strength, branch)
            for name, branches in self.branches.items()
            if (strength := self.strengths[name])
            for branch in branches
        ]
        if not active:
            return output
        x, bias, base = inputs[0].to(output.dtype), getattr(layer, "bias", None), output
        if any(branch.magnitude is not None for _, branch in active):
            base = output - bias.to(output) if bias is not None else output.clone()
        for strength, branch in active:
            part = slice(*branch.rows) if branch.rows else slice(None)
            more = branch.delta(x)
            if branch.magnitude is not None:
                gain = branch.magnitude.to(output)  # by now divided by the length of W + delta
                more = gain * more + (gain - 1) * base[..., part]
            output[..., part].add_(more, alpha=strength)
        return output


class Adapters:
    """The LoRAs on one network, each under a name and with a strength."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.strengths: dict[Hashable, float] = {}
        self._layers: dict[str, _Beside] = {}
        self._vectors: dict[str, tuple[nn.Parameter, dict[Hashable, Tensor]]] = {}

    @torch.no_grad()
    def add(
        self,
        name: Hashable,
        branches: Mapping[str, Sequence[Branch]],
        vectors: Mapping[str, Tensor] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Hang `branches` onto linear layers, by the layers' names.

        `vectors` are differences of one-dimensional parameters (a norm's weight), by the names of
        these: they are too small to be worth a branch, so the parameter is exchanged for its sum.
        """
        assert name not in self.strengths
        self.strengths[name] = strength
        for path, own in branches.items():
            layer = self.network.get_submodule(path)
            if path not in self._layers:
                beside = self._layers[path] = _Beside({}, self.strengths)
                beside.handle = layer.register_forward_hook(beside)
            self._layers[path].branches[name] = [_settled(layer, branch) for branch in own]
        for path, vector in (vectors or {}).items():
            if path not in self._vectors:
                self._vectors[path] = (self.network.get_parameter(path), {})
            self._vectors[path][1][name] = vector
        self._exchange()

    def set_strength(self, name: Hashable, strength: float) -> None:
        self.strengths[name] = strength
        self._exchange()

    def remove(self, name: Hashable) -> None:
        """Take it off: afterwards the network is what it was, bit for bit."""
        del self.strengths[name]
        for path, beside in list(self._layers.items()):
            if beside.branches.pop(name, None) and not beside.branches:
                beside.handle.remove()
                del self._layers[path]
        for path, (parameter, own) in list(self._vectors.items()):
            own.pop(name, None)
            if not own:
                self._put(path, parameter)
                del self._vectors[path]
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if hasattr(self.network, "adapted"):  # it keeps what its layers came to
            self.network.adapted += 1  # pyright: ignore[reportOperatorIssue]
        for path, (parameter, own) in self._vectors.items():
            total = parameter.float()
            for name, vector in own.items():
                total = total + self.strengths[name] * vector.to(total)
            self._put(path, nn.Parameter(total.to(parameter.dtype), requires_grad=False))

    def _put(self, path: str, parameter: nn.Parameter) -> None:
        module, _, leaf = path.rpartition(".")
        setattr(self.network.get_submodule(module), leaf, parameter)


def _settled(layer: nn.Module, branch: Branch) -> Branch:
    """The branch on its layer's device, its magnitude divided by the length of W + delta."""
    device = getattr(layer, "home", None)  # where it works, if its weights come and go
    device = device or next(chain(layer.parameters(), layer.buffers())).device
    delta = branch.delta.to(device)
    if branch.magnitude is None:
        return replace(branch, delta=delta)
    start, lengths = (branch.rows or (0, 0))[0], []
    width = _width(layer)
    step = max(1, BLOCK // width)
    for low in range(0, delta.out, step):
        high = min(low + step, delta.out)
        whole = weight_rows(layer, start + low, start + high).to(device)
        whole = whole + delta.rows(low, high).matrix()
        lengths.append(whole.norm(dim=1))
    gain = branch.magnitude.to(device).float() / torch.cat(lengths)
    return replace(branch, delta=delta, magnitude=gain)


def _width(layer: nn.Module) -> int:
    """A linear layer's inputs."""
    width = getattr(layer, "in_features", None)
    return width if isinstance(width, int) else layer.weight.shape[1]  # type: ignore


def weight_rows(layer: nn.Module, start: int, stop: int) -> Tensor:
    """Rows of a linear layer's weight in fp32, however it is stored."""
    layout = getattr(layer, "layout", None)
    if isinstance(layout, Layout):
        return layout.weight(slice(start, stop))
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.is_floating_point()
    return weight[start:stop].float()


def _through(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """x (..., in) through the product of `factors`, the last one first."""
    for factor in reversed(factors):
        x = F.linear(x, factor.to(x))
    return x
