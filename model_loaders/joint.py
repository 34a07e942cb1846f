"""Pictures that are painted at once and see each other, each behind what is kept for it alone.

A row of the batch is a picture. It attends to its own prefix, to the keys and values that the other
rows have in this very step, and to its own. So nothing of a prefix is computed again, what rows
share of their prefixes is there once, and the room for everybody's keys is that of a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .embeddings import rotate
from .layers import KeptKeys


class JointKeys(KeptKeys):
    """What `kept[row]` holds for each row, of a network with so many `layers`. No gradients.

    `turns` (rows, rows, head_dim / 2) complex: how row `i` turns the keys of row `j` once more, to
    see them where they lie for it.
    """

    def __init__(self, kept: Sequence[KeptKeys], layers: int) -> None:
        super().__init__([], [], max(one.length for one in kept))
        self.base, self.turns = kept[0], torch.empty(0)
        self.shared = min(self.base.common(one) for one in kept)
        # The words of each; where they lie in the store only one of them is in place at a time.
        self.own = [self._words(one, layers) for one in kept]
        self._room: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return self.base.bytes

    def reserve(self, tokens: int) -> None:
        self.base.reserve(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all rows' tokens (rows, heads, tokens, head_dim)."""
        keys, values = self.base.layer(layer)
        room_k, room_v = self._space(k)
        common, tokens, parts = self.shared, k.shape[2], []
        room_k[:, :, :common], room_v[:, :, :common] = keys[:, :, :common], values[:, :, :common]
        for row in range(len(q)):
            own_k, own_v = self.own[row][layer]
            end = common + own_k.shape[2]
            room_k[:, :, common:end], room_v[:, :, common:end] = own_k, own_v
            for other in range(len(q)):
                place = slice(end, end + tokens)
                room_k[:, :, place] = self._as_seen(k[other : other + 1], row, other)
                room_v[:, :, place] = v[other]
                end += tokens
            parts.append(
                F.scaled_dot_product_attention(
                    q[row : row + 1], room_k[:, :, :end], room_v[:, :, :end]
                )
            )
        return torch.cat(parts)

    def _as_seen(self, k: Tensor, row: int, other: int) -> Tensor:
        """Keys (1, heads, tokens, head_dim) of another row, from where this one sees them."""
        if row == other:
            return k
        return rotate(k.transpose(1, 2), self.turns[row, other][None]).transpose(1, 2)

    def _space(self, k: Tensor) -> list[Tensor]:
        """Room (1, heads, tokens, head_dim) for the keys, and for the values, that a row sees."""
        words = max(own[0][0].shape[2] for own in self.own)
        shape = 1, k.shape[1], self.shared + words + len(k) * k.shape[2], k.shape[3]
        if not self._room or self._room[0].shape != shape or self._room[0].dtype != k.dtype:
            self._room = [k.new_empty(shape), k.new_empty(shape)]
        return self._room

    def _words(self, kept: KeptKeys, layers: int) -> list[tuple[Tensor, Tensor]]:
        kept.reserve(0)
        part = slice(self.shared, kept.length)
        return [
            (k[:, :, part].clone(), v[:, :, part].clone())
            for k, v in map(kept.layer, range(layers))
        ]
