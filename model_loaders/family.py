"""What a model family says about itself.

A family is one architecture with everything that makes its pictures right. It is a folder under
`families/` whose `FAMILY` is an instance of `Family`; nothing outside that folder knows its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from .checkpoint import Checkpoint, Source, TensorInfo

Kind = Literal["dit", "vae", "encoder"]

TITLES: dict[str, str] = {
    "dit": "a diffusion model",
    "vae": "a VAE",
    "encoder": "a text encoder",
    "lora": "a LoRA",
}


@dataclass(frozen=True)
class Licence:
    """The terms of a checkpoint, for display next to it."""

    name: str
    url: str
    commercial: bool
    notice: str


@dataclass(frozen=True)
class Schedule:
    """How a checkpoint wants to be sampled: a function of tokens and steps, or an explicit list.

    `sigmas` (with the final 0.0) belongs to a distilled checkpoint and wins over the shift, which
    runs linearly from `base_shift` at `base_tokens` to `max_shift` at `max_tokens`; `terminal` is
    the value that the last sigma before 0 is stretched to, None for no stretch. `mu(tokens, steps)`
    replaces that line. `embedded_guidance`: the network reads the guidance, which goes into its
    prefix, and no negative prompt is run. `norm_rescale`: what guidance makes of a token keeps the
    length that it had without. `reason` says why this was chosen.
    """

    name: str
    steps: int
    guidance: float = 1.0
    sigmas: tuple[float, ...] | None = None
    base_shift: float = 0.5
    max_shift: float = 0.9
    base_tokens: int = 256
    max_tokens: int = 8192
    terminal: float | None = None
    mu: Callable[[int, int], float] | None = None
    embedded_guidance: bool = False
    norm_rescale: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """One published naming of a component's tensors.

    `recognises` looks at the names and shapes in a file; `sources` says where each canonical tensor
    is found. Tensors of the file that `sources` does not use are unexpected and will be reported as
    such.
    """

    name: str
    recognises: Callable[[Mapping[str, TensorInfo]], bool]
    sources: Callable[[Mapping[str, TensorInfo]], dict[str, Source]]


@dataclass(frozen=True)
class Component:
    """One network of a family. `config` and `build` see canonical names only.

    `config` raises KeyError (a tensor that is needed is missing) or ValueError (shapes do not add
    up). `unused` are published tensors that the network does not need. `finish` turns the loaded
    module into what callers work with (an encoder with its tokenizer), given the path it came from.
    `published` are the configs of published networks by their names: a LoRA is recognised by the
    one that it fits.
    """

    kind: Kind
    example: str  # a published file that fits, with its folder
    layouts: tuple[Layout, ...]
    config: Callable[[Checkpoint], Any]
    build: Callable[..., nn.Module]  # (config, operations, device, dtype)
    unused: tuple[str, ...] = ()
    finish: Callable[..., Any] | None = None
    published: Callable[[], Mapping[str, Any]] | None = None

    def layout(self, names: Mapping[str, TensorInfo]) -> Layout | None:
        """The layout these names are in, None when this is another kind of file."""
        return next((layout for layout in self.layouts if layout.recognises(names)), None)

    def matches(self, names: Mapping[str, TensorInfo]) -> bool:
        return self.layout(names) is not None


@dataclass(frozen=True)
class Family:
    """An architecture: its components, its terms, its schedules, and how its pictures are made.

    `step`: sides of pictures are multiples of it, in pixels; `pixels_per_token`: side of the square
    that one token of the DiT covers. `reference_size(width, height, area)` is the size a reference
    is brought to, `resize(image, size)` does it. `prefix(dit, encoder, prompt, images, latents,
    room=, dtype=)` is what `dit(x, t, prefix)` reads at every step. `check(dit, vae, encoder)`
    raises CheckpointError when loaded components do not fit each other.

    `pixels_per_latent`: side of the square that one latent covers. `pads`: a reference that keeps
    its own size (area 0) is padded to whole steps, never resized, and the picture is as large as
    the reference. `encoder_resizes`: the encoder is shown references as they were given. A family
    of several published models names them in `variants` (name -> title), and `settings` says of a
    DiT's checkpoint which one it is: what its config gets, `variant`, `variant_reason` and
    `resolution` among it. `reading(dit)` are the arguments with which its encoder reads;
    `accepts(dit, count)` raises CheckpointError for so many references that it cannot take.
    `frames(dit, layers)` latents are painted together, as a batch; all but the first of several
    are pictures. `modulations(dit, sigmas, dtype)` is what depends on a step's sigma alone, one
    for each; `dit(x, t, prefix, one)` then does not compute it.
    """

    name: str
    title: str
    licence: Licence
    components: tuple[Component, ...]
    schedule: Callable[[Checkpoint], Schedule]
    licence_of: Callable[[Checkpoint], Licence]
    step: int
    pixels_per_token: int
    channels: Callable[[Any], int]
    reference_size: Callable[[int, int, int], tuple[int, int]]
    resize: Callable[[Any, tuple[int, int]], Any]
    prefix: Callable[..., Any]
    check: Callable[[Any, Any, Any], None]
    pixels_per_latent: int = 16
    pads: bool = False
    encoder_resizes: bool = False
    variants: Mapping[str, str] = field(default_factory=dict)
    settings: Callable[[Checkpoint], Mapping[str, Any]] | None = None
    reading: Callable[[Any], Mapping[str, Any]] | None = None
    accepts: Callable[[Any, int], None] | None = None
    frames: Callable[[Any, int], int] | None = None
    modulations: Callable[[Any, Sequence[float], Any], Sequence[Any]] | None = None

    @property
    def latents_per_token(self) -> int:
        return (self.pixels_per_token // self.pixels_per_latent) ** 2

    def component(self, kind: Kind) -> Component | None:
        return next((c for c in self.components if c.kind == kind), None)
