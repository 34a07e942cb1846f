"""What references say and cost: own sizes, masks, strength and role on the embedded model."""

from __future__ import annotations

import json
import re
from pathlib import Path
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


def off(one: Tensor, other: Tensor) -> float:
    """How far apart, in deviations of the first."""
    return float((other - one).square().mean().sqrt() / one.std())


def test_strength_and_size_change_what_is_painted(nodes: Any, loaded: dict[str, Any]) -> None:
    """By more than rounding, which is what a setting that did nothing would be; and a weaker
    reference the more, the weaker it is."""
    full = painted(nodes, loaded, {"image": "image_1"})
    again, *weaker, small = (
        painted(nodes, loaded, {"image": "image_1", **more})
        for more in ({"strength": 1.0}, {"strength": 0.7}, {"strength": 0.3}, {"size": 64})
    )
    assert torch.equal(again, full)
    assert 0.02 < off(full, weaker[0]) < off(full, weaker[1])
    assert off(full, small) > 0.02


def test_every_offered_role_changes_what_is_painted(
    nodes: Any, loaded: dict[str, Any], root: Path
) -> None:
    """Those of the strip and of control signals, each against none and against all others."""
    from seedling.nodes.control import SIGNALS

    text = (root / "web/reference_strip/settings.js").read_text("utf-8")
    (listed_roles,) = re.findall(r"const ROLES = (\[.*?\]);", text)
    roles = [*json.loads(listed_roles), *(role for _, role in SIGNALS.values())]
    assert len(roles) >= 10
    pictures = [painted(nodes, loaded, {"image": "image_1"})]
    for role in dict.fromkeys(roles):
        pictures.append(painted(nodes, loaded, {"image": "image_1", "role": role}))
        assert min(off(before, pictures[-1]) for before in pictures[:-1]) > 0.02, role


@pytest.mark.parametrize("channels", [3, 4])
def test_a_strength_reaches_every_vae(channels: int) -> None:
    """As alpha, or, in families whose VAE has none, on white; encoders see it on white too."""
    from seedling.model_loaders.qwen_vl import on_white
    from seedling.nodes.references import faded
    from seedling.sampling.pipeline import as_pixels

    image = picture(32, 32)
    for strength in (0.25, 0.75):
        seen = as_pixels(faded(image, None, strength), torch.float32, channels)[0]
        white = image * strength + (1 - strength)
        expected = white if channels == 3 else image
        assert (seen[:3].permute(1, 2, 0) - (expected * 2 - 1)).abs().max() < 1e-6
        assert channels == 3 or bool(((seen[3] + 1) / 2 - strength).abs().max() < 1e-6)
        assert (
            on_white(faded(image, None, strength)).permute(1, 2, 0) - white
        ).abs().max() < 1 / 255


# ---- a size of its own for the text encoder ----------------------------------------------------


def test_the_encoder_may_see_it_smaller(
    nodes: Any, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads fewer tokens, the DiT as many as before; the node says what both cost."""
    from seedling.nodes.references import costs_of, listing

    encoder, model = loaded["clip"].module, loaded["model"]
    encode, seen = encoder.encode, []

    def watched(prompt: str, images: Any = (), store: Any = None) -> Any:
        seen.append([tuple(x.shape[:2]) for x in images])
        return encode(prompt, images, store)

    monkeypatch.setattr(encoder, "encode", watched)
    given = {"images": {"image_1": picture(128, 128)[None], "image_2": picture(96, 160)[None]}}
    latents, slots = [], []
    for entry in ({"image": "image_1"}, {"image": "image_1", "vlm_size": 64}):
        found = listed(nodes, [entry], model, **given)
        positive, _ = nodes(
            "EncodeInstruction", clip=loaded["clip"], vae=loaded["vae"], prompt="a red star",
            references=found,
        )  # fmt: skip
        _, extra = positive[0]
        slots.append(extra["slots"])
        latents.append(extra["reference_latents"])
    large, small = seen[0], seen[-1]
    assert large[0] == (128, 128) and small[0] == (64, 64) and large[1] == small[1]
    assert torch.equal(*slots) and all(map(torch.equal, *latents))
    found = listed(nodes, [{"image": "image_1", "vlm_size": 64}], model, **given)
    first, second, _ = listing(found, costs_of(found, model), model).splitlines()
    assert first.startswith("image 1: 128 x 128: 64 tokens") and "; 4 tokens of the text" in first
    assert " tokens of the text encoder" in second
    plain = listed(nodes, ["image_1"], model, **given)
    assert "encoder" not in listing(plain, costs_of(plain, model), model)


@pytest.mark.parametrize("size", ["own", "1K", 16, 5000, True, None, 64.5])
def test_a_senseless_vlm_size_is_refused(nodes: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="the vlm_size of reference 1 is"):
        listed(nodes, [{"image": "a.png", "vlm_size": size}])
