"""All-in-one checkpoints: a diffusion model, its VAE and its text encoder in one file.

ComfyUI writes them (Save Checkpoint) and reads them from models/checkpoints. Each part has a
prefix; each loader takes the part that it is for, and never sees the others.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .checkpoint import Checkpoint, TensorInfo
from .detection import detect
from .family import Kind

# Behind the text encoders' prefix core puts the encoder's own name.
PREFIXES: dict[Kind, re.Pattern[str]] = {
    "dit": re.compile(r"model\.diffusion_model\."),
    "vae": re.compile(r"(?:vae|first_stage_model)\."),
    "encoder": re.compile(r"(?:text_encoders|cond_stage_model)\.(?:[^.]+\.transformer\.)?"),
}


def parts(checkpoint: Checkpoint) -> dict[Kind, Checkpoint]:
    """The parts of an all-in-one checkpoint, each with its own names; none where it is no such."""
    found: dict[Kind, Checkpoint] = {}
    for kind, prefix in PREFIXES.items():
        groups: dict[str, dict[str, TensorInfo]] = {}
        for name, info in checkpoint.names.items():
            if match := prefix.match(name):
                groups.setdefault(match[0], {})[name[match.end() :]] = info
        for names in groups.values():
            own = replace(checkpoint, names=names)
            known = detect(own)
            if known is not None and known.component.kind == kind:
                found[kind] = own
    return found if len(found) > 1 else {}


def part(checkpoint: Checkpoint, kind: Kind) -> Checkpoint:
    """What a loader of `kind` reads of `checkpoint`: its part, or all where there are no parts."""
    return parts(checkpoint).get(kind, checkpoint)
