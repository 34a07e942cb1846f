"""Diffusers' whole pipeline of Qwen-Image-2.1 and ours over the same random weights, cut down.

The DiT is 8 layers x 512 as in the other benchmarks: an eighth of the width, a quarter of the
layers, so 1/256 of the products with weights for a token. Encoder and VAE are cut down to 1/256
too: Qwen3-VL to an eighth of each width and a quarter of its layers (its vocabulary to 1/32, for
the head that diffusers runs), the VAE, whose depth stays, to a sixteenth of its width. So the three
stand to each other as in the published model, in what they multiply.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from ..model_loaders.families.qwen_image_21.encoder import EncoderConfig, Qwen3VL
from ..model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from ..model_loaders.tokenizers import byte_level_bpe
from ..sampling.pipeline import Pipeline
from ._dits import randomize

PARTS = ("encoder", "VAE", "DiT")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
SCHEDULER = {
    "num_train_timesteps": 1000, "use_dynamic_shifting": True, "time_shift_type": "exponential",
    "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip


def encoder_config(dit: DiTConfig) -> EncoderConfig:
    """Qwen3-VL-8B in the proportions of a DiT cut down from 32 layers x 4096."""
    narrow, flat, full = 4096 // dit.dim, 32 // dit.layers, EncoderConfig()
    depth = max(4, round(full.vision_depth / flat))
    return EncoderConfig(
        vocab_size=max(512, full.vocab_size // (narrow * flat)),
        hidden=dit.context_dim,
        layers=max(4, full.layers // flat),
        heads=max(1, full.heads // narrow),
        kv_heads=max(1, full.kv_heads // narrow),
        head_dim=full.head_dim,
        intermediate=full.intermediate // narrow,
        vision_hidden=72 * max(1, full.vision_heads // narrow),
        vision_depth=depth,
        vision_heads=max(1, full.vision_heads // narrow),
        vision_intermediate=full.vision_intermediate // narrow,
        deepstack=(depth // 4, depth // 2, 3 * depth // 4),
    )


def vae_config(dit: DiTConfig) -> VAEConfig:
    """Of the published depth; the width falls as the root of the DiT's multiplications."""
    full = VAEConfig()
    narrow = round(((4096 / dit.dim) ** 2 * 32 / dit.layers) ** 0.5)
    base, decoder = (max(2, w // narrow) for w in (full.base_dim, full.decoder_base_dim))
    return VAEConfig(base_dim=base, decoder_base_dim=decoder)


@torch.no_grad()
def drawn(network: nn.Module, name: str) -> dict[str, torch.Tensor]:
    for key, weight in network.named_parameters():
        randomize(key, weight)
        if name == "vae" and key.endswith("bias") or key.endswith(".b"):
            weight.zero_()
    return {k: v.contiguous() for k, v in network.state_dict().items()}


def write(folder: Path, dit: DiTConfig) -> Path:
    """Random weights in the folder of a diffusers pipeline, as both programs read it."""
    torch.manual_seed(0)
    encoder, vae = encoder_config(dit), vae_config(dit)
    networks = {"transformer": DiT(dit), "vae": VAE(vae), "text_encoder": Qwen3VL(encoder)}
    pad = tokenizer().token_to_id("<|image_pad|>")
    published = asdict(vae)
    published["temperal_downsample"] = published.pop("temporal_downsample")  # as it is spelt there
    published |= {"in_channels": vae.folded, "out_channels": vae.folded}
    configs: dict[str, dict[str, Any]] = {
        "transformer": {
            "in_channels": dit.in_channels, "out_channels": dit.in_channels,
            "num_layers": dit.layers, "attention_head_dim": dit.head_dim,
            "num_attention_heads": dit.heads, "context_in_dim": dit.context_dim,
            "mlp_ratio": dit.mlp_dim // dit.dim, "axes_dims_rope": dit.axes,
        },
        "vae": published,
        "text_encoder": {
            **networks["text_encoder"].model.config.to_dict(), "image_token_id": pad,
            "architectures": ["Qwen3VLForConditionalGeneration"],
        },
    }  # fmt: skip
    names = {
        "transformer": "QwenImage21Transformer2DModel", "vae": "AutoencoderKLQwenImage21",
    }  # fmt: skip
    for part, network in networks.items():
        weights = drawn(network, part)
        if part == "text_encoder":
            weights["lm_head.weight"] = torch.randn(encoder.vocab_size, encoder.hidden)
            weights["model.language_model.norm.weight"] = torch.ones(encoder.hidden)
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (folder / part).mkdir(parents=True)
        save_file(weights, folder / part / f"{file}.safetensors", {"format": "pt"})
        config = configs[part] | ({"_class_name": names[part]} if part in names else {})
        (folder / part / "config.json").write_text(json.dumps(config))
    for part, name, content in (
        ("scheduler", "scheduler_config.json", SCHEDULER),
        (".", "model_index.json", {"_class_name": "QwenImage21Pipeline"}),
    ):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / name).write_text(json.dumps(content))
    (folder / "processor").mkdir()
    tokenizer().save(str(folder / "processor" / "tokenizer.json"))
    return folder


def tokenizer() -> Any:
    """Qwen's rules and control tokens over the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return byte_level_bpe({word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))}, [])


def theirs(folder: Path) -> Any:
    """diffusers' pipeline over the folder."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(transformers.Qwen3VLProcessor):
        """Without the part for videos, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: Any, argument: Any) -> None:
            pass

    diffusers: Any = import_module("diffusers")
    images = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096},
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="<|endoftext|>"
    )
    encoder = transformers.Qwen3VLForConditionalGeneration
    dit, vae = diffusers.QwenImage21Transformer2DModel, diffusers.AutoencoderKLQwenImage21
    made = diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.from_pretrained(folder / "vae"),
        text_encoder=encoder.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        processor=Processor(images, fast, None, chat_template=CHAT),
        transformer=dit.from_pretrained(folder / "transformer"),
    )
    made.set_progress_bar_config(disable=True)
    return made


def ours(folder: Path) -> Pipeline:
    return Pipeline.load(folder, folder, folder)


# ---- where a call spends its time --------------------------------------------------------------


def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Multiplications and additions of an attention, which torch does not count on a CPU."""
    b, heads, tokens, channels = q
    return 4 * b * heads * tokens * k[2] * channels


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Meter:
    """Seconds and multiplications (or additions) of each part of a program, since `clear`."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    work: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    counting: bool = False

    def clear(self) -> None:
        self.seconds, self.work = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    def watch(self, owner: Any, method: str, part: str) -> None:
        """From now on count what this method of an object costs."""
        run: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._measured(part):
                return run(*args, **kwargs)

        setattr(owner, method, watched)

    @contextmanager
    def _measured(self, part: str) -> Any:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        if not self.counting:
            yield
        else:
            mapping: dict[Any, Any] = {ATTENTION: attention}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                yield
            self.work[part] += counter.get_total_flops()
        self.seconds[part] += clock() - start


def meter_of(pipeline: Any) -> Meter:
    """A meter of diffusers' pipeline or of ours."""
    meter = Meter()
    if isinstance(pipeline, Pipeline):
        parts = pipeline.encoder.module, pipeline.vae.module, pipeline.dit.module
        methods = (("encode",), ("encode", "decode"), ("prefix", "forward"))
    else:
        parts = pipeline.text_encoder, pipeline.vae, pipeline.transformer
        methods = (("forward",), ("encode", "decode"), ("forward",))
    for part, owner, names in zip(PARTS, parts, methods, strict=True):
        for name in names:
            meter.watch(owner, name, part)
    return meter
