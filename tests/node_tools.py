"""The nodes over the stand-in of ComfyUI's interface, with the embedded model: for tests of nodes.

From a test: a module fixture with `yield from neighbour("node_tools").nodes(folder)`.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator, Mapping
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
        if node.define_schema().enable_expand:
            return together(self.known, f"Seedling{name}", **{**widgets, **inputs})[0]
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


def together(known: Mapping[str, Any], name: str, **inputs: Any) -> tuple[tuple[Any, ...], str]:
    """What a node returns that unfolds into others, and all that was said. Those run here, too.

    `known`: the nodes by their ids. Core's nodes are left out: they show and save.
    """
    from seedling.host.standin.io import Hidden, HiddenValues
    from seedling.host.standin.runtime import CURRENT, Runtime
    from seedling.host.unfold import Graph, is_link

    wires = {key: ["outside", key] for key, value in inputs.items() if not plain(value)}
    graph = Graph({"set": {"class_type": name, "inputs": {**inputs, **wires}}})
    said: list[str] = []
    folders: Any = None
    token = CURRENT.set(
        Runtime(folders, "set", lambda *_: None, lambda: False, lambda _, text: said.append(text))
    )
    made: dict[str, Any] = {}

    def value(of: Any) -> list[Any]:
        if isinstance(of, list) and of and of[0] == "outside":
            return [inputs[of[1]]]
        return made[of[0]][of[1]] if is_link(of) else [of]

    try:
        cls = type(name, (known[name],), {"hidden": HiddenValues({Hidden.dynprompt: graph})})
        answer = cls.execute(**inputs)
        for node_id, node in answer.expand.items():
            if (kind := known.get(node["class_type"])) is None:
                continue
            given = grown({key: value(of) for key, of in node["inputs"].items()})
            lists = [output.is_output_list for output in kind.define_schema().outputs]
            values = kind.execute(**given).args
            made[node_id] = [v if many else [v] for v, many in zip(values, lists, strict=True)]
    finally:
        CURRENT.reset(token)
    (images, sheets) = (made[wire[0]][wire[1]] for wire in answer.args)
    return (images[0], sheets[0]), "\n".join(said)


def plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) or value is None


def grown(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}."""
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        head, _, tail = key.partition(".")
        if tail:
            found.setdefault(head, {})[tail] = value
        else:
            found[head] = value
    return found
