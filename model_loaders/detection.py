"""What a checkpoint is, and whether it is all there: told before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .families import FAMILIES
from .family import TITLES, Component, Family, Kind, Layout, Schedule
from .header import printable

if TYPE_CHECKING:
    from torch import nn

LISTED = 10  # names in one message
MAX_TENSORS = 20_000  # ten times the largest model; a hostile header is not built into a module
PLAIN = ("F64", "F32", "F16", "BF16")
# What a config or a constructor raises when a header or its config does not add up.
UNFIT = (
    KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A recognised checkpoint; `checkpoint` has canonical names."""

    family: Family
    component: Component
    layout: Layout
    checkpoint: Checkpoint

    @property
    def title(self) -> str:
        """For sentences: "the VAE of Qwen-Image-2.1"."""
        return f"the {noun(self.component.kind)} of {self.model}"

    @property
    def model(self) -> str:
        """The published model, where the family has several and this is a DiT; else the family."""
        return model_title(self.family, self.checkpoint)


@dataclass(frozen=True)
class Differences:
    """How a file differs from the table of names and shapes of its component, in words."""

    wrong: tuple[str, ...]  # missing, or another shape or kind of number
    unused: tuple[str, ...]  # in the file, but not in the table


def model_title(family: Family, checkpoint: Checkpoint) -> str:
    return family.variants.get(checkpoint.config.get("variant", ""), family.title)


def noun(kind: str) -> str:
    return TITLES[kind].split(" ", 1)[1]


def detect(checkpoint: Checkpoint, variant: str | None = None) -> Found | None:
    """The family and component whose names these are; None for none.

    `variant`: which of its family's models a DiT is, where the user knows better than the file.
    """
    for family in FAMILIES:
        for component in family.components:
            layout = component.layout(checkpoint.names)
            if layout is not None:
                view = checkpoint.view(layout.sources(checkpoint.names))
                found = Found(family, component, layout, view)
                return _settled(found, variant) if component.kind == "dit" else found
    return None


def _settled(found: Found, variant: str | None) -> Found:
    """The same, its config filled with what the family knows of this file."""
    family, checkpoint = found.family, found.checkpoint
    if variant is not None and variant not in family.variants:
        known = f"one of {', '.join(family.variants)}" if family.variants else "no variant"
        raise CheckpointError(
            f"{checkpoint.name} is of the family {family.title}, which has no variant {variant}; "
            f"choose {known}."
        )
    if family.settings is None:
        return found
    config = {**checkpoint.config, **({"variant": variant} if variant else {})}
    checkpoint = replace(checkpoint, config=config)
    try:
        config |= family.settings(checkpoint)
    except UNFIT as error:
        raise _unfit(found, error) from error
    return replace(found, checkpoint=replace(checkpoint, config=config))


def what_fits(kind: Kind) -> str:
    """Which file a slot needs, for the end of a sentence."""
    examples = [c.example for family in FAMILIES if (c := family.component(kind))]
    return f"needed is {TITLES[kind]}, for example {' or '.join(examples)}"


def unknown(checkpoint: Checkpoint) -> str:
    """The beginning of a sentence about a file that no family recognises."""
    names = [printable(name) for name in checkpoint.names]
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{checkpoint.name} is no model that Seedling knows (it holds {some})"


def parameters(names: Mapping[str, TensorInfo]) -> int:
    """Number of parameters, however many bits each has."""
    return sum(info.numel for info in names.values())


def main_dtype(names: Mapping[str, TensorInfo]) -> str:
    """The dtype, as in headers, that most of the elements have; a format's name if quantized."""
    total: dict[str, int] = {}
    for info in names.values():
        total[info.dtype] = total.get(info.dtype, 0) + info.numel
    return max(total, key=lambda dtype: total[dtype]) if total else "F32"


def config_of(found: Found) -> Any:
    """The component's config, read from the header. Raises CheckpointError."""
    count = len(found.checkpoint.names)
    if count > MAX_TENSORS:
        raise _unfit(found, ValueError(f"{count} tensors are more than {MAX_TENSORS}"))
    try:
        return found.component.config(found.checkpoint)
    except CheckpointError:
        raise
    except UNFIT as error:
        raise _unfit(found, error) from error


def schedule_of(found: Found) -> Schedule:
    """How the checkpoint wants to be sampled. Raises CheckpointError for a senseless schedule."""
    try:
        return found.family.schedule(found.checkpoint)
    except UNFIT as error:
        raise _unfit(found, error) from error


def table_of(found: Found, config: Any, operations: Any, dtype: Any = None) -> nn.Module:
    """The component on the meta device: takes no memory; its names and shapes are the table."""
    try:
        return found.component.build(config, operations, "meta", dtype)
    except UNFIT as error:
        raise _unfit(found, error) from error


def _unfit(found: Found, error: Exception) -> CheckpointError:
    if isinstance(error, KeyError):
        what = f"{printable(str(error.args[0]))} is missing"
    else:
        what = printable(str(error).split("\n")[0])
    return CheckpointError(
        f"{found.checkpoint.name} looks like {found.title}, but {what}; a file that fits: "
        f"{found.component.example}."
    )


def compare(found: Found, module: nn.Module) -> Differences:
    """Hold the header against the table. Only header and table are read."""
    names, unused = found.checkpoint.names, set(found.component.unused)
    wrong: list[str] = []
    expected = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    for key, shape in expected.items():
        info = names.get(key)
        if info is None:
            wrong.append(f"{printable(key)}: missing, expected {shape}")
        elif info.shape != shape:
            wrong.append(f"{printable(key)}: found {info.shape}, expected {shape}")
        elif info.dtype not in PLAIN and info.form is None:
            wrong.append(f"{printable(key)}: found {info.dtype}, expected floating-point numbers")
    extra = [printable(key) for key in names if key not in expected and key not in unused]
    return Differences(tuple(wrong), tuple(extra))


def refuse_differences(found: Found, differences: Differences) -> None:
    """Raise CheckpointError with at most ten names and a count, and which file would fit."""
    wrong = differences.wrong
    if not wrong:
        return
    count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong)} tensors differ"
    listed = "\n".join(f"  {line}" for line in wrong[:LISTED])
    more = f"\n  and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    raise CheckpointError(
        f"{found.checkpoint.name} does not fit {found.title}: {count}.\n{listed}{more}\nA file "
        f"that fits: {found.component.example}."
    )


def variant_note(found: Found) -> tuple[str, ...]:
    """Why this is taken for one of its family's published models, and what to do where that is a
    guess: one sentence, or nothing."""
    config = found.checkpoint.config if found.family.settings else {}
    reason, question = config.get("variant_reason"), config.get("variant_question")
    more = f"; {question}" if question else ""
    return (f"Taken for {found.model}: {reason}{more}.",) if reason else ()


def unused_note(differences: Differences) -> tuple[str, ...]:
    """What to tell about tensors that the model does not use: one sentence, or nothing."""
    extra = differences.unused
    if not extra:
        return ()
    some = ", ".join(extra[:LISTED]) + (", ..." if len(extra) > LISTED else "")
    are = "1 tensor is" if len(extra) == 1 else f"{len(extra)} tensors are"
    return (f"{are} not used by this model: {some}.",)
