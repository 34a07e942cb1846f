"""Cheaper training steps on a CPU: bf16 products where the processor has units for them (AMX).

With products nearly free, the rest is what costs: attention's fused CPU kernel has a slow backward
in bf16, so it becomes two plain products here, and everything between the products of a DiT block
is fused by torch.compile. Measured, rows a second on one core, batch 32, text to image / edit / two
references: fp32 25 / 14 / 10, bf16 with this 54 / 28 / 19.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_loaders.families.qwen_image_21 import dit


def autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` as two products; (B, heads, tokens, head_dim) throughout."""
    if enable_gqa:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -1e4) if is_bool else scores + attn_mask
    return torch.softmax(scores, -1, dtype=scores.dtype) @ v


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """`dit.rotate` in real numbers, which the compiler can fuse."""
    cos, sin = torch.view_as_real(turn).to(x.dtype).unbind(-1)
    cos = cos.repeat_interleave(2, -1)[:, None]
    sin = torch.stack([-sin, sin], -1).flatten(-2)[:, None]
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


def _before(block: Any, x: Tensor, scale: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = block.img_norm1(x) * scale
    return block.attn.queries(h, turn), *block.attn.keys_values(h, turn)


def _after(block: Any, x: Tensor, h: Tensor, gates: Sequence[Tensor], scale: Tensor) -> Tensor:
    x = torch.addcmul(x, gates[0], block.attn.merge(h))
    return torch.addcmul(x, gates[1], block.img_mlp(block.img_norm2(x) * scale))


def compile_training() -> None:
    """Make this process a trainer: plain attention everywhere, compiled DiT blocks.

    Without a C++ compiler the blocks stay as they are.
    """
    F.scaled_dot_product_attention = attention
    if not shutil.which("g++"):
        return
    torch._dynamo.config.cache_size_limit = 64  # type: ignore[attr-defined]
    before: Callable = torch.compile(_before, dynamic=True)
    after: Callable = torch.compile(_after, dynamic=True)

    def forward(self: Any, x: Tensor, modulation: Sequence[Tensor], turn: Tensor, attend: Callable):
        scale1, gate1, scale2, gate2 = modulation
        h = attend(*before(self, x, scale1, turn))
        return after(self, x, h, (gate1, gate2), scale2)

    dit.rotate = rotate
    dit.Block.forward = forward
