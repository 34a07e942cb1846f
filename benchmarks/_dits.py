"""Diffusers' DiT of Qwen-Image-2.1 and ours over the same random weights, and something to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from ..model_loaders.families.qwen_image_21.sequence import SLOT

WORDS = 64  # of the prompt, in tokens; each reference adds two more around it


def config_of(layers: int, heads: int, head_dim: int = 128, context: int = 512) -> DiTConfig:
    """The published network, cut down; heads of 128 channels are the published ones."""
    side = head_dim * 7 // 16
    return DiTConfig(
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        context_dim=context,
        mlp_dim=3 * heads * head_dim,
        axes=(head_dim - 2 * side, side, side),
    )


def randomize(name: str, weight: Tensor) -> None:
    """Fill a weight so that signals keep their size: no overflow, nothing that fades to zero."""
    if weight.ndim > 1:
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    else:  # norms: the text's is stored as scale - 1
        nn.init.normal_(weight, mean=0.0 if "text_norm" in name else 1.0, std=0.1)


def diffusers_dit(c: DiTConfig, fill: Callable[[str, Tensor], None] = randomize) -> Any:
    """Diffusers' network in fp32, whose weights `fill` writes."""
    from diffusers.models.transformers.transformer_qwenimage21 import (
        QwenImage21Transformer2DModel,
    )

    network = QwenImage21Transformer2DModel(
        in_channels=c.in_channels,
        out_channels=c.in_channels,
        num_layers=c.layers,
        attention_head_dim=c.head_dim,
        num_attention_heads=c.heads,
        context_in_dim=c.context_dim,
        mlp_ratio=c.mlp_dim // c.dim,
        axes_dims_rope=c.axes,
        eps=c.eps,
    )
    for name, weight in network.named_parameters():
        fill(name, weight.data)
    return network.requires_grad_(False).eval()


def random_dits(c: DiTConfig) -> tuple[Any, DiT]:
    """Diffusers' network and ours; the weights are the same tensors."""
    torch.manual_seed(0)
    theirs = diffusers_dit(c)
    ours = DiT(c, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.requires_grad_(False).eval()


@dataclass(frozen=True)
class Scene:
    """Random inputs: encoder states (1, L, C) with their slots, references, latents and a time."""

    text: Tensor
    slots: Tensor
    references: list[Tensor]
    x: Tensor
    t: Tensor

    @property
    def tokens(self) -> int:
        """Of the target."""
        return self.x.shape[-2] * self.x.shape[-1]

    def with_target(self, x: Tensor, time: float) -> Scene:
        return replace(self, x=x, t=torch.full_like(self.t, time))

    def to(self, dtype: torch.dtype) -> Scene:
        return Scene(
            self.text.to(dtype),
            self.slots,
            [r.to(dtype) for r in self.references],
            self.x.to(dtype),
            self.t.to(dtype),
        )


def random_scene(c: DiTConfig, side: int, references: Sequence[int] = ()) -> Scene:
    """A target of side x side latent tokens and square references with these sides."""
    slots = [False] * 5
    for r in references:
        slots += [False, *[True] * (r * r // SLOT), False]
    slots += [False] * WORDS
    return Scene(
        text=torch.randn(1, len(slots), c.context_dim),
        slots=torch.tensor(slots),
        references=[torch.randn(1, c.in_channels, r, r) for r in references],
        x=torch.randn(1, c.in_channels, side, side),
        t=torch.tensor([0.7]),
    )


def new_cache(theirs: Any) -> Any:
    """Diffusers' own store of the prefix; empty."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    return QwenImage21KVCache(len(theirs.transformer_blocks))


def diffusers_velocity(
    theirs: Any, scene: Scene, cache: Any = None, mode: str | None = None
) -> Tensor:
    """What diffusers' pipeline calls in a step, as a picture (1, C, h, w).

    With a cache, `mode` is "extract" in the first step and "cached" in all others; that is its
    default. Without, it runs the references again in every step.
    """
    images = [*scene.references, scene.x]
    grids = [(image.shape[-2], image.shape[-1]) for image in images]
    target = torch.ones(scene.tokens // SLOT, dtype=torch.bool)
    out = theirs(
        hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),
        encoder_hidden_states=scene.text,
        timestep=scene.t,
        img_shapes=[[(1, h, w) for h, w in grids]],
        img_mask=torch.cat([scene.slots, target])[None],
        kv_cache=cache,
        kv_cache_mode=mode,
        return_dict=False,
    )[0]
    return out[:, -math.prod(grids[-1]) :].transpose(1, 2).unflatten(2, grids[-1])
