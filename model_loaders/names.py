"""How tensors are called in files that several families have: prefixes, Wan's VAEs, Qwen's VLMs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .checkpoint import Source, TensorInfo
from .family import Layout

Names = Mapping[str, TensorInfo]

# ComfyUI's single files, and whole-checkpoint exports, put one of these in front of a DiT's names.
DIT_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")

# Wan's own names of the VAE's layers, which ComfyUI's files use -> diffusers'.
RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
TOP = {
    "conv1": "quant_conv", "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in", "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out", "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out", "decoder.head.2": "decoder.conv_out",
}  # fmt: skip
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
CENTRE = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")


def wan_block(rest: str) -> str:
    """A layer of a residual block: `residual.2.weight` -> `conv1.weight`."""
    layer, _, leaf = rest.rpartition(".")
    return f"{RESIDUAL.get(layer, layer)}.{leaf}"


def wan_outside(name: str) -> str:
    """A layer of a Wan VAE that is in none of its stages."""
    if centre := CENTRE.fullmatch(name):
        side, i, rest = centre.groups()
        return f"{side}.mid_block.{MIDDLE[i]}.{wan_block(rest)}"
    layer, _, leaf = name.rpartition(".")
    return f"{TOP.get(layer, layer)}.{leaf}"


def one_frame(names: Names, rename: Callable[[str], str] = str) -> dict[str, Source]:
    """A causal convolution that sees one frame uses the last tap of its temporal kernel only."""
    return {
        rename(name): Source(name, last_tap=len(info.shape) == 5) for name, info in names.items()
    }


# Where text and vision part live: transformers' whole model, ComfyUI's file, transformers' core.
QWEN_VL_PREFIXES = (
    ("transformers", "model.language_model.", "model.visual."),
    ("ComfyUI", "model.", "visual."),
    ("transformers (without head)", "language_model.", "visual."),
)
HEADS = {"lm_head.weight", "model.lm_head.weight"}


def qwen_vl_layouts(text_mark: str, vision_mark: str) -> tuple[Layout, ...]:
    """The layouts of a Qwen vision-language model with these two tensors, by their bare names."""
    return tuple(
        _qwen_vl_layout(title, text, vision, (text + text_mark, vision + vision_mark))
        for title, text, vision in QWEN_VL_PREFIXES
    )


def _qwen_vl_layout(title: str, text: str, vision: str, marks: tuple[str, str]) -> Layout:
    def rename(name: str) -> str:
        if name in HEADS:
            return "lm_head.weight"
        if name.startswith(vision):
            return "model.visual." + name.removeprefix(vision)
        if name.startswith(text):
            return "model.language_model." + name.removeprefix(text)
        return name

    return Layout(
        title,
        lambda names: all(mark in names for mark in marks),
        lambda names: {rename(n): Source(n) for n in names},
    )
