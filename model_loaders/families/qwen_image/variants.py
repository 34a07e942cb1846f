"""Which Qwen-Image a file is: six models share one architecture, and most files do not say which.

Qwen-Image-Layered has a tensor of its own. Edit-2511 has a marker in ComfyUI's files, which repacks
lose, and `zero_cond_t` in diffusers' config. What is left is what pipelines and files are called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

MARKER = "__index_timestep_zero__"  # an empty tensor in ComfyUI's files of Edit-2511
IMAGE, IMAGE_2512, LAYERED = "qwen-image", "qwen-image-2512", "qwen-image-layered"
EDIT = "qwen-image-edit"
EDIT_2509, EDIT_2511 = f"{EDIT}-2509", f"{EDIT}-2511"

VARIANTS: dict[str, str] = {
    IMAGE: "Qwen-Image",
    IMAGE_2512: "Qwen-Image-2512",
    EDIT: "Qwen-Image-Edit",
    EDIT_2509: "Qwen-Image-Edit-2509",
    EDIT_2511: "Qwen-Image-Edit-2511",
    LAYERED: "Qwen-Image-Layered",
}
EDITORS = (EDIT, EDIT_2509, EDIT_2511)
ZERO_COND_T = (EDIT_2511,)  # modulate the references as finished pictures, at t = 0
RESOLUTION = {IMAGE: 1328, IMAGE_2512: 1328, LAYERED: 640}  # side of their square; others 1024

# `_class_name` in the model_index.json of a diffusers folder.
PIPELINES = {
    "QwenImagePipeline": IMAGE,
    "QwenImageEditPipeline": EDIT,
    "QwenImageEditPlusPipeline": EDIT_2509,
    "QwenImageLayeredPipeline": LAYERED,
}
# Words in names of files and folders, the telling ones first. Unknown editors read several
# pictures, as all do that came after the first.
SOME_EDITOR = "edit"
WORDS = (
    ("2511", EDIT_2511),
    ("2509", EDIT_2509),
    ("2512", IMAGE_2512),
    ("qwen_image_edit", EDIT),
    (SOME_EDITOR, EDIT_2509),
    ("qwen_image", IMAGE),
)
# What is asked where neither a file nor its name is sure.
CHOOSE = f"choose which under variant (--variant on the command line): {', '.join(EDITORS)}"
ASK = f"if it is an editor, {CHOOSE}"
ASK_WHICH = (
    "a version is not, and conversions lose the marker of Edit-2511; if it is another one, as "
    f"which colours come out too strong, {CHOOSE}"
)


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a DiT's config gets: its `variant`, `variant_reason`, `variant_question` where the user
    should say whether that is right, and its `resolution` in pixels.

    A variant that is in the config already was chosen by the user, or by who wrote the file.
    """
    given, question = checkpoint.config.get("variant"), ""
    if given:
        variant, reason = str(given), "chosen"
        if variant not in VARIANTS:
            raise ValueError(f"its config has a variant {variant}; known are {', '.join(VARIANTS)}")
    else:
        variant, reason, question = recognised(checkpoint)
    resolution = checkpoint.config.get("resolution") or RESOLUTION.get(variant, 1024)
    return {
        "variant": variant,
        "variant_reason": reason,
        "variant_question": question,
        "resolution": resolution,
    }


def recognised(checkpoint: Checkpoint) -> tuple[str, str, str]:
    """The variant, the reason for it, and what to ask the user where that is a guess."""
    names = [name.lower().replace("-", "_") for name in _names(checkpoint.path)]
    if "time_text_embed.addition_t_embedding.weight" in checkpoint.names:
        return LAYERED, "it has the tensor that only this one has", ""
    if MARKER in checkpoint.names:
        return EDIT_2511, "the file holds its marker", ""
    if checkpoint.config.get("zero_cond_t"):
        return EDIT_2511, "its config has zero_cond_t", ""
    pipeline = PIPELINES.get(_pipeline(checkpoint.path))
    for word, variant in WORDS:
        # Where a folder says which pipeline it is, names may add a version of that, no more.
        possible = pipeline is None or (
            word.isdecimal() and (pipeline in EDITORS) == (variant in EDITORS)
        )
        if possible and any(word in name for name in names):
            question = ASK_WHICH if word == SOME_EDITOR else ""
            return variant, f'"{word}" is in its name', question
    if pipeline is not None:
        return pipeline, "model_index.json beside the folder names its pipeline", ""
    return IMAGE, "nothing in the file or its name says which of the family it is", ASK


def _names(path: Path) -> list[str]:
    """The file's own name, and names of folders around it that speak of a Qwen model."""
    return [path.name, *(p.name for p in path.parents[:4] if "qwen" in p.name.lower())]


def _pipeline(path: Path) -> str:
    for folder in (path.parent, path.parent.parent):
        index = folder / "model_index.json"
        if index.is_file() and index.stat().st_size < 1 << 20:
            try:
                content = json.loads(index.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                return ""
            return str(content.get("_class_name", "")) if isinstance(content, dict) else ""
    return ""
