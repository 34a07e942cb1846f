"""Latents as the trained DiT draws them, beside the pictures that they should have become.

A decoder that has only seen true latents repeats every lump of a drawn shape. So it is also shown
pictures whose latents the DiT has redrawn: noised to a time at which the layout still stands
(SDEdit, Meng et al. 2022), then sampled back. What differs from the true latents is what the DiT
draws badly, and the decoder, with the true picture as its aim, learns to mend it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..sampling.samplers import euler
from .data import Feed
from .projection import Projection
from .prompts import Prompts
from .runs import Run
from .transformer import Student

TIMES = (0.15, 0.75)  # noise added before a picture is drawn again
STEPS = 4
SHARES = (0.7, 0.2, 0.1)


class Redrawer:
    """Draws rows of the world again with the averaged student of a run."""

    def __init__(self, folder: Path, batch: int = 16) -> None:
        state = Run(folder, "student").load()
        if state is None:
            raise SystemExit(f"{folder} has no trained student: run the stage `student` first")
        words = folder / "tokenizer.json"
        self.prompts, self.projection = Prompts(words), Projection(folder)
        self.student = Student(self.prompts).eval()
        self.student.load_state_dict(state.get("average", state["weights"]))
        self.feed = Feed(words, 90000 + state.get("step", 0), batch, SHARES)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        """Pictures (B, 4, H, W) in -1..1 and their redrawn latents (B, 64, H / 16, W / 16)."""
        rows, student = next(self.feed), self.student
        pixels = rows.pictures.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        b, images = pixels.shape[:2]
        latents = self.projection.encode(pixels.flatten(0, 1)).unflatten(0, (b, images))
        hidden, slots = self.prompts.encode(student.reader, rows.ids, rows.pictures[:, :-1])
        prefix = student.dit.prefix(hidden, slots, [latents[:, i] for i in range(images - 1)])
        low, high = TIMES
        start = low + (high - low) * float(torch.rand(()))
        x = torch.lerp(latents[:, -1], torch.randn_like(latents[:, -1]), start)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return student.dit(x, torch.full((b,), sigma), prefix)

        for state in euler(velocity, x, torch.linspace(start, 0, STEPS + 1)):
            x = state.x
        student.middle.clear()
        return pixels[:, -1], x
