"""`comfy_api.latest.ui`: what a node hands to the page besides its outputs."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from ..images import png_8_bit, save_batch
from .inputs import FolderType
from .runtime import CURRENT


class SavedResult(dict):
    """A file as the page asks for it."""

    def __init__(self, filename: str, subfolder: str, type: FolderType | str) -> None:
        kind = type.value if isinstance(type, FolderType) else type
        super().__init__(filename=filename, subfolder=subfolder, type=kind)


class SavedImages:
    def __init__(self, results: list[Any], is_animated: bool = False) -> None:
        self.results, self.is_animated = results, is_animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.results} | ({"animated": (True,)} if self.is_animated else {})


def saved(
    images: Any, filename_prefix: str, folder_type: FolderType, cls: Any, **how: Any
) -> list[SavedResult]:
    """Save a batch in the way of `how`, see `save_batch`."""
    runtime = CURRENT.get()
    if runtime is None:
        raise RuntimeError("pictures are saved while a node runs")
    hidden = getattr(cls, "hidden", None)
    recipe: dict[str, Any] = {}
    if hidden is not None:
        recipe = {"prompt": hidden.prompt} if hidden.prompt is not None else {}
        recipe |= hidden.extra_pnginfo or {}
    kind = FolderType(folder_type).value
    root = runtime.folders.of(kind)
    made = save_batch(root, filename_prefix, images, recipe, kind == "output", **how)
    return [SavedResult(name, subfolder, kind) for subfolder, name in made]


class ImageSaveHelper:
    """Saves batches of pictures as PNG files."""

    @staticmethod
    def save_images(
        images: Any,
        filename_prefix: str,
        folder_type: FolderType,
        cls: Any,
        compress_level: int = 4,
    ) -> list[SavedResult]:
        """Save (B, H, W, C) in 0..1; with `cls` the file carries the prompt and the workflow."""
        encode = partial(png_8_bit, compress=compress_level)
        return saved(images, filename_prefix, folder_type, cls, encode=encode)

    @staticmethod
    def get_save_images_ui(
        images: Any, filename_prefix: str, cls: Any, compress_level: int = 4
    ) -> SavedImages:
        return SavedImages(
            ImageSaveHelper.save_images(
                images, filename_prefix, FolderType.output, cls, compress_level
            )
        )


class PreviewImage:
    """Pictures shown on the node, kept until the host ends."""

    def __init__(self, image: Any, animated: bool = False, cls: Any = None, **_: Any) -> None:
        tail = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))
        self.values = ImageSaveHelper.save_images(
            image, f"ComfyUI_temp_{tail}", FolderType.temp, cls, compress_level=1
        )
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (self.animated,)}


class PreviewMask(PreviewImage):
    """A mask (B, H, W) shown as a grey picture."""

    def __init__(self, mask: Any, animated: bool = False, cls: Any = None, **more: Any) -> None:
        grey = mask.reshape(-1, mask.shape[-2], mask.shape[-1], 1).expand(-1, -1, -1, 3)
        super().__init__(grey, animated, cls, **more)


class PreviewText:
    def __init__(self, value: str, **_: Any) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}
