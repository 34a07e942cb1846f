"""LoRA files: what they hold, which layers they mean, and what is hung onto a loaded network.

Read are the forms that trainers write: LoRA and DoRA (PEFT, diffusers, kohya, ComfyUI), LoKr and
LoHa (LyCORIS), whole differences of weights, biases and norms. Headers are checked first: nothing
is read of a file that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.operations import TORCH
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .families import FAMILIES
from .family import Family
from .header import printable
from .lora_names import Names, Place, Shape, shapes_of
from .lora_parts import Module, bias_delta, part_of, weight_delta

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.lora import Branch
    from .load import Loaded

LISTED = 10  # names in one message
# How names begin -> who writes them so.
STYLES = (
    ("lora_unet_", "kohya"), ("lora_transformer_", "OneTrainer"), ("lora_te", "kohya"),
    ("lycoris_", "LyCORIS"), ("base_model.", "PEFT"), ("diffusion_model.", "ComfyUI"),
    ("model.diffusion_model.", "ComfyUI"), ("transformer.", "diffusers"),
)  # fmt: skip


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as its header tells it: what it holds for each layer, by the file's own names."""

    checkpoint: Checkpoint
    modules: Mapping[str, Module]
    strange: tuple[str, ...]  # tensors that belong to no form of LoRA

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def style(self) -> str:
        """Forms and naming in words: "LoRA, kohya's names"."""
        forms = dict.fromkeys(module.form for module in self.modules.values())
        names = [
            next((style for start, style in STYLES if name.startswith(start)), "plain")
            for name in self.modules
        ]
        most = max(dict.fromkeys(names), key=names.count)
        return f"{' and '.join(forms)}, {most} names"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({m.rank for m in self.modules.values() if m.rank}))


@dataclass(frozen=True)
class Unmatched:
    """The warning that a LoRA has parts for which the network has no place. Show `str` of it."""

    file: str
    names: tuple[str, ...]
    of: int

    def __str__(self) -> str:
        count = f"{len(self.names)} of its {self.of} modules"
        return f"{self.file}: {count} fit nothing here and are left out: {some(self.names)}."


@dataclass(frozen=True)
class Lora:
    """A LoRA for one network: branches by layer, vectors by parameter, for `Adapters.add`."""

    checkpoint: Checkpoint
    branches: Mapping[str, list[Branch]]
    vectors: Mapping[str, Tensor]
    unmatched: Unmatched | None


@dataclass(frozen=True)
class Match:
    """How well a LoRA fits a family; `variant` is the published network whose shapes it has."""

    family: Family
    variant: str | None
    found: int
    unmatched: tuple[str, ...]


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with these names is a LoRA, of whatever model."""
    return any((found := part_of(name)) and found[1] != "alpha" for name in names)


def open_lora(path: Path | str) -> LoraFile:
    """Read and check the header of a LoRA. Raises CheckpointError: one sentence with its name."""
    checkpoint = open_checkpoint(path)
    parts: dict[str, dict[str, str]] = {}
    strange = []
    for name in checkpoint.names:
        if found := part_of(name):
            parts.setdefault(found[0], {})[found[1]] = name
        else:
            strange.append(printable(name))
    modules = {
        name: Module.of(checkpoint, name, own) for name, own in parts.items() if {*own} != {"alpha"}
    }
    if not modules:
        raise CheckpointError(
            f"{checkpoint.name} is no LoRA: it holds {some(strange)}; choose a LoRA in the "
            "safetensors format."
        )
    return LoraFile(checkpoint, modules, tuple(strange))


def load_lora(path: Path | str, loaded: Loaded) -> Lora:
    """What the LoRA at `path` adds to a loaded diffusion model. Raises CheckpointError.

    Tensors are mapped, not copied. Nothing is changed; `quant.lora.Adapters` does that.
    """
    lora = open_lora(path)
    component = loaded.family.component("dit")
    assert component is not None
    names = Names(component, shapes_of(loaded.module))
    places = {name: names.find(name, module.shape) for name, module in lora.modules.items()}
    unmatched = tuple(printable(name) for name, found in places.items() if not found)
    if len(unmatched) == len(places):
        raise _not_for(lora, loaded)
    for name, found in places.items():
        for place in found:
            _check(lora, lora.modules[name], place, names.shapes, loaded)
    branches: dict[str, list[Branch]] = {}
    vectors: dict[str, Tensor] = {}
    for name, found in places.items():
        if found:
            _hang(lora.modules[name], found, names.shapes, branches, vectors)
    left_out = (*unmatched, *lora.strange)
    warning = Unmatched(lora.name, left_out, len(places) + len(lora.strange)) if left_out else None
    return Lora(lora.checkpoint, branches, vectors, warning)


def _check(
    lora: LoraFile, module: Module, place: Place, shapes: Mapping[str, Shape], loaded: Loaded
) -> None:
    """Raise CheckpointError unless the module has the shape of what it is added to."""
    if fits(module, place, shapes):
        return
    needed = " x ".join(map(str, shapes[f"{place.layer}.weight"]))
    match = recognise(lora)
    made = f"it was made for {match.variant}; " if match and match.variant else ""
    raise CheckpointError(
        f"{lora.name} does not fit {loaded.checkpoint.name}: {printable(module.name)} is "
        f"{' x '.join(map(str, module.shape))} (outputs x inputs), the layer is {needed}; {made}"
        f"choose a LoRA for {loaded.family.title} of this size."
    )


def fits(module: Module, place: Place, shapes: Mapping[str, Shape]) -> bool:
    needed = shapes[f"{place.layer}.weight"]
    outputs = place.rows or (0, needed[0])
    start, stop = place.taken or (0, module.shape[0])
    if not (stop <= module.shape[0] and stop - start == outputs[1] - outputs[0]):
        return False
    if module.has_weight:
        return len(module.shape) == len(needed) and module.shape[1:] == needed[1:]
    return len(needed) == 2 or f"{place.layer}.bias" in shapes


def _hang(
    module: Module,
    places: Iterable[Place],
    shapes: Mapping[str, Shape],
    branches: dict[str, list[Branch]],
    vectors: dict[str, Tensor],
) -> None:
    """Read the module's tensors; put what they add under the layers that `places` name."""
    from ..quant.lora import Branch, Shift

    weight, magnitude = weight_delta(module)
    bias = bias_delta(module)
    for place in places:
        taken = slice(*place.taken) if place.taken else slice(None)
        is_linear = len(shapes[f"{place.layer}.weight"]) == 2
        own = branches.setdefault(place.layer, []) if is_linear else []
        if weight is not None and is_linear:
            part = weight.rows(*place.taken) if place.taken else weight
            length = None if magnitude is None else magnitude[taken]
            own.append(Branch(part, place.rows, length))
        elif weight is not None:
            vectors[f"{place.layer}.weight"] = weight.matrix()[taken]
        if bias is not None and is_linear:
            own.append(Branch(Shift(bias[taken]), place.rows))
        elif bias is not None:
            vectors[f"{place.layer}.bias"] = bias[taken]


def _not_for(lora: LoraFile, loaded: Loaded) -> CheckpointError:
    match = recognise(lora)
    if match is None:
        why = f"its layers are called as in no model that Seedling knows ({some(lora.modules)})"
    else:
        why = f"it was made for {match.variant or match.family.title}"
    return CheckpointError(
        f"{lora.name} has nothing for {loaded.checkpoint.name}: {why}; choose a LoRA for "
        f"{loaded.family.title}."
    )


# ---- which family a LoRA is for ----------------------------------------------------------------


def recognise(lora: LoraFile) -> Match | None:
    """The family whose layers a LoRA names, and which of its published networks; None for none."""
    best: Match | None = None
    for family in FAMILIES:
        component = family.component("dit")
        for variant in component.published() if component and component.published else ():
            names = _published(family.name, variant)
            places = {name: names.find(name, m.shape) for name, m in lora.modules.items()}
            found = [name for name, there in places.items() if there]
            fitting = all(
                fits(lora.modules[name], place, names.shapes)
                for name in found
                for place in places[name]
            )
            unmatched = tuple(printable(name) for name, there in places.items() if not there)
            match = Match(family, variant if fitting else None, len(found), unmatched)
            if found and (best is None or _rank(match) > _rank(best)):
                best = match
    return best


def _rank(match: Match) -> tuple[int, bool]:
    return match.found, match.variant is not None


@lru_cache(maxsize=16)
def _published(family: str, variant: str) -> Names:
    """The layers of a published network, from its config alone."""
    component = next(f for f in FAMILIES if f.name == family).component("dit")
    assert component is not None and component.published is not None
    network = component.build(component.published()[variant], TORCH, "meta")
    return Names(component, shapes_of(network))


def some(names: Iterable[str]) -> str:
    """Names from a file for a message: at most ten, and how many more there are."""
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return ", ".join(shown[:LISTED]) + more
