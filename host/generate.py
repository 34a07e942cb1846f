"""`seedling generate`: from what the user said to PNG files, each with its recipe inside."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..model_loaders.family import Kind
from ..model_loaders.lora import open_lora
from ..sampling.pipeline import Picture, Pipeline, Plan, Task
from ..sampling.pipeline import check as check_task
from ..sampling.prefix_store import PrefixStore
from ..sampling.schedules import check_steps
from ..sampling.sizes import parse_size
from . import asked, models, recipe
from .edits import Places, editing_of
from .headline import headline
from .pictures import FORMATS, PictureFile, png, read_picture, to_image, write_at, write_new
from .recipe import Recipe
from .series import Series
from .sheet import Tile, contact_sheet, thumbnail
from .vram import vram_of
from .writer import Writer, in_layers

Say = Callable[[str], None]

STEM = "seedling"
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"


class OrderError(ValueError):
    """An order that cannot be carried out; the message says what to change."""


@dataclass(frozen=True)
class Order:
    """What the user asked for. None: as the repeated picture has it, else as the checkpoint likes.

    `count` pictures are made of each prompt; of a set in all, 0 for as many as its prompts say.
    `repeat` is a picture whose recipe is followed. Each of `loras` is a path or a name, and after a
    colon a strength. `variant` is as for `load_dit`, `layers` as in `Task`, `cache` as for
    `PrefixStore.of`, `vram` as for `vram_of`. `series`: a set, as `plan_set` has it, which goes on
    behind its finished pictures `earlier`; with `same_seed` all begin with the same noise.
    `places`: where the first reference may change; the rest of it keeps its bits.
    """

    prompts: tuple[str, ...] = ()
    references: tuple[Path, ...] = ()
    repeat: Path | None = None
    weights: models.Choice = models.Choice()
    loras: tuple[str, ...] = ()
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int | None = None
    sampler: str | None = None
    resolution: int | None = None
    vlm_resolution: tuple[int, ...] = ()
    variant: str | None = None
    layers: int | None = None
    count: int = 1
    device: str = "auto"
    cache: str = "auto"
    vram: str = "auto"
    series: str | None = None
    earlier: tuple[Path, ...] = ()
    same_seed: bool = False
    places: Places = Places()
    out: Path = Path()
    sheet: bool = False


@dataclass(frozen=True)
class Target:
    """Where pictures go: into `folder`, counting up after `stem`, or into one file."""

    folder: Path
    stem: str = STEM
    file: Path | None = None

    def save(self, data: bytes) -> Path:
        if self.file is None:
            return write_new(self.folder, self.stem, data)
        if not write_at(self.file, data):
            raise _taken(self.file)
        return self.file


@dataclass(frozen=True)
class Made:
    """A finished picture, and how long it took: everything, and each step."""

    picture: Picture
    seconds: float
    per_step: float


def generate(order: Order, saved: list[Path], say: Say) -> int:
    """Carry out `order`. Each file is appended to `saved` as soon as it is complete. How many
    pictures failed that no other one needs; what else fails is raised.

    Everything that can be known beforehand is checked before any weight is read.
    """
    old = repeated(order)
    prompts = order.prompts or ((old.prompt,) if old else ())
    check(order, prompts)
    series = Series(order, prompts) if order.series else None
    target = target_of(order.out, series.left if series else len(prompts) * order.count)
    files = references_of(order, old)
    editing = editing_of(order, old, files)
    loras, store = loras_of(order, old, say), PrefixStore.of(order.cache)
    variant = order.variant or (old.variant if old and order.weights.dit is None else None)
    paths, device = weights_of(order, old, say), device_of(order.device)
    vram = vram_of(order.vram, device, paths.values())
    pipeline = load(
        paths, device, say, loras=loras, variant=variant, vram=vram, dtype=order.weights.dtype
    )
    pipeline.store = store
    if layered(pipeline, order.layers) and target.file:
        target = Target(target.folder, target.file.stem)
    seed = secrets.randbelow(1 << 32) if order.seed is None else order.seed
    wanted = replace(order, seed=old.seed if old and order.seed is None else seed)
    orders = [replace(wanted, prompts=(p,)) for p in prompts]
    orders = series.orders(wanted) if series else orders
    tasks = [task_of(one, old, pipeline, files) for one in orders]
    if series:
        tasks = [replace(task, together=series.plan.together) for task in tasks]
    tasks = editing.tasks(tasks, pipeline) if editing else tasks
    plans = [plan_of(pipeline, task, old, order.repeat) for task in tasks]
    say(headline(pipeline, tasks, plans[0]))
    writer = Writer(pipeline, target.folder, files, editing)
    tiles: list[Tile] = []
    with progress_bar(sum((len(plan.sigmas) - 1) * tasks[0].count for plan in plans)) as bar:
        for task, plan in zip(tasks, plans, strict=True):
            if series:
                task = series.seen(task, plan)
                writer.references = writer.sources((*files, *series.files))
            each = pictures(pipeline, task, bar)
            for made in series.without_failures(each, say) if series else each:
                if old and old.place not in (None, made.picture.index):
                    continue  # another one of those that were painted at once
                image = to_image(made.picture.pixels)
                saved.append(target.save(writer.png(task, plan, made.picture, image)))
                say(f"{saved[-1]}  ({made.seconds:.1f} s, {made.per_step:.3g} s/it)")
                if editing:
                    say(editing.report(saved[-1]))
                if series:
                    series.add(saved[-1])
                if order.sheet:
                    tiles.append(tile_of(saved[-1], task, made.picture, image))
    if tiles:
        saved.append(write_new(target.folder, f"{target.stem}_sheet", png(contact_sheet(tiles))))
        say(f"{saved[-1]}  (contact sheet)")
    say(f"Prompts and references {store.report()}.")
    if series and series.failed and not saved:
        raise series.failed[0]
    return len(series.failed) if series else 0


def tile_of(file: Path, task: Task, picture: Picture, image: Image.Image) -> Tile:
    note = f"{file.name}, seed {picture.seed}"
    return Tile((thumbnail(image),), task.prompt_of(picture.index), note)


def repeated(order: Order) -> Recipe | None:
    """What the picture says that is to be repeated."""
    old = recipe.read_recipe(order.repeat) if order.repeat else None
    if old and old.together and (order.prompts or order.seed is not None or order.count > 1):
        raise OrderError(
            f"{order.repeat} was painted at once with {len(old.together) - 1} others that it sees; "
            "it can be repeated with its own prompts and seeds only, so leave out PROMPT, --seed "
            "and --count."
        )
    return old


def check(order: Order, prompts: Sequence[str]) -> None:
    """Raise a ValueError of ours for an order that cannot work with any model."""
    if not prompts:
        raise OrderError('say what to make: seedling generate "a red star left of a blue circle".')
    for text in (*prompts, order.negative or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise OrderError(f"the prompt {ascii(text)} is not valid Unicode; type it again.")
    if order.guidance is not None and not math.isfinite(order.guidance):
        raise OrderError(f"the guidance must be a number such as 2.5, {order.guidance} was given.")
    if order.steps is not None:
        check_steps(order.steps)
    if order.size is not None:
        parse_size(order.size)
    known: dict[str, Any] = {"sampler": order.sampler or "euler", "seed": order.seed or 0}
    layers = Task.layers if order.layers is None else order.layers
    known |= {"resolution": order.resolution, "vlm_resolution": order.vlm_resolution}
    check_task(Task("", count=order.count or int(bool(order.series)), layers=layers, **known))


def target_of(out: Path, count: int) -> Target:
    """A path that ends as pictures do is a file, or, for several pictures, what their names begin
    with; everything else is a folder. Nothing that exists is overwritten.
    """
    place = next(p for p in (out, *out.parents) if p.exists() or p == Path(p.anchor))
    if not os.access(place, os.W_OK):
        raise OrderError(f"--out {out}: {place} cannot be written to; choose another place.")
    if place != out and not place.is_dir():
        raise OrderError(f"--out {out}: {place} is no folder; choose another place.")
    ending = out.suffix.lower().removeprefix(".")
    is_picture = ending.upper() in (*FORMATS, "JPG", "JFIF", "TIF")
    if out.is_dir() or not is_picture:
        if out.exists() and not out.is_dir():
            raise OrderError(f"--out {out} is a file that exists already; name a PNG or a folder.")
        return Target(out)
    if ending != "png":
        raise OrderError(f"--out {out}: only PNG holds the recipe; call it {out.stem}.png.")
    if count > 1:
        return Target(out.parent, out.stem)
    if out.exists():
        raise _taken(out)
    return Target(out.parent, out.stem, out)


def _taken(out: Path) -> OrderError:
    return OrderError(f"{out} exists already and is never overwritten; choose another name.")


def references_of(order: Order, old: Recipe | None) -> tuple[PictureFile, ...]:
    if order.references or not (old and order.repeat):
        return tuple(read_picture(path) for path in order.references)
    return recipe.find_references(old, order.repeat)


def weights_of(order: Order, old: Recipe | None, say: Say) -> dict[Kind, Path]:
    """The three files. A repeated picture's own ones, but for those that the user names anew."""
    if old is None or order.repeat is None:
        return models.choose(order.weights)
    say(f"Repeating {order.repeat}, made with {_listing(old.made_with)}.")
    choice = order.weights
    given: list[Kind] = [kind for kind in models.KINDS if choice.get(kind)]
    found = recipe.find_weights(old, order.repeat, given, choice.comfyui)
    for kind in given:
        found[kind] = models.look_up(kind, str(choice.get(kind)), choice.comfyui)
        say(f"Note: with {found[kind]} instead of {old.weights[kind].file}, as --{kind} says.")
    return found


def loras_of(order: Order, old: Recipe | None, say: Say) -> tuple[tuple[Path, float], ...]:
    """The LoRA files with their strengths: those that were said, else the repeated picture's."""
    if not order.loras and old and order.repeat:
        return recipe.find_loras(old, order.repeat, order.weights.comfyui)
    if order.loras and old and old.loras:
        say(f"Note: without {' and '.join(s.file for s in old.loras)}, as --lora says.")
    found = tuple(models.lora_of(word, order.weights.comfyui) for word in order.loras)
    for path, _ in found:
        open_lora(path)  # a file that is none is told before any weight is read
    return found


def device_of(name: str) -> torch.device:
    """The device called `name`; OrderError when there is none that computes."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.zeros(1, device=device)
            return device
        why = "it has no memory"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].rstrip(".")
    raise OrderError(f"--device {name} cannot be used here ({why}); try cpu, or leave it out.")


def load(
    paths: dict[Kind, Path],
    device: torch.device,
    say: Say,
    **settings: Any,
) -> Pipeline:
    """Load the three files, with `settings` as for `Pipeline.load`; say what a user should know."""
    files = paths["dit"], paths["vae"], paths["encoder"]
    pipeline = Pipeline.load(*files, device=device, **settings)
    parts = (pipeline.dit, pipeline.vae, pipeline.encoder)
    for licence in dict.fromkeys(part.licence for part in parts):
        if not licence.commercial:
            say(f"{licence.name}, non-commercial. {licence.notice}")
    for part in parts:
        for note in asked.notes(part):
            say(f"Note: {part.checkpoint.name}: {note}")
    for lora, _ in pipeline.loras.values():
        if lora.unmatched:
            say(f"Note: {lora.unmatched}")
    return pipeline


def layered(pipeline: Pipeline, layers: int | None = None) -> bool:
    """Whether it takes a picture apart. Raises OrderError for `layers` of one that does not."""
    if in_layers(pipeline):
        return True
    if layers is not None:
        raise OrderError(
            f"--layers is for models that paint in layers, {pipeline.dit.checkpoint.name} is none."
        )
    return False


def task_of(
    order: Order, old: Recipe | None, pipeline: Pipeline, files: Sequence[PictureFile]
) -> Task:
    """The task for the one prompt in `order`, whose seed is set: what is said, else what was."""
    assert order.seed is not None and len(order.prompts) == 1
    area = pipeline.dit.checkpoint.config.get("resolution", 1024) ** 2
    size = order.size and parse_size(order.size, area=area, multiple=pipeline.family.step)
    task = Task(
        prompt=order.prompts[0],
        references=tuple(file.pixels for file in files),
        size=(size.width, size.height) if size else old.size if old else None,
        negative=order.negative if order.negative is not None else old.negative if old else "",
        seed=order.seed,
        count=order.count,
        sampler=order.sampler or (old.sampler if old else "euler"),
        steps=order.steps,
        guidance=order.guidance,
        resolution=order.resolution,
        layers=order.layers or (old.layers if old and old.layers else Task.layers),
        together=old.together if old else (),
        vlm_resolution=order.vlm_resolution or (old.vlm_resolution if old else ()),
    )
    if old is None or not same_dit(old, pipeline):  # another model has its own ways
        return task
    same_sigmas = order.steps is None and order.size is None
    return replace(
        task,
        steps=old.steps if order.steps is None else order.steps,
        guidance=old.guidance if order.guidance is None else order.guidance,
        resolution=old.resolution if order.resolution is None else order.resolution,
        sigmas=old.sigmas if same_sigmas else None,
    )


def plan_of(pipeline: Pipeline, task: Task, old: Recipe | None, picture: Path | None) -> Plan:
    plan = pipeline.plan(task)
    if (
        old and task.sigmas is not None
    ):  # they are the old picture's, and so is what they are called
        plan = replace(plan, schedule=old.schedule, reason=f"as in {picture}")
    return plan


def same_dit(old: Recipe, pipeline: Pipeline) -> bool:
    return old.weights["dit"].hash == models.fingerprint(pipeline.dit.checkpoint)


def progress_bar(total: int) -> Any:
    """A bar over all steps with seconds per step; none where nobody looks (a pipe, a log file)."""
    return tqdm(total=total, bar_format=BAR, desc="steps", disable=None, dynamic_ncols=True)


def pictures(pipeline: Pipeline, task: Task, bar: Any) -> Iterator[Made]:
    """Run `task`, the bar one further with every step."""
    begin, steps = time.perf_counter(), []
    try:
        for event in pipeline.run(task):
            now = time.perf_counter()
            if not isinstance(event, Picture):
                bar.update()
                steps.append(now)
                continue
            # The first step also waited for prompt and references.
            per_step = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else now - begin
            yield Made(event, now - begin, per_step)
            begin, steps = time.perf_counter(), []
    except torch.OutOfMemoryError as error:
        raise OrderError(
            "the device has not enough memory for this; make a smaller picture (--size), give "
            "fewer or smaller references (--resolution), or use --device cpu."
        ) from error


def _listing(words: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in words.items())
