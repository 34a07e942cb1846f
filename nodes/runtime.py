"""What MODEL, CLIP and VAE are here: ComfyUI's objects, or what our own loader returns.

`comfy_bridge.py` and `plain.py` offer the same; nothing else in `nodes/` asks where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..model_loaders.load import Loaded, Precision
from ..sampling import SamplingError
from ..sampling.composite import free_of, locked
from ..sampling.detail import Window, windowed
from ..sampling.noise import add_noise, noise
from ..sampling.samplers import Model, sampler

Conditioning: TypeAlias = list[list[Any]]  # [[hidden (1, L, C), {"slots", "reference_latents"}]]
Report: TypeAlias = Callable[[int, int, Tensor | None], None]  # (done, of all, preview (h, w, 3))


@dataclass(frozen=True)
class Run:
    """One sampling. `sigmas` fall to where the latents are wanted, 0 for a finished picture.

    `latents` (B, C, h, w) are what sampling starts from, zeros for a new picture; image k has the
    noise of `seed` + k. `mask` (B, H, W), 1 where something may change. `window`: size and overlap
    (height, width) in latents of the windows that the model is asked in, None for all at once.
    `seeds`, one for each of the latents: they are painted at once and see each other.
    """

    positive: Conditioning
    negative: Conditioning
    latents: Tensor
    sigmas: tuple[float, ...]
    seed: int = 0
    guidance: float = 1.0
    sampler: str = "euler"
    mask: Tensor | None = None
    window: tuple[Window, Window] | None = None
    seeds: tuple[int, ...] = ()
    report: Report = field(default=lambda done, total, preview: None)


class Runtime(Protocol):
    """A place where nodes run. Pictures are (H, W, 3 or 4) in 0..1, latents (B, C, h, w)."""

    def load(self, kind: str, path: str, dtype: Precision, variant: str | None = None) -> Any:
        """The MODEL ("dit", of this variant of its family), CLIP ("encoder") or VAE ("vae")."""
        ...

    def loaded(self, thing: Any) -> Loaded | None:
        """What our loader knows of a MODEL, CLIP or VAE; None for one that it did not load."""
        ...

    def read(
        self, clip: Any, prompt: str, images: list[Tensor], how: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Encoder states (1, L, C) and the slots (L,) of the images among them, read so."""
        ...

    def encode(self, vae: Any, image: Tensor) -> Tensor:
        """Latents (1, C, h, w) of a picture."""
        ...

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3 or 4) of latents."""
        ...

    def fit(self, model: Any, latent: dict[str, Any]) -> Tensor:
        """The samples of a LATENT, an empty one in the channels and the size of the model."""
        ...

    def sample(self, model: Any, run: Run) -> Tensor:
        """Latents (B, C, h, w) after the last sigma of `run`."""
        ...

    def progress(self, total: int) -> Report:
        """Show progress on the running node. Calling it raises when the user has cancelled."""
        ...

    def tell(self, text: str) -> None:
        """Show a text on the running node, where that is possible."""
        ...


def runtime() -> Runtime:
    """The one that fits the process."""
    if find_spec("comfy"):
        from .comfy_bridge import ComfyUI

        return ComfyUI()
    from .plain import Plain

    return Plain()


def where() -> tuple[str, int]:
    """The id of the running node, and the number of the call where lists are wired to it.

    "" outside a run.
    """
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return (context.node_id, context.list_index or 0) if context else ("", 0)


def one_by_one(model: Model, run: Run, latents: Tensor, loaded: Loaded | None) -> Tensor:
    """Sample each image of a batch alone, as the command line does it: the same bits.

    `model` is the velocity as a function of x (1, C, h, w) and sigma, on the device of `latents`.
    """
    count, done = len(latents), []
    if run.seeds:
        return at_once(model, run, latents, loaded)
    if loaded is not None and loaded.family.frames and loaded.family.frames(loaded, count) > 1:
        return together(model, run, latents, loaded)
    for k, start in enumerate(latents):
        own = noise(run.seed, k, start.shape, start.device)
        x = add_noise(start, own, run.sigmas[0])[None]
        follow = model if run.window is None else windowed(model, *run.window)
        if run.mask is not None:
            follow = locked(follow, start, own, free_of(run.mask, k, start))
        for state in sampler(run.sampler)(follow, x, run.sigmas):
            x = state.x
            preview = preview_of(loaded, state.denoised)
            run.report(k * state.total + state.step, count * state.total, preview)
        done.append(x)
    return torch.cat(done)


def at_once(model: Model, run: Run, latents: Tensor, loaded: Loaded | None) -> Tensor:
    """Pictures that see each other: the whole batch in every step."""
    if run.mask is not None or run.window is not None:
        raise SamplingError(
            "pictures that are painted at once are painted whole; connect a latent without a mask."
        )
    x = add_noise(latents, seeded_noise(run, latents.device), run.sigmas[0])
    for state in sampler(run.sampler)(model, x, run.sigmas):
        x = state.x
        run.report(state.step, state.total, preview_of(loaded, state.denoised[:1]))
    return x


def seeded_noise(run: Run, device: Any) -> Tensor:
    """The noise of each of `run.seeds`."""
    return torch.stack([noise(seed, 0, run.latents.shape[1:], device) for seed in run.seeds])


def together(model: Model, run: Run, latents: Tensor, loaded: Loaded) -> Tensor:
    """The layers of one picture: painted at once, with the whole picture before them, which goes.

    A batch is so many layers, as `Task.layers` says on the command line: the same bits.
    """
    assert loaded.family.frames is not None
    if run.sigmas[0] < 1 or torch.count_nonzero(latents):
        raise SamplingError(
            "layers are painted from noise, all at once; connect an empty latent whose batch size "
            "is the number of layers, and set denoise to 1."
        )
    shape = (loaded.family.frames(loaded, len(latents)), *latents.shape[1:])
    x = noise(run.seed, 0, shape, latents.device) * run.sigmas[0]
    for state in sampler(run.sampler)(model, x, run.sigmas):
        x = state.x
        run.report(state.step, state.total, preview_of(loaded, state.denoised))
    return x[1:]


class Prefix:
    """What a DiT reads of the text and the references, computed at the first step of a run.

    `hidden` (1, L, C), `slots` (L,), `references` (1, C, h, w) each; `room` target tokens.
    """

    def __init__(self, conditioning: list[Any], room: int) -> None:
        self.hidden, extra = conditioning
        # Text that was encoded without us has no references among it.
        self.slots = extra.get("slots", torch.zeros(self.hidden.shape[1], dtype=torch.bool))
        self.references = list(extra.get("reference_latents") or ())
        self.guidance = extra.get("guidance")
        self.latents_per_token = extra.get("latents_per_token", 1)
        if len(self.slots) != self.hidden.shape[1]:
            raise SamplingError(
                f"the conditioning has {self.hidden.shape[1]} tokens, but was encoded with "
                f"{len(self.slots)}; use it as Encode Instruction gives it, without concatenating."
            )
        self.room = extra.get("room", room)  # less, where the target is painted in windows
        # Of pictures that are painted at once; where several read the same, it is one.
        members = list(extra.get("members", ()))
        unlike = {id(one): Prefix(one, room) for one in members}
        self.members = [unlike[id(one)] for one in members]
        self.store: Any = None  # a PrefixStore, where nothing stands between us and the network
        self._computed: Any = None

    @property
    def tokens(self) -> int:
        """Latent tokens of the references, and tokens of the text."""
        if self.members:
            return sum(member.tokens for member in self.members)
        pictures = sum(x.shape[-2] * x.shape[-1] for x in self.references)
        return pictures // self.latents_per_token + int((~self.slots).sum())

    def of(self, dit: Any, device: Any, dtype: torch.dtype) -> Any:
        """The prefix in the form that `dit` takes."""
        if self._computed is None and self.members:
            for member in self.members:
                member.store = self.store
            each = [member.of(dit, device, dtype) for member in self.members]
            self._computed = dit.joint(each, range(len(each)))
        if self._computed is None:
            # Any conditioning may say how strong; only some networks read it.
            read = self.guidance is not None and getattr(dit.config, "guided", False)
            kept = self.store is not None and getattr(dit, "stores", False)
            self._computed = dit.prefix(
                self.hidden.to(device, dtype),
                self.slots.to(device),
                [x.to(device, dtype) for x in self.references],
                self.room,
                **({"guidance": self.guidance} if read else {}),
                **({"store": self.store} if kept else {}),
            )
        return self._computed


def preview_of(loaded: Loaded | None, latents: Tensor) -> Tensor | None:
    """A rough picture (h, w, 3) in 0..1 of latents (1, C, h, w), if the checkpoint tells how.

    Its config holds `latent_rgb_factors` (C, 3) and `latent_rgb_bias` (3), for colours in -1..1.
    """
    factors = loaded.checkpoint.config.get("latent_rgb_factors") if loaded else None
    if loaded is None or factors is None:
        return None
    bias = torch.tensor(loaded.checkpoint.config.get("latent_rgb_bias", (0.0, 0.0, 0.0)))
    colours = latents[0].permute(1, 2, 0).float().cpu() @ torch.tensor(factors)
    return ((colours + bias + 1) / 2).clamp(0, 1)
