"""Which layer is stored in which way: the least damage for a budget of bytes, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

PLAIN = "16 bits"
FORMAT = 1


class PlanError(ValueError):
    """A plan or a budget that cannot be followed. The message says why."""


@dataclass(frozen=True)
class Option:
    """A way to store one weight: its bytes, and what it does to the layer's output.

    `error` is the squared error of the output over the squared output, on the calibration's inputs;
    `damage` is the same of the latents of whole pictures, with this weight alone stored so.
    """

    bytes: int
    error: float
    damage: float


@dataclass(frozen=True)
class Entry:
    """One weight of the file: what was chosen for it, and everything that was measured."""

    choice: str
    weights: int
    options: Mapping[str, Option]

    @property
    def chosen(self) -> Option:
        return self.options[self.choice]


def choose(
    options: Mapping[str, Mapping[str, Option]],
    weights: Mapping[str, int],
    budget: float = math.inf,
    damage: float = 0.0,
) -> dict[str, Entry]:
    """A choice for each weight, within `budget` bytes, whose damages add up to the least; or the
    fewest bytes whose damages add up to at most `damage`.

    From the smallest of each, always the step is taken that saves most damage for its bytes, along
    the convex hull of each weight's options. Raises PlanError for a budget that is too small.
    """
    hulls = {name: _hull(own) for name, own in options.items()}
    place = dict.fromkeys(hulls, 0)
    spent = sum(options[name][hull[0]].bytes for name, hull in hulls.items())
    if spent > budget:
        total = sum(weights.values())
        raise PlanError(
            f"{8 * budget / total:.3g} bits for each weight are too few; the least that these "
            f"layers can be stored in is {8 * spent / total:.3g}."
        )
    steps = sorted(
        (
            (_slope(options[name][low], options[name][high]), name, i)
            for name, hull in hulls.items()
            for i, (low, high) in enumerate(zip(hull, hull[1:], strict=False))
        ),
        key=lambda step: -step[0],
    )
    left = sum(options[name][hull[0]].damage for name, hull in hulls.items())
    for _, name, i in steps:
        low, high = (options[name][hulls[name][k]] for k in (i, i + 1))
        if left <= damage:
            break
        if place[name] == i and spent + high.bytes - low.bytes <= budget:
            place[name], spent = i + 1, spent + high.bytes - low.bytes
            left -= low.damage - high.damage
    return {
        name: Entry(hulls[name][place[name]], weights[name], own) for name, own in options.items()
    }


def _slope(low: Option, high: Option) -> float:
    return (low.damage - high.damage) / (high.bytes - low.bytes)


def _hull(options: Mapping[str, Option]) -> list[str]:
    """The options worth taking, by bytes: each saves less for its bytes than the one before."""
    hull: list[str] = []
    for name in sorted(options, key=lambda n: (options[n].bytes, options[n].damage)):
        option = options[name]
        if hull and option.damage >= options[hull[-1]].damage:
            continue
        while len(hull) > 1 and _slope(options[hull[-1]], option) >= _slope(
            options[hull[-2]], options[hull[-1]]
        ):
            hull.pop()
        if hull and options[hull[-1]].bytes == option.bytes:
            hull.pop()
        hull.append(name)
    return hull


def save_plan(entries: Mapping[str, Entry], path: Path) -> None:
    content = {"format": FORMAT, "layers": {name: asdict(e) for name, e in entries.items()}}
    path.write_text(json.dumps(content, indent=1), "utf-8")


def read_plan(path: Path) -> dict[str, str]:
    """Weight -> choice, from a plan that `save_plan` wrote and a user may have edited."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise PlanError(f"{path} has the format {content['format']}, readable is {FORMAT}.")
        return {str(name): str(entry["choice"]) for name, entry in content["layers"].items()}
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{path} is no plan of `seedling quantize`: {error!r}.") from error
