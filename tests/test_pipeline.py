"""From a prompt and references to pixels: against diffusers, and what `Pipeline` promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.sampling.noise import noise
from seedling.sampling.pipeline import Picture, Pipeline, Progress, Task, finished

STEPS = 3
# Unequal on purpose; brought to an area of 96 x 96 pixels they are 128 x 64 and 64 x 192.
REFERENCES = [((150, 100), "RGBA"), ((40, 160), "RGB")]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def references(count: int) -> list[Image.Image]:
    """Noise that a resize does not average away, with a transparency of its own."""
    random, images = np.random.default_rng(0), []
    for (width, height), mode in REFERENCES[:count]:
        coarse = random.integers(0, 256, (height // 10, width // 10, len(mode)), dtype=np.uint8)
        images.append(Image.fromarray(coarse, mode).resize((width, height), 0))
    return images


def tensors(images: list[Image.Image]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.array(image)).float() / 255 for image in images)


def pictures(pipeline: Pipeline, task: Task) -> list[Tensor]:
    return [event.pixels for event in pipeline.run(task) if isinstance(event, Picture)]


def picture(pipeline: Pipeline, task: Task) -> Tensor:
    (only,) = pictures(pipeline, task)
    return only


@pytest.fixture(scope="module")
def pipeline(tiny_model: Any) -> Pipeline:
    """It makes opaque pictures of 64 x 64 pixels in 4 steps with guidance 2.5."""
    return Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder; its pictures have an alpha channel."""
    return tiny.tiny_diffusers(tmp_path_factory.mktemp("diffusers"), opaque=False)


@pytest.fixture(scope="module")
def translucent(folder: Path) -> Pipeline:
    return Pipeline.load(folder, folder, folder)


EDIT = Task("a red cup", tensors(references(2)), (64, 96), guidance=2.5, steps=2, resolution=64)

# ---- the same pixels as diffusers --------------------------------------------------------------


def processor(tiny: ModuleType) -> Any:
    """Qwen3-VL's processor, without the video part that needs torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(transformers.Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: Any, argument: Any) -> None:
            pass

    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096},
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tiny_tokenizer(), pad_token="<|endoftext|>"
    )
    return Processor(image_processor, fast, None, chat_template=CHAT)


@pytest.fixture(scope="module")
def oracle(folder: Path, tiny: ModuleType) -> Any:
    """diffusers' pipeline; it and transformers read the folder that our pipeline reads."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    dit, vae = diffusers.QwenImage21Transformer2DModel, diffusers.AutoencoderKLQwenImage21
    encoder = transformers.Qwen3VLForConditionalGeneration
    pipeline = diffusers.QwenImage21Pipeline(
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
        vae=vae.from_pretrained(folder / "vae"),
        text_encoder=encoder.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        processor=processor(tiny),
        transformer=dit.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_pixels_are_those_of_diffusers(
    translucent: Pipeline, oracle: Any, count: int, guidance: float
) -> None:
    images, (width, height) = references(count), (64, 96)
    task = Task(
        "put the red cup of <image1> on the table, 杯子", tensors(images), (width, height), STEPS,
        guidance, negative="blue", seed=5, resolution=96,
    )  # fmt: skip
    latents = noise(5, 0, (16, height // 16, width // 16))
    theirs = oracle(
        prompt=task.prompt,
        image=images or None,
        negative_prompt=task.negative if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=width,
        height=height,
        num_inference_steps=STEPS,
        latents=latents.flatten(1).T[None],
        output_resolution=96,
        output_type="np",
    ).images[0]
    theirs = torch.from_numpy(theirs)
    ours = picture(translucent, task)
    assert ours.shape == theirs.shape == (height, width, 4)
    inside = ((theirs > 0) & (theirs < 1)).float().mean()
    assert inside > 0.5, "clamping hides the comparison"
    assert (ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a blue cup"}, {"negative": "x"}, {"seed": 1}, {"guidance": 3.0}, {"steps": 5},
     {"sampler": "dpmpp_2m"}, {"references": EDIT.references[:1]},
     {"references": EDIT.references[::-1]}, {"resolution": 96}],
)  # fmt: skip
def test_everything_asked_for_has_a_say(pipeline: Pipeline, change: dict[str, Any]) -> None:
    """So that the comparison above means something."""
    base = replace(EDIT, steps=4)  # with fewer, dpmpp_2m is Euler
    other = replace(base, **change)
    assert (picture(pipeline, other) - picture(pipeline, base)).abs().max() > 1e-3


# ---- one after the other -----------------------------------------------------------------------


def test_a_picture_of_a_batch_can_be_made_alone(pipeline: Pipeline) -> None:
    together = [e for e in pipeline.run(replace(EDIT, seed=7, count=3)) if isinstance(e, Picture)]
    assert [(p.index, p.seed) for p in together] == [(0, 7), (1, 8), (2, 9)]
    for made in together:
        assert torch.equal(made.pixels, picture(pipeline, replace(EDIT, seed=made.seed)))
    assert not torch.equal(together[0].pixels, together[1].pixels)


def test_pictures_come_as_soon_as_they_are_done(pipeline: Pipeline) -> None:
    with torch.enable_grad():
        for number, event in enumerate(pipeline.run(Task("a cup", count=2))):
            image, step = divmod(number, 5)
            assert torch.is_grad_enabled(), "the caller's mode is the caller's"
            if step == 4:
                assert isinstance(event, Picture) and event.index == image
                assert event.pixels.shape == (64, 64, 3) and not event.pixels.requires_grad
                assert 0 <= event.pixels.min() < event.pixels.max() <= 1
            else:
                assert isinstance(event, Progress) and event.image == image
                assert (event.state.step, event.state.total) == (step + 1, 4)
                assert event.state.denoised.shape == (1, 16, 4, 4)


@pytest.fixture
def calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of the pipeline was asked; nothing is known from earlier runs."""
    pipeline.store.clear()
    counted: Counter[str] = Counter()

    def count(owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(pipeline.encoder.module, "encode", "encoder")
    count(pipeline.vae.module, "encode", "vae encode")
    count(pipeline.vae.module, "decode", "vae decode")
    count(pipeline.dit.module, "prefix", "prefix")
    count(pipeline.dit.module, "forward", "dit")
    return counted


@pytest.mark.parametrize("guidance, prompts", [(1.0, 1), (2.5, 2)])
def test_prompt_and_references_are_read_once(
    pipeline: Pipeline, calls: Counter[str], guidance: float, prompts: int
) -> None:
    events = pipeline.run(replace(EDIT, guidance=guidance, count=3))
    next(events)
    before = {"encoder": prompts, "vae encode": 2, "prefix": prompts, "dit": prompts}
    assert calls == before
    for _ in events:
        pass
    assert calls == {**before, "dit": 3 * 2 * prompts, "vae decode": 3}


def test_stopping_stops(pipeline: Pipeline, calls: Counter[str]) -> None:
    events = pipeline.run(replace(EDIT, count=3))
    while not isinstance(next(events), Picture):
        pass
    events.close()  # type: ignore[attr-defined]
    assert calls["dit"] == 2 * 2 and calls["vae decode"] == 1
    assert pipeline.plan(EDIT) and calls["dit"] == 4, "a plan computes nothing"


# ---- sizes and alpha ---------------------------------------------------------------------------


def test_a_size_off_the_grid_is_a_crop(pipeline: Pipeline) -> None:
    task = Task("a cup", size=(70, 50))
    plan = pipeline.plan(task)
    assert (plan.size, plan.padded, plan.tokens) == ((70, 50), (96, 64), 6 * 4)
    whole = picture(pipeline, replace(task, size=(96, 64)))
    assert whole.shape == (64, 96, 3)
    assert torch.equal(picture(pipeline, task), whole[:50, :70])


@pytest.mark.parametrize(
    "count, size, resolution, shown, made",
    [
        (0, None, None, (), (64, 64)),  # the model's own
        (0, None, 96, (), (64, 64)),  # a resolution is that of references
        (2, None, None, ((64, 64), (32, 128)), (64, 64)),
        (2, None, 96, ((128, 64), (64, 192)), (128, 64)),  # the first reference's
        (2, None, 0, ((160, 128), (64, 160)), (150, 100)),  # 0 keeps their sizes
        (2, (40, 30), 96, ((128, 64), (64, 192)), (40, 30)),
    ],
)
def test_default_sizes(
    pipeline: Pipeline, count: int, size: Any, resolution: Any, shown: Any, made: Any
) -> None:
    task = Task("a cup", tensors(references(count)), size, resolution=resolution, steps=1)
    plan = pipeline.plan(task)
    assert (plan.references, plan.size) == (shown, made)
    assert picture(pipeline, task).shape == (made[1], made[0], 3)


def test_a_reference_without_alpha_is_opaque(pipeline: Pipeline) -> None:
    (rgb,) = tensors([references(2)[1]])
    rgba = torch.cat([rgb, torch.ones_like(rgb[..., :1])], dim=-1)
    ours, theirs = (picture(pipeline, replace(EDIT, references=(r,))) for r in (rgb, rgba))
    assert torch.equal(ours, theirs)


def test_alpha_is_kept_where_there_is_any(pipeline: Pipeline, translucent: Pipeline) -> None:
    assert picture(pipeline, EDIT).shape == (96, 64, 3)
    assert picture(translucent, EDIT).shape == (96, 64, 4)
    pixels = torch.full((1, 4, 100, 100), 0.5)
    pixels[:, 3] = 0.9  # 0.95 of 0..1: a decoder's opaque
    pixels[:, 3, 0, :10] = -1  # a thousandth of the picture may be stray
    assert finished(pixels, (100, 90)).shape == (90, 100, 4)
    assert finished(pixels, (100, 100)).shape == (100, 100, 3)
    pixels[:, 3, 0, 10] = -1
    image = finished(pixels, (100, 100))
    assert image.shape == (100, 100, 4) and image[0, 0].tolist() == [0.75, 0.75, 0.75, 0.0]


# ---- where the weights come from ---------------------------------------------------------------


def test_files_and_diffusers_folder_make_the_same_picture(
    tiny: ModuleType, translucent: Pipeline, tmp_path: Path
) -> None:
    files = tiny.tiny_model(tmp_path, opaque=False)
    single = Pipeline.load(files.dit, files.vae, files.encoder)
    assert torch.equal(picture(single, EDIT), picture(translucent, EDIT))


def test_16_bit_files_compute_in_32_bits(tiny: ModuleType, tmp_path: Path) -> None:
    """bf16 weights in widened layers: the picture of the fp32 model with the rounded weights."""
    files = tiny.tiny_model(tmp_path, torch.bfloat16)
    half = Pipeline.load(files.dit, files.vae, files.encoder)
    networks = half.dit.module, half.vae.module, half.encoder.module.model
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    wide = Pipeline(
        load_dit(files.dit, dtype=torch.float32),
        load_vae(files.vae, dtype=torch.float32),
        load_encoder(files.encoder, dtype=torch.float32),
    )
    assert {p.dtype for p in wide.dit.module.parameters()} == {torch.float32}
    ours, theirs = picture(half, EDIT), picture(wide, EDIT)
    assert (ours - theirs).abs().max() <= 1e-6 * (theirs.max() - theirs.min())


# ---- sigmas, and errors in words ---------------------------------------------------------------


def test_the_plan_says_why(pipeline: Pipeline) -> None:
    own = pipeline.plan(Task("a cup"))
    assert (own.schedule, own.reason) == ("base", "the file's own config says so")
    assert (len(own.sigmas), own.guidance) == (5, 2.5)
    task = Task("a cup", sigmas=(1.0, 0.7, 0.2, 0.0), guidance=1.0)
    given = pipeline.plan(task)
    assert (given.sigmas, given.schedule) == (task.sigmas, "given")
    states = [event.state for event in pipeline.run(task) if isinstance(event, Progress)]
    assert [(s.sigma, s.sigma_next) for s in states] == [(1.0, 0.7), (0.7, 0.2), (0.2, 0.0)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"count": 0}, "at least one picture must be made, 0 were asked for"),
        ({"seed": -1}, "the seed must lie between 0 and .*, -1 was given"),
        ({"sampler": "ddim"}, "no sampler 'ddim'; choose one of: euler, dpmpp_2m"),
        ({"steps": 0}, "steps must be at least 1, 0 was given"),
        ({"sigmas": (0.5, 1.0, 0.0)}, "fall with every step; got 0.5, 1, 0"),
        ({"sigmas": (2.0, 1.0, 0.0)}, "between 1 .* and 0 .*; got 2, 1, 0"),
        ({"sigmas": (1.0, 0.5)}, "must end at 0, .*; got 1, 0.5"),
        ({"sigmas": ()}, "at least one step; got none"),
        ({"sigmas": (0.0,)}, "at least one step; got 0"),
        ({"sigmas": (1.0, 0.0), "steps": 4}, "4 steps were asked for, but sigmas for 1 "),
        ({"size": (0, 64)}, "0x64: both sides must lie between 1 and"),
        ({"size": (2048, 64)}, "one side is 32 times the other"),
        ({"resolution": -1}, "resolution is -1; give a side in pixels, at most"),
        ({"references": (torch.rand(8, 8, 3), torch.rand(1, 8, 8, 3))}, "reference 2 is 1 x 8 x 8"),
        ({"references": (torch.rand(3, 8, 8),)}, "3 x 8 x 8, float32; give height x width x 3"),
        ({"references": (torch.zeros(8, 8, 3, dtype=torch.uint8),)}, "uint8; .* floats in 0..1"),
        ({"references": (torch.rand(0, 8, 3),)}, "8 x 0 pixels is empty"),
    ],
)
def test_what_cannot_be_made_is_said_in_words(
    pipeline: Pipeline, calls: Counter[str], change: dict[str, Any], words: str
) -> None:
    task = replace(Task("a cup"), **change)
    for attempt in (lambda: pipeline.plan(task), lambda: next(pipeline.run(task))):
        with pytest.raises(ValueError, match=words):
            attempt()
    assert not calls, "the task is refused before anything is computed"


def test_networks_that_do_not_fit_are_refused(pipeline: Pipeline) -> None:
    dit, vae, encoder = pipeline.dit, pipeline.vae, pipeline.encoder
    eight = {"latents_mean": (0.0,) * 8, "latents_std": (1.0,) * 8}
    narrow = replace(vae, config=replace(vae.config, z_dim=8, **eight))
    with pytest.raises(ValueError, match=r"latents of 8 channels, but .* works on 16; choose the"):
        Pipeline(dit, narrow, encoder)
    fine = replace(vae, config=replace(vae.config, patch_size=8))
    with pytest.raises(ValueError, match=r"latent of 8 x 8 pixels, but .* needs 16 x 16; choose"):
        Pipeline(dit, fine, encoder)
    small = replace(encoder, config=replace(encoder.config, hidden=48))
    with pytest.raises(ValueError, match=r"states of 48 channels, but .* reads 64; choose the"):
        Pipeline(dit, vae, small)
    other = replace(vae, family=replace(vae.family, name="another"))
    with pytest.raises(ValueError, match=r"of the family qwen_image_21, but .* is of another"):
        Pipeline(dit, other, encoder)


@pytest.mark.parametrize("size", [(64, 64), (53, 61), (100, 17), (5, 75)])
def test_an_edit_in_its_own_size_moves_no_pixel(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Padded to whole tokens, painted, cropped: reference and target stand on the same grid."""
    width, height = size
    image, seen = torch.rand(height, width, 3), []
    encode = pipeline.vae.module.encode
    monkeypatch.setattr(pipeline.vae.module, "encode", lambda x: seen.append(x) or encode(x))
    task = Task("blue", (image,), None, 1, 1.0, resolution=0)
    plan = pipeline.plan(task)
    assert plan.size == size and plan.references == (plan.padded,)
    assert picture(pipeline, task).shape[:2] == (height, width)
    kept = (seen[0][0, :3, :height, :width].permute(1, 2, 0) + 1) / 2
    torch.testing.assert_close(kept, image, rtol=0, atol=1e-6)
    assert plan.padded == tuple(reversed(seen[0].shape[2:]))
