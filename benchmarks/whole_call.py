"""Whole calls with references, from pixels to pixels: ours against diffusers' pipeline.

Prompt and pictures go in, a picture comes out: vision tower, text encoder, VAE and DiT of both
programs, in the published proportions (`_pipelines.py`). Diffusers keeps the prefix within one
call, which is its default; ours keeps it, the encoder's states and latents from call to call.

`work` is the ratio of multiplications that the two do, counted by torch while they run: what the
measured ratio would be if both did them equally fast. `--part N` measures one of the tables;
with `--runs 1` each side runs once and nothing is counted, with `--runs 0` nothing is timed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sampling.noise import noise
from ..sampling.pipeline import Picture, Pipeline, Task
from ..sampling.prefix_store import PrefixStore
from ..sampling.sets import Failure, plan_set, run_set
from . import _pipelines
from ._dits import config_of
from ._pipelines import PARTS, Meter, meter_of
from .protocol import Times, arguments, difference, interleave, keep_freed_memory, show

LIMIT = 1e-4  # of the picture's range
ROOM = 1 << 40
NEGATIVE = "blurred, low quality"


@dataclass(frozen=True)
class Case:
    """What all calls share."""

    theirs: Any
    ours: Pipeline
    meters: dict[str, Meter]
    pictures: list[Image.Image]
    side: int  # pixels
    steps: int
    runs: int

    def call(self, prompt: str, images: Sequence[Image.Image], seed: int = 0, **more: Any) -> Any:
        """A whole call of diffusers' pipeline; a picture (H, W, 4) in 0..1."""
        latents = noise(seed, 0, (64, self.side // 16, self.side // 16))
        made = self.theirs(
            prompt=prompt, image=list(images), width=self.side, height=self.side,
            num_inference_steps=self.steps, latents=latents.flatten(1).T[None],
            output_resolution=self.side, output_type="np", **more,
        )  # fmt: skip
        return torch.from_numpy(made.images[0])

    def task(self, prompt: str, shown: int, **more: Any) -> Task:
        """The same for ours, over the first `shown` pictures."""
        images = tuple(tensor(image) for image in self.pictures[:shown])
        size = self.side, self.side
        return Task(prompt, images, size, self.steps, 1.0, resolution=self.side, **more)

    def make(self, task: Task, store: PrefixStore | None = None) -> list[Tensor]:
        """A whole call of ours; without a store nothing is known before and nothing kept."""
        self.ours.store = store or PrefixStore(0)
        return [event.pixels for event in self.ours.run(task) if isinstance(event, Picture)]


@dataclass(frozen=True)
class Side:
    """A way to make `pictures`. `prepare` is what is known before, and not counted."""

    run: Callable[[], Any]
    pictures: int = 1


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def image_of(picture: Any) -> Image.Image:
    return Image.fromarray((np.asarray(picture) * 255).round().astype(np.uint8))


def words(number: int) -> str:
    """A prompt of always as many tokens, which is bytes here, and never the same twice."""
    return f"the fox of <image1> in the house of <image2>, day {number:08d}"


def table(case: Case, sides: dict[str, Side]) -> list[dict[str, object]]:
    """Seconds for a picture, and what each part takes of them; the last side is ours."""
    shares: dict[str, dict[str, float]] = {name: dict.fromkeys(PARTS, 0.0) for name in sides}

    def metered(name: str, side: Side) -> None:
        meter = _meter(case, name)
        meter.clear()
        start = clock()
        side.run()
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in meter.seconds.items())
        print(f"{name}: {clock() - start:.3f} s ({parts})", file=sys.stderr, flush=True)
        for part in PARTS:
            shares[name][part] += meter.seconds[part]

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    # The whole time of a side; what its parts take of it is summed beside it.
    ways = {name: (lambda n=name, s=side: metered(n, s)) for name, side in sides.items()}
    times = interleave(ways, case.runs) if case.runs > 1 else once(ways, case.runs)
    work = dict.fromkeys(sides, float("nan"))
    if case.runs != 1:
        work = {name: _counted(case, name, side) for name, side in sides.items()}
    *_, (own, last) = sides.items()
    rows = []
    for name, t in times.items():
        per = sides[name].pictures
        parts = {part: shares[name][part] / len(t.seconds) / per for part in PARTS}
        rows.append(
            {
                "program": name,
                "median s": t.median / per,
                "seedling is faster by, median": t.median / per * last.pictures / times[own].median,
                "min": t.shortest / per * last.pictures / times[own].shortest,
                "work": work[name] / per * last.pictures / work[own],
                **{f"{part} s": seconds for part, seconds in parts.items()},
                "rest s": sum(t.seconds) / len(t.seconds) / per - sum(parts.values()),
            }
        )
    return rows


def once(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, Times]:
    """Each way once, in turn: for sides of minutes. Not at all for 0 runs."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    keep_freed_memory()
    times = {}
    for name, way in ways.items():
        start = clock()
        for _ in range(runs):
            way()
        times[name] = Times([clock() - start if runs else float("nan")])
    return times


def _meter(case: Case, name: str) -> Meter:
    return case.meters["ours" if name.startswith("seedling") else "theirs"]


def _counted(case: Case, name: str, side: Side) -> float:
    meter = _meter(case, name)
    meter.clear()
    meter.counting = True
    side.run()
    meter.counting = False
    return sum(meter.work.values())


def agreed(case: Case, count: int) -> float:
    """Ours, cold and warm, against diffusers; the run ends when they do not agree."""
    store, task = PrefixStore(ROOM), case.task(words(0), count)
    expected = case.call(words(0), case.pictures[:count])
    cold, *_ = case.make(task, store)
    warm, *_ = case.make(task, store)
    if not torch.equal(cold, warm):
        raise SystemExit("a warm call is not a cold call")
    return difference(cold[..., :3], expected[..., :3], LIMIT)


def calls(case: Case, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Side]]]]:
    """Titles of the tables with one picture a call, and how their sides are made."""
    images, store = case.pictures[:count], PrefixStore(ROOM)
    number = iter(range(1, 1 << 30))
    peer = Side(lambda: case.call(words(next(number)), images))

    def prompt() -> dict[str, Side]:
        case.make(case.task(words(0), count), store)
        return {
            "diffusers, no cache": Side(
                lambda: case.call(words(next(number)), images, use_kv_cache=False)
            ),
            "diffusers, its cache": peer,
            "seedling, nothing known": Side(lambda: case.make(case.task(words(0), count))),
            "seedling, known": Side(
                lambda: case.make(case.task(words(next(number)), count), store)
            ),
        }

    def seed() -> dict[str, Side]:
        case.make(case.task(words(0), count), store)
        return {
            "diffusers, its cache": Side(lambda: case.call(words(0), images, next(number))),
            "seedling, known": Side(
                lambda: case.make(case.task(words(0), count, seed=next(number)), store)
            ),
        }

    def guided() -> dict[str, Side]:
        more = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}
        task = case.task(words(0), count, negative=NEGATIVE)
        task = Task(**{**vars(task), "guidance": 2.5})
        return {
            "diffusers, its cache": Side(lambda: case.call(words(0), images, **more)),
            "seedling, nothing known": Side(lambda: case.make(task, PrefixStore(ROOM))),
        }

    yield f"{count} references, a new prompt", prompt
    yield f"{count} references, a new seed", seed
    yield f"{count} references, guidance, nothing known", guided


def seeds(case: Case, count: int, many: int) -> dict[str, Side]:
    images = case.pictures[:count]
    return {
        "diffusers, its cache": Side(lambda: case.call(words(0), images)),
        f"seedling, {many} seeds": Side(
            lambda: case.make(case.task(words(0), count, count=many), PrefixStore(ROOM)), many
        ),
    }


def prefill(case: Case, count: int) -> Callable[..., list[Any]]:
    """Has encoder and DiT read references with a prompt and with a negative one, each with a store
    of its own or the same: the prefixes. The references' latents are there."""
    case.ours.store = PrefixStore(ROOM)
    ours, task = case.ours, case.task(words(0), count)
    plan = ours.plan(task)
    shown = ours._references(task, plan)

    def read(*stores: PrefixStore) -> list[Any]:
        return [
            ours.family.prefix(
                ours.dit.module, ours.encoder.module, text, *shown, room=plan.tokens,
                dtype=torch.float32, store=store,
            )
            for text, store in zip((words(0), NEGATIVE), stores, strict=True)
        ]  # fmt: skip

    return read


def branches(case: Case, count: int) -> dict[str, Side]:
    """The prefill of both branches of guidance: each on its own, and over shared references."""
    read = prefill(case, count)

    def own(shared: bool) -> None:
        first = PrefixStore(ROOM)
        read(first, first if shared else PrefixStore(ROOM))

    return {
        "seedling, apart": Side(lambda: own(False)), "seedling, shared": Side(lambda: own(True)),
    }  # fmt: skip


def branch_bytes(case: Case, count: int) -> str:
    """Keys and values of both branches in the DiT, of diffusers and ours."""
    caches: dict[int, Any] = {}

    def catch(_: Any, __: Any, given: dict[str, Any]) -> None:
        caches[id(given["kv_cache"])] = given["kv_cache"]

    hook = case.theirs.transformer.register_forward_pre_hook(catch, with_kwargs=True)
    replace(case, steps=1).call(
        words(0), case.pictures[:count], negative_prompt=NEGATIVE, true_cfg_scale=2.5
    )
    hook.remove()
    theirs = sum(x.k.nbytes + x.v.nbytes for cache in caches.values() for x in cache.layer_caches)
    store = PrefixStore(ROOM)
    kept = [prefix.kept for prefix in prefill(case, count)(store, store)]
    ours = sum({id(block): block.bytes for one in kept for block in one.blocks}.values())
    return (
        f"keys and values of both branches: diffusers {theirs / 1e6:.1f} MB, seedling "
        f"{ours / 1e6:.1f} MB, {ours / theirs:.2f} of that"
    )


def sequence(case: Case, count: int, many: int) -> dict[str, Side]:
    """Each picture a reference of the next; diffusers is given it in its next call."""

    def peer() -> None:
        images = case.pictures[:count]
        for k in range(many):
            images = [*images, image_of(case.call(words(k), images, k))]

    def own() -> None:
        case.ours.store = PrefixStore(ROOM)
        plan = plan_set("\n".join(map(words, range(many))), many, "sequential", references=count)
        for event in run_set(case.ours, case.task("", count), plan):
            if isinstance(event, Failure):
                raise event.error

    return {
        "diffusers, its cache": Side(peer, many), "seedling, sequential": Side(own, many),
    }  # fmt: skip


@torch.no_grad()
def measure(args: Any, folder: Path) -> Iterator[tuple[str, list[dict[str, object]], list[str]]]:
    """Every table with its title and notes, as soon as it is measured."""
    references, side = args.references, args.side * 16
    _pipelines.write(folder, config_of(args.layers, args.heads))
    theirs, ours = _pipelines.theirs(folder), _pipelines.ours(folder)
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(max(references, 2))
    ]
    meters = {"theirs": meter_of(theirs), "ours": meter_of(ours)}
    case = Case(theirs, ours, meters, pictures, side, args.steps, args.runs)
    note = f"difference to diffusers, of the range: {agreed(case, 2):.2g}; warm to cold: 0"
    made = [*calls(case, references)]
    made.append((f"{references} references, {args.seeds} seeds in one go, for each picture",
                 lambda: seeds(case, references, args.seeds)))  # fmt: skip
    made.append((f"A sequence of {args.pictures} with 2 references, for each picture",
                 lambda: sequence(case, 2, args.pictures)))  # fmt: skip
    both = f"{references} references, the prefill of both branches of guidance"
    made.append((both, lambda: branches(case, references)))
    for number, (title, sides) in enumerate(made, start=1):
        if args.part in (0, number):
            notes = [note, *([branch_bytes(case, references)] if title == both else [])]
            yield title, table(case, sides()), notes


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "side": 4, "references": 2, "seeds": 2, "pictures": 2}
    args = arguments(
        __doc__, tiny=tiny, layers=8, heads=4, side=16, references=4, steps=4, seeds=8, pictures=6,
        part=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        size = f"{args.steps} steps, {args.side**2} tokens, {args.layers} x {args.heads * 128}"
        for title, rows, notes in measure(args, Path(folder)):
            show(f"{title} ({size}, fp32)", rows, args.json, notes)


if __name__ == "__main__":
    main()
