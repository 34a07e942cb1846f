"""Say what a file is, from its header alone: in words, or as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..quant.operations import TORCH
from .bundle import parts
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .detection import (
    Found,
    compare,
    config_of,
    detect,
    main_dtype,
    noun,
    parameters,
    refuse_differences,
    schedule_of,
    table_of,
    unknown,
    unused_note,
    variant_note,
)
from .families import FAMILIES
from .family import TITLES, Licence
from .lora import is_lora, open_lora, recognise, some
from .quantized import check_formats, quantization

SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Report:
    """What `inspect` found. What could not be told is None; a usable file has no `problems`."""

    file: str
    family: str | None = None
    title: str | None = None
    variant: str | None = None
    reason: str | None = None  # why this variant
    component: str | None = None  # dit, vae, encoder, lora
    layout: str | None = None  # of a LoRA: its form and whose names it has
    modules: int | None = None  # of a LoRA: layers it is for
    ranks: tuple[int, ...] = ()  # of a LoRA, all that occur
    parameters: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    bytes: int | None = None
    licence: str | None = None
    commercial: bool | None = None
    notice: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    parts: tuple[Report, ...] = ()  # of an all-in-one checkpoint, which has no component itself

    @property
    def usable(self) -> bool:
        return not self.problems and all(part.usable for part in self.parts)

    def part(self, kind: str) -> Report:
        """What is told of the part of a kind; of the file itself where it has no parts."""
        return next((part for part in self.parts if part.component == kind), self)

    @property
    def exit_code(self) -> int:
        """Of a command that shows this report: 0 usable, 2 refused."""
        return 0 if self.usable else 2

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def words(self) -> str:
        """A few lines for people; the last ones are the problems."""
        lines = [self.file]
        if self.parts:
            kinds = ", ".join(TITLES[part.component or ""] for part in self.parts)
            lines.append(f"  All in one, each loader takes its part: {kinds}")
            return "\n".join(
                lines + [line for p in self.parts for line in p.words().split("\n")[1:]]
            )
        if self.component:
            known = f"{self.title} ({self.family})" if self.family else "Unknown family"
            lines.append(f"  {known}: {noun(self.component)}")
        if self.modules is not None:
            ranks = f", rank {' to '.join(map(str, _ends(self.ranks)))}" if self.ranks else ""
            layers = "1 layer" if self.modules == 1 else f"{self.modules} layers"
            lines.append(f"  {self.layout}, for {layers}{ranks}")
        if self.variant:
            lines.append(f"  Sampled as {self.variant}: {self.reason}.")
        if self.parameters is not None and self.bytes is not None:
            form = f", quantized as {self.quantization}" if self.quantization else ""
            is_model = self.layout and self.modules is None
            layout = f", names as in {self.layout}" if is_model else ""
            lines.append(
                f"  {_count(self.parameters)} parameters, {self.dtype}{form}, "
                f"{self.bytes / 1e9:.3g} GB{layout}"
            )
        if self.licence:
            terms = "commercial use allowed" if self.commercial else "non-commercial"
            lines.append(f"  {self.licence}, {terms}. {self.notice}")
        lines += [f"  Note: {note}" for note in self.notes]
        lines += [f"  Refused: {problem}" for problem in self.problems] or ["  Usable."]
        return "\n".join(lines[:1] + [line.replace("\n", "\n  ") for line in lines[1:]])


def inspect(path: Path | str) -> Report:
    """Read the header of the file or folder `path` and hold it against the table of what it seems.

    Never raises for a bad file: what is wrong is in `problems`, one sentence each, with the file's
    name.
    """
    report = Report(file=str(path))
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return replace(report, problems=(str(error),))
    report = _numbers(report, checkpoint)
    try:
        if is_lora(checkpoint.names):
            report = replace(report, component="lora")
            return _lora(report)
        if own := parts(checkpoint):
            return replace(report, parts=tuple(_of(str(path), part) for part in own.values()))
        return _of(str(path), checkpoint)
    except CheckpointError as error:
        return replace(report, problems=(str(error),))


def _of(file: str, checkpoint: Checkpoint) -> Report:
    """The report of one component."""
    report = _numbers(Report(file=file), checkpoint)
    try:
        found = detect(checkpoint)
        if found is None:
            known = ", ".join(family.title for family in FAMILIES)
            return replace(report, problems=(f"{unknown(checkpoint)}; it knows {known}.",))
        return _component(_numbers(report, found.checkpoint), found)
    except CheckpointError as error:
        return replace(report, problems=(str(error),))


def _numbers(report: Report, checkpoint: Checkpoint) -> Report:
    dtype = main_dtype(checkpoint.names)
    return replace(
        report,
        parameters=parameters(checkpoint.names),
        dtype=SHORT.get(dtype) or dtype,
        quantization=quantization(checkpoint),
        bytes=checkpoint.bytes,
    )


def _lora(report: Report) -> Report:
    lora = open_lora(report.file)
    report = replace(report, layout=lora.style, modules=len(lora.modules), ranks=lora.ranks)
    match = recognise(lora)
    if match is None:
        problem = (
            f"{lora.name} is a LoRA for a model that Seedling does not know; its layers are "
            f"called {some(lora.modules)}."
        )
        return replace(report, problems=(problem,))
    family = match.family
    fits = f"Its shapes are those of {match.variant}."
    if match.variant is None:
        fits = f"Its shapes are those of no published {family.title}: for a network of other sizes."
    notes = [fits]
    if left_out := (*match.unmatched, *lora.strange):
        notes.append(f"{len(left_out)} of its parts fit nothing there: {some(left_out)}.")
    report = replace(report, family=family.name, title=family.title, notes=tuple(notes))
    return _terms(report, family.licence)


def _component(report: Report, found: Found) -> Report:
    family, kind = found.family, found.component.kind
    report = replace(
        report, family=family.name, title=found.model, component=kind, layout=found.layout.name
    )
    report = _terms(report, family.licence_of(found.checkpoint))
    try:
        if kind == "dit":
            schedule = schedule_of(found)
            report = replace(report, variant=schedule.name, reason=schedule.reason)
        check_formats(found.checkpoint)
        differences = compare(found, table_of(found, config_of(found), TORCH))
        report = replace(report, notes=(*variant_note(found), *unused_note(differences)))
        refuse_differences(found, differences)
    except CheckpointError as error:
        return replace(report, problems=(str(error),))
    return report


def _terms(report: Report, licence: Licence) -> Report:
    return replace(
        report, licence=licence.name, commercial=licence.commercial, notice=licence.notice
    )


def _ends(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest and the largest, or the only one."""
    return tuple(dict.fromkeys((numbers[0], numbers[-1])))


def _count(number: int) -> str:
    """7.08 billion, 170 million, 1234."""
    for unit, word in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {word}"
    return str(number)
