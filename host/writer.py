"""Finished pictures as PNG files with their recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..model_loaders.family import Kind
from ..sampling.pipeline import Picture, Pipeline, Plan, Task
from . import recipe
from .edits import Editing
from .images import png_16_bit
from .pictures import PictureFile, png
from .recipe import Recipe, Source


def in_layers(pipeline: Pipeline) -> bool:
    """Whether it takes a picture apart."""
    frames = pipeline.family.frames
    return frames is not None and frames(pipeline.dit, 1) > 1


class Writer:
    """Turns finished pictures into PNG files with their recipe, for one folder."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        files: Sequence[PictureFile] = (),
        editing: Editing | None = None,
    ) -> None:
        parts = (pipeline.dit, pipeline.vae, pipeline.encoder)
        self.weights: dict[Kind, Source] = recipe.weights(parts, folder)
        self.loras = recipe.loras(pipeline.loras, folder)
        self.folder = folder
        self.references = self.sources(files)
        self.editing, mask = editing, editing.mask if editing else None
        self.mask = self.sources((mask,))[0] if mask else None
        self.made_with = recipe.made_with(pipeline.device)
        self.layered, dit = in_layers(pipeline), pipeline.dit.checkpoint.config
        self.variant = dit["variant"] if dit.get("variant_reason") == "chosen" else None

    def sources(self, files: Sequence[PictureFile]) -> tuple[Source, ...]:
        return tuple(recipe.source(f.path, f.sha256, self.folder) for f in files)

    def png(self, task: Task, plan: Plan, picture: Picture, image: Image.Image) -> bytes:
        text = {recipe.KEY: self.recipe(task, plan, picture).text()}
        if self.editing and self.editing.deep:
            return png_16_bit(picture.pixels, text)
        return png(image, text)

    def recipe(self, task: Task, plan: Plan, picture: Picture) -> Recipe:
        return Recipe(
            prompt=task.prompt_of(picture.index),
            negative=task.negative,
            references=self.references,
            size=plan.size,
            steps=len(plan.sigmas) - 1,
            guidance=plan.guidance,
            seed=picture.seed,
            sampler=task.sampler,
            sigmas=plan.sigmas,
            schedule=plan.schedule,
            resolution=task.resolution,
            layers=task.layers if self.layered else None,
            variant=self.variant,
            weights=self.weights,
            made_with=self.made_with,
            loras=self.loras,
            together=task.together,
            place=picture.index if task.together else None,
            vlm_resolution=task.vlm_resolution,
            edit=self.editing.where if self.editing else None,
            mask=self.mask,
        )
