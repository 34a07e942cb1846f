"""What training stages share: a folder, checkpoints that resume, a log, a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


class Run:
    """A stage's `<stage>.pt` (last checkpoint, written whole or not at all) and `<stage>.jsonl`."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage = Path(folder), stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved = time.monotonic()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stage}.pt"

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None on a fresh start."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def save(self, name: str | None = None, **state: Any) -> None:
        path = self.path if name is None else self.folder / f"{name}.pt"
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)
        self.saved = time.monotonic()

    def due(self, minutes: float = 3.0) -> bool:
        """Is it time for another checkpoint?"""
        return time.monotonic() - self.saved > 60 * minutes

    def log(self, **values: Any) -> None:
        with (self.folder / f"{self.stage}.jsonl").open("a") as file:
            file.write(
                json.dumps({"stage": self.stage, "cpu": time.process_time(), **values}) + "\n"
            )


class Budget:
    """Progress in 0..1 through a budget of wall-clock `minutes`, some `spent` in earlier runs."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.minutes, self.before, self.start = minutes, spent, time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + (time.monotonic() - self.start) / 60

    @property
    def progress(self) -> float:
        return min(1.0, self.spent / self.minutes)

    def steps(self, first: int, name: str) -> Iterator[int]:
        """Step numbers until the budget is used up, under a progress bar in minutes."""
        with tqdm(total=self.minutes, initial=self.spent, desc=name, unit="min") as bar:
            step = first
            while self.progress < 1:
                yield step
                step += 1
                bar.update(round(self.spent - bar.n, 3))


def warm_stable_decay(step: int, progress: float, warm: int = 200, decay: float = 0.25) -> float:
    """Factor of the learning rate: warm-up in steps, constant, to zero over the last `decay`."""
    return min(1.0, (step + 1) / warm) * min(1.0, (1 - progress) / decay)


class Average:
    """Exponential moving average of a module's weights that soon forgets the start."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            self.values[key].lerp_(value.to(self.values[key].dtype), 1 - decay)
