"""Shapes of regions against definitions that are slow and plain; reports of what is no picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seedling.sampling import SamplingError
from seedling.sampling.composite import depth, feathered, grown, joined
from seedling.sampling.preservation import delta_e, differences, lab, preservation


def region_of(height: int, width: int, seed: int) -> Tensor:
    made = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.4
    made[height // 3 : height, width // 4 : width // 4 * 3] = True
    return made.float()


SIZES = [(1, 1), (1, 9), (9, 1), (23, 40), (40, 17)]


@pytest.mark.parametrize("size", SIZES)
def test_depth_is_the_chessboard_distance_to_the_outside(size: tuple[int, int]) -> None:
    for seed in range(5):
        inside = region_of(*size, seed) > 0
        outside, points = torch.nonzero(~inside), torch.nonzero(inside)
        found = depth(inside)
        assert not found[~inside].any()
        if len(outside) and len(points):
            away = (points[:, None] - outside[None]).abs().amax(dim=-1).amin(dim=1)
            assert torch.equal(found[inside], away.float())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", [-50, -2, -1, 1, 2, 7, 500])
def test_growing_is_the_highest_of_a_square(size: tuple[int, int], pixels: int) -> None:
    """Any numbers, further than the picture is large, and nothing comes from outside of it."""
    region = torch.rand(size, generator=torch.Generator().manual_seed(1))
    side, sign = 2 * abs(pixels) + 1, 1 if pixels > 0 else -1
    padded = F.pad(sign * region, (side // 2,) * 4, value=-2.0)
    wanted = sign * F.max_pool2d(padded[None], side, 1)[0]
    assert torch.equal(grown(region, pixels), wanted)


def test_a_feather_of_everything_and_of_nothing() -> None:
    assert torch.equal(feathered(torch.ones(5, 7), 3), torch.ones(5, 7))
    assert torch.equal(feathered(torch.zeros(5, 7), 3), torch.zeros(5, 7))


def test_a_winding_shape_is_followed_to_its_end() -> None:
    """A spiral of one pixel: every turn once, and nothing that only touches at a corner."""
    side = 41
    alike = torch.zeros(side, side, dtype=torch.bool)
    row, column, way, steps = 0, 0, (0, 1), 0
    alike[0, 0] = True
    while True:
        ahead, beyond = [(row + k * way[0], column + k * way[1]) for k in (1, 2)]
        free = all(0 <= v < side for v in ahead) and not alike[ahead]
        if free and all(0 <= v < side for v in beyond) and alike[beyond]:
            free = False
        if not free:
            way, steps = (way[1], -way[0]), steps + 1
            if steps > 1:
                break
            continue
        row, column, steps = *ahead, 0
        alike[row, column] = True
    assert int(alike.sum()) > 10 * side
    assert torch.equal(joined(alike, row, column), alike.float())
    crossed = torch.eye(9, dtype=torch.bool)
    assert int(joined(crossed, 4, 4).sum()) == 1


def test_what_is_the_same_needs_no_colour_difference() -> None:
    old = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(2))
    new = old.clone()
    new[3:9, 4:8] = 1 - new[3:9, 4:8]
    found, wanted = differences(new, old), delta_e(lab(new), lab(old))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    assert torch.equal(found > 0, (new != old).any(dim=-1))


@pytest.mark.parametrize("which", ["edited", "original"])
def test_a_picture_that_is_no_numbers_is_not_judged(which: str) -> None:
    """Instead of a report of nan dB and a shift that is none."""
    pictures = {"edited": torch.rand(40, 40, 3), "original": torch.rand(40, 40, 3)}
    pictures[which][5, 5, 1] = float("nan")
    with pytest.raises(SamplingError, match=f"the {which} picture has pixels that are no numbers"):
        preservation(pictures["edited"], pictures["original"])
