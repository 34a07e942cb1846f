"""What is kept of prompts and references from run to run. It lives where the network lives: with a
MODEL, CLIP or VAE goes what was computed by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..model_loaders.family import read_once
from ..model_loaders.load import Loaded
from ..sampling.prefix_store import PrefixStore


def cache_input() -> Any:
    return io.String.Input(
        "cache",
        default="auto",
        optional=True,
        advanced=True,
        tooltip="How much memory what the model reads of prompts and references may take from run "
        "to run: auto, off, or a size such as 6GB. :host keeps it in the computer's memory between "
        "runs, :int8 and :int4 round it, and the node shows the error. Example: 6GB:int8.",
    )


def store_of(loaded: Loaded) -> PrefixStore:
    """What this network has computed, and may compute again."""
    store = getattr(loaded.module, "prefix_store", None)
    if store is None:
        store = loaded.module.prefix_store = PrefixStore()
    return store


def use(loaded: Loaded | None, cache: str) -> PrefixStore | None:
    """The store with the settings of a `cache` input; what is rounded otherwise is forgotten."""
    if loaded is None:
        return None
    wanted, store = PrefixStore.of(cache), store_of(loaded)
    if (wanted.precision, wanted.place) != (store.precision, store.place):
        loaded.module.prefix_store = store = wanted
    store.budget = wanted.budget
    store.counts.clear()
    return store


def read(loaded: Loaded, prompt: str, images: Sequence[Tensor], how: Mapping[str, Any]) -> Any:
    """What a text encoder of ours makes of a prompt: only what it has not read before."""
    store = store_of(loaded)
    try:
        with store.reading():
            if getattr(loaded.module, "stores", False):
                return loaded.module.encode(prompt, images, store=store, **how)
            return read_once(store, loaded.module, prompt, images, **how)
    finally:
        store.trim()


def encoded(vae: Loaded | None, image: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Latents of a picture that `compute` makes, once."""
    if vae is None:
        return compute(image)
    store = store_of(vae)
    latents = store.recall("latents", vae.module, (image,), partial(compute, image))
    store.trim()
    return latents


def told(*parts: Loaded | None) -> str:
    """What was known before, of each kind, and how much is kept: a line for the node."""
    lines = [store_of(part).report() for part in parts if part is not None]
    return "; ".join(line for line in lines if line)
