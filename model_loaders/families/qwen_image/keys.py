"""Where Qwen-Image's tensors are found in every published layout.

Canonical names are diffusers' (for the text encoder: transformers'). A layout is recognised by
names and shapes only; its map is a plain dict of canonical name -> `Source`, made from the names in
the file.
"""

from __future__ import annotations

import re

from ...checkpoint import Source
from ...family import Layout
from ...names import DIT_PREFIXES, Names, one_frame, qwen_vl_layouts, wan_block, wan_outside
from .variants import MARKER

# Published, but no parameter: the marker of Edit-2511.
DIT_UNUSED = (MARKER,)
# What a step's time does to every layer: a third of the weights, read once for a schedule.
DIT_LENT = re.compile(r"transformer_blocks\.\d+\.(img|txt)_mod\.1")


def _prefix(names: Names) -> str | None:
    """The prefix under which this file holds the DiT, None when it holds none."""
    for prefix in DIT_PREFIXES:
        block = f"{prefix}transformer_blocks.0."
        if (
            f"{prefix}txt_norm.weight" in names
            and f"{block}img_mod.1.weight" in names
            and f"{block}attn.add_q_proj.weight" in names
        ):
            return prefix
    return None


def dit_sources(names: Names) -> dict[str, Source]:
    """Strip the prefix."""
    prefix = _prefix(names) or ""
    return {n.removeprefix(prefix): Source(n) for n in names if n.startswith(prefix)}


# Nunchaku's files keep queries, keys and values of a stream in one layer.
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _is_nunchaku(names: Names) -> bool:
    return (
        "txt_norm.weight" in names
        and "transformer_blocks.0.img_mod.1.weight" in names
        and "transformer_blocks.0.attn.add_qkv_proj.weight" in names
    )


def nunchaku_sources(names: Names) -> dict[str, Source]:
    """Split what is fused into thirds of its rows."""
    sources = {}
    for name, info in names.items():
        layer, _, leaf = name.rpartition(".")
        fused = next((f for f in FUSED if layer.endswith(f".{f}")), None)
        if fused is None or not info.shape or info.shape[0] % 3:
            sources[name] = Source(name)
            continue
        size = info.shape[0] // 3
        for i, part in enumerate(FUSED[fused]):
            own = f"{layer.removesuffix(fused)}{part}.{leaf}"
            sources[own] = Source(name, rows=(i * size, (i + 1) * size))
    return sources


DIT_LAYOUTS = (
    Layout("diffusers", lambda names: _prefix(names) == "" and MARKER not in names, dit_sources),
    Layout("ComfyUI", lambda names: _prefix(names) == "", dit_sources),
    Layout("ComfyUI (with prefix)", lambda names: _prefix(names) is not None, dit_sources),
    Layout("Nunchaku", _is_nunchaku, nunchaku_sources),
)


# The VAE. Wan 2.1's video VAE has the same names and shapes.


def _is_diffusers_vae(names: Names) -> bool:
    return "encoder.down_blocks.0.norm1.gamma" in names and "post_quant_conv.weight" in names


def _is_native_vae(names: Names) -> bool:
    return "encoder.downsamples.0.residual.0.gamma" in names and "conv2.weight" in names


STAGE = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)")


def native_vae_sources(names: Names) -> dict[str, Source]:
    """Wan 2.1's own naming, which ComfyUI's VAE file uses: one flat list on each side."""
    places = _decoder_places(names)

    def rename(name: str) -> str:
        stage = STAGE.fullmatch(name)
        if not stage:
            return wan_outside(name)
        side, i, rest = stage.groups()
        layer = rest if rest.startswith(("resample.", "time_conv.")) else wan_block(rest)
        if side.startswith("encoder"):
            return f"encoder.down_blocks.{i}.{layer}"
        return f"decoder.up_blocks.{places[int(i)]}.{layer}"

    return one_frame(names, rename)


def _decoder_places(names: Names) -> dict[int, str]:
    """Where a block of the decoder's flat list is in diffusers' stages, each closed by a resample:
    0 -> "0.resnets.0", 3 -> "0.upsamplers.0", 4 -> "1.resnets.0"."""
    found = {
        int(stage[2]): stage[3].startswith(("resample.", "time_conv."))
        for name in names
        if (stage := STAGE.fullmatch(name)) and stage[1].startswith("decoder")
    }
    places, block, resnet = {}, 0, 0
    for i in sorted(found):
        if found[i]:
            places[i] = f"{block}.upsamplers.0"
            block, resnet = block + 1, 0
        else:
            places[i] = f"{block}.resnets.{resnet}"
            resnet += 1
    return places


VAE_LAYOUTS = (
    Layout("diffusers", _is_diffusers_vae, one_frame),
    Layout("ComfyUI (Wan 2.1 naming)", _is_native_vae, native_vae_sources),
)

# The text encoder: Qwen2.5-VL, told by the biases of its text part and the norms of its vision part
# from Qwen3-VL and from Qwen2-VL.
ENCODER_UNUSED = ("lm_head.weight",)
ENCODER_LAYOUTS = qwen_vl_layouts("layers.0.self_attn.q_proj.bias", "blocks.0.mlp.gate_proj.weight")
