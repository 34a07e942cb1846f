"""The nodes that there are, core's stand-ins and ours, and what /object_info says of them."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import standin
from .paths import Folders

log = logging.getLogger(__name__)
OURS = __name__.rsplit(".", 2)[0] + ".nodes"


class LibraryError(ValueError):
    """A node that is there twice."""


@dataclass(frozen=True)
class Entry:
    """A node's class, and the module that the page is told."""

    cls: Any
    module: str

    def schema(self) -> Any:
        """The schema as it is now: choices follow the files on disk."""
        return self.cls.GET_SCHEMA()


Library = Mapping[str, Entry]


def load(folders: Folders, entries: Sequence[str] = (OURS,)) -> Library:
    """Import core's stand-ins and the modules named in `entries`; installs the stand-in API.

    `entries` are modules with a `comfy_entrypoint`. LibraryError when two nodes have one id.
    """
    standin.install(folders)
    from .nodes_core import CORE

    found: dict[str, Entry] = {cls.define_schema().node_id: Entry(cls, "nodes") for cls in CORE}
    for name in entries:
        if name == OURS and importlib.util.find_spec(name) is None:
            continue
        pack = "seedling" if name == OURS else name.rpartition(".")[2]
        for cls in classes_of(name):
            identity = cls.define_schema().node_id
            if identity in found:
                raise LibraryError(f"two nodes are called {identity}; node ids must be unique.")
            found[identity] = Entry(cls, f"custom_nodes.{pack}")
    return found


def classes_of(name: str) -> list[Any]:
    """The nodes of a module; none, and a traceback in the log, when it cannot be imported."""
    try:
        return asyncio.run(nodes_of(importlib.import_module(name).comfy_entrypoint))
    except Exception:
        log.exception("the nodes of %s could not be loaded; the studio goes on without them", name)
        return []


async def nodes_of(entrypoint: Any) -> list[Any]:
    """The classes of a pack, as ComfyUI asks for them."""
    extension = entrypoint()
    if asyncio.iscoroutine(extension):
        extension = await extension
    await extension.on_load()
    return await extension.get_node_list()


def object_info(library: Library, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What GET /object_info answers."""
    wanted = library if names is None else [name for name in names if name in library]
    return {name: library[name].schema().info(library[name].module) for name in wanted}
