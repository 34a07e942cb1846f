"""Where Qwen-Image-2.1's tensors are found in every published layout, and what its shapes say.

Canonical names are diffusers' (for the text encoder: transformers'). A layout is recognised by
names and shapes only; its map is a plain dict of canonical name -> `Source`, made from the names in
the file.
"""

from __future__ import annotations

import math
import re

from ...checkpoint import Source
from ...family import Layout
from ...names import DIT_PREFIXES, Names, one_frame, qwen_vl_layouts, wan_block, wan_outside

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


STAGE = re.compile(r"(encoder|decoder)\.(downsamples|upsamples)\.(\d+)\.\2\.(\d+)\.(.+)")


def _native_vae_name(name: str) -> str:
    """Wan 2.2's own naming, which ComfyUI's VAE file uses."""
    stage = STAGE.fullmatch(name)
    if not stage:
        return wan_outside(name)
    side, kind, i, j, rest = stage.groups()
    down = kind == "downsamples"
    where = f"{side}.{'down' if down else 'up'}_blocks.{i}"
    if rest.startswith(("resample.", "time_conv.")):
        return f"{where}.{'downsampler' if down else 'upsampler'}.{rest}"
    return f"{where}.resnets.{j}.{wan_block(rest)}"


VAE_LAYOUTS = (
    Layout("diffusers", _is_diffusers_vae, one_frame),
    Layout(
        "ComfyUI (Wan 2.2 naming)",
        _is_native_vae,
        lambda names: one_frame(names, _native_vae_name),
    ),
)


# The text encoder: Qwen3-VL, told from other language models by its DeepStack mergers.

# Published, but the diffusion model reads the states before the final norm.
ENCODER_UNUSED = ("lm_head.weight", "model.language_model.norm.weight")


ENCODER_LAYOUTS = qwen_vl_layouts(
    "layers.0.self_attn.q_norm.weight", "deepstack_merger_list.0.norm.weight"
)
