"""`comfy_api.latest.io`: schema, node and the types of sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from .dynamic import AnyType as AnyType
from .dynamic import Autogrow as Autogrow
from .dynamic import DynamicCombo as DynamicCombo
from .dynamic import MatchOutput, input_dict
from .dynamic import MatchType as MatchType
from .dynamic import MultiType as MultiType
from .inputs import (
    BooleanInput,
    ColorInput,
    ComboInput,
    FloatInput,
    ImageCompareInput,
    IntInput,
    MultiComboInput,
    Socket,
    StringInput,
)
from .inputs import ControlAfterGenerate as ControlAfterGenerate
from .inputs import FolderType as FolderType
from .inputs import (
    Input as Input,
)
from .inputs import NumberDisplay as NumberDisplay
from .inputs import (
    Output as Output,
)
from .inputs import RemoteOptions as RemoteOptions
from .inputs import UploadType as UploadType
from .inputs import (
    WidgetInput as WidgetInput,
)


class Boolean(Socket, io_type="BOOLEAN", input=BooleanInput):
    Type = bool


class Int(Socket, io_type="INT", input=IntInput):
    Type = int


class Float(Socket, io_type="FLOAT", input=FloatInput):
    Type = float


class String(Socket, io_type="STRING", input=StringInput):
    Type = str


class Combo(Socket, io_type="COMBO", input=ComboInput):
    Type = str


class MultiCombo(Socket, io_type="COMBO", input=MultiComboInput):
    Type = list


class Color(Socket, io_type="COLOR", input=ColorInput):
    Type = str


class ImageCompare(Socket, io_type="IMAGECOMPARE", input=ImageCompareInput):
    Type = dict


class Image(Socket, io_type="IMAGE"):
    """(B, H, W, 3 or 4) in 0..1."""


class Mask(Socket, io_type="MASK"):
    """(B, H, W) in 0..1, 1 is masked."""


class Latent(Socket, io_type="LATENT"):
    """{"samples": (B, C, h, w)}."""


class Conditioning(Socket, io_type="CONDITIONING"):
    """[[tensor, {...}], ...]."""


class Model(Socket, io_type="MODEL"): ...


class Clip(Socket, io_type="CLIP"): ...


class Vae(Socket, io_type="VAE"): ...


class Sigmas(Socket, io_type="SIGMAS"): ...


class Sampler(Socket, io_type="SAMPLER"): ...


class Noise(Socket, io_type="NOISE"): ...


class Guider(Socket, io_type="GUIDER"): ...


def Custom(io_type: str) -> type[Socket]:
    """A type of sockets of one's own."""
    return type(io_type, (Socket,), {}, io_type=io_type)


def comfytype(io_type: str, **_: Any) -> Any:
    """Decorator: a class with its own Input or Output becomes a type of sockets."""

    def decorate(cls: type) -> type:
        made = type(
            cls.__name__, (cls, Socket), {"Type": getattr(cls, "Type", Any)}, io_type=io_type
        )
        for name in ("Input", "Output"):
            if name in vars(cls):
                setattr(made, name, type(name, (vars(cls)[name],), {"io_type": io_type}))
        return made

    return decorate


class Hidden(str, Enum):
    """What a node may ask for besides its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"
    auth_token_comfy_org = "AUTH_TOKEN_COMFY_ORG"
    api_key_comfy_org = "API_KEY_COMFY_ORG"
    comfy_usage_source = "COMFY_USAGE_SOURCE"


class HiddenValues:
    """`cls.hidden`; what was not asked for is None."""

    def __init__(self, values: Mapping[Hidden, Any]) -> None:
        self._values = {key.name: value for key, value in values.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._values.get(name)


@dataclass
class Schema:
    """A node as it describes itself."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_dev_only: bool = False
    is_api_node: bool = False
    price_badge: Any = None
    not_idempotent: bool = False
    enable_expand: bool = False
    accept_all_inputs: bool = False
    essentials_category: str | None = None
    has_intermediate_output: bool = False

    def finalize(self) -> None:
        """Fill in what follows from the rest; ValueError for a name that is there twice."""
        for what, entries in (("input", self.inputs), ("output", self.outputs)):
            names = [entry.id for entry in entries if entry.id is not None]
            if len(set(names)) < len(names):
                raise ValueError(f"{self.node_id} has two {what}s of one name")
        if self.is_output_node:
            wanted = [h for h in (Hidden.prompt, Hidden.extra_pnginfo) if h not in self.hidden]
            self.hidden = [*self.hidden, *wanted]
        for number, output in enumerate(self.outputs):
            output.id = output.id or f"_{number}_{output.io_type}_"

    def info(self, python_module: str) -> dict[str, Any]:
        """The node's entry in /object_info."""
        listed = input_dict(self.inputs)
        if self.hidden:
            listed["hidden"] = {hidden.name: (hidden.value,) for hidden in self.hidden}
        matches = [
            o.template.template_id if isinstance(o, MatchOutput) else None for o in self.outputs
        ]
        return {
            "input": listed,
            "input_order": {place: list(names) for place, names in listed.items()},
            "is_input_list": self.is_input_list,
            "output": [output.io_type for output in self.outputs],
            "output_is_list": [output.is_output_list for output in self.outputs],
            "output_name": [output.display_name or output.io_type for output in self.outputs],
            "output_tooltips": [output.tooltip or None for output in self.outputs],
            "output_matchtypes": matches if any(matches) else None,
            "name": self.node_id,
            "display_name": self.display_name,
            "description": self.description,
            "python_module": python_module,
            "category": self.category,
            "output_node": self.is_output_node,
            "deprecated": self.is_deprecated,
            "experimental": self.is_experimental,
            "dev_only": self.is_dev_only,
            "api_node": self.is_api_node,
            "price_badge": None,
            "search_aliases": self.search_aliases or None,
            "essentials_category": self.essentials_category,
            "has_intermediate_output": self.has_intermediate_output,
        }


class ComfyNode:
    """A node: a schema, and a class method `execute` that takes the inputs by their names.

    The class is never instantiated.
    """

    hidden: ClassVar[HiddenValues] = HiddenValues({})

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The finished schema."""
        schema = cls.define_schema()
        schema.finalize()
        return schema


class ExecutionBlocker:
    """A value that keeps the nodes behind it from running, with a sentence if that is an error."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message


class NodeOutput:
    """What `execute` returns: values, and what the page shows (`ui`)."""

    def __init__(
        self,
        *values: Any,
        ui: Any = None,
        expand: dict[str, Any] | None = None,
        block_execution: str | None = None,
    ) -> None:
        self.args, self.ui, self.expand, self.block_execution = values, ui, expand, block_execution

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]
