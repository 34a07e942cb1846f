"""Which FLUX.2 a file is, how it wants to be sampled, and under which terms.

Shapes tell klein 4B, klein 9B and dev apart. The distilled klein, its base and the 9B with cached
references have the same tensors: there only configs, pipelines and names of files can tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...family import APACHE, Licence, Schedule

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

DEV = "dev"
VARIANTS: dict[str, str] = {
    "klein-4b": "FLUX.2 klein 4B",
    "klein-base-4b": "FLUX.2 klein base 4B",
    "klein-9b": "FLUX.2 klein 9B",
    "klein-base-9b": "FLUX.2 klein base 9B",
    "klein-9b-kv": "FLUX.2 klein 9B-KV",
    DEV: "FLUX.2 dev",
}
GUIDANCE = 4.0  # that dev and the base models were published with
SIZES = {3072: "4b", 4096: "9b"}  # width of a network -> how it is called
# Words in names of files and folders, between separators, the telling ones first.
WORDS = tuple((re.compile(rf"(?<![a-z]){word}(?![a-z])"), word) for word in ("kv", "base"))
UNTOLD = "nothing in the file or its name says that it is a base model or has cached references"
ASK = "if it is one of these, choose so under variant (--variant on the command line)"

KLEIN_NC = Licence(
    "FLUX Non-Commercial License v2.1",
    "",
    commercial=False,
    notice="For non-commercial use; Black Forest Labs sells a commercial licence.",
)
DEV_NC = Licence(
    "FLUX [dev] Non-Commercial License",
    "",
    commercial=False,
    notice="For non-commercial use; Black Forest Labs sells a commercial licence.",
)
UNKNOWN = Licence(
    "unknown",
    "",
    commercial=False,
    notice="No published network of the family has this size: ask whoever trained it.",
)


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a DiT's config gets: its `variant`, `variant_reason`, and `variant_question` where the
    user should say whether that is right.

    A variant that is in the config already was chosen by the user, or by who wrote the file. Raises
    ValueError for one that this network cannot be.
    """
    guided = "time_guidance_embed.guidance_embedder.linear_1.weight" in checkpoint.names
    size = SIZES.get(_width(checkpoint))
    given = checkpoint.config.get("variant")
    if given:
        possible = [
            name for name in VARIANTS
            if (name == DEV) == guided and (size is None or size in name or guided)
        ]  # fmt: skip
        if given not in possible:
            raise ValueError(f"as {given}: by its shapes it can be {' or '.join(possible)}")
        return {"variant": given, "variant_reason": "chosen"}
    if guided:
        return {"variant": DEV, "variant_reason": "the network reads the guidance"}
    word, reason = _recognised(checkpoint.path)
    if word == "kv" and size == "4b":
        word, reason = "", f"{reason}, but only the 9B was published so"
    size = "9b" if word == "kv" else size or "4b"
    variant = {"kv": f"klein-{size}-kv", "base": f"klein-base-{size}"}.get(word, f"klein-{size}")
    question = ASK if reason == UNTOLD else ""
    return {"variant": variant, "variant_reason": reason, "variant_question": question}


def is_cached(checkpoint: Checkpoint) -> bool:
    """Whether this DiT was trained with references that can be cached."""
    return str(checkpoint.config["variant"]).endswith("-kv")


def _recognised(path: Path) -> tuple[str, str]:
    """kv, base or nothing, and why: the pipeline around it, a word in its name."""
    index = _pipeline(path)
    if index.get("_class_name") == "Flux2KleinKVPipeline":
        return "kv", "model_index.json beside the folder names the KV pipeline"
    if index.get("is_distilled") is False:
        return "base", "model_index.json beside the folder says that it is not distilled"
    if index.get("is_distilled") is True:
        return "", "model_index.json beside the folder says that it is distilled"
    for name in _names(path):
        for pattern, word in WORDS:
            if pattern.search(name):
                return word, f'"{word}" is in its name'
    if any("klein" in name for name in _names(path)):
        return "", '"klein" is in its name, "base" and "kv" are not'
    return "", UNTOLD


def _names(path: Path) -> list[str]:
    """The file's own name, and names of folders around it that speak of FLUX.2."""
    names = [path.stem if path.suffix == ".safetensors" else path.name]
    around = (p.name for p in path.parents[:3] if re.search("flux|klein", p.name.lower()))
    return [name.lower() for name in (*names, *around)]


def _pipeline(path: Path) -> Mapping[str, Any]:
    """A pipeline's model_index.json, given its component's folder or a file in that."""
    for folder in (path.parent, path.parent.parent):
        index = folder / "model_index.json"
        if index.is_file() and index.stat().st_size < 1 << 20:
            try:
                content = json.loads(index.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                return {}
            return content if isinstance(content, dict) else {}
    return {}


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift that BFL fitted for 10 and 200 steps, on a line between them and beyond.

    `compute_empirical_mu` of the published pipelines: two lines over the tokens; large pictures
    follow the one for many steps at any number of steps.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (steps - 200)


def schedule(checkpoint: Checkpoint) -> Schedule:
    """How this DiT wants to be sampled; `schedule` in its own config may change steps, guidance."""
    variant = str(checkpoint.config["variant"])
    steps, guidance = (50, GUIDANCE) if variant == DEV or "base" in variant else (4, 1.0)
    own = checkpoint.config.get("schedule")
    if isinstance(own, dict):
        steps, guidance = int(own.get("steps", steps)), float(own.get("guidance", guidance))
        if steps < 1:
            raise ValueError(f"the schedule in its config has {steps} steps")
    return Schedule(
        variant,
        steps=steps,
        guidance=guidance,
        mu=empirical_mu,
        embedded_guidance=variant == DEV,
        reason=str(checkpoint.config["variant_reason"]),
    )


def licence(checkpoint: Checkpoint) -> Licence:
    """The terms of a component. VAE and text encoders are free; sizes tell the DiTs apart.

    Distilled, merged and quantized versions inherit their licence. Only a network of other widths
    can have been trained by somebody else, who may say so in its metadata.
    """
    if "x_embedder.weight" not in checkpoint.names:
        return APACHE
    known = {3072: APACHE, 4096: KLEIN_NC, 6144: DEV_NC}.get(_width(checkpoint))
    said = str(checkpoint.config.get("licence") or checkpoint.metadata.get("licence") or "").lower()
    return known or (APACHE if said == "apache-2.0" else UNKNOWN)


def _width(checkpoint: Checkpoint) -> int:
    shape = checkpoint.names["x_embedder.weight"].shape
    return shape[0] if shape else 0
