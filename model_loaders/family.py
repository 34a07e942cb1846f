"""What a model family says about itself.

A family is one architecture with everything that makes its pictures right. It is a folder under
`families/` whose `FAMILY` is an instance of `Family`; nothing outside that folder knows its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .checkpoint import Checkpoint, Source, TensorInfo
    from .layers import Store

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


APACHE = Licence(
    "Apache-2.0", "", commercial=True, notice="Free for any use, with its notice kept."
)


@dataclass(frozen=True)
class PublishedFile:
    """A file of a repository on the Hugging Face Hub, and where under models/ it belongs."""

    folder: str  # ComfyUI's name
    repository: str
    path: str
    own_name: str = ""  # where it is to be called otherwise than there

    @property
    def name(self) -> str:
        return self.own_name or self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Offer:
    """Published files that make a model complete, under a name that people can type."""

    name: str
    title: str
    licence: Licence
    files: tuple[PublishedFile, ...]


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
    one that it fits. `lent` matches the paths of layers that work only before a run: their weights
    stay in the file, and the network's `each` (what `Lender.each` replaces) gives them in passing.
    """

    kind: Kind
    example: str  # a published file that fits, with its folder
    layouts: tuple[Layout, ...]
    config: Callable[[Checkpoint], Any]
    build: Callable[..., nn.Module]  # (config, operations, device, dtype)
    unused: tuple[str, ...] = ()
    finish: Callable[..., Any] | None = None
    published: Callable[[], Mapping[str, Any]] | None = None
    lent: re.Pattern[str] | None = None

    def layout(self, names: Mapping[str, TensorInfo]) -> Layout | None:
        """The layout these names are in, None when this is another kind of file."""
        return next((layout for layout in self.layouts if layout.recognises(names)), None)

    def matches(self, names: Mapping[str, TensorInfo]) -> bool:
        return self.layout(names) is not None


@dataclass(frozen=True)
class OwnSize:
    """How an encoder sees references in other sizes than the VAE. `sides` are those of squares of
    the areas in which it sees each of them, 0 for the family's own way.

    `show(given, shown, sides)`: what it is shown, of pictures as they were given and as they would
    be shown. `how(sides)`: arguments with which it reads. `tokens(width, height, side)`: how many
    it reads of a picture. `fit(hidden, slots, latents)`: its states and slots, with as many slots
    as the latents need.
    """

    show: Callable[..., list[Any]]
    how: Callable[[Sequence[int]], Mapping[str, Any]]
    tokens: Callable[[int, int, int], int]
    fit: Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Family:
    """An architecture: its components, its terms, its schedules, and how its pictures are made.

    `step`: sides of pictures are multiples of it, in pixels; `pixels_per_token`: side of the square
    that one token of the DiT covers. `reference_size(width, height, area)` is the size a reference
    is brought to, `resize(image, size)` does it. `prefix(dit, encoder, prompt, images, latents,
    room=, dtype=, store=)` is what `dit(x, t, prefix)` reads at every step; `store`, a
    `layers.Store`, knows what of it stays true in other runs. `check(dit, vae, encoder)` raises
    CheckpointError when loaded components do not fit each other.

    `pixels_per_latent`: side of the square that one latent covers. `pads`: a reference that keeps
    its own size (area 0) is padded to whole steps, never resized, and the picture is as large as
    the reference. `encoder_resizes`: the encoder is shown references as they were given; `own_size`
    how it sees them in sizes of its own, None where it does not look at them. A family
    of several published models names them in `variants` (name -> title), and `settings` says of a
    DiT's checkpoint which one it is: what its config gets, `variant`, `variant_reason`,
    `variant_question` (for the user, where it is a guess) and `resolution` among it.
    `reading(dit)` are the arguments with which its encoder reads; `accepts(dit, count)` raises
    CheckpointError for so many references that it cannot take.
    `frames(dit, layers)` latents are painted together, as a batch; all but the first of several
    are pictures. `modulations(dit, sigmas, dtype)` is what depends on a step's sigma alone, one
    for each; `dit(x, t, prefix, one)` then does not compute it. `offers` are its published models
    as they can be downloaded.
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
    own_size: OwnSize | None = None
    variants: Mapping[str, str] = field(default_factory=dict)
    settings: Callable[[Checkpoint], Mapping[str, Any]] | None = None
    reading: Callable[[Any], Mapping[str, Any]] | None = None
    accepts: Callable[[Any, int], None] | None = None
    frames: Callable[[Any, int], int] | None = None
    modulations: Callable[[Any, Sequence[float], Any], Sequence[Any]] | None = None
    offers: tuple[Offer, ...] = ()

    @property
    def latents_per_token(self) -> int:
        return (self.pixels_per_token // self.pixels_per_latent) ** 2

    def component(self, kind: Kind) -> Component | None:
        return next((c for c in self.components if c.kind == kind), None)


# ---- what families say in the same way ---------------------------------------------------------


def later(package: str, module: str, name: str) -> Callable[..., Any]:
    """The function, class or method `name` of `module` of `package`, imported at its first call.

    A family is looked at in every start, its networks only when one is loaded.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return attrgetter(name)(import_module(module, package))(*args, **kwargs)

    return call


def with_tokenizer(package: str, tokenizer: str) -> Callable[..., Any]:
    """A `finish`: the `Encoder` of `package.encoder` over the network and its tokenizer.

    `tokenizer` is the class in `package.templates` that knows the prompts.
    """

    def finish(module: Any, path: Path, tokenizer_paths: Sequence[Path | str] = ()) -> Any:
        from .tokenizers import find_tokenizer

        make = later(package, ".templates", tokenizer)
        found = find_tokenizer(make, path, module.config.vocab_size, tokenizer_paths)
        return later(package, ".encoder", "Encoder")(module, found)

    return finish


def by_schedule(dit: Any, sigmas: Sequence[float], dtype: Any) -> Sequence[Any]:
    """The `modulations` of a network that has them as a method."""
    return dit.modulations(sigmas, dtype)


def read_once(
    store: Store | None, encoder: Any, prompt: str, images: Sequence[Tensor], **how: Any
) -> Any:
    """What an encoder makes of a prompt with its references, which `store` may know already."""
    compute = partial(encoder.encode, prompt, images, **how)
    if store is None:
        return compute()
    return store.recall("prompts", encoder, (prompt, sorted(how.items()), *images), compute)
