"""What Qwen's vision-language models share: how pictures become patches, and where tokens stand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MERGE = 2  # patches per side of a vision token ("slot")
TEMPORAL = 2  # frames per patch; a still picture is shown twice

Grid = tuple[int, int]  # rows, columns


def on_white(image: Tensor) -> Tensor:
    """What the vision tower sees of a picture (H, W, 3 or 4) in 0..1: (3, H, W) over white.

    In steps of 1/255, because the published pipelines hand over 8-bit pictures.
    """
    rgb = image[..., :3].float()
    if image.shape[-1] == 4:
        alpha = image[..., 3:].float()
        rgb = rgb * alpha + (1.0 - alpha)
    return ((rgb.clamp(0.0, 1.0) * 255.0).round() / 255.0).permute(2, 0, 1)


def patches(x: Tensor, patch: int) -> Tensor:
    """Normalised pictures (B, 3, H, W) as patches (B * H/patch * W/patch, 3 * 2 * patch * patch).

    The four patches of a slot follow one another, slots row by row; a patch is channel, frame,
    row, column, and both frames are the same picture.
    """
    b, c, height, width = x.shape
    slot = patch * MERGE
    x = x.reshape(b, c, height // slot, MERGE, patch, width // slot, MERGE, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # picture, slot (y, x), patch (y, x), c, pixel (y, x)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return x.reshape(-1, c * TEMPORAL * patch * patch)


class PatchEmbed(nn.Module):
    """The vision tower's first layer: published as a 3-d convolution, run as a plain product."""

    def __init__(
        self, patch: int, width: int, bias: bool = True, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = (TEMPORAL, patch, patch)
        place = {"device": device, "dtype": dtype}
        self.proj = nn.Conv3d(3, width, kernel, stride=kernel, bias=bias, **place)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 3 * 2 * patch * patch) to (P, width), in the dtype of the patches."""
        weight, bias = self.proj.weight.flatten(1).to(patches.dtype), self.proj.bias
        return F.linear(patches, weight, None if bias is None else bias.to(patches.dtype))


def positions(slots: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Rotary positions (3, B, L) on the axes time, row, column; `slots` (B, L) bool.

    Text advances all three together; a picture stands still in time, counts rows and columns from
    where it starts, and the text after it goes on behind its longer side.
    """
    if not grids:
        return torch.arange(slots.shape[1], device=slots.device).expand(3, slots.shape[0], -1)
    left, rows = iter(grids), []
    for row in slots.tolist():
        parts, start = [], 0
        for is_picture, run in itertools.groupby(row):
            length = len(list(run))
            cells, size = torch.arange(length), length
            if is_picture:
                h, w = (side // MERGE for side in next(left))
                assert h * w == length, f"a picture of {h} x {w} slots meets {length} of them"
                part, size = torch.stack([cells * 0, cells // w, cells % w]), max(h, w)
            else:
                part = cells.expand(3, -1)
            parts.append(part + start)
            start += size
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows, dim=1).to(slots.device)


def published_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Text and vision part of a config.json, of transformers 4 (text at its top) or 5."""
    text = {**config, **(config.get("text_config") or {})}
    rope = text.get("rope_parameters") or {}
    text |= {key: rope[key] for key in ("rope_theta",) if key in rope}
    return text, dict(config.get("vision_config") or {})
