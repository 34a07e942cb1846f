"""Control signals: what a picture says about the next one, as a reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sampling import SamplingError
from ..sampling.signals import SIGNALS, signal
from .references import MAX_REFERENCES, Reference, ReferenceList, References
from .runtime import runtime


class SeedlingControlSignal(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedlingControlSignal",
            display_name="Control Signal",
            category="Seedling",
            description="Makes edges, lines, colours or layout of a picture a reference that the "
            "next one follows.",
            search_aliases=["ControlNet", "canny", "lineart", "tile", "sketch", "控制图", "线稿"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to take it from."),
                io.Combo.Input(
                    "kind",
                    options=list(SIGNALS),
                    default="canny",
                    tooltip="canny, soft edge: where things end. line art: as drawn. blur, colour "
                    "blocks: light and colours without shapes. tile: all but the fine detail.",
                ),
                io.Float.Input(
                    "detail",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the picture gets through. Higher binds the next one to "
                    "more of it.",
                ),
                ReferenceList.Input(
                    "references",
                    optional=True,
                    tooltip="The references before it, from References: the signal comes last.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will read it, for its own size. Without it: 1K.",
                ),
            ],
            outputs=[
                ReferenceList.Output(
                    "references",
                    "references",
                    tooltip="With the signal at the end, its role set. For Encode Instruction and "
                    "Canvas Size.",
                ),
                io.Image.Output("image", "image", tooltip="The signal itself, to look at."),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, kind: str, detail: float, references: References | None = None,
        model: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        loaded = runtime().loaded(model)
        side = loaded.checkpoint.config.get("resolution", 1024) if loaded else 1024
        before = references or References((), side)
        made = torch.stack([signal(picture, kind, detail) for picture in image])
        role = SIGNALS[kind][1]
        items = (*before.items, *(Reference(picture, role=role) for picture in made))
        if len(items) > MAX_REFERENCES:
            raise SamplingError(
                f"with the signal there are {len(items)} references; the model takes at most "
                f"{MAX_REFERENCES}. Leave some out (a batch counts as several)."
            )
        text = f"image {len(items)}: {role}"
        runtime().tell(text)
        return io.NodeOutput(replace(before, items=items), made, ui=ui.PreviewText(text))
