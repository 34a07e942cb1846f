"""`seedling generate --set`: pictures that belong together, each a file as soon as it is done.

In a sequence every finished picture becomes a reference of the next. It is read back from its file,
so that the recipe in the next one names everything that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..sampling.pipeline import Plan, Task
from ..sampling.sets import FAILURES, SEEING, Failure, SetPlan, plan_set
from .pictures import PictureFile, read_picture

if TYPE_CHECKING:
    from .generate import Order

__all__ = ["SEEING", "Series"]

T = TypeVar("T")


class Series:
    """A set that is being made. `files` are its finished pictures that later ones see."""

    def __init__(self, order: Order, prompts: Sequence[str]) -> None:
        self.text = "\n".join(prompts)
        self.plan = self._plan(order, 0)
        self.files: tuple[PictureFile, ...] = ()
        self.failed: list[Exception] = []
        self.begun = self.plan.start
        for path in order.earlier:
            self.add(path)

    def _plan(self, order: Order, seed: int) -> SetPlan:
        return plan_set(
            self.text,
            order.count,
            order.series or SEEING[0],
            seed=seed,
            same_seed=order.same_seed,
            references=len(order.references),
            start=len(order.earlier),
        )

    @property
    def left(self) -> int:
        """Pictures that are still to be made."""
        return len(self.plan) - self.plan.start

    def orders(self, wanted: Order) -> list[Order]:
        """An order for each of them, or one for all that are painted at once."""
        assert wanted.seed is not None
        self.plan = self._plan(wanted, wanted.seed)
        each = zip(self.plan.prompts, self.plan.seeds, strict=True)
        orders = [replace(wanted, prompts=(prompt,), seed=seed, count=1) for prompt, seed in each]
        return orders[:1] if self.plan.together else orders[self.plan.start :]

    def seen(self, task: Task, plan: Plan) -> Task:
        """The task with what it sees of the set, in the size that was planned without it."""
        shown = tuple(file.pixels for file in self.files)
        return replace(task, references=(*task.references, *shown), size=plan.size)

    def without_failures(self, made: Iterator[T], say: Callable[[str], None]) -> Iterator[T]:
        """What is made of one order. Of independent pictures one that fails is told, and noted."""
        self.begun += 1
        try:
            yield from made
        except FAILURES as error:
            if self.plan.seeing != SEEING[0]:
                raise
            self.failed.append(error)
            say(f"{Failure(self.begun - 1, error).text} The others go on.")

    def add(self, path: Path) -> None:
        """A picture of the set is finished."""
        if self.plan.sequential:
            self.files = (*self.files, read_picture(path))
