"""The nodes over the stand-in of ComfyUI's interface, with the embedded model: for tests of nodes.

From a test: a module fixture with `yield from neighbour("node_tools").nodes(folder)`.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("comfy_api", "comfy_execution", "folder_paths", "server", "seedling.nodes")
EMBEDDED = "seedling-tiny (embedded)"
KNOBS = {"steps": 0, "guidance": 0.0, "sampler": "euler"}


def borrowed() -> dict[str, ModuleType]:
    """The modules that the stand-in brings or takes the place of."""
    begins = tuple(f"{name}." for name in OURS)
    return {n: m for n, m in sys.modules.items() if n in OURS or n.startswith(begins)}


class Nodes:
    """The nodes by their ids, and the model that ships with the pack."""

    def __init__(self, package: Any, folder: Path) -> None:
        extension = asyncio.run(package.comfy_entrypoint())
        self.known = {n.__name__: n for n in asyncio.run(extension.get_node_list())}
        self.folder = folder  # of input pictures

    def __call__(self, name: str, **inputs: Any) -> tuple[Any, ...]:
        """What the node `Seedling<name>` returns, widgets that are not given as they are."""
        node = self.known[f"Seedling{name}"]
        widgets = {i.id: i.options.get("default") for i in node.define_schema().inputs if i.widget}
        return node.execute(**{**widgets, **inputs}).args

    def loaded(self) -> dict[str, Any]:
        """The embedded model: model, clip, vae."""
        (model,) = self("LoadDiT", dit=EMBEDDED, precision="as stored")
        (clip,) = self("LoadEncoder", encoder=EMBEDDED, precision="as stored")
        (vae,) = self("LoadVAE", vae=EMBEDDED, precision="as stored")
        return {"model": model, "clip": clip, "vae": vae}


@contextmanager
def package(folder: Path) -> Iterator[tuple[Any, Path]]:
    """seedling.nodes over the stand-in, and the folder of input pictures; then all is as before."""
    from seedling.host.paths import Folders
    from seedling.host.standin import install

    before = borrowed()
    for name in before:
        del sys.modules[name]
    folders = Folders(folder)
    folders.make()
    install(folders)
    yield importlib.import_module("seedling.nodes"), folders.of("input")
    for name in borrowed():
        del sys.modules[name]
    sys.modules.update(before)


def nodes(folder: Path) -> Iterator[Nodes]:
    """The nodes while the generator waits."""
    with package(folder) as (pack, inputs):
        yield Nodes(pack, inputs)
