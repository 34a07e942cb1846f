"""How benchmarks measure: ratios of two programs in one process, never seconds on their own.

Both sides run on the same tensors, interleaved A B B A so that a machine that slows down slows
both, with a fixed number of threads; the shortest and the median time of each are kept. With one
thread the time is the processor time of this process, which a busy machine distorts least; with
more it is wall time, and then the load average beside it says what it is worth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

LARGE = 32 << 20  # where glibc's own threshold ends up in programs with large blocks


@dataclass
class Times:
    """Seconds of every run of one side."""

    seconds: list[float] = field(default_factory=list)

    @property
    def shortest(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(sides: Mapping[str, Callable[[], object]], runs: int = 6) -> dict[str, Times]:
    """Run all sides in turn, forwards and backwards (A B B A), until each has `runs` times or more.

    Do each of them once before. What a side returns is dropped at once.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: Times() for name in sides}
    order = [*sides, *reversed([*sides])]
    _map_blocks_from(LARGE)  # or each large tensor would cost fresh pages
    for _ in range(-(-runs // 2)):
        for name in order:
            start = clock()
            sides[name]()
            times[name].seconds.append(clock() - start)
    return times


def peak_memory(run: Callable[[], object]) -> int | None:
    """How many bytes the peak of this process's resident memory rises while `run` runs.

    It sees everything: tensors, scratch space of the libraries, the heap. Linux only (VmHWM, reset
    first), else None. Do `run` once before, so that code is paged in and caches are filled; measure
    memory before times, because a heap with holes in it hides what is allocated.
    """
    _map_blocks_from(128 * 1024)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present value
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
    except OSError:
        return None
    finally:
        _map_blocks_from(LARGE)
    del result
    return max(peak - before, 0)


def resident_memory() -> int:
    """This process's resident memory now, in bytes, once what was freed has gone back; Linux."""
    _map_blocks_from(128 * 1024)
    return _status("VmRSS")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def keep_freed_memory() -> None:
    """From now on large blocks that were freed are used again, as in any program that runs for a
    while: for times that are taken before `interleave`. Memory is not measured from here on."""
    _map_blocks_from(LARGE)


def _map_blocks_from(size: int) -> None:
    """glibc: return what is free to the system, and from now on, whenever it is freed, every block
    of `size` bytes and more."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        libc.malloc_trim(0)


def difference(ours: torch.Tensor, theirs: torch.Tensor, limit: float) -> float:
    """The largest difference, relative to the range of `theirs`; ends the run if above `limit`."""
    spread = theirs.max() - theirs.min()
    found = float((ours.float() - theirs.float()).abs().max() / spread)
    if not found <= limit:  # not a number is no agreement either
        sys.exit(
            f"The outputs differ by {found:.2g} of their range, at most {limit:.2g} is allowed."
        )
    return found


def arguments(
    description: str | None,
    threads: int = 1,
    tiny: Mapping[str, int | str] | None = None,
    **numbers: int | str,
) -> argparse.Namespace:
    """The command line that all benchmarks share, with more options that are `numbers` or words,
    name and default, which `--tiny` replaces by those of `tiny`. Sets the number of threads as it
    says."""
    _map_blocks_from(128 * 1024)  # until memory has been measured
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    for name, default in numbers.items():
        help = f"default: {default or 'all'}"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)
    parser.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    parser.add_argument("--runs", type=int, default=6, help="counted runs of each side; default: 6")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if tiny is not None:
        help = "a few seconds: shows that it runs and that outputs agree, no figure means anything"
        parser.add_argument("--tiny", action="store_true", help=help)
    args = parser.parse_args()
    if tiny is not None and args.tiny:
        vars(args).update(runs=2, **tiny)
    torch.set_num_threads(args.threads)
    return args


def chosen(words: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `words` name, with commas between them; all for "". Exits on others."""
    names = [word.strip() for word in words.split(",") if word] or [*known]
    if unknown := {*names}.difference(known):
        sys.exit(f"Unknown: {', '.join(unknown)}; there are {'; '.join(known)}.")
    return names


def circumstances() -> dict[str, object]:
    """What has to be known about this machine, now, to read the numbers."""
    threads = torch.get_num_threads()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall time",
        "load average": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def show(
    title: str, rows: Sequence[Mapping[str, object]], as_json: bool, notes: Sequence[str] = ()
) -> None:
    """Print rows (the same keys in each) with the circumstances, as a table or as JSON."""
    around = circumstances()
    if as_json:
        json.dump({"title": title, **around, "rows": list(rows), "notes": list(notes)}, sys.stdout)
        print()
        return
    print(title)
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    lines = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    for note in notes:
        print(note)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
