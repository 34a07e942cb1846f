"""`seedling generate --region`: the picture of the nodes, bits that stay, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seedling.host.cli import main
from seedling.host.images import png_16_bit
from seedling.host.pictures import read_picture
from seedling.host.recipe import read_recipe
from seedling.model_loaders.pictures import read_16_bit
from seedling.sampling import SamplingError
from seedling.sampling.composite import Where
from seedling.sampling.pipeline import Picture, Pipeline, Task

PROMPT = "make the star green ☃"
BOX = "40,30,60,50"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)


def scene(name: str, height: int = 117, width: int = 151, bits: int = 8, alpha: bool = False):
    """A picture in the working folder, and its values (H, W, 3 or 4)."""
    random = np.random.default_rng(0)
    stored = random.integers(0, 1 << bits, (height, width, 4 if alpha else 3))
    if bits == 8:
        Image.fromarray(stored.astype(np.uint8)).save(name)
    else:
        values = torch.from_numpy(stored.astype(np.float32)) / 65535
        Path(name).write_bytes(png_16_bit(values, {}))
    return stored


def make(*words: object, steps: int | None = 3) -> None:
    """Run `seedling generate` with the embedded model; it must succeed."""
    more = [] if steps is None else ["--steps", str(steps)]
    assert main(["generate", *map(str, words), *more]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("seedling: ") and said.count("\n") == 1
    assert not list(Path().glob("seedling_*"))
    return said


def by_nodes(nodes: Any, image: Tensor, seed: int, **widgets: Any) -> Tensor:
    """The edited picture of Edit Region, Encode Instruction, Few-Step Sampler, Finish Edit."""
    runtime = sys.modules["seedling.nodes.runtime"].runtime()
    parts = nodes.loaded()
    model, vae = parts["model"], parts["vae"]
    seen, latent, *_ = nodes("EditRegion", image=image[None], vae=vae, model=model, **widgets)
    positive, negative = nodes(
        "EncodeInstruction", clip=parts["clip"], prompt=PROMPT, references=seen, vae=vae
    )
    done, _ = nodes(
        "FewStepSampler", model=model, positive=positive, negative=negative, latent=latent,
        seed=seed, steps=3,
    )  # fmt: skip
    decoded = runtime.decode(vae, done["samples"])
    return nodes("FinishEdit", image=decoded, references=seen)[0][0]


@pytest.mark.parametrize("context", [0, 8])
def test_it_is_the_picture_of_the_nodes(nodes: Any, context: int) -> None:
    """To the bit, a size that is on no grid included; and what the recipe repeats, too."""
    scene("a.png")
    make(PROMPT, "--reference", "a.png", "--region", BOX, "--seed", 5, "--context", context)
    original = read_picture("a.png").pixels
    wanted = by_nodes(nodes, original, 5, boxes=BOX, context=context)
    found = read_picture("seedling_00001.png").pixels
    assert torch.equal(found, (wanted * 255).round() / 255)
    assert not torch.equal(found[40:70, 50:90], original[40:70, 50:90])
    make("--from", "seedling_00001.png", steps=None)
    assert Path("seedling_00002.png").read_bytes() == Path("seedling_00001.png").read_bytes()


def test_sixteen_bits_and_alpha_stay(capsys: pytest.CaptureFixture[str]) -> None:
    stored = scene("deep.png", bits=16, alpha=True)
    mask = np.zeros((117, 151), np.uint8)
    mask[20:60, 30:80] = 255
    Image.fromarray(mask).save("mask.png")
    make(PROMPT, "--reference", "deep.png", "--mask", "mask.png", "--grow", 2, "--feather", 3)
    assert "every pixel is the original's, bit for bit" in capsys.readouterr().out
    found = read_16_bit(Path("seedling_00001.png"))
    assert found is not None and found.shape == (117, 151, 4)
    inside = np.zeros((117, 151), bool)
    inside[18:62, 28:82] = True
    values = (found * 65535).round().numpy().astype(int)
    assert (values[~inside] == stored[~inside]).all() and (values[inside] != stored[inside]).any()
    recipe = read_recipe(Path("seedling_00001.png"))
    assert recipe.prompt == PROMPT and recipe.size == (151, 117)
    assert recipe.edit == Where(grow=2, feather=3) and recipe.mask is not None
    make("--from", "seedling_00001.png", steps=None)
    assert Path("seedling_00002.png").read_bytes() == Path("seedling_00001.png").read_bytes()
    Image.fromarray(255 - mask).save("mask.png")
    assert main(["generate", "--from", "seedling_00001.png"]) == 2
    assert "mask.png has changed since" in capsys.readouterr().err


def test_a_repeated_edit_can_be_changed() -> None:
    scene("a.png")
    make(PROMPT, "--reference", "a.png", "--region", BOX, "--feather", 9, "--seed", 1)
    make("--from", "seedling_00001.png", "--grow", -3, steps=None)
    assert read_recipe(Path("seedling_00002.png")).edit == Where(BOX, feather=9, grow=-3)
    make("--from", "seedling_00001.png", "--region", "0,0,9,9", "--point", "50%,50%", steps=None)
    moved = Where("0,0,9,9", "50%,50%", feather=9)
    assert read_recipe(Path("seedling_00003.png")).edit == moved


def test_the_report_says_what_was_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    from seedling.host.edits import Editing

    scene("a.png")
    pixels, region = read_picture("a.png").pixels, torch.zeros(117, 151)
    region[:50] = 1
    said = Editing(pixels.flip(0), region, Where(), None, False).report(Path("a.png"))
    assert "bit for bit" not in said and "dB" in said and said.count("\n") == 0
    make(PROMPT, "--reference", "a.png", "--region", "0,0,100%,100%")
    assert "nothing was to be kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--region", BOX], "give it with --reference"),
        (["--reference", "a.png", "--region", "200,0,9,9"], "outside of the picture"),
        (["--reference", "a.png", "--region", "1,1,0,9"], "holds nothing"),
        (["--reference", "a.png", "--region", "1,1"], "not x, y, width, height"),
        (["--reference", "a.png", "--region", "1,1,4,4", "--grow", "-9"], "region is empty"),
        (["--reference", "a.png", "--region", BOX, "--feather", "-1"], "feather is -1"),
        (["--reference", "a.png", "--region", BOX, "--size", "64x64"], "leave out --size"),
        (["--reference", "a.png", "--region", BOX, "--set", "sequential"], "leave out --set"),
        (["--reference", "a.png", "--mask", "small.png"], "mask is 8 x 9 pixels, the picture 151"),
        (["--reference", "a.png", "--mask", "black.png"], "region is empty"),
        (["--reference", "a.png", "--mask", "none.png"], "does not exist"),
        (["--reference", "a.png", "--feather", "2"], "--feather goes with --region"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scene("a.png")
    Image.new("L", (8, 9), 255).save("small.png")
    Image.new("L", (151, 117)).save("black.png")
    assert said in refused(capsys, PROMPT, *words)


def test_in_python(tiny_model: Any) -> None:
    """`Task.edit` on a random model: exact outside, and a clear word where it does not fit."""
    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    image = torch.rand(50, 70, 4, generator=torch.Generator().manual_seed(0))
    where = Where("10, 10, 20, 20")
    region = where.region(image)
    edit = where.edit(image, region, pipeline.family.step, 64)
    task = Task("x", (edit.seen(), torch.rand(40, 40, 3)), steps=2, edit=edit)
    assert region is not None and pipeline.plan(task).size == (70, 50)
    (done,) = [event.pixels for event in pipeline.run(task) if isinstance(event, Picture)]
    assert done.shape == image.shape
    assert torch.equal(done[region == 0], image[region == 0]) and not torch.equal(done, image)
    with pytest.raises(SamplingError, match=r"give edit\.seen"):
        pipeline.plan(Task("x", (image,), edit=edit))
    with pytest.raises(SamplingError, match="as large as the original"):
        pipeline.plan(Task("x", task.references, size=(64, 64), edit=edit))
