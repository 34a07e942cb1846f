"""What a running node may ask of its host: progress, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..paths import Folders


class Interrupted(BaseException):
    """The user cancelled. A BaseException, so that a node's `except Exception` lets it through."""


@dataclass(frozen=True)
class Runtime:
    """The run that a node is part of."""

    folders: Folders
    node_id: str
    progress: Callable[[str, float, float, Any], None]  # node, value, maximum, preview or None
    stopped: Callable[[], bool]
    text: Callable[[str, str], None] = lambda node_id, text: None
    list_index: int = 0  # which call of the node this is, where lists are wired to it

    def check(self) -> None:
        """Raise Interrupted once the run is cancelled."""
        if self.stopped():
            raise Interrupted


# The run of the code that asks: the worker sets it around each call of a node.
CURRENT: ContextVar[Runtime | None] = ContextVar("seedling_run", default=None)
