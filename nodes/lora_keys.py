"""The names under which ComfyUI's LoRA loaders find the layers of our DiT.

Core asks a model's `state_dict` for names and gives patches by these names to its patcher. Ours
answers with the names in the model's file too (BFL's, fused layers), and the patcher, which is of a
class of ours, hands patches on to the layers that those became.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..model_loaders.checkpoint import CheckpointError
from ..model_loaders.load import Loaded
from ..model_loaders.lora_names import bare

PREFIX = "diffusion_model."  # of our DiT in core's model
DORA = {"lora": 4, "loha": 7, "lokr": 8}  # where core's adapters keep the scales of a DoRA


@dataclass(frozen=True)
class Whole:
    """A published weight (out, in): the parameters that it became, and which rows (None: all)."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, int] | None], ...]


def published(loaded: Loaded) -> dict[str, Whole]:
    """The weights of the DiT's file that our network calls otherwise, by core's names for them."""
    parts: dict[str, list[tuple[str, tuple[int, int] | None]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in loaded.checkpoint.names.items():
        *_, key = bare(info.key)
        if key == name or not key.endswith(".weight"):
            continue
        stop = info.rows[1] if info.rows else info.shape[0]
        rows = max(stop, *shapes.get(key, (0,))[:1])
        parts.setdefault(key, []).append((PREFIX + name, info.rows))
        shapes[key] = (rows, *info.shape[1:])
    return {PREFIX + key: Whole(shapes[key], tuple(own)) for key, own in parts.items()}


class Named(OrderedDict):
    """A state dict that also answers to published names, though it counts only its own tensors."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, Whole]) -> None:
        super().__init__(tensors)
        self.names = names

    def keys(self) -> Any:
        return [*super().keys(), *self.names]

    def __missing__(self, name: str) -> Any:
        """The published weight, put together again."""
        if name not in self.names:
            raise KeyError(name)
        tensors = [self[key] for key, _ in self.names[name].parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def pop(self, key: str, default: Any = None) -> Any:
        return super().pop(key, default)  # core takes out what it saw in `keys`


def renaming(patcher: Any, adapter: Any) -> Any:
    """A class of `patcher` that takes patches by published names too, and hands them on.

    `adapter` is the class of core's adapters. The model has the published names in `published`.
    """

    class Rows(adapter):
        """Some rows of what another adapter adds to a weight of `shape`."""

        name = "rows"

        def __init__(self, whole: Any, shape: tuple[int, ...], rows: slice) -> None:
            self.whole, self.shape, self.rows = whole, shape, rows
            self.loaded_keys, self.weights = whole.loaded_keys, whole.weights

        def calculate_weight(self, weight: Any, *args: Any, **more: Any) -> Any:
            """weight (rows, in), in place; the other arguments are core's."""
            added = self.whole.calculate_weight(weight.new_zeros(self.shape), *args, **more)
            return weight.add_(added[self.rows])

    def part(patch: Any, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Any:
        if rows is None:
            return patch
        if isinstance(patch, tuple):  # ("diff", (tensor,))
            return patch[0], tuple(t[slice(*rows)] for t in patch[1])
        if patch.weights[DORA.get(patch.name, -1)] is not None:
            raise CheckpointError(
                "This LoRA is a DoRA of fused layers, which ComfyUI's loader cannot split; run it "
                "with `seedling generate --lora`, or use one without DoRA."
            )
        return Rows(patch, shape, slice(*rows))

    class Renaming(patcher):
        def add_patches(self, patches: Any, *args: Any, **more: Any) -> list[Any]:
            add = super().add_patches
            return self.renamed(patches, lambda own: add(own, *args, **more))

        def add_hook_patches(self, hook: Any, patches: Any, *args: Any, **more: Any) -> list[Any]:
            add = super().add_hook_patches
            return self.renamed(patches, lambda own: add(hook, own, *args, **more))

        def renamed(self, patches: dict[Any, Any], add: Any) -> list[Any]:
            """`add` the patches under our names; the given names of those that it took."""
            names: dict[str, Whole] = self.model.published
            taken = list(add({name: patch for name, patch in patches.items() if name not in names}))
            given = {name: names[name] for name in patches if name in names}
            ours = {
                key: part(patches[name], whole.shape, rows)
                for name, whole in given.items()
                for key, rows in whole.parts
            }
            done = set(add(ours)) if ours else set()
            return taken + [n for n, whole in given.items() if done.issuperset(dict(whole.parts))]

    return Renaming
