"""The part of ComfyUI's V3 node interface that our nodes use, for a process without ComfyUI.

`install` puts it into `sys.modules` under ComfyUI's names, in the host's own processes only.
Written from the interface's documented behaviour; it shares no code with ComfyUI.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from ..paths import Folders
from . import io, ui
from .api import ComfyAPI, ComfyAPISync, ComfyExtension, PromptServer
from .folders import folder_paths
from .runtime import CURRENT

__all__ = ["ComfyAPI", "ComfyAPISync", "ComfyExtension", "install", "io", "ui"]


def install(folders: Folders) -> None:
    """Offer this package as `comfy_api`, and `folders` as `folder_paths`, to the imports to come.

    RuntimeError where a real ComfyUI is loaded: its nodes and ours would share one name.
    """
    if "comfy" in sys.modules:
        raise RuntimeError("the embedded host does not run inside a ComfyUI process")
    latest: dict[str, Any] = {
        "ComfyAPI": ComfyAPI, "ComfyAPISync": ComfyAPISync, "ComfyExtension": ComfyExtension,
        "io": io, "IO": io, "ui": ui, "UI": ui,
    }  # fmt: skip
    for name in ("latest", "v0_0_2"):
        module = offer(f"comfy_api.{name}", latest, package=True)
        setattr(offer("comfy_api", {}, package=True), name, module)
    graph = offer("comfy_execution.graph_utils", {"ExecutionBlocker": io.ExecutionBlocker})
    utils = offer("comfy_execution.utils", {"get_executing_context": CURRENT.get})
    offer("comfy_execution", {"graph_utils": graph, "utils": utils}, package=True)
    offer("server", {"PromptServer": PromptServer})
    sys.modules["folder_paths"] = folder_paths(folders)


def offer(name: str, values: dict[str, Any], package: bool = False) -> ModuleType:
    """The module `name` in sys.modules, made when it is missing, with `values` in it."""
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = ModuleType(name)
        # importlib.util.find_spec asks for it.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
        if package:
            module.__path__ = []
    vars(module).update(values)
    return module
