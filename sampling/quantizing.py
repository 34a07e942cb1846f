"""From a diffusion model to a quantized one: what the command line and the node call.

Prompts and references of the user are run as they would be; `quant.quantizer` does the rest. The
file that comes out has the names of the one that went in, in ComfyUI's own formats.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from ..model_loaders.layers import Block, computed
from ..model_loaders.load import Loaded, load_dit
from ..quant.encode import FOUR, FOUR_BY_FOUR, SIX, WAYS, bytes_of
from ..quant.plan import PLAIN, Entry, PlanError, choose, read_plan, save_plan
from ..quant.quantizer import Calibration, Trials, Unit, try_all, writing
from .pipeline import Picture, Pipeline, Progress, Task
from .prefix_store import PrefixStore

SMALL = 64  # a layer with fewer inputs stays as it is
COMPARED = 2  # pictures that are made with the new file
FEW = 8  # steps; of pictures that take more, damages are measured in half as many, but no fewer
INPUTS = (16, 8, 4)


@dataclass(frozen=True)
class Wish:
    """`bits` for each weight on average (default 8), or the `loss` in percent that the latents of
    pictures may have, added up over the layers; or a `plan` to follow, weight by weight.

    `trials` is the folder for what was tried, by default beside the new file; `memory` in bytes
    bounds what is observed at a time. `six` allows layers of 6 bits, which ComfyUI reads with a
    comfy-kitchen of 0.2.40 or later only. `inputs`: what the inputs of quantized layers may be
    rounded to. 8 bits are multiplied fast; 16, not at all, loses least and is widened; 4, of layers
    of 4 bits, are for cards that multiply them so.
    """

    bits: float | None = None
    loss: float | None = None
    plan: Path | None = None
    trials: Path | None = None
    memory: int = 2 << 30
    six: bool = False
    inputs: int = 8

    def check(self) -> None:
        """Raises PlanError for numbers that mean nothing."""
        for name, number in (("bits", self.bits), ("loss", self.loss)):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise PlanError(f"the {name} must be a number above 0, {number} was given.")
        if self.inputs not in INPUTS:
            raise PlanError(f"inputs can have 16, 8 or 4 bits, {self.inputs} was given.")
        if self.memory <= 0:
            raise PlanError("the memory for what is observed must be more than nothing.")

    def allows(self, name: str) -> bool:
        """Whether a way to store may be chosen."""
        if name == PLAIN:
            return True
        way = WAYS[name]
        if SIX in (name, way.like) and not self.six:
            return False
        if self.inputs == 16:
            return way.bits == 16
        if way.like:
            return name == FOUR_BY_FOUR and self.inputs == 4
        return name != FOUR or self.inputs == 8


@dataclass(frozen=True)
class Made:
    """What came out. `before` and `after` are the same pictures (H, W, C) by either model."""

    out: Path
    entries: Mapping[str, Entry]
    bytes: int
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]

    @property
    def bits(self) -> float:
        """Of each weight that could be quantized, on average."""
        weights = sum(entry.weights for entry in self.entries.values())
        return 8 * sum(entry.chosen.bytes for entry in self.entries.values()) / weights

    @property
    def psnr(self) -> float:
        """Of the pictures after to those before, in decibels."""
        pairs = zip(self.before, self.after, strict=True)
        error = sum(float((a[..., :3] - b[..., :3]).square().mean()) for a, b in pairs)
        return math.inf if error == 0 else -10 * math.log10(error / len(self.before))

    def words(self) -> str:
        """The report as a table: weight, choice, bytes, error of its outputs in percent."""
        lines = [
            f"{name:<56} {entry.choice:<18} {entry.chosen.bytes:>12} "
            f"{100 * entry.chosen.error**0.5:>7.2f} %"
            for name, entry in self.entries.items()
        ]
        return "\n".join((
            *lines,
            f"{self.out}: {self.bytes / 1e9:.3g} GB, {self.bits:.3g} bits for each weight that "
            f"could be quantized; pictures {self.psnr:.1f} dB from full precision",
        ))  # fmt: skip


class Forgetful(PrefixStore):
    """Keeps what encoder and VAE say, and nothing of a DiT whose weights are being exchanged."""

    def __init__(self, dit: nn.Module) -> None:
        super().__init__()
        self.dit = dit

    def keep(self, kind: str, owner: Any, blocks: Sequence[Block], room: int) -> Any:
        if owner is self.dit:
            return computed(blocks, room)
        return super().keep(kind, owner, blocks, room)

    def recall(
        self, kind: str, owner: Any, content: tuple[Any, ...], compute: Callable[[], Any]
    ) -> Any:
        return compute() if owner is self.dit else super().recall(kind, owner, content, compute)


def quantize(
    pipeline: Pipeline,
    tasks: Sequence[Task],
    out: Path,
    wish: Wish,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Made:
    """Write the pipeline's DiT, quantized, to `out` (.safetensors), plan and report beside it.

    What was tried lies in a folder beside it as well: a run that was stopped goes on from there,
    and another budget needs no new trials. What can be known to fail is told before any trial.
    Raises CheckpointError, PlanError, SamplingError.
    """
    wish.check()
    check_out(out)
    if not tasks:
        raise PlanError("there is no prompt to calibrate on; give some that are like yours.")
    calibrating = Forgetful(pipeline.dit.module)
    pipeline = Pipeline(pipeline.dit, pipeline.vae, pipeline.encoder, calibrating)
    units = units_of(pipeline.dit)
    chosen = _followed(wish.plan, units) if wish.plan else None
    if chosen is None and wish.loss is None:
        check_budget(units, wish)
    about = {"model": _model(pipeline.dit.checkpoint, units), "list of prompts": _prompts(tasks)}
    trials = Trials(wish.trials or out.with_suffix(".trials"), about)
    made = calibration(pipeline, tasks)
    done = sum(unit in trials for unit in units)
    progress(done, len(units))
    with torch.no_grad():
        for number, _ in enumerate(try_all(pipeline.dit.module, units, made, trials, wish.memory)):
            progress(done + number + 1, len(units))
        entries = _entries(units, trials, wish, chosen)
        with writing(out):
            write(pipeline.dit.checkpoint, units, entries, trials, out)
            save_plan(entries, out.with_suffix(".plan.json"))
        few = tasks[:COMPARED]
        before = tuple(pictures(pipeline, few))
        new = load_dit(out, device=pipeline.device)
        new = replace(new, schedule=pipeline.dit.schedule)
        after = tuple(pictures(Pipeline(new, pipeline.vae, pipeline.encoder), few))
    result = Made(out, entries, out.stat().st_size, before, after)
    out.with_suffix(".report.txt").write_text(f"{result.words()}\n", "utf-8")
    return result


def check_out(out: Path) -> None:
    """Raises PlanError for a file that exists, or whose folder does not."""
    if out.suffix != ".safetensors":
        raise PlanError(f"{out} does not end in .safetensors; give a new file's name.")
    if out.exists():
        raise PlanError(f"{out} exists already and is not overwritten; give a new file's name.")
    if not out.parent.is_dir():
        raise PlanError(f"{out}: there is no folder {out.parent}; make it, or choose another.")


def check_budget(units: Sequence[Unit], wish: Wish) -> None:
    """Raises PlanError for bits that are too few, before hours are spent on trials."""
    least = 0
    for unit in units:
        allowed = [way for way in unit.ways if wish.allows(way.name)]
        least += min(2 * unit.weights, *(bytes_of(way, unit.shape) for way in allowed))
    weights, bits = sum(unit.weights for unit in units), wish.bits or 8
    if 8 * least > bits * weights:
        raise PlanError(
            f"{bits:g} bits for each weight are too few; the least that these layers can be stored "
            f"in is {math.ceil(800 * least / weights) / 100:g}."
        )


def _model(checkpoint: Checkpoint, units: Sequence[Unit]) -> str:
    """Tells models apart, also those of one shape."""
    digest = hashlib.sha256(repr([(unit.name, unit.shape) for unit in units]).encode())
    for unit in units[:: max(len(units) // 8, 1)]:
        digest.update(
            checkpoint.tensor(f"{next(iter(unit.layers))}.weight")[:1].float().numpy().tobytes()
        )
    return digest.hexdigest()


def _prompts(tasks: Sequence[Task]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        known = replace(task, references=())
        digest.update(repr(known).encode("utf-8", "surrogatepass"))
        for reference in task.references:
            digest.update(reference.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibration(pipeline: Pipeline, tasks: Sequence[Task]) -> Calibration:
    """What the network does with `tasks`; each is one picture."""

    def steps(k: int) -> int:
        return len(pipeline.plan(tasks[k]).sigmas) - 1

    def latents(task: Task) -> Tensor:
        """Of a picture, as its last step leaves them."""
        events = pipeline.run(task)
        for event in events:
            assert isinstance(event, Progress)
            if event.state.step == event.state.total:
                events.close()  # type: ignore[attr-defined]
                return event.state.denoised
        raise AssertionError

    def probe(k: int) -> Tensor:
        most = steps(k)
        schedule = pipeline.dit.schedule
        own = tasks[k].sigmas or (schedule and schedule.sigmas)  # a list has as many as it has
        few = most if own else max(min(most, FEW), most // 2)
        return latents(replace(tasks[k], steps=None if own else few))

    return Calibration(len(tasks), steps, lambda k: latents(tasks[k]), probe)


def pictures(pipeline: Pipeline, tasks: Sequence[Task]) -> Iterator[Tensor]:
    for task in tasks:
        yield next(e.pixels for e in pipeline.run(task) if isinstance(e, Picture))


def units_of(dit: Loaded) -> list[Unit]:
    """The tensors of the file that are weights of linear layers. Raises CheckpointError."""
    checkpoint = dit.checkpoint
    if any(info.form for info in checkpoint.names.values()):
        raise CheckpointError(
            f"{checkpoint.name} is quantized already; start from its bf16 or fp32 file."
        )
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for path, layer in dit.module.named_modules():
        info = checkpoint.names.get(f"{path}.weight")
        if isinstance(layer, nn.Linear) and info and info.shape[1] >= SMALL:
            rows = info.rows or (0, info.shape[0])
            parts.setdefault(info.key, {})[path] = rows
    return [_unit(checkpoint, key, layers) for key, layers in parts.items()]


def _unit(checkpoint: Checkpoint, key: str, layers: dict[str, tuple[int, int]]) -> Unit:
    layers = dict(sorted(layers.items(), key=lambda item: item[1]))

    def weight() -> Tensor:
        return torch.cat([checkpoint.tensor(f"{path}.weight").float() for path in layers])

    first = checkpoint.names[f"{next(iter(layers))}.weight"]
    out = sum(stop - start for start, stop in layers.values())
    return Unit(key.removesuffix(".weight"), (out, first.shape[1]), layers, weight)


def _followed(plan: Path, units: Sequence[Unit]) -> dict[str, str]:
    """What a plan says for each unit. Raises PlanError for one that does not fit them."""
    chosen, names = read_plan(plan), {unit.name for unit in units}
    missing, unknown = sorted(names - {*chosen}), sorted({*chosen} - names)
    if missing or unknown:
        what = f"says nothing of {missing[0]}" if missing else f"names {unknown[0]}"
        hint = "which this model has" if missing else "which this model has not"
        raise PlanError(f"{plan} {what}, {hint}; it is the plan of another model.")
    for unit in units:
        possible = [*(way.name for way in unit.ways), PLAIN]
        if chosen[unit.name] not in possible:
            raise PlanError(
                f"the plan says {chosen[unit.name]!r} for {unit.name}; possible are "
                f"{', '.join(possible)}."
            )
    return chosen


def _entries(
    units: Sequence[Unit], trials: Trials, wish: Wish, chosen: Mapping[str, str] | None
) -> dict[str, Entry]:
    options = {unit.name: trials.options(unit) for unit in units}
    weights = {unit.name: unit.weights for unit in units}
    if chosen is None:
        allowed = {
            name: {way: option for way, option in own.items() if wish.allows(way)}
            for name, own in options.items()
        }
        if wish.loss is not None:
            return choose(allowed, weights, damage=(wish.loss / 100) ** 2)
        return choose(allowed, weights, (wish.bits or 8) / 8 * sum(weights.values()))
    return {name: Entry(chosen[name], weights[name], own) for name, own in options.items()}


def write(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    entries: Mapping[str, Entry],
    trials: Trials,
    out: Path,
) -> None:
    """The file: the tensors of `checkpoint` under their own names, those of `units` as chosen."""
    from safetensors.torch import save_file

    raw = open_checkpoint(checkpoint.path)
    tensors = {name: raw.tensor(name) for name in raw.names}
    for unit in units:
        choice, key = entries[unit.name].choice, f"{unit.name}.weight"
        if choice == PLAIN:
            if tensors[key].dtype.itemsize > 2:
                tensors[key] = tensors[key].bfloat16()
            continue
        encoded = trials.read(unit, choice)
        tensors |= {f"{unit.name}.{part}": tensor for part, tensor in encoded.tensors.items()}
        marker = json.dumps(encoded.settings).encode()
        tensors[f"{unit.name}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    metadata = {**raw.metadata, "format": "pt"}
    if raw.config and "config" not in metadata:
        metadata["config"] = json.dumps(raw.config)
    part = out.with_name(f"{out.name}.part")
    save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata)
    part.replace(out)
