"""`seedling generate --region`: a part of a picture is edited, the rest keeps its bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model_loaders.pictures import read_16_bit
from ..sampling.composite import Where, refuse_empty
from ..sampling.pipeline import Pipeline, Task
from ..sampling.preservation import grey, preservation
from . import recipe
from .pictures import PictureError, PictureFile, read_picture
from .recipe import Recipe


class EditError(ValueError):
    """An edit that cannot be made; the message says what to change."""


@dataclass(frozen=True)
class Places:
    """What the user said of the region: boxes, points and a mask. None: nothing."""

    boxes: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    mask: Path | None = None
    grow: int | None = None
    feather: int | None = None
    context: int | None = None

    @property
    def placed(self) -> bool:
        return bool(self.boxes or self.points or self.mask)

    @property
    def widths(self) -> dict[str, int]:
        """Those that were said."""
        given = {"grow": self.grow, "feather": self.feather, "context": self.context}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Editing:
    """The edit of an `original` (H, W, 3 or 4) in its `region` (H, W), and where it came from.

    `deep`: the original has more than 8 bits, and so has what is saved.
    """

    original: Tensor
    region: Tensor
    where: Where
    mask: PictureFile | None
    deep: bool

    def tasks(self, tasks: Sequence[Task], pipeline: Pipeline) -> list[Task]:
        """The tasks with their first reference edited."""
        side = pipeline.dit.checkpoint.config.get("resolution", 1024)
        edit = self.where.edit(self.original, self.region, pipeline.family.step, side)
        seen = edit.seen()
        return [
            replace(task, references=(seen, *task.references[1:]), size=None, edit=edit)
            for task in tasks
        ]

    def report(self, saved: Path) -> str:
        """What the file that was saved has kept of the original, in one line."""
        if bool((self.region > 0).all()):
            return "The region is the whole picture: nothing was to be kept."
        found = preservation(read_deep(saved)[0].pixels, self.original, self.region)
        words = found.text().replace("\n", "; ")
        if found.psnr == float("inf"):
            words = "every pixel is the original's, bit for bit"
        return f"Outside of the region, {found.kept:.1%} of the picture: {words}."


def editing_of(order: Any, old: Recipe | None, files: Sequence[PictureFile]) -> Editing | None:
    """The edit that an `Order` asks for, or that the repeated picture had; None for none.

    Everything is checked that can be without a model. Raises EditError, SamplingError.
    """
    places: Places = order.places
    where, mask = old.edit if old else None, None
    if places.placed:
        known = {name: getattr(where, name) for name in ("grow", "feather", "context") if where}
        text = {"boxes": "; ".join(places.boxes), "points": "; ".join(places.points)}
        where = Where(**text, **{**known, **places.widths})
        mask = read_picture(places.mask) if places.mask else None
    elif where is not None:
        where = replace(where, **places.widths)
        mask = recipe.find_mask(old, order.repeat) if old else None
    elif places.widths:
        name = next(iter(places.widths))
        raise EditError(f"--{name} goes with --region, --point or --mask; say where, too.")
    if where is None:
        return None
    if order.series:
        raise EditError("an edit of a region is no --set; leave out --set, or what says where.")
    if order.size:
        raise EditError("an edited picture is as large as the original; leave out --size.")
    if not files:
        raise EditError(
            "there is no picture whose region could be edited; give it with --reference."
        )
    original, deep = read_deep(files[0].path)
    region = where.region(original.pixels, None if mask is None else white(mask.pixels))
    assert region is not None
    refuse_empty(region)
    return Editing(original.pixels, region, where, mask, deep)


def white(mask: Tensor) -> Tensor:
    """How white a picture (H, W, 3 or 4) is; what is transparent is black."""
    shown = grey(mask[..., :3])
    return shown * mask[..., 3] if mask.shape[-1] == 4 else shown


def read_deep(path: Path) -> tuple[PictureFile, bool]:
    """As `read_picture`, with all bits of a 16-bit PNG; and whether there are more than 8."""
    found = read_picture(path)
    try:
        pixels = read_16_bit(path)
    except OSError as error:
        raise PictureError(f"{path} cannot be edited: {error}") from error
    if pixels is not None:
        return replace(found, pixels=pixels), True
    rounded = (found.pixels * 255).round() / 255
    return found, not bool((rounded == found.pixels).all())
