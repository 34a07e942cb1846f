"""ComfyUI loads this folder as a custom node; pip installs the same folder as `seedling`."""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

# Only inside ComfyUI. Asked for, not tried: a node that fails to import must show its traceback.
if find_spec("comfy_api"):
    from .nodes import comfy_entrypoint as comfy_entrypoint
