"""Inputs and outputs of a node: what they are called, and how the page hears of them.

Every input class names its options and the key under which each stands in /object_info; an option
that is None is left out. The keys are those that comfyui-frontend-package 1.49.6 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar


class FolderType(str, Enum):
    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    number = "number"
    slider = "slider"
    gradient_slider = "gradientslider"


class ControlAfterGenerate(str, Enum):
    fixed = "fixed"
    increment = "increment"
    decrement = "decrement"
    randomize = "randomize"


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are None, enums as their values."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}
    return {k: v for k, v in plain.items() if v is not None}


class RemoteOptions:
    """Options of a combo that the page fetches."""

    def __init__(self, route: str, refresh_button: bool, **options: Any) -> None:
        self.options = {"route": route, "refresh_button": refresh_button, **options}

    def as_dict(self) -> dict[str, Any]:
        return given(self.options)


class Input:
    """An input that only a wire can feed; `options` are what OPTIONS lists."""

    io_type: ClassVar[str] = "*"
    OPTIONS: ClassVar[dict[str, str]] = {
        "lazy": "lazy",
        "raw_link": "rawLink",
        "advanced": "advanced",
    }
    DEFAULTS: ClassVar[dict[str, Any]] = {}
    POSITIONAL: ClassVar[tuple[str, ...]] = ("display_name", "optional", "tooltip")
    widget: ClassVar[bool] = False

    def __init__(self, id: str, *more: Any, **options: Any) -> None:
        options = {**self.DEFAULTS, **dict(zip(self.POSITIONAL, more, strict=False)), **options}
        self.id = id
        self.display_name: str | None = options.pop("display_name", None)
        self.optional: bool = bool(options.pop("optional", False))
        self.tooltip: str | None = options.pop("tooltip", None)
        self.extra: dict[str, Any] = options.pop("extra_dict", None) or {}
        unknown = sorted(set(options) - set(self.OPTIONS))
        if unknown:
            raise TypeError(f"{self.io_type} input {id!r} has no option {', '.join(unknown)}")
        self.options: dict[str, Any] = options

    @property
    def default(self) -> Any:
        return self.options.get("default")

    def get_io_type(self) -> str:
        return self.options.get("widget_type") or self.io_type

    def as_dict(self) -> dict[str, Any]:
        """What /object_info says behind the type."""
        values = {self.OPTIONS[name]: value for name, value in self.options.items()}
        return given({"display_name": self.display_name, "tooltip": self.tooltip} | values) | given(
            self.extra
        )

    def with_id(self, id: str) -> Input:
        """A copy of another name."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.id = id
        return other


class WidgetInput(Input):
    """An input with a widget."""

    widget = True
    OPTIONS = Input.OPTIONS | {
        "default": "default", "socketless": "socketless", "widget_type": "widgetType",
        "force_input": "forceInput",
    }  # fmt: skip


class BooleanInput(WidgetInput):
    OPTIONS = WidgetInput.OPTIONS | {"label_on": "label_on", "label_off": "label_off"}


NUMBER = WidgetInput.OPTIONS | {
    "min": "min",
    "max": "max",
    "step": "step",
    "display_mode": "display",
}


class IntInput(WidgetInput):
    OPTIONS = NUMBER | {"control_after_generate": "control_after_generate"}


class FloatInput(WidgetInput):
    OPTIONS = NUMBER | {"round": "round", "gradient_stops": "gradient_stops"}


class StringInput(WidgetInput):
    OPTIONS = WidgetInput.OPTIONS | {
        "multiline": "multiline", "placeholder": "placeholder", "dynamic_prompts": "dynamicPrompts",
    }  # fmt: skip
    DEFAULTS = {"multiline": False}


class ComboInput(WidgetInput):
    OPTIONS = WidgetInput.OPTIONS | {
        "options": "options", "control_after_generate": "control_after_generate",
        "upload": "upload", "image_folder": "image_folder", "remote": "remote",
    }  # fmt: skip
    POSITIONAL = ("options", *Input.POSITIONAL)

    def __init__(self, id: str, *more: Any, **options: Any) -> None:
        super().__init__(id, *more, **options)
        choices = self.options.get("options")
        if isinstance(choices, type) and issubclass(choices, Enum):
            self.options["options"] = [choice.value for choice in choices]

    @property
    def choices(self) -> list[Any] | None:
        """What may be chosen; None when the page fetches it."""
        return self.options.get("options")

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        upload, remote = values.pop("upload", None), values.pop("remote", None)
        values |= {upload: True} if upload else {}
        values |= {"remote": remote.as_dict()} if remote else {}
        return {"multiselect": False} | values


class MultiComboInput(ComboInput):
    OPTIONS = ComboInput.OPTIONS | {"placeholder": "placeholder", "chip": "chip"}

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        look = {name: values.pop(name) for name in ("placeholder", "chip") if name in values}
        return values | {"multiselect": True, "multi_select": look}


class ImageCompareInput(WidgetInput):
    DEFAULTS = {"socketless": True}


class ColorInput(WidgetInput):
    DEFAULTS = {"socketless": True, "default": "#ffffff"}


class Output:
    """An output; `is_output_list` when it hands out a list, item by item."""

    io_type: ClassVar[str] = "*"

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
        options: list[str] | None = None,
    ) -> None:
        self.id, self.display_name = id, display_name or id
        self.tooltip, self.is_output_list = tooltip, is_output_list
        self.options = options


PlainInput, PlainOutput = Input, Output


class Socket:
    """A type of values that wires carry, with its `Input` and `Output`."""

    io_type: ClassVar[str] = "*"
    Type: ClassVar[Any] = Any
    Input: ClassVar[Any] = PlainInput
    Output: ClassVar[Any] = PlainOutput

    def __init_subclass__(cls, io_type: str = "", input: Any = None) -> None:
        if io_type:
            cls.io_type = io_type
            cls.Input = type("Input", (input or PlainInput,), {"io_type": io_type})
            cls.Output = type("Output", (PlainOutput,), {"io_type": io_type})
