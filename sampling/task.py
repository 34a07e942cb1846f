"""What can be asked of a `Pipeline`, what it comes to, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..model_loaders.family import Schedule
from . import SamplingError
from .composite import Edit
from .noise import image_seed
from .samplers import State, sampler, steps_of
from .schedules import sigmas_for

MAX_REFERENCES = 14  # of one picture
MAX_RESOLUTION = 16384  # pixels, side of the square that references are brought to
MAX_VLM = 4096  # pixels, side of the largest square that a text encoder is shown


@dataclass(frozen=True)
class Member:
    """A picture of several that are painted at once; `place` is its number in their order."""

    prompt: str
    seed: int
    place: int


@dataclass(frozen=True)
class Task:
    """What to make. None means: as the checkpoint likes it.

    `references` are pictures (H, W, 3 or 4) in 0..1, "image 1", "image 2", ... in the prompt;
    `size` is (width, height) in pixels, by default that of the first reference; `resolution` is the
    side of the square whose area references are brought to, 0 keeps each as large as it is.
    `vlm_resolution` is that in which the text encoder sees each of them, the last one holding for
    all that follow; 0, or none: as its family does.
    `sigmas` fall to 0 and go without `steps`. Image k of `count` is the image that `seed` + k makes
    alone. `layers` is how many a model paints that takes a picture apart. `together`: these are
    painted at once and see each other, instead of the one of `prompt` and `seed`.
    `edit`: the first reference is `edit.seen()`, and the pictures are its original with what was
    painted where it may change.
    """

    prompt: str
    references: tuple[Tensor, ...] = ()
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    seed: int = 0
    count: int = 1
    sampler: str = "euler"
    sigmas: tuple[float, ...] | None = None
    resolution: int | None = None
    layers: int = 4
    together: tuple[Member, ...] = ()
    vlm_resolution: tuple[int, ...] = ()
    edit: Edit | None = None

    def prompt_of(self, index: int) -> str:
        """The prompt of picture `index`."""
        return self.together[index].prompt if self.together else self.prompt

    @property
    def vlm_sides(self) -> tuple[int, ...]:
        """Of each reference; 0 where it has no size of its own for the encoder."""
        given = self.vlm_resolution or (0,)
        return tuple(given[min(k, len(given) - 1)] for k in range(len(self.references)))


@dataclass(frozen=True)
class Plan:
    """What a task comes to, before anything is computed."""

    size: tuple[int, int]  # of the pictures, in pixels
    padded: tuple[int, int]  # that the model makes; cropped to `size` at the right and the bottom
    references: tuple[tuple[int, int], ...]  # sizes that the references are brought to
    sigmas: tuple[float, ...]
    schedule: str
    reason: str
    guidance: float
    tokens: int  # of the target
    vlm_tokens: tuple[int, ...] = ()  # of the text encoder, where references have a size for it

    def shown(self, pixels_per_token: int) -> Iterator[str]:
        """How large each reference is read, and what that costs, in words."""
        for index, (width, height) in enumerate(self.references):
            tokens = f"{width * height // pixels_per_token**2} tokens"
            if self.vlm_tokens:
                tokens += f", {self.vlm_tokens[index]} of the text encoder"
            yield f"image {index + 1} at {width} x {height} ({tokens})"


@dataclass(frozen=True)
class Progress:
    """A step of image `image` (0-based) is done."""

    image: int
    state: State


@dataclass(frozen=True)
class Picture:
    """A finished picture (H, W, 3 or 4) in 0..1 on the CPU; `seed` makes it again alone.

    `layer` counts those that were painted together, the undermost first.
    """

    index: int
    seed: int
    pixels: Tensor
    layer: int = 0


def check(task: Task) -> None:
    """Raise SamplingError for what no model can do."""
    if task.count < 1:
        raise SamplingError(f"at least one picture must be made, {task.count} were asked for.")
    if task.together and task.count > 1:
        raise SamplingError("pictures that are painted at once are one of each; set count to 1.")
    if task.edit is not None:
        check_edit(task, task.edit)
    if task.layers < 1:
        raise SamplingError(f"at least one layer must be painted, {task.layers} were asked for.")
    if len(task.references) > MAX_REFERENCES:
        raise SamplingError(
            f"{len(task.references)} references were given; at most {MAX_REFERENCES} are read, so "
            "leave some out."
        )
    if task.resolution is not None and not 0 <= task.resolution <= MAX_RESOLUTION:
        raise SamplingError(
            f"the references' resolution is {task.resolution}; give a side in pixels, at most "
            f"{MAX_RESOLUTION}, or 0 to keep each as large as it is."
        )
    if wrong := [side for side in task.vlm_resolution if side and not 32 <= side <= MAX_VLM]:
        raise SamplingError(
            f"the text encoder cannot see a reference at {wrong[0]}; give the side of a square in "
            f"pixels, from 32 to {MAX_VLM}, or 0 for the usual size."
        )
    image_seed(task.seed, 0)
    sampler(task.sampler)
    for number, image in enumerate(task.references, start=1):
        if image.ndim != 3 or image.shape[-1] not in (3, 4) or not image.is_floating_point():
            given = (
                f"{' x '.join(map(str, image.shape))}, {str(image.dtype).removeprefix('torch.')}"
            )
            raise SamplingError(
                f"reference {number} is {given}; give height x width x 3 or 4 channels, as floats "
                "in 0..1."
            )


def check_edit(task: Task, edit: Edit) -> None:
    first = tuple(task.references[0].shape[1::-1]) if task.references else ()
    if first != edit.padded:
        raise SamplingError(
            "the first reference of an edit is what the model sees of the picture, "
            f"{edit.padded[0]} x {edit.padded[1]} pixels; give edit.seen()."
        )
    if task.size is not None or task.together:
        raise SamplingError(
            "an edited picture is as large as the original and is painted alone; leave out the "
            "size, and pictures that are painted at once."
        )


def sigmas_of(task: Task, schedule: Schedule, tokens: int) -> tuple[float, ...]:
    """The sigmas that were given, if they lead to a picture; else those of the schedule."""
    if task.sigmas is None:
        return tuple(sigmas_for(schedule, task.steps, tokens).tolist())
    sigmas = tuple(map(float, task.sigmas))
    steps = len(steps_of(sigmas))
    if steps < 1 or sigmas[-1] != 0:
        raise SamplingError(
            f"the sigmas must end at 0, the finished picture, after at least one step; got "
            f"{', '.join(f'{sigma:.4g}' for sigma in sigmas) or 'none'}."
        )
    if task.steps not in (None, steps):
        raise SamplingError(
            f"{task.steps} steps were asked for, but sigmas for {steps} were given; leave out one."
        )
    return sigmas
