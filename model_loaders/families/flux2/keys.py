"""Where FLUX.2's tensors are found in every published layout.

Canonical names are diffusers' (for the text encoders: transformers'), with `norm_out` in halves. A
layout is recognised by names and shapes only; its map is a plain dict of canonical name ->
`Source`, made from the names in the file. BFL's own names are also those of ComfyUI's files.
"""

from __future__ import annotations

import re

from ...checkpoint import Source, TensorInfo
from ...family import Layout
from ...names import DIT_PREFIXES, Names

# ---- the diffusion model -----------------------------------------------------------------------

# Layers of BFL's files -> ours; several where rows of one layer make up several.
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
TOP: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.shift", "norm_out.scale"),
    "final_layer.linear": ("proj_out",),
    "norm_out.linear": ("norm_out.scale", "norm_out.shift"),  # diffusers: the other way round
}
BLOCK: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "attn.to_qkv": QKV,  # diffusers, after `fuse_qkv_projections`
    "attn.to_added_qkv": ADDED_QKV,
}
BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "transformer_blocks": "transformer_blocks",
    "single_transformer_blocks": "single_transformer_blocks",
}
IN_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
WHOLE = ("comfy_quant",)  # bytes about a layer, which all of its parts share


def _layers(layer: str) -> tuple[str, ...]:
    """Our layers that a published layer holds."""
    inside = IN_BLOCK.fullmatch(layer)
    if inside and inside[1] in BLOCKS:
        parts = BLOCK.get(inside[3], (inside[3],))
        return tuple(f"{BLOCKS[inside[1]]}.{inside[2]}.{part}" for part in parts)
    return TOP.get(layer, (layer,))


def dit_sources(names: Names) -> dict[str, Source]:
    """Strip the prefix, rename, and split rows that are several layers' of ours."""
    prefix, sources = _prefix(names) or "", {}
    for name, info in names.items():
        if not name.startswith(prefix):
            continue
        layer, _, leaf = name.removeprefix(prefix).rpartition(".")
        layers = _layers(layer)
        if leaf == "scale":  # of a norm, in BFL's files
            leaf = "weight"
        for i, part in enumerate(layers):
            rows = _rows(info, i, len(layers)) if leaf not in WHOLE else None
            sources[f"{part}.{leaf}" if part else leaf] = Source(name, rows=rows)
    return sources


def _rows(info: TensorInfo, index: int, parts: int) -> tuple[int, int] | None:
    """The rows of part `index` of `parts` equal ones; None: the whole tensor."""
    if parts == 1 or not info.shape or info.shape[0] % parts:
        return None
    size = info.shape[0] // parts
    return index * size, (index + 1) * size


MARKS = {
    "BFL": ("double_stream_modulation_img.lin.weight", "double_blocks.0.txt_mlp.0.weight"),
    "diffusers": (
        "double_stream_modulation_img.linear.weight",
        "transformer_blocks.0.ff_context.linear_in.weight",
    ),
}


def _prefix(names: Names, *kinds: str) -> str | None:
    """The prefix under which this file holds the DiT, in one of `kinds` of names, or None."""
    for kind in kinds or MARKS:
        for prefix in DIT_PREFIXES:
            if all(prefix + mark in names for mark in MARKS[kind]):
                return prefix
    return None


DIT_LAYOUTS = (
    Layout("BFL, ComfyUI", lambda names: _prefix(names, "BFL") == "", dit_sources),
    Layout("diffusers", lambda names: _prefix(names, "diffusers") == "", dit_sources),
    Layout("ComfyUI (with prefix)", lambda names: _prefix(names) is not None, dit_sources),
)

# ---- the VAE -----------------------------------------------------------------------------------

STATISTICS = ("bn.running_mean", "bn.running_var")
VAE_UNUSED = ("bn.num_batches_tracked",)


def _is_vae(names: Names, mark: str) -> bool:
    """An autoencoder with the statistics of FLUX.2's: no other has them."""
    return all(name in names for name in (*STATISTICS, "encoder.conv_in.weight", mark))


def _is_diffusers_vae(names: Names) -> bool:
    return _is_vae(names, "encoder.down_blocks.0.resnets.0.norm1.weight")


def _is_bfl_vae(names: Names) -> bool:
    return _is_vae(names, "encoder.down.0.block.0.norm1.weight")


# One after the other, on BFL's names.
VAE_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(?:encoder\.|decoder\.)((?:post_)?quant_conv\.)", r"\1"),
        (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
        (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    )
)
UP = re.compile(r"decoder\.up\.(\d+)\.(block|upsample)\.(.+)")


def bfl_vae_sources(names: Names) -> dict[str, Source]:
    """The decoder counts its stages from the finest; attention is kept as 1x1 convolutions."""
    stages = 1 + max((int(up[1]) for name in names if (up := UP.fullmatch(name))), default=0)
    sources = {}
    for name, info in names.items():
        key = name
        if up := UP.fullmatch(name):
            kind = "resnets" if up[2] == "block" else "upsamplers.0"
            key = f"decoder.up_blocks.{stages - 1 - int(up[1])}.{kind}.{up[3]}"
        for pattern, new in VAE_RENAMES:
            key = pattern.sub(new, key)
        flat = ".attentions." in key and info.shape[2:] == (1, 1)
        sources[key] = Source(name, shape=info.shape[:2] if flat else None)
    return sources


VAE_LAYOUTS = (
    Layout("diffusers", _is_diffusers_vae, lambda names: {name: Source(name) for name in names}),
    Layout("BFL, ComfyUI", _is_bfl_vae, bfl_vae_sources),
)

# ---- the text encoders -------------------------------------------------------------------------

NORMED = "layers.0.self_attn.q_norm.weight"  # Qwen3 has it, Mistral has not
PLAIN = "layers.0.self_attn.q_proj.weight"
SEEING = ("visual.", "model.visual.", "vision_tower.", "model.vision_tower.")
MISTRAL_ROWS = 131072  # of Mistral Small's vocabulary
TEKKEN = "tekken_model"  # ComfyUI's file carries its tokenizer


def _is_qwen3(names: Names) -> bool:
    return f"model.{NORMED}" in names and not any(name.startswith(SEEING) for name in names)


def _is_mistral(names: Names, prefix: str) -> bool:
    """Mistral among the many networks with these names: by its vocabulary or its vision tower."""
    if f"{prefix}{PLAIN}" not in names or f"{prefix}{NORMED}" in names:
        return False
    words = names.get(f"{prefix}embed_tokens.weight")
    return (
        TEKKEN in names
        or any(name.endswith("vision_tower.patch_conv.weight") for name in names)
        or (words is not None and words.shape[:1] == (MISTRAL_ROWS,))
    )


def _mistral_layout(title: str, text: str) -> Layout:
    def rename(name: str) -> str:
        name = name.replace("language_model.lm_head.", "lm_head.")
        if name.startswith(text):
            return "model." + name.removeprefix(text)
        return name.removeprefix("model.") if name.startswith("model.") else name

    return Layout(
        title,
        lambda names: _is_mistral(names, text),
        lambda names: {rename(name): Source(name) for name in names},
    )


QWEN3_LAYOUTS = (
    Layout("transformers, ComfyUI", _is_qwen3, lambda names: {n: Source(n) for n in names}),
)
MISTRAL_LAYOUTS = (
    _mistral_layout("transformers", "language_model.model."),
    _mistral_layout("transformers 5", "model.language_model."),
    _mistral_layout("ComfyUI", "model."),
)
LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
VISION_LAYER = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
    "attention_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj",
    "ffn_norm",
)  # fmt: skip
EYES = (
    "vision_tower.patch_conv", "vision_tower.ln_pre", "multi_modal_projector.norm",
    "multi_modal_projector.patch_merger.merging_layer", "multi_modal_projector.linear_1",
    "multi_modal_projector.linear_2",
)  # fmt: skip


def _above(first: int, last: int) -> tuple[str, ...]:
    """What is published above the last layer that the diffusion model reads."""
    layers = [f"model.layers.{i}.{layer}" for i in range(first, last) for layer in LAYER]
    return tuple(f"{layer}.weight" for layer in [*layers, "model.norm", "lm_head"])


def _vision() -> tuple[str, ...]:
    """Mistral's eyes: FLUX.2 only sees through its VAE."""
    layers = [
        f"vision_tower.transformer.layers.{i}.{layer}" for i in range(24) for layer in VISION_LAYER
    ]
    return tuple(f"{layer}.weight" for layer in [*layers, *EYES])


QWEN3_UNUSED = _above(27, 36)
MISTRAL_UNUSED = (*_above(30, 40), *_vision(), TEKKEN)
