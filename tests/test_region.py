"""Edits that keep the rest: regions, the lock while painting, exact sizes, and the report."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seedling.sampling import SamplingError
from seedling.sampling.composite import (
    blend,
    feathered,
    free_of,
    grown,
    joined,
    locked,
    prepared,
    selected,
)
from seedling.sampling.noise import add_noise
from seedling.sampling.preservation import delta_e, lab, preservation, shift, ssim
from seedling.sampling.samplers import SAMPLERS, sampler


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Something with soft shapes in 0..1, in 16-bit steps."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, height // 8, width // 8, generator=generator)
    image = F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0)
    return (image.clamp(0, 1) * 65535).round() / 65535


# ---- where -------------------------------------------------------------------------------------


def test_boxes_in_pixels_and_percent() -> None:
    region = selected((40, 20), "4, 2, 10, 5\n50% 50% 25% 25%")
    assert region is not None
    wanted = torch.zeros(20, 40)
    wanted[2:7, 4:14] = 1
    wanted[10:15, 20:30] = 1
    assert torch.equal(region, wanted)
    assert selected((40, 20)) is None
    beyond = selected((40, 20), "-5, -5, 10, 10; 35, 15, 50, 50")
    assert beyond is not None and int(beyond.sum()) == 50


@pytest.mark.parametrize(
    ("boxes", "points", "words"),
    [
        ("1, 2, 3", "", "not x, y, width, height"),
        ("a, b, c, d", "", "not x, y, width, height"),
        ("nan, 0, 3, 3", "", "not x, y, width, height"),
        ("50, 0, 5, 5", "", "outside of the picture"),
        ("5, 5, 0, 5", "", "holds nothing"),
        ("", "40, 3", "picture, which is 40 x 20"),
        ("", "3", "not x, y"),
    ],
)
def test_senseless_places_are_refused(boxes: str, points: str, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        selected((40, 20), boxes, points, torch.zeros(20, 40, 3))


def test_a_point_takes_what_is_joined_in_its_colour() -> None:
    """Against a flood fill that goes pixel by pixel, on mazes."""
    for seed in range(20):
        alike = torch.rand(23, 31, generator=torch.Generator().manual_seed(seed)) < 0.6
        alike[11, 15] = True
        wanted, edge = torch.zeros(23, 31), [(11, 15)]
        while edge:
            row, column = edge.pop()
            if not (0 <= row < 23 and 0 <= column < 31) or not alike[row, column]:
                continue
            if wanted[row, column]:
                continue
            wanted[row, column] = 1
            edge += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        assert torch.equal(joined(alike, 11, 15), wanted)
    image = torch.full((20, 40, 3), 0.9)
    image[5:10, 5:15] = torch.tensor([0.8, 0.1, 0.1])
    image[12:18, 30:35] = torch.tensor([0.8, 0.1, 0.1])
    region = selected((40, 20), points="7, 7", image=image)
    assert region is not None and int(region.sum()) == 50


def test_growing_and_shrinking() -> None:
    region = torch.zeros(20, 30)
    region[5:10, 0:8] = 1
    larger = grown(region, 3)
    assert int(larger.sum()) == 11 * 11 and larger[2, 10] == 1
    assert torch.equal(grown(larger, -3), region)
    assert torch.equal(grown(region, 0), region)


def test_a_feather_stays_inside() -> None:
    region = torch.zeros(40, 60)
    region[10:30, 20:60] = 1  # touches the right edge of the picture
    soft = feathered(region, 6)
    assert torch.equal(soft > 0, region > 0)
    row = soft[20]
    assert (row[20:27].diff() > 0).all() and (row[26:] == 1).all(), "no fall at the picture's edge"
    assert torch.equal(feathered(region, 0), region)
    thin = torch.zeros(9, 9)
    thin[4] = 1
    assert torch.equal(feathered(thin, 50), thin), "its middle is new, however thin it is"


# ---- sizes and the composite -------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 96), (50, 70)])
def test_padding_comes_off_again(size: tuple[int, int]) -> None:
    image = torch.rand(*size, 4)
    edit = prepared(image, None, 32)
    seen = edit.seen()
    assert seen.shape[0] % 32 == seen.shape[1] % 32 == 0
    assert torch.equal(seen[: size[0], : size[1]], image)
    assert torch.equal(seen[-1, -1], image[-1, -1])
    assert torch.equal(edit.finished(seen), image)
    with pytest.raises(SamplingError, match="resize nothing"):
        edit.finished(seen[:, :-1])


def test_outside_the_region_every_bit_stays() -> None:
    """16-bit values and alpha, from a painted picture that has none."""
    image = picture(200, 300, 4)
    region = torch.zeros(200, 300)
    region[60:120, 100:180] = 1
    for context in (0, 16):
        edit = prepared(image, region, 32, feather=8, context=context, least=64)
        painted = torch.rand(*edit.seen().shape[:2], 3)
        done = edit.finished(painted)
        assert done.shape == image.shape
        outside = region == 0
        assert torch.equal(done[outside], image[outside])
        stored = (done[outside] * 65535).round().to(torch.int32)
        assert torch.equal(stored, (image[outside] * 65535).round().to(torch.int32))
        left, top, width, height = edit.box
        inner = painted[80 - top : 100 - top, 120 - left : 160 - left]
        assert torch.equal(done[80:100, 120:160, :3], inner)
        assert (done[80:100, 120:160, 3] == 1).all()


def test_the_context_is_cut_without_resizing() -> None:
    image = picture(400, 600)
    region = torch.zeros(400, 600)
    region[390:400, 580:590] = 1
    edit = prepared(image, region, 32, context=20, least=100)
    left, top, width, height = edit.box
    assert (width, height) == (128, 128) and (left + width, top + height) == (600, 400)
    assert torch.equal(edit.seen(), image[top : top + 128, left : left + 128])
    free = edit.free(16)
    assert free.shape == (1, 8, 8) and int(free.sum()) == 2
    tall = prepared(picture(40, 600), torch.ones(40, 600), 32, context=1)
    assert tall.box == (0, 0, 600, 40) and tall.padded == (608, 64)


def test_an_empty_region_is_refused() -> None:
    with pytest.raises(SamplingError, match="region is empty"):
        prepared(picture(16, 16), torch.zeros(16, 16), 32)


def test_no_dark_rim_where_alpha_ends() -> None:
    """Half of an opaque red over nothing is red, half opaque."""
    nothing, red = torch.zeros(1, 1, 4), torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    mixed = blend(nothing, red, torch.full((1, 1), 0.5))
    assert torch.allclose(mixed, torch.tensor([1.0, 0.0, 0.0, 0.5]))


# ---- the lock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_lock_ends_where_it_began(name: str) -> None:
    """And the model sees the locked part as noisy as the sigma says, at every step."""
    start, noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    free = torch.zeros(1, 1, 6, 5)
    free[..., 2:4, 1:3] = 1
    seen = []

    def model(x: Tensor, sigma: float) -> Tensor:
        seen.append(
            float((x - add_noise(start, noise, sigma))[(free == 0).expand_as(x)].abs().max())
        )
        return x.sin() + 3

    x = add_noise(start, noise, 1.0)[None]
    for state in sampler(name)(locked(model, start, noise, free), x, (1.0, 0.7, 0.4, 0.1, 0.0)):
        x = state.x
    kept = (free == 0).expand_as(x)
    assert seen == [0.0] * 4
    assert torch.allclose(x[kept], start[None][kept], atol=1e-5)
    assert (x - start)[~kept].abs().mean() > 0.1


def test_masks_of_any_shape_become_latents() -> None:
    latents = torch.zeros(4, 6, 5)
    masks = torch.stack([torch.zeros(6, 5), torch.ones(6, 5)])
    for given in (masks, masks[:, None]):
        assert float(free_of(given, 1, latents).mean()) == 1
        assert float(free_of(given, 2, latents).mean()) == 0
    assert free_of(torch.ones(1, 96, 80), 0, latents).shape == (1, 1, 6, 5)


# ---- the report --------------------------------------------------------------------------------

SHARMA = [  # pairs of the published test data (Sharma, Wu, Dalal 2005, table 1)
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 3.1571, -77.2803), (50, 0, -82.7485), 2.8615),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
    ((50, -0.001, 2.49), (50, 0.0011, -2.49), 4.7461),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((50, 2.5, 0), (50, 3.1736, 0.5854), 1.0),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize(("first", "second", "wanted"), SHARMA)
def test_colour_differences_are_the_published_ones(first: Any, second: Any, wanted: float) -> None:
    a, b = torch.tensor(first).double(), torch.tensor(second).double()
    assert float(delta_e(a, b)) == pytest.approx(wanted, abs=1e-4)
    assert float(delta_e(b, a)) == pytest.approx(wanted, abs=1e-4)


def test_colours_and_similarity_are_kornias() -> None:
    import kornia

    a, b = picture(64, 48), picture(64, 48, seed=1)
    theirs = kornia.color.rgb_to_lab(a.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert torch.allclose(lab(a), theirs, atol=0.02)  # they round the matrix and the white
    luma = [(x @ torch.tensor([0.299, 0.587, 0.114]))[None, None] for x in (a, b)]
    wanted = kornia.metrics.ssim(luma[0], luma[1], 11)[0, 0]
    inner = (slice(5, -5), slice(5, -5))
    assert torch.allclose(ssim(a, b)[inner], wanted[inner], atol=1e-4)


def moved(image: Tensor, right: float, down: float) -> Tensor:
    """By parts of a pixel, in the frequencies."""
    rows, columns = (torch.fft.fftfreq(n).double() for n in image.shape[:2])
    turn = torch.exp(-2j * math.pi * (rows[:, None] * down + columns * right))
    return torch.fft.ifft2(torch.fft.fft2(image.permute(2, 0, 1).double()) * turn).real.permute(
        1, 2, 0
    )


@pytest.mark.parametrize("by", [(0.0, 0.0), (0.05, 0.0), (0.3, -0.7), (-3.25, 1.5)])
def test_shifts_are_found_below_a_pixel(by: tuple[float, float]) -> None:
    image = picture(160, 192)
    found = shift(moved(image, *by).float(), image, torch.ones(160, 192))
    assert found == pytest.approx(by, abs=0.02)


def test_the_report_looks_outside_of_the_region_only() -> None:
    image = picture(160, 192)
    region = torch.zeros(160, 192)
    region[40:90, 30:120] = 1
    edited = image.clone()
    edited[40:90, 30:120] = torch.rand(50, 90, 3)
    found = preservation(edited, image, region)
    assert found.psnr == math.inf and found.delta_e == found.delta_e_most == 0
    assert found.ssim == pytest.approx(1, abs=1e-4) and found.shift == pytest.approx((0, 0))
    assert found.kept == pytest.approx(1 - 50 * 90 / 160 / 192)
    noisy = edited + 0.02 * torch.randn(edited.shape, generator=torch.Generator().manual_seed(1))
    worse = preservation(noisy, image, region)
    assert worse.psnr == pytest.approx(34, abs=0.2) and worse.delta_e > 1
    assert worse.shift == pytest.approx((0, 0), abs=0.05)
    red = worse.map[..., 0] - worse.map[..., 1]
    assert float(red[region == 0].mean()) > 0.05 and float(red[region == 1].abs().max()) < 1e-5
    assert preservation(edited, image).psnr < 20, "without a region all of it counts"
    with pytest.raises(SamplingError, match="Finish Edit first"):
        preservation(edited[1:], image)
    with pytest.raises(SamplingError, match="nothing is left"):
        preservation(edited, image, torch.ones(160, 192))


def test_a_plain_picture_has_no_shift() -> None:
    assert shift(torch.ones(64, 64, 3), torch.ones(64, 64, 3), torch.ones(64, 64)) is None


# ---- on the embedded model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(nodes: Any) -> dict[str, Any]:
    return nodes.loaded()


def edit(nodes: Any, loaded: dict[str, Any], image: Tensor, **widgets: Any) -> tuple[Any, ...]:
    """(edited picture, region, decoded picture) of an edit through the nodes."""
    from seedling.nodes.runtime import runtime

    model, clip, vae = loaded["model"], loaded["clip"], loaded["vae"]
    references, latent, region, _ = nodes(
        "EditRegion", image=image[None], vae=vae, model=model, **widgets
    )
    positive, negative = nodes(
        "EncodeInstruction", clip=clip, prompt="make the star green", references=references, vae=vae
    )
    done, _ = nodes(
        "FewStepSampler", model=model, positive=positive, negative=negative, latent=latent, seed=1,
        steps=4,
    )  # fmt: skip
    decoded = runtime().decode(vae, done["samples"])
    (finished,) = nodes("FinishEdit", image=decoded, references=references)
    return finished, region, decoded


def test_an_edit_keeps_its_size_and_what_is_locked(nodes: Any, loaded: dict[str, Any]) -> None:
    """Whatever the model paints: more than 45 dB outside, no shift, changed inside."""
    image = picture(117, 151)
    finished, region, decoded = edit(nodes, loaded, image, boxes="40, 30, 60, 50")
    assert decoded.shape[1:3] == (128, 160)
    assert finished.shape[1:3] == (117, 151) == tuple(region.shape[1:])
    found = preservation(finished[0], image, region[0])
    assert found.psnr > 45 and found.shift == pytest.approx((0, 0), abs=0.05)
    assert not torch.equal(finished[0, 40:70, 50:90, :3], image[40:70, 50:90])
    report, heat = nodes("PreservationReport", image=finished, original=image[None], region=region)
    assert "the same bits" in report and heat.shape == (1, 117, 151, 3)


def test_the_locked_latents_are_the_pictures(nodes: Any, loaded: dict[str, Any]) -> None:
    """Before any pixel is put back: locked latents decode to what the VAE makes of the original."""
    from seedling.nodes.runtime import runtime

    image = picture(128, 160)
    model, vae = loaded["model"], loaded["vae"]
    references, latent, *_ = nodes(
        "EditRegion", image=image[None], vae=vae, model=model, boxes="64, 64, 32, 32"
    )
    positive, negative = nodes(
        "EncodeInstruction", clip=loaded["clip"], prompt="x", references=references, vae=vae
    )
    done, _ = nodes(
        "FewStepSampler", model=model, positive=positive, negative=negative, latent=latent, seed=1,
        steps=3,
    )  # fmt: skip
    free = latent["noise_mask"][0].bool()
    assert free.shape == (1, 8, 10) and int(free.sum()) == 4
    difference = (done["samples"] - latent["samples"]).abs().amax(dim=1)
    assert float(difference[~free].max()) < 1e-4 < float(difference[free].min())
    assert torch.equal(runtime().encode(vae, image), latent["samples"])


def test_without_the_lock_only_the_size_is_kept(nodes: Any, loaded: dict[str, Any]) -> None:
    image = picture(100, 100)
    finished, region, decoded = edit(nodes, loaded, image, boxes="1, 1, 9, 9", lock=False)
    assert float(region.min()) == 1
    assert torch.equal(finished, decoded[:, :100, :100])


def test_masks_points_and_more_references(nodes: Any, loaded: dict[str, Any]) -> None:
    image, vae = picture(64, 64, 4), loaded["vae"]
    image[10:20, 10:20] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    mask = torch.zeros(1, 64, 64)
    mask[0, 40:50, 40:50] = 1
    (others,) = nodes("References", images={"image_1": torch.zeros(1, 40, 40, 3)})
    given = {"image": image[None], "vae": vae, "points": "15, 15", "mask": mask, "feather": 0}
    references, latent, region, _ = nodes("EditRegion", references=others, **given)
    wanted = torch.zeros(64, 64)
    wanted[10:20, 10:20] = wanted[40:50, 40:50] = 1
    assert torch.equal(region[0], wanted)
    assert len(references.items) == 2 and references.items[1] is others.items[0]
    assert references.sizes(vae.family)[0] == (64, 64) == references.edit.padded
    assert torch.equal(references.sized(vae.family)[0], image)
    _, empty, everything, _ = nodes("EditRegion", image=image[None], vae=vae, mask=mask * 0)
    assert not empty["samples"].any() and "noise_mask" not in empty and everything.all()
    with pytest.raises(ValueError, match="mask that belongs"):
        nodes("EditRegion", image=image[None], vae=vae, mask=torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="one is edited at a time"):
        nodes("EditRegion", image=image[None].expand(2, -1, -1, -1), vae=vae)


def test_finishing_without_an_edit_cuts(nodes: Any) -> None:
    image = torch.rand(2, 64, 96, 3)
    (same,) = nodes("FinishEdit", image=image)
    assert torch.equal(same, image)
    (smaller,) = nodes("FinishEdit", image=image, width=90, height=50)
    assert torch.equal(smaller, image[:, :50, :90])
    with pytest.raises(ValueError, match="cannot be cut to 97 x 0"):
        nodes("FinishEdit", image=image, width=97)
    (plain,) = nodes("References", images={"image_1": image[:1]})
    with pytest.raises(ValueError, match="connect those from Edit Region"):
        nodes("FinishEdit", image=image, references=plain)
    small = torch.zeros(1, 8, 8, 3)
    with pytest.raises(ValueError, match="region of Edit Region"):
        nodes("PreservationReport", image=small, original=small, region=torch.ones(1, 4, 4))


def test_a_16_bit_file_with_alpha_comes_through(nodes: Any, loaded: dict[str, Any]) -> None:
    """From the file to the finished edit, every bit outside of the region."""
    import kornia_rs.io as kornia_io  # pyright: ignore[reportMissingModuleSource]
    import numpy as np

    stored = np.ascontiguousarray((picture(70, 90, 4) * 65535).round().numpy(), np.uint16)
    path = nodes.folder / "deep.png"
    kornia_io.write_image_png_u16(str(path), stored, "rgba")
    given = {"file": "deep.png", "vae": loaded["vae"], "boxes": "30, 20, 20, 20"}
    references, _, region, original = nodes("EditRegion", **given)
    assert original.shape == (1, 70, 90, 4)
    painted = torch.rand(1, 96, 96, 3)
    (done,) = nodes("FinishEdit", image=painted, references=references)
    again = nodes.folder / "done.png"
    values = np.ascontiguousarray((done[0] * 65535).round().numpy(), np.uint16)
    kornia_io.write_image_png_u16(str(again), values, "rgba")
    back = np.asarray(kornia_io.read_image_png_u16(str(again), "rgba"))
    outside = region[0].numpy() == 0
    assert (back[outside] == stored[outside]).all() and (back[~outside] != stored[~outside]).any()
    node = nodes.known["SeedlingEditRegion"]
    first = node.fingerprint_inputs(file="deep.png")
    kornia_io.write_image_png_u16(str(path), stored[:40].copy(), "rgba")
    assert first != node.fingerprint_inputs(file="deep.png")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="deep.png cannot be read as a picture"):
        nodes("EditRegion", **given)
    with pytest.raises(ValueError, match="one picture is edited"):
        nodes("EditRegion", vae=loaded["vae"])
    with pytest.raises(ValueError, match="not both"):
        nodes("EditRegion", image=original, **given)


def test_grey_of_16_bits_is_not_cut_off(nodes: Any) -> None:
    import kornia_rs.io as kornia_io  # pyright: ignore[reportMissingModuleSource]
    import numpy as np

    stored = np.full((32, 32, 1), 20000, np.uint16)
    kornia_io.write_image_png_u16(str(nodes.folder / "grey.png"), stored, "mono")
    (found,) = nodes("References", strip='["grey.png"]')
    assert float(found.items[0].image.mean()) == pytest.approx(20000 / 65535)
    assert found.items[0].image.shape == (32, 32, 3)
