"""Stand-ins for the core nodes that our workflows use: core's ids, inputs and results.

Here are those for pictures and values; `nodes_model.py` has those that call a network. IMAGE is
(B, H, W, C) in 0..1, MASK (B, H, W).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

from .images import FORMATS, header, load_picture, png_8_bit, png_16_bit
from .nodes_model import MODEL_NODES
from .nodes_sampler import KSampler
from .paths import PathError, annotated_path, files_below
from .standin import io, ui
from .standin.folders import studio

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
assert len(FORMATS) == len(IMAGE_SUFFIXES) - 1  # .jpg and .jpeg are one


def input_pictures() -> list[str]:
    """Names of the pictures directly in the input folder."""
    names = [name for name, _ in files_below(studio().of("input"), links=False) if "/" not in name]
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


class LoadImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImage",
            display_name="Load Image",
            category="image",
            essentials_category="Basics",
            search_aliases=["load image", "open image", "import image", "upload image"],
            inputs=[cls.image_input()],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def image_input(cls) -> Any:
        return io.Combo.Input("image", input_pictures(), upload=io.UploadType.image)

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        return io.NodeOutput(*load_picture(annotated_path(studio(), image)))

    @classmethod
    def validate_inputs(cls, image: str | None) -> bool | str:
        """Judged from the file's header: nothing is decoded for an answer."""
        if image is None:
            return True
        try:
            header(annotated_path(studio(), image))
        except FileNotFoundError:
            return f"There is no picture {image!r} in the input folder; choose or upload one."
        except (PathError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, image: str, **_: Any) -> str:
        return hashlib.sha256(annotated_path(studio(), image).read_bytes()).hexdigest()


class LoadImageMask(LoadImage):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImageMask",
            display_name="Load Image (as Mask)",
            category="image",
            essentials_category="Image Tools",
            search_aliases=["import mask", "alpha mask", "channel mask"],
            inputs=[
                cls.image_input(),
                io.Combo.Input("channel", ["alpha", "red", "green", "blue"]),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, image: str, channel: str) -> io.NodeOutput:  # type: ignore[override]
        pixels, mask = load_picture(annotated_path(studio(), image))
        if channel == "alpha":
            return io.NodeOutput(mask)
        return io.NodeOutput(pixels[..., ("red", "green", "blue").index(channel)].clone())


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            essentials_category="Basics",
            description="Saves the input images to the output folder of this studio.",
            search_aliases=["save", "export image", "output image", "write image", "download"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="The beginning of the file's name. It may have folders, and "
                    "%year%, %month%, %day%, %hour%, %minute%, %second%, %width%, %height%.",
                ),
            ],
            outputs=[io.Image.Output("images")],
        )

    @classmethod
    def execute(cls, images: Any, filename_prefix: str = "ComfyUI") -> io.NodeOutput:
        return io.NodeOutput(
            images, ui=ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls)
        )


class SaveImageAdvanced(io.ComfyNode):
    """Core's, without EXR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        depth = io.Combo.Input("bit_depth", ["8-bit", "16-bit"], default="8-bit", advanced=True)
        space = io.Combo.Input("input_color_space", ["sRGB"], default="sRGB", advanced=True)
        return io.Schema(
            node_id="SaveImageAdvanced",
            display_name="Save Image (Advanced)",
            category="image",
            essentials_category="Basics",
            description="Saves the input images to the output folder of this studio.",
            search_aliases=["save", "save image", "export image", "output image", "write image"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="The beginning of the file's name, as of Save Image.",
                ),
                io.DynamicCombo.Input(
                    "format",
                    options=[io.DynamicCombo.Option("png", [depth, space])],
                    tooltip="The file format. 16-bit keeps what 8 bits would round off.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, images: Any, filename_prefix: str, format: dict[str, str]) -> io.NodeOutput:
        encode = png_16_bit if format["bit_depth"] == "16-bit" else png_8_bit
        files = ui.saved(images, filename_prefix, io.FolderType.output, cls, encode=encode, end="")
        return io.NodeOutput(images, ui={"images": files})


class PreviewImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            essentials_category="Basics",
            description="Shows the images without saving them to the output folder.",
            search_aliases=["preview", "show image", "view image", "display image"],
            is_output_node=True,
            inputs=[io.Image.Input("images")],
            outputs=[io.Image.Output("images")],
        )

    @classmethod
    def execute(cls, images: Any) -> io.NodeOutput:
        return io.NodeOutput(images, ui={"images": ui.PreviewImage(images, cls=cls).values})


class ImageCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageCompare",
            display_name="Compare Images",
            description="Compares two images side by side with a slider.",
            category="image",
            essentials_category="Image Tools",
            is_experimental=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("image_a", optional=True),
                io.Image.Input("image_b", optional=True),
                io.ImageCompare.Input("compare_view"),
            ],
        )

    @classmethod
    def execute(
        cls, image_a: Any = None, image_b: Any = None, compare_view: Any = None
    ) -> io.NodeOutput:
        tail = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))
        shown: dict[str, list[Any]] = {"a_images": [], "b_images": []}
        for side, images in (("a", image_a), ("b", image_b)):
            if images is not None and len(images):
                shown[f"{side}_images"] = ui.ImageSaveHelper.save_images(
                    images, f"comfy.compare.{side}_temp_{tail}", io.FolderType.temp, None, 1
                )
        return io.NodeOutput(ui=shown)


class PreviewAny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewAny",
            display_name="Preview as Text",
            category="utilities",
            description="Preview any input value as text.",
            search_aliases=["show output", "inspect", "debug", "print value", "show text"],
            is_output_node=True,
            inputs=[io.AnyType.Input("source")],
            outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, source: Any = None) -> io.NodeOutput:
        text = source if isinstance(source, str) else None
        if isinstance(source, int | float) or source is None:
            text = str(source)
        if text is None:
            try:
                text = json.dumps(source, indent=4, ensure_ascii=False)
            except (TypeError, ValueError):
                text = str(source)
        return io.NodeOutput(text, ui={"text": (text,)})


def primitive(identity: str, name: str, socket: Any, **options: Any) -> type[io.ComfyNode]:
    """A node that hands on the value of its one widget."""

    def define_schema(cls: Any) -> io.Schema:
        return io.Schema(
            node_id=identity,
            display_name=name,
            category="utilities/primitive",
            inputs=[socket.Input("value", **options)],
            outputs=[socket.Output()],
        )

    def execute(cls: Any, value: Any) -> io.NodeOutput:
        return io.NodeOutput(value)

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(identity, (io.ComfyNode,), methods)


BIG = {"min": -sys.maxsize, "max": sys.maxsize}
CORE: list[type[io.ComfyNode]] = [
    LoadImage, LoadImageMask, SaveImage, SaveImageAdvanced, PreviewImage, ImageCompare, PreviewAny,
    *MODEL_NODES, KSampler,
    primitive("PrimitiveString", "Text", io.String),
    primitive("PrimitiveStringMultiline", "Text (Multiline)", io.String, multiline=True),
    primitive("PrimitiveInt", "Int", io.Int, control_after_generate="fixed", **BIG),
    primitive("PrimitiveFloat", "Float", io.Float, step=0.1, **BIG),
    primitive("PrimitiveBoolean", "Boolean", io.Boolean),
]  # fmt: skip
