"""ComfyExtension, ComfyAPI and ComfyAPISync as nodes call them."""

from __future__ import annotations

from typing import Any

from .runtime import CURRENT


class ComfyExtension:
    """What `comfy_entrypoint` returns."""

    async def on_load(self) -> None:
        """Called once before the nodes are asked for."""

    async def get_node_list(self) -> list[type]:
        raise NotImplementedError


def set_progress(
    value: float,
    max_value: float,
    node_id: str | None = None,
    preview_image: Any = None,
    ignore_size_limit: bool = False,
) -> None:
    """Show how far a node is, with a picture if there is one; raises Interrupted when cancelled.

    `preview_image`: a Pillow image, or a tensor (H, W, C) or (1, H, W, C) in 0..1. Outside a run
    nothing happens. `ignore_size_limit` is ComfyUI's; previews here keep the size they come in.
    """
    runtime = CURRENT.get()
    if runtime is None:
        return
    runtime.check()
    runtime.progress(node_id or runtime.node_id, value, max_value, preview_image)


class ExecutionSync:
    """`ComfyAPISync().execution`."""

    set_progress = staticmethod(set_progress)


class Execution:
    """`ComfyAPI().execution`."""

    async def set_progress(self, *arguments: Any, **options: Any) -> None:
        """As the plain `set_progress`."""
        set_progress(*arguments, **options)


class ComfyAPISync:
    def __init__(self) -> None:
        self.execution = ExecutionSync()


class ComfyAPI:
    def __init__(self) -> None:
        self.execution = Execution()


class Speaker:
    """`PromptServer.instance`, as far as a node may talk to the page."""

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        """Show a text on a node. Outside a run nothing happens."""
        if runtime := CURRENT.get():
            runtime.text(str(node_id), str(text))


class PromptServer:
    instance = Speaker()
