"""The nodes: each is a schema and one call."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .loaders import SeedlingLoadDiT, SeedlingLoadEncoder, SeedlingLoadVAE
from .outputs import SeedlingImageSet
from .prompt import SeedlingEncodeInstruction
from .references import SeedlingReferences
from .sampling import SeedlingCanvasSize, SeedlingFewStepSampler

NODES: list[type[io.ComfyNode]] = [
    SeedlingLoadDiT,
    SeedlingLoadEncoder,
    SeedlingLoadVAE,
    SeedlingReferences,
    SeedlingEncodeInstruction,
    SeedlingCanvasSize,
    SeedlingFewStepSampler,
    SeedlingImageSet,
]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Extension:
    return Extension()
