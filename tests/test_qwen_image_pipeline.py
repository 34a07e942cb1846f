"""From a prompt and references to pixels with Qwen-Image: against diffusers, on random weights."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.families.qwen_image.dit import pack
from seedling.model_loaders.load import load_dit
from seedling.sampling.noise import noise
from seedling.sampling.pipeline import Picture, Pipeline, Task

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
NEIGHBOUR = Path(__file__).with_name("tiny_qwen_image.py")
spec = importlib.util.spec_from_file_location("seedling_tests_tiny_qwen_image", NEIGHBOUR)
assert spec is not None and spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

STEPS, AREA = 2, 96  # side of the square that references are brought to
# Unequal on purpose; at an area of 96 x 96 pixels they are 128 x 64, 64 x 192, ...
SIZES = [(150, 100), (40, 160), (97, 61), (64, 64)]
TEXT = "put the red cup of Picture 1 on the table, 杯子"


def references(count: int, mode: str = "RGB") -> list[Image.Image]:
    """Noise that a resize does not average away."""
    random, images = np.random.default_rng(0), []
    for width, height in SIZES[:count]:
        coarse = random.integers(0, 256, (height // 8, width // 8, len(mode)), dtype=np.uint8)
        images.append(Image.fromarray(coarse, mode).resize((width, height), 0))
    return images


def tensors(images: list[Image.Image]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.array(image)).float() / 255 for image in images)


def pictures(pipeline: Pipeline, task: Task) -> list[Picture]:
    return [event for event in pipeline.run(task) if isinstance(event, Picture)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.write(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def both(folder: Callable[[str], Path]) -> Callable[[str], tuple[Pipeline, Any]]:
    """Our pipeline and diffusers' over the same folder."""
    made: dict[str, tuple[Pipeline, Any]] = {}

    def get(kind: str) -> tuple[Pipeline, Any]:
        if kind not in made:
            where = folder(kind)
            ours, theirs = Pipeline.load(where, where, where), tiny.oracle(where, kind)
            # The tiny tokenizer needs more tokens for the turn that is dropped.
            with_pictures = [1] if "Edit" in kind else []
            dropped = ours.encoder.module.tokenizer.prompt("", with_pictures).dropped
            theirs.prompt_template_encode_start_idx = dropped
            made[kind] = ours, theirs
        return made[kind]

    return get


def packed_noise(seed: int, width: int, height: int, frames: int = 1) -> Tensor:
    x = noise(seed, 0, (frames, tiny.CHANNELS, height // 8, width // 8))
    return pack(x).flatten(0, 1)[None]


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    found = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    logging.warning("error %.1e", found)  # `pytest -rP` shows them all
    assert found <= tolerance
    assert theirs.std() > 0.02  # it is a picture


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_text_to_image_is_that_of_diffusers(both: Any, guidance: float) -> None:
    ours, theirs = both("QwenImagePipeline")
    width, height = 80, 48
    task = Task(TEXT, (), (width, height), STEPS, guidance, seed=5)
    wanted = theirs(
        prompt=TEXT, negative_prompt=" " if guidance > 1 else None, true_cfg_scale=guidance,
        width=width, height=height, num_inference_steps=STEPS, output_type="pt",
        latents=packed_noise(5, width, height),
    ).images  # fmt: skip
    (picture,) = pictures(ours, task)
    same(picture.pixels, wanted[0].permute(1, 2, 0))


@pytest.mark.parametrize(("count", "guidance"), [(1, 1.0), (1, 4.0), (4, 1.0), (4, 4.0)])
def test_edits_are_those_of_diffusers(
    both: Any, monkeypatch: pytest.MonkeyPatch, count: int, guidance: float
) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", AREA**2)
    ours, theirs = both("QwenImageEditPlusPipeline")
    assert ours.dit.config.variant == "qwen-image-edit-2511"
    images, (width, height) = references(count), (80, 48)
    wanted = theirs(
        image=images, prompt=TEXT, negative_prompt="blue" if guidance > 1 else None,
        true_cfg_scale=guidance, width=width, height=height, num_inference_steps=STEPS,
        output_type="pt", latents=packed_noise(7, width, height),
    ).images  # fmt: skip
    task = Task(
        TEXT, tensors(images), (width, height), STEPS, guidance, "blue", seed=7, resolution=AREA
    )
    (picture,) = pictures(ours, task)
    same(picture.pixels, wanted[0].permute(1, 2, 0))


def test_the_first_editor_is_that_of_diffusers(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    from seedling.model_loaders.families.qwen_image import conditioning

    real, area = module.calculate_dimensions, AREA**2
    monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: real(area, ratio))
    monkeypatch.setattr(conditioning, "FIRST_EDIT_AREA", area)
    ours, theirs = both("QwenImageEditPipeline")
    assert ours.dit.config.variant == "qwen-image-edit"
    (image,) = references(1)
    size = ours.family.reference_size(*image.size, area)
    wanted = theirs(
        image=image, prompt=TEXT, negative_prompt=" ", true_cfg_scale=4.0, width=size[0],
        height=size[1], num_inference_steps=STEPS, output_type="pt",
        latents=packed_noise(3, *size),
    ).images  # fmt: skip
    task = Task(TEXT, tensors([image]), None, STEPS, 4.0, seed=3, resolution=AREA)
    (picture,) = pictures(ours, task)
    same(picture.pixels, wanted[0].permute(1, 2, 0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_layers_are_those_of_diffusers(
    both: Any, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as module

    real = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: real(AREA**2, ratio))
    ours, theirs = both("QwenImageLayeredPipeline")
    (image,), layers = references(1, "RGBA"), 3
    width, height = ours.family.reference_size(*image.size, AREA**2)
    wanted = theirs(
        image=image, prompt=TEXT, negative_prompt=" " if guidance > 1 else None, layers=layers,
        true_cfg_scale=guidance, num_inference_steps=STEPS, output_type="pt",
        latents=packed_noise(9, width, height, layers + 1),
    ).images[0]  # fmt: skip
    task = Task(
        TEXT, tensors([image]), None, STEPS, guidance, seed=9, resolution=AREA, layers=layers
    )
    made = pictures(ours, task)
    assert [(p.index, p.seed, p.layer) for p in made] == [(0, 9, 0), (0, 9, 1), (0, 9, 2)]
    for picture, layer in zip(made, wanted, strict=True):
        assert picture.pixels.shape == (height, width, 4)
        same(picture.pixels, layer.permute(1, 2, 0))


@pytest.mark.parametrize("size", [(64, 48), (53, 61), (100, 17)])
def test_an_edit_in_its_own_size_moves_no_pixel(
    both: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """References keep every pixel at its place, targets are as large; both on the same grid."""
    ours, _ = both("QwenImageEditPlusPipeline")
    width, height = size
    image = torch.rand(height, width, 3)
    seen: list[Tensor] = []
    encode = ours.vae.module.encode
    monkeypatch.setattr(ours.vae.module, "encode", lambda x: seen.append(x) or encode(x))
    (picture,) = pictures(ours, Task("blue", (image,), None, 1, 1.0, resolution=0))
    assert picture.pixels.shape == (height, width, 3)
    kept = (seen[0][0, :, :height, :width].permute(1, 2, 0) + 1) / 2
    torch.testing.assert_close(kept, image, rtol=0, atol=1e-6)
    assert ours.plan(Task("blue", (image,), None, 1, resolution=0)).padded == tuple(
        reversed(seen[0].shape[2:])
    )


def test_a_picture_with_alpha_is_laid_on_white(both: Any) -> None:
    ours, _ = both("QwenImageEditPlusPipeline")
    (clear,) = tensors(references(1, "RGBA"))
    alpha = clear[..., 3:]
    white = clear[..., :3] * alpha + 1 - alpha
    made = [pictures(ours, Task("x", (i,), None, 1, 1.0, resolution=0)) for i in (clear, white)]
    # The encoder's copy is resized with its alpha, so its edges differ a little.
    assert (made[0][0].pixels - made[1][0].pixels).abs().max() < 0.1


def test_references_that_a_variant_cannot_take_are_refused(both: Any, folder: Any) -> None:
    image = tensors(references(1))
    ours, _ = both("QwenImagePipeline")
    assert ours.family.accepts is not None
    ours.family.accepts(both("QwenImageEditPlusPipeline")[0].dit, 12)  # no limit of three
    with pytest.raises(CheckpointError, match="loaded as Qwen-Image, which paints from words only"):
        pictures(ours, Task("x", image, (32, 32), 1))
    where = folder("QwenImagePipeline")
    chosen = Pipeline(load_dit(where, variant="qwen-image-edit-2509"), ours.vae, ours.encoder)
    assert len(pictures(chosen, Task("x", image, (32, 32), 1, 1.0, resolution=AREA))) == 1
    layered, _ = both("QwenImageLayeredPipeline")
    with pytest.raises(CheckpointError, match="one picture apart into layers, but was given 0"):
        pictures(layered, Task("x", (), (32, 32), 1))
    with pytest.raises(CheckpointError, match="needs a VAE with alpha"):
        Pipeline(layered.dit, ours.vae, ours.encoder)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[None]:
    """ComfyUI's modules, as the embedded host stands in for them."""
    from seedling.host.paths import Folders
    from seedling.host.standin import install

    theirs = ("comfy_api", "comfy_execution", "folder_paths", "server", "seedling.nodes")

    def taken() -> dict[str, Any]:
        return {n: m for n, m in sys.modules.items() if n.startswith(theirs)}

    before = taken()
    for name in before:
        del sys.modules[name]
    folders = Folders(tmp_path)
    folders.make()
    install(folders)
    yield
    for name in taken():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("kind", ["QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
@torch.no_grad()
def test_nodes_paint_the_same_picture_bit_for_bit(both: Any, kind: str) -> None:
    """The host's half of the nodes; layers are a batch there."""
    from seedling.nodes.plain import Plain
    from seedling.nodes.runtime import Prefix, Run

    ours, _ = both(kind)
    here, layers = Plain(), 2 if "Layered" in kind else 1
    (image,) = tensors(references(1, "RGBA"))
    task = Task("a hat", (image,), None, STEPS, 4.0, seed=4, resolution=AREA, layers=layers)
    plan, family = ours.plan(task), ours.family
    assert family.reading is not None
    latents = [here.encode(ours.vae, family.resize(image, plan.references[0]))]
    texts = []
    for prompt in (task.prompt, task.negative):
        hidden, slots = here.read(ours.encoder, prompt, [image], family.reading(ours.dit))
        extra = {"slots": slots, "reference_latents": latents, "latents_per_token": 4}
        texts.append([[hidden, extra]])
    pictures_of_tokens = Prefix(texts[0][0], 0).tokens - texts[0][0][0].shape[1]
    assert pictures_of_tokens == plan.tokens  # the reference is as large as the target
    empty = {"samples": torch.zeros(layers, 64, plan.padded[1] // 16, plan.padded[0] // 16)}
    samples = here.fit(ours.dit, {**empty, "downscale_ratio_spacial": 16})
    run = Run(texts[0], texts[1], samples, plan.sigmas, seed=4, guidance=plan.guidance)
    painted = here.decode(ours.vae, here.sample(ours.dit, run))
    made = pictures(ours, task)
    assert len(painted) == len(made) == layers
    for picture, shown in zip(made, painted, strict=True):
        assert torch.equal(picture.pixels[..., : shown.shape[-1]], shown)


# ---- references that the encoder sees in sizes of their own ------------------------------------


def test_the_encoder_may_see_each_reference_in_a_size_of_its_own(
    both: Callable[[str], tuple[Pipeline, Any]],
) -> None:
    """The family's own size, written out, is no change; `Plan` says the tokens that are read."""
    pipeline, _ = both("QwenImageEditPlusPipeline")
    task = Task(TEXT, tensors(references(2)), (64, 64), STEPS, 1.0, resolution=AREA)
    usual, same, small = (
        pictures(pipeline, replace(task, vlm_resolution=sides))[0].pixels
        for sides in ((), (384, 0), (96, 0))
    )
    assert torch.equal(usual, same) and not torch.equal(usual, small)
    read = pipeline.encoder.module.encode
    for sides in ((96, 0), (0, 128)):
        grids = read(TEXT, task.references, areas=[side**2 for side in sides]).grids
        counted = pipeline.plan(replace(task, vlm_resolution=sides)).vlm_tokens
        assert counted == tuple(h * w // 4 for h, w in grids)
    with pytest.raises(ValueError, match="is not shown its reference"):
        read(TEXT, task.references, area=0, areas=[96 * 96, 0])
