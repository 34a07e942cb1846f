"""The nodes: each is a schema and one call."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .control import SeedlingControlSignal
from .detail import SeedlingDetailPass
from .loaders import SeedlingLoadDiT, SeedlingLoadEncoder, SeedlingLoadVAE
from .outputs import SeedlingImageSet
from .prompt import SeedlingEncodeInstruction
from .quantize import SeedlingQuantizeDiT
from .references import SeedlingReferences
from .region import SeedlingEditRegion, SeedlingFinishEdit, SeedlingPreservationReport
from .sampling import SeedlingCanvasSize, SeedlingFewStepSampler
from .set_parts import SeedlingSetAtOnce, SeedlingSetPicture, SeedlingSetPictures

NODES: list[type[io.ComfyNode]] = [
    SeedlingLoadDiT,
    SeedlingLoadEncoder,
    SeedlingLoadVAE,
    SeedlingReferences,
    SeedlingEncodeInstruction,
    SeedlingCanvasSize,
    SeedlingFewStepSampler,
    SeedlingImageSet,
    SeedlingEditRegion,
    SeedlingFinishEdit,
    SeedlingPreservationReport,
    SeedlingControlSignal,
    SeedlingDetailPass,
    SeedlingQuantizeDiT,
]
INSIDE: list[type[io.ComfyNode]] = [  # in no menu
    SeedlingSetPicture,
    SeedlingSetPictures,
    SeedlingSetAtOnce,
]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*NODES, *INSIDE]


async def comfy_entrypoint() -> Extension:
    return Extension()
