"""What Canvas Size draws on itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("size", [(512, 512), (1216, 832), (64, 2048), (1031, 777)])
def test_the_drawn_sheet_has_the_canvas_s_shape(pack: Any, size: tuple[int, int]) -> None:
    """Its ratio, to a pixel of the drawing, and the part that is painted beyond it."""
    from seedling.nodes.size_picture import size_picture

    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    drawn = size_picture(*size, padded, "words · more")
    light = (drawn.mean(dim=-1) > 0.5)[: 320 - 40]  # above the words below
    rows, columns = light.any(dim=1).sum(), light.any(dim=0).sum()
    assert abs(int(columns) - int(rows) * size[0] / size[1]) <= 2 + size[0] / size[1]
    dark = ((drawn - torch.tensor([0x34, 0x39, 0x46]) / 255).abs().max(dim=-1)[0] < 0.01).any()
    assert bool(dark) == (padded != size)
