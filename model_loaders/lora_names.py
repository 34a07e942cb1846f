"""Which layers of a network the names in a LoRA file mean.

Trainers name layers as one of the published layouts does, put a prefix in front and, some of them,
glue the words with underscores. The layouts of a family say where a published tensor goes; that is
all that is needed here, so a family writes no code for LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, TensorInfo
from .family import Component

Shape = tuple[int, ...]
Rows = tuple[int, int]

# In front of a layer's name, one after the other: PEFT, diffusers, ComfyUI, older trainers.
PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.",
    "model.", "dit.", "pipe.",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "lora_",
)  # fmt: skip
LEAVES = ("weight", "scale")  # what a layer's main tensor is called
GAPS = 11  # more words than that no layer's name has; each gap doubles the work


@dataclass(frozen=True)
class Place:
    """A layer, and which of its outputs (None: all) get which outputs of the LoRA (None: all)."""

    layer: str
    rows: Rows | None = None
    taken: Rows | None = None


def shapes_of(network: Any) -> dict[str, Shape]:
    """The shape of every parameter; a linear layer's weight as (out, in), however it is stored."""
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    for name, layer in network.named_modules():
        if hasattr(layer, "in_features"):
            shapes[f"{name}.weight"] = (layer.out_features, layer.in_features)
    return shapes


class Names:
    """Finds layers of one network by the names that LoRA files give them."""

    def __init__(self, component: Component, shapes: Mapping[str, Shape]) -> None:
        self.layouts, self.shapes = component.layouts, shapes
        main = {name.rpartition(".")[0]: shape for name, shape in shapes.items()
                if name.endswith(".weight")}  # fmt: skip
        self.places = {layer: Place(layer) for layer in main}
        for layer, shape in main.items():  # what the network fuses, files may hold in parts
            for part in self._published(layer, shape):
                self.places.setdefault(part.layer, Place(layer, rows=part.taken))
        self.glued = {layer.replace(".", "_"): layer for layer in self.places}
        self._separators: dict[str, list[Sequence[str]]] = {}  # those that fit, by pattern

    def find(self, name: str, shape: Shape) -> list[Place]:
        """Where a LoRA of weights of `shape` called `name` goes; empty for nowhere."""
        for candidate in bare(name):
            for tail in ("", "0"):  # of a list with one entry
                places = self._dotted(f"{candidate}.{tail}".rstrip("."), shape)
                if not places and "." not in candidate:
                    places = self._underscored(f"{candidate}_{tail}".rstrip("_"), shape)
                if places:
                    return places
        return []

    def _dotted(self, name: str, shape: Shape) -> list[Place]:
        if name in self.places:
            return [self.places[name]]
        parts = self._published(name, shape)
        return [
            Place(self.places[part.layer].layer, self.places[part.layer].rows, part.taken)
            for part in parts
            if part.layer in self.places
        ]

    def _published(self, name: str, shape: Shape) -> list[Place]:
        """The layers that are made of the published tensor `name`, by the first layout with it."""
        for layout, leaf in product(self.layouts, LEAVES):
            published = f"{name}.{leaf}"
            info = TensorInfo("F32", shape, Path(), published, 0, 0, shape)
            try:
                sources = layout.sources({published: info})
            except (KeyError, IndexError, ValueError, TypeError, CheckpointError):
                continue  # a layout that cannot do with one tensor does not know this one
            places = [
                Place(key.rpartition(".")[0], taken=source.rows)
                for key, source in sources.items()
                if source.name == published and key != published
            ]
            if places:
                return places
        return []

    def _underscored(self, name: str, shape: Shape) -> list[Place]:
        if name in self.glued:
            return [self.places[self.glued[name]]]
        words = name.split("_")
        pattern = re.sub(r"\d+", "#", name)  # what fits one block fits all, and so does nothing
        known = self._separators.get(pattern)
        for separators in _ways(words) if known is None else known:
            dotted = "".join(w + s for w, s in zip(words, (*separators, ""), strict=True))
            places = self._dotted(dotted, shape)
            if places:
                self._separators[pattern] = [separators]
                return places
        self._separators.setdefault(pattern, [])
        return []


def bare(name: str) -> Iterator[str]:
    """The name, and what remains of it without one prefix after the other."""
    name = name.replace(".processor.", ".")
    found = True
    while found:
        yield name
        found = next((p for p in PREFIXES if name.startswith(p)), None)
        name = name.removeprefix(found or "")


def _ways(words: Sequence[str]) -> Iterator[Sequence[str]]:
    """All ways to join words with dots and underscores; a layer's number stands between dots."""
    gaps = range(1, len(words))
    choices = ["." if words[i - 1].isdigit() else "._" for i in gaps]
    return iter(()) if len(words) > GAPS + 1 else product(*choices)
