"""Results by what they were made from: a node whose inputs did not change does not run again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .standin.io import Hidden
from .validate import is_link

DEEPEST = 6  # levels of a result that are searched for tensors
MOST_RESULTS = 2000


@dataclass
class Result:
    """What a node made: per output the list of its items, and what the page was shown."""

    outputs: list[list[Any]]
    ui: dict[str, Any] | None
    size: int = 0
    used: int = 0  # number of the run that used it last
    answers: list[Any] = field(default_factory=list)  # of a node that unfolds into others


class Cache:
    """Results of earlier runs; those that the last run did not use go first, when `budget` is full.

    A model that the last run did not use goes at once: two of them seldom fit.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.results: dict[str, Result] = {}  # in the order of their last use
        self.models: set[str] = set()  # the keys of results that hold a model
        self.bytes = 0
        self.run = 0

    def start(self) -> None:
        self.run += 1

    def get(self, key: str) -> Result | None:
        result = self.results.pop(key, None)
        if result:
            result.used = self.run
            self.results[key] = result
        return result

    def put(self, key: str, result: Result) -> None:
        self.drop(key)
        result.size, result.used = size_of(result.outputs), self.run
        self.results[key] = result
        self.bytes += result.size
        if holds_model(result.outputs):
            self.models.add(key)

    def drop(self, key: str) -> None:
        result = self.results.pop(key, None)
        self.bytes -= result.size if result else 0
        self.models.discard(key)

    def trim(self) -> None:
        """After a run: forget what it did not use, the oldest first, down to the budget.

        It looks at what goes only: thousands of results may stay.
        """
        for key in [key for key in self.models if self.results[key].used < self.run]:
            self.drop(key)
        while self.results and (self.bytes > self.budget or len(self.results) > MOST_RESULTS):
            oldest = next(iter(self.results))
            if self.results[oldest].used == self.run:
                return
            self.drop(oldest)

    def clear(self) -> None:
        self.results.clear()
        self.models.clear()
        self.bytes = 0


def walk(value: Any) -> Iterable[Any]:
    """A value and what is inside its containers and objects, a few levels deep."""
    level, seen = [value], set()
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if id(item) in seen or isinstance(item, str | int | float | bool | bytes | None):
                continue
            seen.add(id(item))
            yield item
            if isinstance(item, Mapping):
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
            elif hasattr(item, "module"):
                below.append(item.module)
        level = below


def size_of(value: Any) -> int:
    """Bytes of the tensors in a value."""
    return sum(
        item.nbytes for item in walk(value) if isinstance(getattr(item, "nbytes", None), int)
    )


def holds_model(value: Any) -> bool:
    """Whether a network is in a value, itself or behind `module`."""
    return any(hasattr(item, "parameters") or hasattr(item, "module") for item in walk(value))


def fingerprint(cls: Any, constants: Mapping[str, Any]) -> Any:
    """What `fingerprint_inputs` says; NaN, which equals nothing, when the node must always run."""
    ask = getattr(cls, "fingerprint_inputs", None)
    if ask is None:
        return None
    try:
        answer = ask(**constants)
    except Exception:  # noqa: BLE001  a node's own code: whatever it raises, the node runs again
        return math.nan
    return answer


def keys(
    prompt: Mapping[str, Any],
    order: Iterable[str],
    schemas: Mapping[str, Any],
    constants: Any,
    run: int,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The cache key of each node of `order`, which lists a node behind all that it needs.

    A key says the node's type, its constants, what its fingerprint says, and the keys of what is
    wired to it; its id only where the node asked for it. `constants(node_id)`: class and values.
    `known` are keys that were computed before.
    """
    found = dict(known or {})
    for node_id in order:
        node = prompt[node_id]
        schema = schemas[node["class_type"]]
        inputs = [
            [name, "wire", found[value[0]], value[1]] if is_link(value) else [name, "is", value]
            for name, value in sorted(node["inputs"].items())
        ]
        changed = fingerprint(*constants(node_id))
        if isinstance(changed, float) and math.isnan(changed):
            changed = ["always", run, node_id]
        own = schema.not_idempotent or Hidden.unique_id in schema.hidden
        parts = [node["class_type"], repr(changed), inputs, node_id if own else None]
        found[node_id] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return found
