"""Batches for training: prompts, references and targets, drawn by one process beside the trainer.

Rows of a batch have equally many tokens (prompts wait in buckets by length), so nothing is padded.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import world
from .prompts import Prompts

SIZE = 128
FULL = 0.6  # of the captions are full ones, whatever the world's odds of levels
FEW = 0.4  # of text-to-image scenes have one or two objects, whatever the world's odds
KINDS = (9, 11, 4, 3)  # classes of shape, colour, fill and size, 0 = no object


@dataclass(frozen=True)
class Sample:
    """One picture to make: what is said, what is shown, what should come out.

    `own`: the references are earlier pictures of a set, in use the model's own.
    """

    prompt: str
    references: tuple[world.Scene, ...]
    target: world.Scene
    own: bool = False


@dataclass
class Batch:
    """Rows of equal length.

    `ids` (B, L) of the conversation; `pictures` (B, R + 1, 128, 128, 4) uint8, target last;
    `labels` (B, R + 1, 4, 64) object classes per latent token; `layout` (B, 4, 9) per cell; `own`
    (B,) where the references are earlier pictures of a set.
    """

    ids: Tensor
    pictures: Tensor
    labels: Tensor
    layout: Tensor
    own: Tensor


def token_classes(scene: world.Scene) -> np.ndarray:
    """Shape, colour, fill and size of the object on each latent token, (4, 64) ids."""
    owner, classes = world.object_map(scene, SIZE, 8)
    table = np.concatenate([np.zeros((1, 4), np.int64), classes])
    return table[owner.reshape(-1)].T


def draw(
    rng: np.random.Generator,
    shares: tuple[float, ...],
    held_out: bool = False,
    level: int | None = None,
) -> Sample:
    """A random text-to-image, edit, composition or set sample; `shares` are their odds.

    Some prompts are left out, for guidance: then anything may come, or with a reference just that.
    """
    kind = rng.choice(len(shares), p=np.array(shares) / sum(shares))
    left_out = rng.random() < 0.08 and not held_out and level is None
    if kind == 0:
        count = int(rng.integers(1, 3)) if rng.random() < FEW else None
        scene = world.sample_scene(rng, count=count, held_out=held_out)
        level = 3 if level is None and rng.random() < FULL else level
        text = world.sample_caption(scene, rng, level=level)[0].text
        return Sample("" if left_out else text, (), scene)
    if kind == 1:
        edit = world.sample_edit(rng, held_out=held_out)
        if left_out:
            return Sample("", (edit.before,), edit.before)
        return Sample(edit.instruction.text, (edit.before,), edit.after)
    if kind == 3:
        return draw_panel(rng, held_out, left_out)
    made = world.sample_composition(rng, held_out=held_out)
    return Sample(made.instruction.text, made.references, made.target)


def draw_panel(rng: np.random.Generator, held_out: bool, left_out: bool) -> Sample:
    """A picture of a set after its first, which sees all before it, as the engine has it."""
    panels = world.sample_set(rng, held_out=held_out).panels
    place = int(rng.integers(1, len(panels)))
    seen = tuple(panel.scene for panel in panels[:place])
    if left_out:
        return Sample("", seen, seen[-1], own=True)
    return Sample(panels[place].caption.text, seen, panels[place].scene, own=True)


def collate(samples: list[Sample], ids: list[list[int]], draw_pictures: bool = True) -> Batch:
    """Rows as tensors; without pictures, `pictures` and `labels` are empty."""
    rows = [(*s.references, s.target) for s in samples] if draw_pictures else [() for _ in samples]
    count = len(rows[0])
    pictures = np.zeros((len(rows), count, SIZE, SIZE, 4), np.uint8)
    labels = np.zeros((len(rows), count, len(KINDS), 64), np.int64)
    for i, row in enumerate(rows):
        for j, scene in enumerate(row):
            pictures[i, j], labels[i, j] = world.render(scene, SIZE), token_classes(scene)
    layout = np.stack([np.stack(world.layout(s.target)).reshape(len(KINDS), 9) for s in samples])
    own = np.array([s.own for s in samples])
    return Batch(*(torch.from_numpy(a) for a in (np.array(ids), pictures, labels, layout, own)))


def batches(
    tokenizer: Path,
    seed: int,
    size: int,
    shares: tuple[float, ...],
    *,
    pictures: bool = True,
    level: int | None = None,
) -> Iterator[Batch]:
    """Endless batches of `size` rows; every row of one batch has the same length and references."""
    rng, prompts = np.random.default_rng(seed), Prompts(tokenizer)
    waiting: dict[tuple[int, int], list[tuple[Sample, list[int]]]] = defaultdict(list)
    while True:
        sample = draw(rng, shares, level=level)
        ids = prompts.ids(sample.prompt, [(SIZE, SIZE)] * len(sample.references))
        bucket = waiting[len(ids), len(sample.references)]
        bucket.append((sample, ids))
        if len(bucket) == size:
            yield collate([s for s, _ in bucket], [i for _, i in bucket], pictures)
            bucket.clear()


def _produce(out: multiprocessing.Queue, args: tuple, options: dict) -> None:
    torch.set_num_threads(1)
    for batch in batches(*args, **options):
        out.put([tensor.numpy() for tensor in vars(batch).values()])


class Feed:
    """Batches made in another process, a few ahead of the trainer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.queue = context.Queue(maxsize=6)
        self.process = context.Process(
            target=_produce, args=(self.queue, args, options), daemon=True
        )
        self.process.start()

    def __next__(self) -> Batch:
        while True:
            try:
                return Batch(*map(torch.from_numpy, self.queue.get(timeout=60)))
            except queue.Empty:
                if not self.process.is_alive():
                    raise RuntimeError("the process that draws training batches has died") from None
