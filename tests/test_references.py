"""What references say and cost: own sizes, masks, strength and role on the embedded model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def loaded(nodes: Any) -> dict[str, Any]:
    return nodes.loaded()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width))[0].permute(1, 2, 0)


def listed(nodes: Any, strip: list[Any], model: Any = None, **given: Any) -> Any:
    (found,) = nodes("References", strip=json.dumps(strip), model=model, **given)
    return found


def test_each_has_a_size_of_its_own(nodes: Any, loaded: dict[str, Any]) -> None:
    family = loaded["model"].family
    images = {f"image_{n}": picture(96, 288)[None] for n in range(1, 5)}
    strip = [
        "image_1",
        {"image": "image_2", "size": "own"},
        {"image": "image_3", "size": 64},
        {"image": "image_4", "size": "model"},
    ]
    found = listed(nodes, strip, loaded["model"], images=images)
    assert found.sides == [128, 0, 64, 128]
    sizes = [family.reference_size(288, 96, side**2) for side in (128, 0, 64, 128)]
    assert found.sizes(family) == sizes and len(set(sizes)) == 3
    assert [(x.shape[1], x.shape[0]) for x in found.sized(family)] == sizes
    assert torch.equal(found.sized(family)[1], images["image_2"][0])


@pytest.mark.parametrize("size", ["3K", 16, 99999, True, None, 64.5])
def test_a_senseless_size_is_refused(nodes: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="the size of reference 1 is"):
        listed(nodes, [{"image": "a.png", "size": size}])


def test_masks_may_be_named(nodes: Any) -> None:
    """For a file of the list, and for an input that has another one's."""
    from PIL import Image

    folder = nodes.folder
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(folder / "half.png")
    mask = torch.zeros(1, 32, 32)
    mask[0, 0, 0] = 1
    given = {"images": {"image_1": picture(32, 32)[None]}, "masks": {"mask_3": mask}}
    (by_file,) = listed(nodes, [{"image": "image_1", "mask": "half.png"}], **given).items
    assert by_file.image[..., 3].sum() == 16 * 32
    (by_input,) = listed(nodes, [{"image": "image_1", "mask": "mask_3"}], **given).items
    assert by_input.image[..., 3].sum() == 1
    (without,) = listed(nodes, ["image_1"], **given).items
    assert without.image.shape[-1] == 3
    with pytest.raises(ValueError, match="names mask_9"):
        listed(nodes, [{"image": "image_1", "mask": "mask_9"}], **given)
    node = nodes.known["SeedlingReferences"]
    strip = json.dumps([{"image": "image_1", "mask": "half.png"}])
    before = node.fingerprint_inputs(strip=strip)
    half.resize((64, 64)).save(folder / "half.png")
    assert node.fingerprint_inputs(strip=strip) != before


# ---- what they cost ----------------------------------------------------------------------------


def test_the_cost_is_what_the_prefix_holds(nodes: Any, loaded: dict[str, Any]) -> None:
    """Tokens and bytes of each reference, against the keys and values of a computed prefix."""
    from seedling.nodes.references import costs_of
    from seedling.nodes.runtime import Prefix

    model, clip, vae = loaded["model"], loaded["clip"], loaded["vae"]
    images = {"image_1": picture(96, 160)[None], "image_2": picture(128, 128)[None]}
    held = []
    for chosen in (images, {}):
        (found,) = nodes("References", images=chosen, model=model)
        positive, _ = nodes(
            "EncodeInstruction", clip=clip, prompt="a cup", references=found, vae=vae
        )
        prefix = Prefix(positive[0], 0)
        with torch.no_grad():
            kept = prefix.of(model.module, "cpu", torch.float32).kept
        words = int((~prefix.slots).sum())
        held.append((kept.length - words, kept.bytes * (kept.length - words) // kept.length))
    (both,) = nodes("References", images=images, model=model)
    each = costs_of(both, model)
    assert sum(cost.tokens for cost in each) == held[0][0]
    assert sum(cost.bytes for cost in each) == held[0][1]
    assert held[1] == (0, 0)
    assert all(cost.seconds > 0 for cost in each)
    assert costs_of(both, None) == []


def test_the_cost_is_said(nodes: Any, loaded: dict[str, Any]) -> None:
    from seedling.nodes.references import costs_of, listing

    images = {"image_1": picture(128, 128)[None], "image_2": picture(128, 128)[None]}
    (found,) = nodes("References", images=images, model=loaded["model"])
    first, _, together = listing(found, costs_of(found, loaded["model"])).splitlines()
    assert first.startswith("image 1: 128 x 128: 64 tokens, ") and " MiB, about " in first
    assert together.startswith("together 128 tokens, ")


# ---- strength and role -------------------------------------------------------------------------


def painted(nodes: Any, loaded: dict[str, Any], entry: dict[str, Any]) -> Tensor:
    """Latents of a picture over one reference with these settings."""
    model = loaded["model"]
    found = listed(nodes, [entry], model, images={"image_1": picture(128, 128)[None]})
    positive, negative = nodes(
        "EncodeInstruction", clip=loaded["clip"], vae=loaded["vae"], prompt="a red star",
        references=found,
    )  # fmt: skip
    latent, *_ = nodes("CanvasSize", model=model)
    done, _ = nodes(
        "FewStepSampler", model=model, positive=positive, negative=negative, latent=latent, steps=4
    )
    return done["samples"]


def test_strength_and_role_change_what_is_painted(nodes: Any, loaded: dict[str, Any]) -> None:
    """By more than rounding, which is what a setting that did nothing would be."""
    plain = {"image": "image_1"}
    full = painted(nodes, loaded, plain)
    spread = float(full.std())
    for more in ({"strength": 0.5}, {"role": "style"}, {"size": 64}):
        other = painted(nodes, loaded, {**plain, **more})
        assert float((other - full).square().mean().sqrt()) > 0.02 * spread, more
    assert torch.equal(painted(nodes, loaded, {**plain, "strength": 1.0}), full)
