"""Inputs that unfold: lists that grow, choices with inputs of their own, types that match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .inputs import Input, Output, Socket, WidgetInput

MOST_NAMES = 100  # of a growing input, as in ComfyUI


class AnyType(Socket, io_type="*"):
    """Takes every wire."""


def input_dict(inputs: Sequence[Input]) -> dict[str, dict[str, Any]]:
    """Inputs as /object_info has them: {"required": {id: [type, options]}, "optional": ...}."""
    listed: dict[str, dict[str, Any]] = {"required": {}}
    for entry in inputs:
        place = listed.setdefault("optional" if entry.optional else "required", {})
        place[entry.id] = (entry.get_io_type(), entry.as_dict())
    return listed


class GrowTemplate:
    """What a growing input repeats, and under which names."""

    def __init__(self, input: Input, names: list[str], min: int, look: dict[str, Any]) -> None:
        if isinstance(input, AutogrowInput | DynamicComboInput):
            raise TypeError("an input that unfolds cannot be repeated by Autogrow")
        if min < 0 or not names or len(names) > MOST_NAMES:
            raise ValueError(f"Autogrow takes 1 to {MOST_NAMES} names and a minimum >= 0")
        self.input, self.names, self.min, self.look = input.with_id(input.id), names, min, look
        if isinstance(input, WidgetInput):  # repeated widgets are sockets
            self.input.options = {**input.options, "force_input": True}

    def as_dict(self) -> dict[str, Any]:
        return {"input": input_dict([self.input]), **self.look, "min": self.min}

    def inputs(self) -> Iterator[tuple[Input, bool]]:
        """Each possible input, and whether it must be given."""
        for number, name in enumerate(self.names):
            yield self.input.with_id(name), number < self.min and not self.input.optional


class AutogrowInput(Input):
    POSITIONAL = ("template", *Input.POSITIONAL)
    OPTIONS = {"lazy": "lazy", "template": "template"}

    @property
    def template(self) -> GrowTemplate:
        return self.options["template"]

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"template": self.template.as_dict()}


class Autogrow(Socket, io_type="COMFY_AUTOGROW_V3", input=AutogrowInput):
    """An input that grows another one when the last is taken; execute gets {name: value}."""

    @staticmethod
    def TemplatePrefix(input: Input, prefix: str, min: int = 1, max: int = 10) -> GrowTemplate:
        names = [f"{prefix}{number}" for number in range(max)]
        return GrowTemplate(input, names, min, {"prefix": prefix, "max": max})

    @staticmethod
    def TemplateNames(input: Input, names: list[str], min: int = 1) -> GrowTemplate:
        names = names[:MOST_NAMES]
        return GrowTemplate(input, names, min, {"names": names})


@dataclass(frozen=True)
class Option:
    """A choice with inputs of its own."""

    key: str
    inputs: list[Any]


class DynamicComboInput(WidgetInput):
    POSITIONAL = ("options", *Input.POSITIONAL)
    OPTIONS = {"lazy": "lazy", "options": "options"}

    @property
    def choices(self) -> list[Option]:
        return self.options["options"]

    def chosen(self, key: Any) -> Option | None:
        return next((option for option in self.choices if option.key == key), None)

    def as_dict(self) -> dict[str, Any]:
        options = [{"key": o.key, "inputs": input_dict(o.inputs)} for o in self.choices]
        return super().as_dict() | {"options": options}


class DynamicCombo(Socket, io_type="COMFY_DYNAMICCOMBO_V3", input=DynamicComboInput):
    """A combo that brings inputs; execute gets {its id: the key, input: value, ...}."""

    Option = Option


class Template:
    """Inputs and outputs with one template carry one type."""

    def __init__(self, template_id: str, allowed_types: Any = AnyType) -> None:
        self.template_id = template_id
        several = isinstance(allowed_types, list | tuple)
        self.allowed_types = list(allowed_types) if several else [allowed_types]

    def as_dict(self) -> dict[str, Any]:
        names = [allowed.io_type for allowed in self.allowed_types]
        return {"template_id": self.template_id, "allowed_types": ",".join(names)}


class MatchInput(Input):
    POSITIONAL = ("template", *Input.POSITIONAL)
    OPTIONS = Input.OPTIONS | {"template": "template"}

    @property
    def template(self) -> Template:
        return self.options["template"]

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"template": self.template.as_dict()}


class MatchOutput(Output):
    io_type = "COMFY_MATCHTYPE_V3"

    def __init__(self, template: Template, id: str | None = None, **more: Any) -> None:
        if not id and not more.get("display_name"):
            more["display_name"] = "MATCHTYPE"
        super().__init__(id, **more)
        self.template = template


class MatchType(Socket, io_type="COMFY_MATCHTYPE_V3", input=MatchInput):
    """A type that the wires decide."""

    Template = Template


MatchType.Output = MatchOutput


class MultiInput(Input):
    """Takes several types; built from another input it keeps that one's widget."""

    POSITIONAL = ("types", *Input.POSITIONAL)
    OPTIONS = Input.OPTIONS | {"types": "types"}

    def __init__(self, id: str | Input, *more: Any, **options: Any) -> None:
        self.inner = id.with_id(id.id) if isinstance(id, Input) else None
        if isinstance(id, Input):
            options = {"display_name": id.display_name, "tooltip": id.tooltip} | options
            options["optional"] = id.optional or options.get("optional", False)
            if isinstance(id, WidgetInput) and self.inner:
                self.inner.options = {**id.options, "widget_type": id.get_io_type()}
        super().__init__(id.id if isinstance(id, Input) else id, *more, **options)

    def get_io_type(self) -> str:
        names = [allowed.io_type for allowed in self.options["types"]]
        first = [self.inner.get_io_type()] if self.inner else []
        return ",".join(dict.fromkeys(first + names))

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        del values["types"]
        return (self.inner.as_dict() if self.inner else {}) | values


class MultiType:
    """Several types at one input."""

    io_type = "COMFY_MULTITYPED_V3"
    Input = MultiInput


@dataclass(frozen=True)
class Slot:
    """An input as a prompt names it: its path ("mode.refs.ref0"), and whether it must be given."""

    path: str
    input: Input
    required: bool


def slots(inputs: Sequence[Input], live: Mapping[str, Any], prefix: str = "") -> Iterator[Slot]:
    """The inputs that a prompt's values `live` unfold to."""
    for entry in inputs:
        path = prefix + entry.id
        if isinstance(entry, AutogrowInput):
            for part, required in entry.template.inputs():
                yield Slot(f"{path}.{part.id}", part, required)
        else:
            yield Slot(path, entry, not entry.optional)
        if isinstance(entry, DynamicComboInput) and (option := entry.chosen(live.get(path))):
            yield from slots(option.inputs, live, f"{path}.")


def nested(inputs: Sequence[Input], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by path as `execute` takes them: growing and dynamic inputs as dicts."""
    out: dict[str, Any] = {}
    for entry in inputs:
        path = prefix + entry.id
        if isinstance(entry, AutogrowInput):
            parts = [part for part, _ in entry.template.inputs()]
            out[entry.id] = nested(parts, values, f"{path}.")
        elif path in values and isinstance(entry, DynamicComboInput):
            option = entry.chosen(values[path])
            inner = nested(option.inputs, values, f"{path}.") if option else {}
            out[entry.id] = {entry.id: values[path], **inner}
        elif path in values:
            out[entry.id] = values[path]
    return out
