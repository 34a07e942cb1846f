"""How much of a card's memory weights may take: what was typed, and what fits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..sampling import SamplingError
from ..sampling.prefix_memory import free_memory, read_size

# Of what is free: the rest is for activations, the prefix and the decoder.
SHARE = 0.75


def vram_of(words: str, device: torch.device, files: Iterable[Path]) -> int | None:
    """Bytes of weights that may lie on `device`; None: all of them.

    "auto" is all of them where the files are smaller than three quarters of what is free, else
    that; "all"; or a size such as "6GB". Raises SamplingError for anything else, and for a size
    where the device is no card.
    """
    word = words.strip().lower()
    if word == "all" or (word == "auto" and device.type != "cuda"):
        return None
    if word == "auto":
        limit = int(SHARE * free_memory(device))
        return None if sum(map(size_of, files)) <= limit else limit
    try:
        size = read_size(word)
    except SamplingError:
        size = 0
    if not size:
        raise SamplingError(f"--vram is '{words}'; write auto, all, or a size such as 6GB.")
    if device.type != "cuda":
        raise SamplingError(
            f"--vram {words} is for an NVIDIA card, and this runs on {device.type}; leave it out."
        )
    return size


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
