"""ComfyUI after our pack was imported is the ComfyUI from before."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.comfyui

# Runs in ComfyUI's folder: everything a server loads, then the pack, as ComfyUI loads it.
UNTOUCHED = """
import asyncio, importlib.util, logging, os, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.getcwd())
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy.sd, comfy.samplers, comfy.sample, comfy.lora, latent_preview, server, execution
import comfy_api.latest, comfy_execution.utils, comfy_extras.nodes_custom_sampler, transformers
CORE = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "nodes", "execution", "server",
        "folder_paths", "latent_preview", "node_helpers")

def members(thing):
    return {(thing.__name__, name): id(value) for name, value in vars(thing).items()}

def world():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in CORE and module is not None:
            seen.update(members(module))
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__.partition(".")[0] in CORE:
                    inside = members(value).items()
                    seen.update({(name, *k): v for k, v in inside if not k[1].startswith("__")})
    return seen

def loggers():
    every = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return {
        id(l): (l.level, l.disabled, l.propagate, tuple(l.handlers), tuple(l.filters))
        for l in every if isinstance(l, logging.Logger)
    }

before, talk = world(), loggers()
assert len(before) > 10_000
pack = os.environ["PACK"]
spec = importlib.util.spec_from_file_location(pack, os.path.join(pack, "__init__.py"))
module = sys.modules[pack] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
listed = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
assert len(listed) == int(os.environ["NODES"]), listed
for node in listed:
    node.GET_SCHEMA()
after, talked = world(), loggers()
changed = sorted(k for k in before if after.get(k) != before[k])
assert not changed, changed
owners = {key[0] for key in before}
new = sorted(key for key in after if key not in before and key[0] in owners)
assert not new, new
assert {k: talked[k] for k in talk} == talk, "a logger was changed"
print("untouched")
"""


def test_importing_the_pack_changes_nothing_of_comfyui(
    comfyui: Any, root: Path, tmp_path: Path
) -> None:
    """No attribute of its modules and classes, no logger."""
    pack = tmp_path / "seedling-pack"
    pack.symlink_to(root, target_is_directory=True)
    stored = json.loads((root / "tests" / "nodes_schema.json").read_text("utf-8"))
    done = subprocess.run(
        [comfyui.python, "-c", UNTOUCHED],
        cwd=comfyui.folder,
        env={**comfyui.environment, "PACK": str(pack), "NODES": str(len(stored))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("untouched\n")
