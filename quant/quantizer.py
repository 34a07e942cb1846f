"""Make a quantized model: observe, try every way for every weight, choose, write.

The whole works on *units*: tensors of the file, each the weight of one linear layer or, where the
file fuses them, of several with the same input. Observed are the second moments of a unit's inputs
and a sample of them, while the network makes the calibration's pictures. Each way to store it is
then measured by the error of its outputs on that sample; and how much such an error matters is
measured once for each unit, by the whole network's output with that unit alone quantized.

What has been tried lies in a folder, a file for each unit, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .encode import FOUR, FOUR_BY_FOUR, WAYS, Encoded, Way, encode, possible
from .layouts import Layout, Parts, layout_of
from .linear import Buffer, QuantizedLinear
from .plan import PLAIN, Option

SAMPLE = 1024  # rows of inputs that are kept for each unit
PROBES = ("4 bits", "4 bits in groups", "nvfp4 smoothed", "int8")  # the coarsest that is possible
ALPHAS = (0.25, 0.5, 0.75)

Run = Callable[[int], Tensor]


@dataclass(frozen=True)
class Unit:
    """A tensor of the file: `layers` of the network, each with its rows of it."""

    name: str
    shape: tuple[int, int]
    layers: Mapping[str, tuple[int, int]]
    weight: Callable[[], Tensor]  # in full precision, (out, in)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def ways(self) -> list[Way]:
        return [way for way in WAYS.values() if possible(way, self.shape)]


@dataclass
class Observed:
    """What a unit was given: the mean of x x^T (in, in), and some of the x."""

    moments: Tensor
    sample: Tensor
    seen: int = 0

    def take(self, x: Tensor, generator: torch.Generator) -> None:
        """Add rows x (n, in). The sample stays a fair one of all that were seen (Vitter's R)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = len(rows)
        self.moments.mul_(self.seen / (self.seen + count))
        self.moments.addmm_(rows.T, rows, alpha=1 / (self.seen + count))
        number = torch.arange(self.seen, self.seen + count)
        place = (torch.rand(count, generator=generator) * (number + 1)).long()
        place = torch.where(number < SAMPLE, number, place)
        kept = place < SAMPLE
        self.sample[place[kept]] = rows[kept.to(rows.device)].to(self.sample.device)
        self.seen += count


@contextmanager
def observing(network: nn.Module, units: Iterable[Unit]) -> Iterator[dict[str, Observed]]:
    """Watch the inputs of `units` while the network runs."""
    found: dict[str, Observed] = {}
    generator, handles = torch.Generator().manual_seed(0), []
    for unit in units:
        layer = network.get_submodule(next(iter(unit.layers)))
        device, width = next(layer.parameters()).device, unit.shape[1]
        found[unit.name] = Observed(
            torch.zeros(width, width, device=device),
            torch.zeros(SAMPLE, width),
        )

        def hook(_: Any, inputs: tuple[Tensor, ...], own: Observed = found[unit.name]) -> None:
            own.take(inputs[0], generator)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def groups(units: Iterable[Unit], memory: int) -> Iterator[list[Unit]]:
    """Units whose observations fit into `memory` bytes together; at least one each."""
    group: list[Unit] = []
    taken = 0
    for unit in units:
        needed = 4 * unit.shape[1] * (unit.shape[1] + SAMPLE)
        if group and taken + needed > memory:
            yield group
            group, taken = [], 0
        group.append(unit)
        taken += needed
    if group:
        yield group


# ---- one unit ----------------------------------------------------------------------------------


def tried(unit: Unit, seen: Observed) -> dict[str, tuple[Encoded, float]]:
    """Every way to store the unit, and the squared error of its outputs over the squared output."""
    assert seen.seen, f"{unit.name} took no part in the calibration"
    weight = unit.weight()
    x = seen.sample[: seen.seen].to(weight.device)
    y = F.linear(x, weight)
    results = {}
    for way in unit.ways:
        if way.name == FOUR_BY_FOUR:  # the same numbers, multiplied in another way
            made = results[FOUR][0]
            options = [replace(made, settings=made.settings | {"linear_dtype": "int4"})]
        else:
            options = [encode(way, weight, seen.moments, s) for s in _smoothings(way, weight, x)]
        errors = [output_error(layout(unit, o), way, x, y) for o in options]
        best = min(range(len(options)), key=errors.__getitem__)
        results[way.name] = options[best], errors[best]
    return results


def _smoothings(way: Way, weight: Tensor, x: Tensor) -> list[Tensor | None]:
    """SmoothQuant's scales (arXiv:2211.10438) for each alpha, where the format can hold them."""
    if way.format != "nvfp4":
        return [None]
    inputs = x.abs().amax(dim=0).clamp_min(1e-5)
    outputs = weight.abs().amax(dim=0).clamp_min(1e-5)
    scales: list[Tensor | None] = [None]
    for alpha in ALPHAS:
        scale = inputs**alpha / outputs ** (1 - alpha)
        scales.append((scale / scale.log().mean().exp()).clamp(1e-3, 1e3))
    return scales


def layout(unit: Unit, encoded: Encoded, rows: tuple[int, int] | None = None) -> Layout:
    start, stop = rows or (0, unit.shape[0])
    shape = (stop - start, unit.shape[1])
    return layout_of(
        encoded.format, Parts(encoded.tensors, shape, rows, unit.shape[0], encoded.settings)
    )


def output_error(made: Layout, way: Way, x: Tensor, y: Tensor) -> float:
    """|W' x - y|^2 / |y|^2 with inputs rounded as the way's product rounds them."""
    inputs = made.inputs(x)
    if way.bits < 16:
        step = inputs.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (way.bits - 1) - 1)
        inputs = (inputs / step).round() * step
    return float((F.linear(inputs, made.values()) - y).square().sum() / y.square().sum())


@contextmanager
def replaced(network: nn.Module, unit: Unit, encoded: Encoded) -> Iterator[None]:
    """The network with this unit quantized, for a while."""
    old = {path: network.get_submodule(path) for path in unit.layers}
    buffer = Buffer()
    for path, rows in unit.layers.items():
        bias = getattr(old[path], "bias", None)
        network.set_submodule(path, QuantizedLinear(layout(unit, encoded, rows), bias, buffer))
    try:
        yield
    finally:
        for path, layer in old.items():
            network.set_submodule(path, layer)


# ---- all of them -------------------------------------------------------------------------------


class Trials:
    """What was tried of each unit, in `folder`; a unit that is there is not tried again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"

    def __contains__(self, unit: Unit) -> bool:
        return self.file(unit).is_file()

    def save(
        self, unit: Unit, results: Mapping[str, tuple[Encoded, float]], damage: float, probe: str
    ) -> None:
        """`damage`: the share of the network's squared output that is lost with the unit stored as
        `probe`; that of other ways is in proportion to the errors of the unit's own outputs."""
        least = max(results[probe][1], 1e-20)
        options = {
            name: asdict(Option(encoded.bytes, error, damage * error / least))
            for name, (encoded, error) in results.items()
        }
        settings = {name: encoded.settings for name, (encoded, _) in results.items()}
        tensors = {
            f"{name}/{key}": tensor.cpu()
            for name, (encoded, _) in results.items()
            if name != FOUR_BY_FOUR  # whose numbers are those of FOUR
            for key, tensor in encoded.tensors.items()
        }
        started = self.file(unit).with_suffix(".part")
        words = {"options": json.dumps(options), "settings": json.dumps(settings)}
        save_file(tensors, started, words)
        started.replace(self.file(unit))

    def options(self, unit: Unit) -> dict[str, Option]:
        with safe_open(str(self.file(unit)), framework="pt") as file:
            found = json.loads(file.metadata()["options"])
        measured = {name: Option(**values) for name, values in found.items()}
        return {**measured, PLAIN: Option(2 * unit.weights, 0.0, 0.0)}

    def read(self, unit: Unit, way: str) -> Encoded:
        with safe_open(str(self.file(unit)), framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])[way]
            own = FOUR if way == FOUR_BY_FOUR else way
            keys = [key for key in file.keys() if key.startswith(f"{own}/")]
            tensors = {key.partition("/")[2]: file.get_tensor(key) for key in keys}
        return Encoded(WAYS[way].format, tensors, settings)


def try_all(
    network: nn.Module,
    units: list[Unit],
    runs: tuple[Run, int],
    trials: Trials,
    memory: int = 2 << 30,
) -> Iterator[Unit]:
    """Try every unit that has not been tried; yields each when it is done.

    `runs`: what makes picture k with the network as it is, and how many there are. It returns what
    is compared: the network's outputs at each step.
    """
    run, count = runs
    left = [unit for unit in units if unit not in trials]
    if not left:
        return
    exact = {k: run(k) for k in (0, count - 1)}  # of prompts and edits often one each
    whole = sum(float(y.square().sum()) for y in exact.values())
    for group in groups(left, memory):
        with observing(network, group) as found:
            for k in range(count):
                run(k)
        for unit in group:
            results = tried(unit, found.pop(unit.name))
            probe = next(name for name in PROBES if name in results)
            with replaced(network, unit, results[probe][0]):
                lost = sum(float((run(k) - y).square().sum()) for k, y in exact.items())
            trials.save(unit, results, lost / whole, probe)
            yield unit
