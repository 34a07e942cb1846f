"""The text encoders of FLUX.2: Qwen3 for klein, Mistral Small for dev, read in three layers.

The networks are transformers', their layers exchanged for those of an operations namespace, and end
at the last layer that is read: what lies above is neither loaded nor run. References are not seen
here: FLUX.2 reads them through its VAE only. transformers is imported when a network is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....quant.operations import TORCH, Operations
from ...layers import make_tables, replace_layers
from ...shapes import count, ratio
from .templates import PromptTokenizer

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

QWEN3, MISTRAL = "qwen3", "mistral"
LAYERS = {QWEN3: (9, 18, 27), MISTRAL: (10, 20, 30)}  # whose outputs are read, counted from 1
THETA = {QWEN3: 1_000_000.0, MISTRAL: 1_000_000_000.0}
EPS = {QWEN3: 1e-6, MISTRAL: 1e-5}


@dataclass(frozen=True)
class EncoderConfig:
    """Widths of the network; the defaults are Qwen3-4B."""

    kind: str = QWEN3
    vocab_size: int = 151936
    hidden: int = 2560
    read: tuple[int, ...] = LAYERS[QWEN3]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 9728
    theta: float = THETA[QWEN3]
    eps: float = EPS[QWEN3]

    @property
    def width(self) -> int:
        """Channels that the diffusion model gets for a token."""
        return self.hidden * len(self.read)

    @classmethod
    def from_header(cls, checkpoint: Checkpoint, kind: str) -> EncoderConfig:
        """From canonical names and shapes; `checkpoint.config` for what shapes cannot tell.

        Raises KeyError for a missing tensor, ValueError where shapes and config do not add up.
        """
        shapes = {name: tuple(info.shape) for name, info in checkpoint.names.items()}
        said = dict(checkpoint.config.get("text_config") or checkpoint.config)
        rope = said.get("rope_parameters") or said
        layer = "model.layers.0"
        vocab_size, hidden = shapes["model.embed_tokens.weight"]
        if kind == QWEN3:
            (head_dim,) = shapes[f"{layer}.self_attn.q_norm.weight"]
        else:
            head_dim = int(said.get("head_dim") or 128)
        read = tuple(map(int, said.get("read_layers") or LAYERS[kind]))
        layers = count(shapes, "model.layers.", ".self_attn.q_proj.weight")
        if not read or layers < max(read) or min(read) < 1:
            raise ValueError(f"it has {layers} layers, and the layers {read} must be read")
        heads, keys = (
            ratio(name, shapes[name][0], head_dim)
            for name in (f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.k_proj.weight")
        )
        return cls(
            kind=kind,
            vocab_size=vocab_size,
            hidden=hidden,
            read=read,
            heads=heads,
            kv_heads=keys,
            head_dim=head_dim,
            intermediate=shapes[f"{layer}.mlp.gate_proj.weight"][0],
            theta=float(rope.get("rope_theta") or THETA[kind]),
            eps=float(said.get("rms_norm_eps") or EPS[kind]),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_header` cannot read from shapes."""
        return {
            "head_dim": self.head_dim,
            "rope_theta": self.theta,
            "rms_norm_eps": self.eps,
            "read_layers": list(self.read),
        }


class TextModel(nn.Module):
    """Token ids to the outputs of the layers that are read."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = _transformers_model(config)
        self.model.norm = nn.Identity()
        replace_layers(self.model, operations, device, dtype)
        make_tables(device, (self.model, "rotary_emb"))
        self.eval()

    def forward(self, ids: Tensor, read: Tensor) -> Tensor:
        """States (B, L, width) of conversations `ids` (B, L); `read` (B, L) is 0 at padding."""
        states: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                states[number] = output if isinstance(output, Tensor) else output[0]

            return hook

        layers = self.model.layers
        hooks = [layers[n - 1].register_forward_hook(keep(n)) for n in self.config.read]
        try:
            self.model(inputs_embeds=self.model.embed_tokens(ids), attention_mask=read.long(),
                       use_cache=False)  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([states[n] for n in self.config.read], dim=-1)


def _transformers_model(config: EncoderConfig) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": max(config.read),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "max_position_embeddings": 32768,
    }
    if config.kind == QWEN3:
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

        return Qwen3Model(Qwen3Config(**settings))
    from transformers.models.mistral.configuration_mistral import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralModel

    return MistralModel(MistralConfig(**settings, sliding_window=None))


@dataclass(frozen=True)
class Conditioning:
    """What the diffusion model reads of a prompt: `hidden` (1, 512, width) fp32.

    `slots` (512) are True where a reference stands among the words: nowhere.
    """

    hidden: Tensor
    slots: Tensor


class Encoder:
    """A network with the tokenizer that it was trained with."""

    def __init__(self, model: TextModel, tokenizer: PromptTokenizer) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        tokenizer.must_fit(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    @torch.no_grad()
    def encode(self, prompt: str, images: Sequence[Tensor] = ()) -> Conditioning:
        """Read a prompt. Raises PromptError for one that is too long, or not Unicode.

        `images` are for callers that know no encoder in particular: this one does not look.
        """
        words = self.tokenizer.prompt(prompt)
        ids = torch.tensor([words.ids], device=self.device)
        hidden = self.model(ids, torch.tensor([words.read], device=self.device))
        return Conditioning(hidden.float(), torch.zeros(ids.shape[1], dtype=torch.bool))
