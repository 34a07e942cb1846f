"""Parts that networks of several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.operations import Operations

WORDS = 64  # tokens of text in a block: from the one with the first new word on, all are computed

# (layer, k, v) of tokens (B, heads, tokens, head_dim) -> those of all tokens up to these.
See: TypeAlias = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Block:
    """A run of prefix tokens that go through a network together.

    `content`, tensors, numbers and words, decides their keys and values, together with the blocks
    before it and the weights. `compute` runs them through all layers; in each it hands its keys and
    values to `See`, once, and reads what that returns. What `compute` returns is kept too.
    """

    tokens: int
    content: tuple[Any, ...]
    compute: Callable[[See], Tensor | None]


class Store(Protocol):
    """Keeps what was computed for as long as it likes; `sampling/prefix_store.py` is one.

    `owner` is the network that computes, `kind` a word for the user.
    """

    def keep(self, kind: str, owner: Any, blocks: Sequence[Block], room: int) -> KeptKeys:
        """Keys and values of these blocks, computed from the first one on that is not known."""
        ...

    def recall(
        self, kind: str, owner: Any, content: tuple[Any, ...], compute: Callable[[], Any]
    ) -> Any:
        """What `compute` returns, tensors in tuples or lists, for this content."""
        ...


@dataclass
class KeptKeys:
    """Keys and values of tokens that no step changes, computed once, read at every step.

    `keys[layer]`, `values[layer]`: (B, heads, length + room, head_dim), keys after rotation. The
    room behind `length` is scratch space where a step writes its own keys and values, so that
    attention reads one buffer and nothing is concatenated. `outputs` are what blocks returned.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int
    outputs: tuple[Tensor | None, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes that are kept, without the scratch room."""
        k = self.keys[0]
        return 2 * len(self.keys) * k[:, :, : self.length].numel() * k.element_size()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The buffers of one layer."""
        return self.keys[index], self.values[index]

    def keep(self, k: Tensor, v: Tensor, room: int) -> None:
        """Add a layer: k and v (B, heads, length, head_dim)."""
        self.keys.append(_with_room(k, room))
        self.values.append(_with_room(v, room))

    def common(self, other: KeptKeys) -> int:
        """How many tokens, from the first one on, are the very same memory."""
        return self.length if other is self else 0

    def reserve(self, tokens: int) -> None:
        """Make sure that `tokens` of a step fit behind those that are kept."""
        if self.keys[0].shape[2] >= self.length + tokens:
            return
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = _with_room(old[:, :, : self.length], tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a step's tokens (B, heads, tokens, head_dim) to what is kept and themselves.

        What is kept has batch B, or fewer: then many share it, in turn.
        """
        (keys, values), start = self.layer(layer), self.length
        end = start + k.shape[2]
        if torch.is_grad_enabled():  # training: buffers are not written in place
            shared = (-1 if keys.shape[0] == k.shape[0] else k.shape[0], -1, -1, -1)
            k = torch.cat([keys[:, :, :start].expand(shared), k], dim=2)
            v = torch.cat([values[:, :, :start].expand(shared), v], dim=2)
            return F.scaled_dot_product_attention(q, k, v)
        parts = []
        for i in range(0, len(q), len(keys)):
            part = slice(i, i + len(keys))
            keys[:, :, start:end], values[:, :, start:end] = k[part], v[part]
            parts.append(
                F.scaled_dot_product_attention(q[part], keys[:, :, :end], values[:, :, :end])
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def computed(blocks: Sequence[Block], room: int) -> KeptKeys:
    """Keys and values of blocks, one after the other: what a store gives that keeps nothing.

    With gradients there must be one block only.
    """
    kept = KeptKeys([], [], 0)
    whole = sum(block.tokens for block in blocks) + room

    def see(start: int, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(kept.keys):
            kept.keep(k, v, whole - k.shape[2])
            return k, v
        end = start + k.shape[2]
        keys, values = kept.layer(layer)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    for block in blocks:
        output = block.compute(partial(see, kept.length))
        kept.length, kept.outputs = kept.length + block.tokens, (*kept.outputs, output)
    return kept


def _with_room(x: Tensor, room: int) -> Tensor:
    """x (B, heads, tokens, head_dim) in a buffer with `room` free tokens behind it."""
    return x if torch.is_grad_enabled() else F.pad(x, (0, 0, 0, room))


def replace_layers(
    root: nn.Module, operations: Operations, device: Any, dtype: torch.dtype | None
) -> None:
    """Exchange every layer under `root` that holds weights for its like from `operations`."""
    place = {"device": device, "dtype": dtype}
    for parent in list(root.modules()):
        for name, layer in list(parent.named_children()):
            new: nn.Module | None = None
            if isinstance(layer, nn.Linear):
                bias = layer.bias is not None
                new = operations.Linear(layer.in_features, layer.out_features, bias=bias, **place)
            elif isinstance(layer, nn.Embedding):
                new = operations.Embedding(layer.num_embeddings, layer.embedding_dim, **place)
            elif isinstance(layer, nn.LayerNorm):
                new = operations.LayerNorm(layer.normalized_shape, eps=layer.eps, **place)
            elif type(layer).__name__.endswith("RMSNorm"):
                width = layer.get_parameter("weight").shape[0]
                eps = float(getattr(layer, "variance_epsilon"))  # noqa: B009  # transformers' name
                new = operations.RMSNorm(width, eps=eps, **place)
            if new is not None:
                setattr(parent, name, new)


def make_tables(device: torch.device | str | None, *places: tuple[Any, str]) -> None:
    """Make rotary tables of transformers' networks anew: (network, attribute) each.

    No file holds them, so they are real even while the weights are still on "meta".
    """
    real = torch.device(device or "cpu")
    with torch.device("cpu") if real.type == "meta" else real:
        for network, name in places:
            setattr(network, name, type(getattr(network, name))(network.config))
