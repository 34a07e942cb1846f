"""`seedling generate --set`: pictures that belong together, each a file as soon as it is done.

In a sequence every finished picture becomes a reference of the next. It is read back from its file,
so that the recipe in the next one names everything that it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..sampling.noise import image_seed
from ..sampling.pipeline import Plan, Task
from ..sampling.sets import SEEING, plan_set
from .pictures import PictureFile, read_picture

if TYPE_CHECKING:
    from .generate import Order

__all__ = ["SEEING", "Series"]


class Series:
    """A set that is being made. `files` are its finished pictures that later ones see."""

    def __init__(self, order: Order, prompts: Sequence[str]) -> None:
        self.plan = plan_set(
            "\n".join(prompts),
            0 if order.count == 1 else order.count,
            order.series or SEEING[0],
            references=len(order.references),
            start=len(order.earlier),
        )
        self.files: tuple[PictureFile, ...] = ()
        for path in order.earlier:
            self.add(path)

    @property
    def left(self) -> int:
        """Pictures that are still to be made."""
        return len(self.plan) - self.plan.start

    def orders(self, wanted: Order) -> list[Order]:
        """An order for each of them; picture k has the seed of `wanted` + k."""
        assert wanted.seed is not None
        return [
            replace(wanted, prompts=(prompt,), seed=image_seed(wanted.seed, k), count=1)
            for k, prompt in enumerate(self.plan.prompts)
            if k >= self.plan.start
        ]

    def seen(self, task: Task, plan: Plan) -> Task:
        """The task with what it sees of the set, in the size that was planned without it."""
        shown = tuple(file.pixels for file in self.files)
        return replace(task, references=(*task.references, *shown), size=plan.size)

    def add(self, path: Path) -> None:
        """A picture of the set is finished."""
        if self.plan.sequential:
            self.files = (*self.files, read_picture(path))
