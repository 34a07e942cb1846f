"""A tiny Qwen-Image with random weights, in diffusers' and transformers' own classes.

Its pictures mean nothing. The folder it is written to is read by those libraries and by ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from seedling.model_loaders.tokenizers import byte_level_bpe

CHANNELS = 6  # of a latent; not those of a picture, by which diffusers tells the two apart
MERGES = [("r", "e"), ("re", "d"), ("Ġ", "c"), ("i", "n"), ("e", "r"), ("c", "t"), ("P", "i")]
DIT = {
    "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 2,
    "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
    "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {},
    "QwenImageEditPipeline": {},
    "QwenImageEditPlusPipeline": {"zero_cond_t": True},
    "QwenImageLayeredPipeline": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
SCHEDULER = {
    "num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
    "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}  # fmt: skip
# scheduler_config.json of Qwen-Image-Layered, where it differs.
LAYERED = {"shift_terminal": False, "time_shift_type": "linear"}


def tiny_tokenizer() -> Any:
    """Qwen's rules and control tokens over 256 bytes and a few merges."""
    words = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    return byte_level_bpe({word: i for i, word in enumerate(words)}, MERGES)


def encoder_config() -> Any:
    """Of the text encoder, as it is published; small."""
    tokenizer = tiny_tokenizer()
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
    )  # fmt: skip


@torch.no_grad()
def drawn(module: nn.Module) -> Any:
    """Matrices keep the length of what they multiply; gains lie around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        gain = float("norm" in name and not name.endswith("bias"))
        p.copy_(noise / p[0].numel() ** 0.5 if p[0].numel() > 1 else gain + 0.1 * noise)
    return module.eval()


def write(folder: Path, kind: str) -> Path:
    """The folder of a diffusers pipeline of this class."""
    alpha = 4 if "Layered" in kind else 3
    drawn(diffusers.QwenImageTransformer2DModel(**DIT, **KINDS[kind])).save_pretrained(  # pyright: ignore[reportPrivateImportUsage]
        folder / "transformer"
    )
    vae = diffusers.AutoencoderKLQwenImage(  # pyright: ignore[reportPrivateImportUsage]
        base_dim=8, z_dim=CHANNELS, num_res_blocks=1, input_channels=alpha,
        latents_mean=[0.1 * i - 0.2 for i in range(CHANNELS)],
        latents_std=[1.0 + 0.1 * i for i in range(CHANNELS)],
    )  # fmt: skip
    drawn(vae).save_pretrained(folder / "vae")
    encoder = drawn(transformers.Qwen2_5_VLForConditionalGeneration(encoder_config()))
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def processor() -> Any:
    """Qwen2.5-VL's processor, without the video part that needs torchvision."""

    class Processor(transformers.Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name: Any, argument: Any) -> None:
            pass

    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 12845056}  # as published
    )
    return Processor(image_processor, tokenizer(), None)


def tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), pad_token="<|endoftext|>"
    )


def with_kinds_of_tokens(encoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """transformers 5 needs to be told which tokens are pictures, to put them on their grid.

    transformers 4, which the model was published with, saw it in the ids. diffusers 0.42.1 passes
    what was enough then, and so loses the grid without a word.
    """
    pictures = kwargs["input_ids"] == encoder.config.image_token_id
    return args, {**kwargs, "mm_token_type_ids": pictures.int()}


def oracle(folder: Path, kind: str) -> Any:
    """diffusers' pipeline over the folder."""
    scheduler = {**SCHEDULER, **(LAYERED if "Layered" in kind else {})}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=torch.float32
    )
    encoder.register_forward_pre_hook(with_kinds_of_tokens, with_kwargs=True)
    parts = {"processor": processor()} if kind != "QwenImagePipeline" else {}
    pipeline = getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),  # pyright: ignore[reportPrivateImportUsage]
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae"),  # pyright: ignore[reportPrivateImportUsage]
        text_encoder=encoder.eval(),
        tokenizer=tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),  # pyright: ignore[reportPrivateImportUsage]
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
