"""What keeping the prefix over calls saves: ours against diffusers with its cache of one call.

Diffusers runs prompt and references in the first step of every call and keeps their keys and values
until its end. Ours keeps them in a store: another prompt over the same references runs its words,
another seed runs nothing, and each picture of a sequence runs only the picture before it. All that
the DiT does in a call is counted, with the hashing; the text encoder and the VAE are not.

`theory` is the ratio of multiplications that the two ways need, so what is missing to it is what
both do alike per call, and what the smaller products of a step lose in speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from ..model_loaders.families.qwen_image_21.sequence import SLOT
from ..sampling.prefix_store import PrefixStore
from ._dits import WORDS, Scene, config_of, random_dits
from .edit_references import LIMIT, euler, with_cache, without_cache
from .protocol import arguments, difference, interleave, show

HEAD = 5  # tokens before the first reference


class Material:
    """Random states and latents from which scenes are put together that share what they share."""

    def __init__(self, c: DiTConfig, side: int, references: int) -> None:
        self.c, self.side = c, side
        self.head = torch.randn(1, HEAD, c.context_dim)
        slots = side * side // SLOT
        self.shown = [torch.randn(1, slots + 2, c.context_dim) for _ in range(references)]
        self.latents = [torch.randn(1, c.in_channels, side, side) for _ in range(references)]
        self.words = self.new_words()

    def new_words(self) -> Tensor:
        return torch.randn(1, WORDS, self.c.context_dim)

    def scene(self, references: int, words: Tensor | None = None) -> Scene:
        """The first references and some words; a new target."""
        shown, side = self.shown[:references], self.side
        slots = [False] * HEAD
        for _ in shown:
            slots += [False, *[True] * (side * side // SLOT), False]
        return Scene(
            text=torch.cat([self.head, *shown, self.words if words is None else words], dim=1),
            slots=torch.tensor(slots + [False] * WORDS),
            references=self.latents[:references],
            x=torch.randn(1, self.c.in_channels, side, side),
            t=torch.tensor([0.7]),
        )


@dataclass(frozen=True)
class Work:
    """Multiplications of a call: products with weights, and attention."""

    c: DiTConfig
    tokens: int  # of the target, and of a reference
    steps: int

    def run(self, count: int, keys: int) -> float:
        """So many tokens that see so many keys, once through the network."""
        c = self.c
        weights = c.layers * (4 * c.dim**2 + 3 * c.dim * c.mlp_dim)
        return count * (weights + 2.0 * c.layers * c.dim * keys)

    def prefix_tokens(self, references: int) -> int:
        return HEAD + references * (self.tokens + 2) + WORDS

    def steps_of(self, references: int, steps: int) -> float:
        return steps * self.run(self.tokens, self.prefix_tokens(references) + self.tokens)

    def diffusers(self, references: int, cached: bool = True) -> float:
        """Attention in its first step is one product with a mask: everybody against everybody."""
        whole = self.prefix_tokens(references) + self.tokens
        full = self.run(whole, whole)
        return full + self.steps_of(references, self.steps - 1) if cached else self.steps * full

    def prefix(self, references: int, known: int = 0) -> float:
        """Ours, block by block, when the first `known` references are there already."""
        last = self.prefix_tokens(references)
        images = sum(
            self.run(self.tokens + 2, HEAD + (k + 1) * (self.tokens + 2))
            for k in range(known, references)
        )
        return images + self.run(WORDS + 2, last)


def make(ours: DiT, scene: Scene, steps: int, store: PrefixStore | None) -> Tensor:
    """A whole call of ours."""
    prefix = ours.prefix(scene.text, scene.slots, scene.references, scene.tokens, store)
    made = euler(lambda now, _: ours(now.x, now.t, prefix), scene, steps)
    if store is not None:
        store.trim()
    return made


@dataclass(frozen=True)
class Side:
    """A way to make `pictures`; `work` is what it takes in theory, for each of them."""

    run: Callable[[], Any]
    work: float
    pictures: int = 1


def table(sides: dict[str, Side], runs: int, errors: dict[str, float]) -> list[dict[str, object]]:
    """Seconds for a picture; the last side is what the others are compared with."""
    times = interleave({name: side.run for name, side in sides.items()}, runs)
    *_, (own, side) = sides.items()

    def rate(name: str, value: float) -> float:
        return value / sides[name].pictures

    return [
        {
            "program": name,
            "min s": rate(name, t.shortest),
            "median s": rate(name, t.median),
            "seedling is faster by, min": rate(name, t.shortest) / rate(own, times[own].shortest),
            "median": rate(name, t.median) / rate(own, times[own].median),
            "theory": sides[name].work / side.work,
            "difference": errors.get(name, 0.0),
        }
        for name, t in times.items()
    ]


def calls(nets: tuple[Any, DiT], m: Material, work: Work, runs: int, references: int) -> list:
    """Another prompt over the same references, and another seed."""
    (theirs, ours), steps = nets, work.steps
    store, cold = PrefixStore(1 << 40), PrefixStore(0)
    scene = m.scene(references)
    expected = without_cache(theirs, scene, steps)
    made = make(ours, scene, steps, store)
    errors = {
        "diffusers, its cache": difference(with_cache(theirs, scene, steps), expected, LIMIT),
        "seedling, known": difference(made, expected, LIMIT),
    }
    if not torch.equal(make(ours, scene, steps, store), made):
        raise SystemExit("what the store gave is not what was computed")
    if not torch.equal(make(ours, scene, steps, PrefixStore(0)), made):
        raise SystemExit("a warm call is not a cold call")
    peers = {
        "diffusers, no cache": Side(
            lambda: without_cache(theirs, scene, steps), work.diffusers(references, False)
        ),
        "diffusers, its cache": Side(
            lambda: with_cache(theirs, scene, steps), work.diffusers(references)
        ),
    }
    stepping = work.steps_of(references, steps)
    ways = {
        **peers,
        "seedling, nothing known": Side(
            lambda: make(ours, scene, steps, cold), work.prefix(references) + stepping
        ),
        "seedling, known": Side(
            lambda: make(ours, m.scene(references, m.new_words()), steps, store),
            work.prefix(references, references) + stepping,
        ),
    }
    prompt = table(ways, runs, errors)
    ways = {
        "diffusers, its cache": peers["diffusers, its cache"],
        "seedling, known": Side(
            lambda: make(ours, replace(scene, x=torch.randn_like(scene.x)), steps, store), stepping
        ),
    }
    return [prompt, table(ways, runs, errors)]


def seeds(
    nets: tuple[Any, DiT], m: Material, work: Work, runs: int, references: int, count: int
) -> list[dict[str, object]]:
    """Many seeds in one go, nothing known before, for each picture."""
    (theirs, ours), steps = nets, work.steps
    scene = m.scene(references)

    def together() -> None:
        store = PrefixStore(1 << 40)
        for _ in range(count):
            make(ours, replace(scene, x=torch.randn_like(scene.x)), steps, store)

    mine = work.prefix(references) / count + work.steps_of(references, steps)
    sides = {
        "diffusers, its cache": Side(
            lambda: with_cache(theirs, scene, steps), work.diffusers(references)
        ),
        f"seedling, {count} seeds": Side(together, mine, count),
    }
    return table(sides, runs, {})


def branches(
    nets: tuple[Any, DiT], m: Material, work: Work, runs: int, references: int
) -> tuple[list[dict[str, object]], float]:
    """The prefix of both branches of guidance, nothing known before; share of memory with one."""
    _, ours = nets
    scene, words = m.scene(references), m.new_words()
    other = m.scene(references, words)

    def both(store: PrefixStore | None) -> Any:
        given = [(s.text, s.slots, s.references, s.tokens) for s in (scene, other)]
        return [ours.prefix(*arguments, store) for arguments in given]

    one = work.prefix(references)
    sides = {
        "two prefixes": Side(lambda: both(None), 2 * one),
        "one, shared": Side(
            lambda: both(PrefixStore(1 << 40)), one + work.prefix(references, references)
        ),
    }
    store = PrefixStore(1 << 40)
    kept = both(store)
    apart = sum(prefix.kept.bytes for prefix in kept)
    return table(sides, runs, {}), store.held / apart


def sequence(
    nets: tuple[Any, DiT], m: Material, work: Work, runs: int, references: int, count: int
) -> list[dict[str, object]]:
    """Each picture a reference of the next, nothing known before, for each picture."""
    (theirs, ours), steps = nets, work.steps
    scenes = [m.scene(references + k, m.new_words()) for k in range(count)]
    expected = with_cache(theirs, scenes[-1], steps)

    def mine() -> Tensor:
        store = PrefixStore(1 << 40)
        *_, last = (make(ours, scene, steps, store) for scene in scenes)
        return last

    error = difference(mine(), expected, LIMIT)
    theory = [work.diffusers(references + k) for k in range(count)]
    own = work.prefix(references) + sum(
        work.prefix(references + k, references + k - 1) for k in range(1, count)
    )
    own += sum(work.steps_of(references + k, steps) for k in range(count))
    sides = {
        "diffusers, its cache": Side(
            lambda: [with_cache(theirs, scene, steps) for scene in scenes],
            sum(theory) / count,
            count,
        ),
        "seedling, sequential": Side(mine, own / count, count),
    }
    return table(sides, runs, {"seedling, sequential": error})


def counted(ours: DiT, m: Material, references: int) -> list[dict[str, object]]:
    """Tokens of the prefix that ran, of all; and bytes of memory against those of what is kept."""
    store = PrefixStore(1 << 40)
    swapped = Material(m.c, m.side, references)
    swapped.head, swapped.words = m.head, m.words
    swapped.shown[: references - 1] = m.shown[: references - 1]
    swapped.latents[: references - 1] = m.latents[: references - 1]
    scenes = {
        "first call": m.scene(references),
        "nothing changed": m.scene(references),
        "new prompt": m.scene(references, m.new_words()),
        "last reference swapped": swapped.scene(references),
    }
    rows = []
    for name, scene in scenes.items():
        store.counts.clear()
        prefix = ours.prefix(scene.text, scene.slots, scene.references, scene.tokens, store)
        ours(scene.x, scene.t, prefix)
        seen = store.counts["prefix"]
        c, target = m.c, scene.tokens
        held = store.held + 2 * c.layers * c.dim * 4 * target
        rows.append(
            {
                "call": name,
                "tokens": seen.asked,
                "computed": seen.computed,
                "memory / keys and values": store.bytes / held,
            }
        )
    return rows


@torch.no_grad()
def measure(args: Any) -> Iterator[tuple[str, Sequence[dict[str, object]]]]:
    """Every table with its title, as soon as it is measured."""
    references, runs = args.references, args.runs
    nets = random_dits(config_of(args.layers, args.heads))
    ours = nets[1]
    m = Material(ours.config, args.side, max(references, 2 + args.pictures))
    work = Work(ours.config, args.side**2, args.steps)
    yield "Tokens of the prefix that are computed", counted(ours, m, references)
    prompt, seed = calls(nets, m, work, runs, references)
    yield f"{references} references, a new prompt", prompt
    yield f"{references} references, a new seed", seed
    made = seeds(nets, m, work, runs, references, args.seeds)
    yield f"{references} references, {args.seeds} seeds in one go, for each picture", made
    shared, share = branches(nets, m, work, runs, references)
    yield f"Prefixes of both branches of guidance; memory of shared ones: {share:.2f}", shared
    made = sequence(nets, m, work, runs, 2, args.pictures)
    yield f"A sequence of {args.pictures} with 2 references, for each picture", made


def main() -> None:
    tiny = {"layers": 2, "heads": 1, "side": 4, "references": 2, "seeds": 2, "pictures": 2}
    args = arguments(
        __doc__, tiny=tiny, layers=8, heads=4, side=32, references=4, steps=4, seeds=8, pictures=6
    )
    size = f"{args.steps} steps, {args.side**2} tokens, {args.layers} x {args.heads * 128}, fp32"
    for title, rows in measure(args):
        show(f"{title} ({size})", rows, args.json, ["theory: ratio of multiplications"])


if __name__ == "__main__":
    main()
