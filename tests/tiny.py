"""A tiny Qwen-Image-2.1 with random weights, as files: three safetensors, or a diffusers folder.

Tests get it from the fixtures `tiny_model` (its files) and `tiny` (this module). It reads and
writes like the real one and its pictures mean nothing. The weights are the same every time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.families.qwen_image_21.encoder import (
    EncoderConfig,
    Qwen3VL,
    tiny_config,
)
from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from seedling.model_loaders.tokenizers import byte_level_bpe

NAME = "tiny"
RESOLUTION = 64  # side of its square picture, in pixels
SCHEDULE = {"steps": 4, "guidance": 2.5}
DIT = DiTConfig(
    in_channels=16, layers=2, heads=2, head_dim=32, context_dim=64, mlp_dim=192, axes=(4, 14, 14)
)
VAE_CONFIG = VAEConfig(
    z_dim=16, base_dim=32, decoder_base_dim=32, dim_mult=(1,), num_res_blocks=1,
    temporal_downsample=(), patch_size=16,
    latents_mean=tuple(0.1 * i - 0.8 for i in range(16)),
    latents_std=tuple(1.0 + 0.05 * i for i in range(16)),
)  # fmt: skip
MERGES = [("r", "e"), ("re", "d"), ("Ġ", "c"), ("Ġ", "a"), ("i", "n"), ("e", "r"), ("u", "p")]


@dataclass(frozen=True)
class TinyModel:
    """Where its files are; a picture of the model's own size is RESOLUTION pixels square."""

    dit: Path
    vae: Path
    encoder: Path
    tokenizer: Path


def tiny_tokenizer() -> Tokenizer:
    """Qwen's rules and control tokens over 256 bytes and a few merges."""
    words = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    return byte_level_bpe({word: i for i, word in enumerate(words)}, MERGES)


def tiny_encoder_config() -> EncoderConfig:
    return tiny_config(
        tiny_tokenizer().get_vocab_size(), hidden=DIT.context_dim, layers=2, heads=2, kv_heads=1,
        intermediate=96, vision_hidden=32, vision_heads=2, vision_intermediate=64,
    )  # fmt: skip


def tiny_model(
    folder: Path, dtype: torch.dtype = torch.float32, opaque: bool = True, name: str = NAME
) -> TinyModel:
    """Write it as ComfyUI users have it: a file in each of diffusion_models/, vae/, text_encoders/.

    `opaque`: its pictures come without alpha; else with a random one.
    """
    weights, config = _weights(dtype, opaque), tiny_encoder_config()
    card = {"licence": "Apache-2.0", "resolution": RESOLUTION, "schedule": SCHEDULE}
    model = TinyModel(
        dit=folder / "diffusion_models" / f"{name}.safetensors",
        vae=folder / "vae" / f"{name}.safetensors",
        encoder=folder / "text_encoders" / f"{name}.safetensors",
        tokenizer=folder / "text_encoders" / f"{name}.tokenizer.json",
    )
    _save(model.dit, weights["dit"], {**card, **asdict(DIT)})
    _save(model.vae, weights["vae"], asdict(VAE_CONFIG))
    _save(model.encoder, weights["encoder"], config.to_json())
    tiny_tokenizer().save(str(model.tokenizer))
    return model


def tiny_diffusers(folder: Path, dtype: torch.dtype = torch.float32, opaque: bool = True) -> Path:
    """Write the same weights as the folder of a diffusers pipeline, and return it.

    diffusers and transformers can load its parts; as published, nothing in it says how large its
    pictures are.
    """
    weights, config = _weights(dtype, opaque), tiny_encoder_config()
    encoder = weights["encoder"]  # published with two tensors that the pipeline has no use for
    encoder["lm_head.weight"] = torch.zeros(config.vocab_size, config.hidden, dtype=dtype)
    encoder["model.language_model.norm.weight"] = torch.ones(config.hidden, dtype=dtype)
    part = "diffusion_pytorch_model.safetensors"
    _save(folder / "transformer" / part, weights["dit"])
    _save(folder / "vae" / part, weights["vae"])
    _save(folder / "text_encoder" / "model.safetensors", encoder)
    _write_json(folder / "transformer" / "config.json", _published_dit())
    _write_json(folder / "vae" / "config.json", _published_vae())
    _write_json(folder / "text_encoder" / "config.json", _published_encoder(config))
    _write_json(folder / "scheduler" / "scheduler_config.json", PUBLISHED_SCHEDULER)
    _write_json(folder / "model_index.json", {"_class_name": "QwenImage21Pipeline"})
    (folder / "processor").mkdir(exist_ok=True)
    tiny_tokenizer().save(str(folder / "processor" / "tokenizer.json"))
    return folder


PUBLISHED_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
    "use_dynamic_shifting": True, "time_shift_type": "exponential", "base_shift": 0.5,
    "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip


def _weights(dtype: torch.dtype, opaque: bool) -> dict[str, dict[str, Tensor]]:
    """Canonical names -> random weights of every part."""
    parts = {"dit": DiT(DIT), "vae": VAE(VAE_CONFIG), "encoder": Qwen3VL(tiny_encoder_config())}
    weights = {name: _drawn(module) for name, module in parts.items()}
    if opaque:  # channels of the unfolded pixels, alpha last
        weights["vae"]["decoder.conv_out.bias"][-(VAE_CONFIG.patch**2) :] += 5
    return {part: {k: v.to(dtype) for k, v in drawn.items()} for part, drawn in weights.items()}


@torch.no_grad()
def _drawn(module: nn.Module) -> dict[str, Tensor]:
    """Matrices keep the length of what they multiply; gains lie around 1, the rest around 0."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, old in module.state_dict().items():
        noise = torch.randn(old.shape, generator=generator)
        if old[0].numel() > 1:
            weights[name] = noise / old[0].numel() ** 0.5
        else:
            gain = "norm" in name and not name.endswith(".bias") and "text_norm" not in name
            weights[name] = gain + 0.1 * noise
    return weights


def _published_dit() -> dict[str, Any]:
    return {
        "_class_name": "QwenImage21Transformer2DModel", "in_channels": DIT.in_channels,
        "out_channels": DIT.in_channels, "num_layers": DIT.layers,
        "mlp_ratio": DIT.mlp_dim // DIT.dim,
        "attention_head_dim": DIT.head_dim, "num_attention_heads": DIT.heads,
        "context_in_dim": DIT.context_dim, "axes_dims_rope": DIT.axes,
    }  # fmt: skip


def _published_vae() -> dict[str, Any]:
    config = asdict(VAE_CONFIG)
    config["temperal_downsample"] = config.pop("temporal_downsample")  # as it is spelt there
    channels = {"in_channels": VAE_CONFIG.folded, "out_channels": VAE_CONFIG.folded}
    return {"_class_name": "AutoencoderKLQwenImage21", **config, **channels}


def _published_encoder(config: EncoderConfig) -> dict[str, Any]:
    with torch.device("meta"):
        theirs = Qwen3VL(config).model.config.to_dict()
    pad = tiny_tokenizer().token_to_id("<|image_pad|>")
    return {**theirs, "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": pad}


def _save(path: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({"config": json.dumps(config)} if config else {})
    save_file({name: w.contiguous() for name, w in weights.items()}, path, metadata)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), "utf-8")
