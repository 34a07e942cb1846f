"""From a diffusion model to a quantized one: what the command line and the node call.

Prompts and references of the user are run as they would be; `quant.quantizer` does the rest. The
file that comes out has the names of the one that went in, in ComfyUI's own formats.
"""

from __future__ import annotations

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
from ..quant.encode import FOUR, FOUR_BY_FOUR, SIX
from ..quant.plan import PLAIN, Entry, PlanError, choose, read_plan, save_plan
from ..quant.quantizer import Run, Trials, Unit, try_all
from .pipeline import Picture, Pipeline, Progress, Task
from .prefix_store import PrefixStore

SMALL = 64  # a layer with fewer inputs stays as it is
COMPARED = 2  # pictures that are made with the new file


@dataclass(frozen=True)
class Wish:
    """`bits` for each weight on average (default 8), or the `loss` in percent that what the network
    predicts may have, added up over its layers; or a `plan` to follow, weight by weight.

    `trials` is the folder for what was tried, by default beside the new file; `memory` in bytes
    bounds what is observed at a time. `six` allows layers of 6 bits, which ComfyUI reads with a
    comfy-kitchen of 0.2.40 or later only. `fast` rounds the inputs of layers of 4 bits to 4 bits
    too, for cards that multiply them so.
    """

    bits: float | None = None
    loss: float | None = None
    plan: Path | None = None
    trials: Path | None = None
    memory: int = 2 << 30
    six: bool = False
    fast: bool = False

    @property
    def excluded(self) -> tuple[str, ...]:
        """Ways that are not chosen."""
        return (FOUR if self.fast else FOUR_BY_FOUR, *(() if self.six else (SIX,)))


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
    and another budget needs no new trials. Raises CheckpointError, PlanError, SamplingError.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise PlanError(f"{out} exists, or does not end in .safetensors; give a new file's name.")
    if not tasks:
        raise PlanError("there is no prompt to calibrate on; give some that are like yours.")
    calibrating = Forgetful(pipeline.dit.module)
    pipeline = Pipeline(pipeline.dit, pipeline.vae, pipeline.encoder, calibrating)
    units = units_of(pipeline.dit)
    chosen = read_plan(wish.plan) if wish.plan else None
    trials = Trials(wish.trials or out.with_suffix(".trials"))
    runs = runner(pipeline, tasks), len(tasks)
    done = sum(unit in trials for unit in units)
    progress(done, len(units))
    with torch.no_grad():
        for number, _ in enumerate(try_all(pipeline.dit.module, units, runs, trials, wish.memory)):
            progress(done + number + 1, len(units))
        entries = _entries(units, trials, wish, chosen)
        write(pipeline.dit.checkpoint, units, entries, trials, out)
        save_plan(entries, out.with_suffix(".plan.json"))
        few = tasks[:COMPARED]
        before = tuple(pictures(pipeline, few))
        new = load_dit(out, device=pipeline.device)
        new = replace(new, schedule=pipeline.dit.schedule)
        after = tuple(pictures(Pipeline(new, pipeline.vae, pipeline.encoder), few))
    made = Made(out, entries, out.stat().st_size, before, after)
    out.with_suffix(".report.txt").write_text(f"{made.words()}\n", "utf-8")
    return made


def runner(pipeline: Pipeline, tasks: Sequence[Task]) -> Run:
    """Picture k up to its last step: what the network makes of it at each of them."""

    def run(k: int) -> Tensor:
        denoised = []
        steps = pipeline.run(tasks[k])
        for event in steps:
            assert isinstance(event, Progress)
            denoised.append(event.state.denoised)
            if event.state.step == event.state.total:
                break
        steps.close()  # type: ignore[attr-defined]
        return torch.stack(denoised)

    return run


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


def _entries(
    units: Sequence[Unit], trials: Trials, wish: Wish, chosen: Mapping[str, str] | None
) -> dict[str, Entry]:
    options = {unit.name: trials.options(unit) for unit in units}
    weights = {unit.name: unit.weights for unit in units}
    if chosen is None:
        allowed = {
            name: {way: option for way, option in own.items() if way not in wish.excluded}
            for name, own in options.items()
        }
        if wish.loss is not None:
            return choose(allowed, weights, damage=(wish.loss / 100) ** 2)
        return choose(allowed, weights, (wish.bits or 8) / 8 * sum(weights.values()))
    for name, own in options.items():
        if chosen.get(name) not in own:
            raise PlanError(
                f"the plan says {chosen.get(name)!r} for {name}; possible are {', '.join(own)}."
            )
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
