"""How much memory is free, and sizes as people write them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

from . import SamplingError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
UNKNOWN = 4 << 30  # where a system does not tell


def read_size(words: int | str) -> int:
    """Bytes of "6 GB", "512 MiB", "off" or a number; SamplingError for anything else."""
    if isinstance(words, int) and words >= 0:
        return words
    if str(words).strip().lower() == "off":
        return 0
    found = SIZE.fullmatch(str(words).strip())
    if not found:
        raise SamplingError(
            f"the budget of the prefix store is '{words}'; write auto, off, or a size such as 6 GB."
        )
    base = 1024 if found[3] else 1000
    powers = {1: 0, 10**3: 1, 10**6: 2, 10**9: 3, 10**12: 4}
    return int(float(found[1]) * base ** powers[UNITS[found[2].lower()]])


def size_words(size: int) -> str:
    """Bytes for people: "512 MB"."""
    power = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`, and in what torch holds of it."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return UNKNOWN
