"""Where Qwen-Image-2.1's tensors are found in every published layout, and what its shapes say.

Canonical names are diffusers' (for the text encoder: transformers'). A layout is recognised by
names and shapes only; its map is a plain dict of canonical name -> `Source`, made from the names in
the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from ...checkpoint import Source, TensorInfo
from ...family import Layout

Names = Mapping[str, TensorInfo]

# ComfyUI's single files, and whole-checkpoint exports, put one of these in front of every name.
DIT_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
GATE_UP = ".img_mlp.gate_up.weight"


def _prefix(names: Names) -> str | None:
    """The prefix under which this file holds the DiT, None when it holds none."""
    for prefix in DIT_PREFIXES:
        block = f"{prefix}transformer_blocks.0."
        if (
            f"{prefix}txt_in.text_norm.weight" in names
            and f"{prefix}modulation.1.weight" in names
            and f"{block}attn.norm_q.weight" in names
            and (
                f"{block}img_mlp.proj.weight" in names or f"{block}img_mlp.gate_up.weight" in names
            )
        ):
            return prefix
    return None


def _is_dit(names: Names) -> bool:
    return _prefix(names) is not None


def _is_fused(names: Names) -> bool:
    return _is_dit(names) and any(name.endswith(GATE_UP) for name in names)


def dit_sources(names: Names) -> dict[str, Source]:
    """Strip the prefix; split `gate_up` = [gate_layer; proj] into the rows of its halves."""
    prefix = _prefix(names) or ""
    sources = {}
    for name, info in names.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix)
        if key.endswith(GATE_UP) and info.shape:
            half, mlp = info.shape[0] // 2, key.removesuffix("gate_up.weight")
            sources[f"{mlp}gate_layer.weight"] = Source(name, rows=(0, half))
            sources[f"{mlp}proj.weight"] = Source(name, rows=(half, 2 * half))
        else:
            sources[key] = Source(name)
    return sources


DIT_LAYOUTS = (
    Layout("ComfyUI (fused gate_up)", _is_fused, dit_sources),
    Layout("diffusers", lambda names: _prefix(names) == "", dit_sources),
    Layout("ComfyUI (with prefix)", _is_dit, dit_sources),
)


# The VAE. Wan's video VAE has the same names; it is told apart by its three colour channels.


def _rgba(names: Names, first: str, last: str) -> bool:
    """Whether first and last convolution carry 4 channels, or 4 times a square (unshuffled)."""
    if first not in names or last not in names:
        return False
    shapes = names[first].shape, names[last].shape
    if any(len(shape) not in (4, 5) for shape in shapes):
        return False
    channels = shapes[0][1]
    patch = math.isqrt(channels // 4)
    return channels > 0 and channels == shapes[1][0] == 4 * patch * patch


def _is_diffusers_vae(names: Names) -> bool:
    return (
        "encoder.down_blocks.0.resnets.0.norm1.gamma" in names
        and "quant_conv.weight" in names
        and _rgba(names, "encoder.conv_in.weight", "decoder.conv_out.weight")
    )


def _is_native_vae(names: Names) -> bool:
    return (
        "encoder.downsamples.0.downsamples.0.residual.0.gamma" in names
        and "conv1.weight" in names
        and _rgba(names, "encoder.conv1.weight", "decoder.head.2.weight")
    )


def _vae_source(name: str, info: TensorInfo) -> Source:
    """A causal convolution that sees one frame uses the last tap of its temporal kernel only."""
    return Source(name, last_tap=len(info.shape) == 5)


def vae_sources(names: Names) -> dict[str, Source]:
    return {name: _vae_source(name, info) for name, info in names.items()}


def native_vae_sources(names: Names) -> dict[str, Source]:
    """Wan 2.2's own naming, which ComfyUI's VAE file uses."""
    rename = _native_vae_names(names)
    return {rename(name): _vae_source(name, info) for name, info in names.items()}


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
STAGE = re.compile(r"(encoder|decoder)\.(downsamples|upsamples)\.(\d+)\.\2\.(\d+)\.(.+)")
CENTRE = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")


def _native_vae_names(names: Names) -> Callable[[str], str]:
    def block(rest: str) -> str:
        """`residual.2.weight` -> `conv1.weight`."""
        layer, _, leaf = rest.rpartition(".")
        return f"{RESIDUAL.get(layer, layer)}.{leaf}"

    def rename(name: str) -> str:
        if stage := STAGE.fullmatch(name):
            side, kind, i, j, rest = stage.groups()
            down = kind == "downsamples"
            where = f"{side}.{'down' if down else 'up'}_blocks.{i}"
            if rest.startswith(("resample.", "time_conv.")):
                return f"{where}.{'downsampler' if down else 'upsampler'}.{rest}"
            return f"{where}.resnets.{j}.{block(rest)}"
        if centre := CENTRE.fullmatch(name):
            side, i, rest = centre.groups()
            return f"{side}.mid_block.{MIDDLE[i]}.{block(rest)}"
        layer, _, leaf = name.rpartition(".")
        return f"{TOP.get(layer, layer)}.{leaf}"

    return rename


VAE_LAYOUTS = (
    Layout("diffusers", _is_diffusers_vae, vae_sources),
    Layout("ComfyUI (Wan 2.2 naming)", _is_native_vae, native_vae_sources),
)


# The text encoder: Qwen3-VL, told from other language models by its DeepStack mergers.

# Where text and vision part live: transformers' whole model, ComfyUI's file, transformers' core.
ENCODER_PREFIXES = (
    ("transformers", "model.language_model.", "model.visual."),
    ("ComfyUI", "model.", "visual."),
    ("transformers (without head)", "language_model.", "visual."),
)
HEADS = {"lm_head.weight", "model.lm_head.weight"}
# Published, but the diffusion model reads the states before the final norm.
ENCODER_UNUSED = ("lm_head.weight", "model.language_model.norm.weight")


def _encoder_layout(title: str, text: str, vision: str) -> Layout:
    def recognises(names: Names) -> bool:
        return (
            f"{text}layers.0.self_attn.q_norm.weight" in names
            and f"{vision}deepstack_merger_list.0.norm.weight" in names
        )

    def rename(name: str) -> str:
        if name in HEADS:
            return "lm_head.weight"
        if name.startswith(vision):
            return "model.visual." + name.removeprefix(vision)
        if name.startswith(text):
            return "model.language_model." + name.removeprefix(text)
        return name

    return Layout(title, recognises, lambda names: {rename(n): Source(n) for n in names})


ENCODER_LAYOUTS = tuple(_encoder_layout(*row) for row in ENCODER_PREFIXES)


# LoRA files name layers of the DiT, with their own prefix and ending.
LORA_LAYER = re.compile(
    r"transformer_blocks[._]\d+[._]img_mlp[._](gate_layer|gate_up|proj|out)[._]"
)


def is_lora(names: Names) -> bool:
    """Whether a LoRA's layers are this family's: no other has this feed-forward."""
    return any(LORA_LAYER.search(name) for name in names) or any(
        re.search(r"transformer_blocks[._]0[._]attn[._]to_q[._].*(lora_A|lora_down)", name)
        and info.shape[-1:] == (4096,)
        for name, info in names.items()
    )
