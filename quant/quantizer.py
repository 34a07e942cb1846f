"""Make a quantized model: observe, try every way for every weight, choose, write.

The whole works on *units*: tensors of the file, each the weight of one linear layer or, where the
file fuses them, of several with the same input. Observed are the second moments of a unit's inputs
and a sample of them, while the network makes the calibration's pictures. Each way to store it is
then measured by the error of its outputs on that sample; and how much such an error matters is
measured once for each unit: pictures are made with that unit alone quantized.

Inputs count as often as what becomes of them is used: text and references that are read once and
kept for all steps count for each of these (0.8 to 1.3 dB of their layers' error). Damages are
averaged in decibels, for one picture of many turns out another one at the least change, and in a
plain mean it would outweigh all others.

What has been tried lies in a folder, a file for each unit, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .encode import WAYS, Encoded, EncodeError, Way, encode, possible
from .layouts import Layout, Parts, layout_of
from .linear import Buffer, QuantizedLinear
from .plan import PLAIN, Option, PlanError

SAMPLE = 1024  # rows of inputs that are kept for each unit
COARSE = ("4 bits", "4 bits in groups", "nvfp4 smoothed", "int8")  # damages are measured so
ALPHAS = (0.25, 0.5, 0.75)
FORMAT = 2  # of a folder of trials
PROBED = 6  # pictures that a damage is measured with


@dataclass(frozen=True)
class Calibration:
    """`count` pictures, which the network makes as it is when they are asked for.

    `observe(k)` makes picture k in the steps that the checkpoint really uses, `steps(k)` of them;
    `probe(k)` returns its latents, made in as many or in fewer.
    """

    count: int
    steps: Callable[[int], int]
    observe: Callable[[int], object]
    probe: Callable[[int], Tensor]

    @property
    def probed(self) -> list[int]:
        """Pictures from everywhere in the list: prompts and edits often lie apart in it."""
        many = min(PROBED, self.count)
        return [k * (self.count - 1) // max(many - 1, 1) for k in range(many)]


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
    """What a unit was given: the weighted mean of x x^T (in, in), and some of the x (n, in)."""

    moments: Tensor
    sample: Tensor = field(default_factory=lambda: torch.zeros(0))
    total: float = 0.0
    keys: Tensor = field(default_factory=lambda: torch.zeros(0))

    def take(self, x: Tensor, weight: float, generator: torch.Generator) -> None:
        """Add rows x (..., in). Each is in the sample with a probability in proportion to its
        weight (Efraimidis and Spirakis, 2006)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        before, self.total = self.total, self.total + weight * len(rows)
        self.moments.mul_(before / self.total)
        self.moments.addmm_(rows.T, rows, alpha=weight / self.total)
        keys = torch.rand(len(rows), generator=generator).log() / weight
        if len(self.keys) == SAMPLE:
            new = (keys > self.keys[-1]).nonzero()[:, 0]
            if not len(new):
                return
            keys, rows = keys[new], rows[new.to(rows.device)]
        keys = torch.cat((self.keys, keys))
        rows = torch.cat((self.sample.reshape(-1, x.shape[-1]), rows.cpu()))
        self.keys, best = keys.topk(min(SAMPLE, len(keys)))
        self.sample = rows[best]


class Served:
    """How many steps use what a network computes at the moment."""

    def __init__(self) -> None:
        self.steps = 1  # of the picture that is being made
        self.inside = False  # whether this is one of its steps

    @property
    def weight(self) -> int:
        return 1 if self.inside else self.steps


@contextmanager
def observing(
    network: nn.Module, units: Iterable[Unit]
) -> Iterator[tuple[dict[str, Observed], Served]]:
    """Watch the inputs of `units` while the network runs."""
    found: dict[str, Observed] = {}
    served, generator = Served(), torch.Generator().manual_seed(0)

    def enter(*_: Any) -> None:
        served.inside = True

    def leave(*_: Any) -> None:
        served.inside = False

    handles: list[Any] = [
        network.register_forward_pre_hook(enter),
        network.register_forward_hook(leave, always_call=True),
    ]
    for unit in units:
        layer = network.get_submodule(next(iter(unit.layers)))
        device, width = next(layer.parameters()).device, unit.shape[1]
        found[unit.name] = Observed(torch.zeros(width, width, device=device))

        def hook(_: Any, inputs: tuple[Tensor, ...], own: Observed = found[unit.name]) -> None:
            own.take(inputs[0], served.weight, generator)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found, served
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
    if not seen.total:
        raise PlanError(f"{unit.name} took no part in the calibration; give prompts that use it.")
    weight = unit.weight()
    x = seen.sample.to(weight.device)
    y = F.linear(x, weight)
    results: dict[str, tuple[Encoded, float]] = {}
    for way in unit.ways:
        if way.like:  # the same numbers, multiplied in another way
            options = [results[way.like][0].as_way(way)]
        else:
            smoothings = _smoothings(way, weight, x)
            try:
                options = [encode(way, weight, seen.moments, scales) for scales in smoothings]
            except EncodeError as error:
                raise PlanError(f"{unit.name} {error}; is the model itself sound?") from error
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
    """What was tried of each unit, in `folder`; a unit that is there is not tried again.

    `about` says of what model and prompts. Raises PlanError for a folder of others, and for one
    that cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder, note = folder, folder / "about.json"
        own = {"format": str(FORMAT), **about}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not note.exists() and not any(folder.glob("*.safetensors")):
                note.write_text(json.dumps(own), "utf-8")
        try:
            found = json.loads(note.read_text("utf-8"))
            other = [name for name in own if found.get(name) != own[name]]
        except (OSError, ValueError, AttributeError):
            other = [*own]
        if other:
            raise PlanError(
                f"{folder} holds trials of another {' and another '.join(other)}; name another "
                "folder for trials, or delete this one."
            )

    def file(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"

    def __contains__(self, unit: Unit) -> bool:
        return self.file(unit).is_file()

    def save(
        self, unit: Unit, results: Mapping[str, tuple[Encoded, float]], damage: float, probe: str
    ) -> None:
        """`damage`: what is lost of the pictures with the unit stored as `probe`; that of other
        ways is in proportion to the errors of the unit's own outputs."""
        least = max(results[probe][1], 1e-20)
        options = {
            name: asdict(Option(encoded.bytes, error, damage * error / least))
            for name, (encoded, error) in results.items()
        }
        settings = {name: encoded.settings for name, (encoded, _) in results.items()}
        tensors = {
            f"{name}/{key}": tensor.cpu()
            for name, (encoded, _) in results.items()
            if not WAYS[name].like
            for key, tensor in encoded.tensors.items()
        }
        started = self.file(unit).with_suffix(".part")
        words = {"options": json.dumps(options), "settings": json.dumps(settings)}
        with writing(started):
            save_file(tensors, started, words)
            started.replace(self.file(unit))

    def options(self, unit: Unit) -> dict[str, Option]:
        found = json.loads(self._metadata(unit)["options"])
        measured = {name: Option(**values) for name, values in found.items()}
        return {**measured, PLAIN: Option(2 * unit.weights, 0.0, 0.0)}

    def _metadata(self, unit: Unit) -> dict[str, str]:
        try:
            with safe_open(str(self.file(unit)), framework="pt") as file:
                return file.metadata()
        except (OSError, SafetensorError) as error:
            raise PlanError(f"{self.file(unit)} is damaged ({error}); delete it.") from error

    def read(self, unit: Unit, way: str) -> Encoded:
        settings = json.loads(self._metadata(unit)["settings"])[way]
        with safe_open(str(self.file(unit)), framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{WAYS[way].like or way}/")]
            tensors = {key.partition("/")[2]: file.get_tensor(key) for key in keys}
        return Encoded(WAYS[way].format, tensors, settings)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a file or folder into a PlanError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise PlanError(
            f"{path} cannot be written ({why}); what was tried before is kept, so once there is "
            "room and a right to write, the same command goes on."
        ) from error


def try_all(
    network: nn.Module,
    units: list[Unit],
    calibration: Calibration,
    trials: Trials,
    memory: int = 2 << 30,
) -> Iterator[Unit]:
    """Try every unit that has not been tried; yields each when it is done."""
    left = [unit for unit in units if unit not in trials]
    if not left:
        return
    exact = {k: calibration.probe(k) for k in calibration.probed}
    for group in groups(left, memory):
        with observing(network, group) as (found, served):
            for k in range(calibration.count):
                served.steps = calibration.steps(k)
                calibration.observe(k)
        for unit in group:
            results = tried(unit, found.pop(unit.name))
            probe = next(name for name in COARSE if name in results)
            with replaced(network, unit, results[probe][0]):
                lost = [_lost(calibration.probe(k), wanted) for k, wanted in exact.items()]
            trials.save(unit, results, math.exp(sum(lost) / len(lost)), probe)
            yield unit


def _lost(found: Tensor, wanted: Tensor) -> float:
    """The logarithm of the squared error over the square."""
    return math.log(max(float((found - wanted).square().sum() / wanted.square().sum()), 1e-20))
