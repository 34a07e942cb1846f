"""Control signals: what each keeps of a picture, and its way to the model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from seedling.sampling import SamplingError
from seedling.sampling.signals import SIGNALS, signal


def disc(size: int = 96) -> Tensor:
    """A red disc of radius 28 in the middle of pale blue."""
    at = torch.arange(size) - (size - 1) / 2
    inside = (at[:, None].square() + at.square()).sqrt() < 28
    return torch.where(
        inside[..., None], torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.7, 0.8, 1])
    )


def distance(size: int = 96) -> Tensor:
    """How far a pixel is from the disc's edge."""
    at = torch.arange(size) - (size - 1) / 2
    return ((at[:, None].square() + at.square()).sqrt() - 28).abs()


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("size", [(96, 96), (37, 61), (8, 90)])
def test_a_signal_is_a_picture_of_the_same_size(kind: str, size: tuple[int, int]) -> None:
    made = signal(torch.rand(*size, 4), kind)
    assert made.shape == (*size, 3)
    assert float(made.min()) >= 0 and float(made.max()) <= 1 and bool(made.isfinite().all())


@pytest.mark.parametrize("kind", ["canny", "soft edge", "line art"])
def test_edges_lie_where_the_disc_ends(kind: str) -> None:
    lines = signal(disc(), kind)[..., 0]
    if kind == "line art":
        lines = 1 - lines
    assert float(lines[distance() > 8].max()) < 0.1
    near = lines[distance() < 3]
    assert float(near.max()) > 0.5 and float(near.mean()) > 0.15


@pytest.mark.parametrize("kind", ["blur", "colour blocks", "tile"])
def test_colours_stay_and_shapes_go(kind: str) -> None:
    image = disc()
    texture = (torch.rand(96, 96, 1, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.2
    made = signal((image + texture).clamp(0, 1), kind)
    plain = signal(image, kind)
    assert torch.allclose(made[48, 48], image[48, 48], atol=0.1)
    assert torch.allclose(made[4, 4], image[4, 4], atol=0.1)
    left = (made - plain).std() / texture.std()
    assert float(left) < 0.5, "the texture is gone"


@pytest.mark.parametrize("kind", SIGNALS)
def test_more_detail_lets_more_through(kind: str) -> None:
    """Measured as what is left of a fine texture, or as ink."""
    generator = torch.Generator().manual_seed(1)
    image = (disc() + (torch.rand(96, 96, 3, generator=generator) - 0.5) * 0.3).clamp(0, 1)

    def amount(detail: float) -> float:
        made = signal(image, kind, detail)
        if kind == "canny":
            return float(made.mean())
        return float((made[1:] - made[:-1]).abs().mean())

    assert amount(0.0) < amount(0.5) < amount(1.0)


def test_colour_blocks_are_flat() -> None:
    made = signal(torch.rand(64, 64, 3), "colour blocks", 0.0)
    assert len(made.reshape(-1, 3).unique(dim=0)) == 64


def test_alpha_lies_on_white() -> None:
    clear = torch.cat([torch.rand(32, 32, 3), torch.zeros(32, 32, 1)], dim=-1)
    assert torch.allclose(signal(clear, "blur"), torch.ones(32, 32, 3), atol=1e-5)


def test_senseless_signals_are_refused() -> None:
    with pytest.raises(SamplingError, match="choose one of: canny"):
        signal(disc(), "depth")
    with pytest.raises(SamplingError, match="between 0 and 1"):
        signal(disc(), "canny", 2)
    with pytest.raises(SamplingError, match="at least 8 a side"):
        signal(disc()[:7], "canny")


def test_kornia_waits_until_it_is_used() -> None:
    code = "import sys, seedling.sampling.signals; sys.exit('kornia' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_signal_is_a_reference_with_its_role(nodes: Any) -> None:
    """Behind those that were there, in the instruction's words, and read by the model."""
    from seedling.nodes.references import instruction

    loaded = nodes.loaded()
    (before,) = nodes("References", images={"image_1": disc()[None]}, model=loaded["model"])
    found, image = nodes("ControlSignal", image=disc()[None], references=before)
    assert torch.equal(image[0], signal(disc(), "canny"))
    assert found.side == before.side and found.items[0] is before.items[0]
    assert instruction("a cup", found) == "a cup Image 2: the edges to follow."
    alone, _ = nodes("ControlSignal", image=disc()[None], kind="blur", model=loaded["model"])
    assert alone.side == 128
    given = {"clip": loaded["clip"], "vae": loaded["vae"], "prompt": "a cup"}
    one, _ = nodes("EncodeInstruction", references=before, **given)
    two, _ = nodes("EncodeInstruction", references=found, **given)
    assert len(one[0][1]["reference_latents"]) == 1 < len(two[0][1]["reference_latents"]) == 2
    many = disc()[None].expand(14, -1, -1, -1)
    with pytest.raises(ValueError, match="15 references"):
        nodes("ControlSignal", image=many, references=before)
