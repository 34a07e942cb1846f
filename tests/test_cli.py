"""The command line in this process, on a tiny random model: what it makes, repeats and refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from seedling.host import demo, generate, models
from seedling.host.cli import main
from seedling.host.models import ModelsError
from seedling.host.pictures import read_picture, read_text
from seedling.host.recipe import read_recipe
from seedling.sampling.pipeline import Picture, Pipeline

STAR = "一颗红色的星星 ☃ left of 🌱"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and no ComfyUI around."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)


@pytest.fixture
def weights(tiny_model: Any) -> list[str]:
    files = {"--dit": tiny_model.dit, "--vae": tiny_model.vae, "--encoder": tiny_model.encoder}
    return [str(word) for pair in files.items() for word in pair]


@pytest.fixture
def make(weights: list[str]):
    """Run `seedling generate` with the tiny model; it must succeed."""

    def run(*words: object, seed: int | None = 7) -> None:
        seeds = [] if seed is None else ["--seed", str(seed)]
        assert main(["generate", *map(str, words), *seeds, *weights]) == 0

    return run


def picture(name: str, width: int = 64, height: int = 64, mode: str = "RGB") -> Path:
    """A picture in the working folder that differs from all others."""
    image = Image.effect_noise((width, height), 80).convert(mode)
    image.save(name)
    return Path(name)


def pixels(name: str | Path) -> torch.Tensor:
    return read_picture(name).pixels


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must be refused; its one sentence."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("seedling: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


def test_a_picture_with_its_recipe(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make(STAR, "--size", "40x24", "--steps", 3, "--negative", "雨", "--guidance", 2,
         "--out", "new/a")  # fmt: skip
    said = capsys.readouterr().out
    assert "40 x 24" in said and "3 steps of euler, schedule base (the file's own config" in said
    assert "guidance 2, seed 7" in said and f"{Path('new/a/seedling_00001.png')}  (" in said
    assert "s/it" in said
    path = Path("new/a/seedling_00001.png")
    with Image.open(path) as image:
        assert image.size == (40, 24) and image.mode == "RGB"
        assert set(image.info) == {"seedling"}  # "prompt" and "workflow" are ComfyUI's
    assert os.listdir("new/a") == [path.name]
    recipe = read_recipe(path)
    assert (recipe.prompt, recipe.negative, recipe.size) == (STAR, "雨", (40, 24))
    assert (recipe.steps, recipe.guidance, recipe.seed) == (3, 2.0, 7)
    assert (recipe.sampler, recipe.schedule, recipe.resolution) == ("euler", "base", None)
    assert len(recipe.sigmas) == 4 and recipe.sigmas[-1] == 0
    assert recipe.weights["dit"].file == "tiny.safetensors"
    assert recipe.made_with["torch"] == torch.__version__
    assert STAR in read_text(path)["seedling"]  # as it was typed, not as \u escapes


def test_the_picture_is_what_the_engine_makes(make: Any, tiny_model: Any) -> None:
    make(STAR, "--reference", picture("a.png"), "--steps", 2)
    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)
    task = generate.Task(STAR, (pixels("a.png"),), steps=2, seed=7)
    *_, last = pipeline.run(task)
    assert isinstance(last, Picture)
    assert torch.equal(pixels("seedling_00001.png"), (last.pixels * 255).round() / 255)


def test_from_repeats_bit_for_bit(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("refs").mkdir()
    one, two = picture("refs/1.png", 96, 64), picture("refs/2.png", mode="RGBA")
    make(STAR, "--reference", one, "--reference", two, "--steps", 2, "--sampler", "dpmpp_2m",
         "--resolution", 32, "--size", "48x80", "--count", 2, "--out", "out")  # fmt: skip
    first, second = Path("out/seedling_00001.png"), Path("out/seedling_00002.png")
    assert [s.file for s in read_recipe(second).references] == ["1.png", "2.png"]
    assert [s.path for s in read_recipe(second).references] == ["../refs/1.png", "../refs/2.png"]

    for old in (first, second):  # the second alone is what it was in the batch
        assert main(["generate", "--from", str(old), "--out", "again"]) == 0
    for name in (first.name, second.name):
        assert torch.equal(pixels(Path("again") / name), pixels(Path("out") / name))
        assert read_recipe(Path("again") / name) == read_recipe(Path("out") / name)
    assert "schedule base (as in out" in capsys.readouterr().out
    assert not torch.equal(pixels(first), pixels(second))


def test_a_folder_of_work_can_be_moved(make: Any, tmp_path: Path) -> None:
    Path("a/refs").mkdir(parents=True)
    make("x", "--steps", 1, "--reference", picture("a/refs/r.png"), "--out", "a/p.png")
    before = pixels("a/p.png")
    recipe = read_recipe(Path("a/p.png"))
    # The weights lie elsewhere and stay where they are: as seen from a/ and b/ alike.
    Path("a").rename("b")
    assert main(["generate", "--from", "b/p.png", "--out", "b/q.png"]) == 0
    assert torch.equal(pixels("b/q.png"), before)
    Path("b/refs/r.png").rename("b/r.png")  # beside the picture will do
    assert main(["generate", "--from", "b/p.png", "--out", "b/r2.png"]) == 0
    assert torch.equal(pixels("b/r2.png"), before)
    assert str(tmp_path) not in recipe.text()  # no name of a user's folder leaves with a picture


def test_other_options_override_the_recipe(make: Any) -> None:
    make("x", "--steps", 3, "--out", "a.png")
    old = read_recipe(Path("a.png"))
    make("y", "--from", "a.png", "--steps", 2, "--size", "32x32", "--out", "b.png", seed=None)
    new = read_recipe(Path("b.png"))
    assert (new.prompt, new.steps, new.size, new.seed) == ("y", 2, (32, 32), old.seed)
    assert new.guidance == old.guidance and len(new.sigmas) == 3
    make("--from", "a.png", "--out", "c.png", seed=8)
    other = read_recipe(Path("c.png"))
    assert (other.prompt, other.seed, other.sigmas) == ("x", 8, old.sigmas)


def test_from_refuses_what_is_missing_or_changed(
    make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make("x", "--steps", 1, "--reference", picture("r.png"), "--out", "a.png")
    picture("r.png")
    assert "r.png has changed" in refused(capsys, "generate", "--from", "a.png")
    Path("r.png").unlink()
    assert "made from r.png, which is neither" in refused(capsys, "generate", "--from", "a.png")
    picture("plain.png")
    assert "plain.png carries no recipe" in refused(capsys, "generate", "--from", "plain.png")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:60])
    assert "cut.png" in refused(capsys, "generate", "--from", "cut.png")
    make("--from", "a.png", "--reference", "plain.png", "--out", "b.png")


def test_from_notices_other_weights(
    make: Any, tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tiny.tiny_model(tmp_path / "models")
    words = ["--dit", own.dit, "--vae", own.vae, "--encoder", own.encoder, "--steps", 1]
    assert main([str(w) for w in ("generate", "x", *words, "--out", "a.png")]) == 0
    data = bytearray(own.vae.read_bytes())
    data[-3] ^= 1  # a bit of the last weight: the header and the size stay
    own.vae.write_bytes(bytes(data))
    said = refused(capsys, "generate", "--from", "a.png")
    assert "other weights than" in said and "--vae" in said
    make("--from", "a.png", "--out", "b.png")
    assert "instead of tiny.safetensors, as --vae says" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "models")
    assert "not there any more" in refused(capsys, "generate", "--from", "a.png")


def test_recipe_is_printed(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make(STAR, "--steps", 1, "--out", "a.png")
    capsys.readouterr()
    assert main(["generate", "--from", "a.png", "--recipe"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == STAR
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--recipe"])


def test_a_batch_of_prompts_and_a_contact_sheet(make: Any) -> None:
    Path("prompts.txt").write_text(f"\ufeff# a comment\n\n  a star  \n{STAR}\n", "utf-8")
    make("--prompts", "prompts.txt", "--count", 2, "--steps", 1, "--sheet", "--out", "set.png")
    names = [f"set_0000{i}.png" for i in (1, 2, 3, 4)]
    assert sorted(os.listdir()) == ["prompts.txt", *names, "set_sheet_00001.png"]
    made = [read_recipe(Path(name)) for name in names]
    assert [r.prompt for r in made] == ["a star", "a star", STAR, STAR]
    assert [r.seed for r in made] == [7, 8, 7, 8]
    make("a star", "--steps", 1, "--out", "alone.png", seed=8)
    assert torch.equal(pixels("alone.png"), pixels("set_00002.png"))


def test_nothing_is_overwritten(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make("x", "--steps", 1, "--out", "a.png")
    before = Path("a.png").read_bytes()
    assert "a.png exists already" in refused(capsys, "generate", "x", "--out", "a.png")
    assert Path("a.png").read_bytes() == before
    assert "only PNG holds" in refused(capsys, "generate", "x", "--out", "a.jpg")
    Path("file").touch()
    assert "is a file" in refused(capsys, "generate", "x", "--out", "file")


def test_alpha_is_kept(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.tiny_model(tmp_path / "clear", opaque=False)
    words = ["--dit", model.dit, "--vae", model.vae, "--encoder", model.encoder, "--out", "a.png"]
    assert main([str(w) for w in ("generate", "x", "--steps", 1, *words)]) == 0
    assert Image.open("a.png").mode == "RGBA"


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "say what to make"),
        ("x --reference none.png", "none.png does not exist"),
        ("x --reference cut.png", "cut.png is damaged or cut short"),
        ("x --size huge", "'huge' is not a size"),
        ("x --steps 0", "at least 1"),
        ("x --count 0", "at least one picture"),
        ("x --seed -1", "the seed must lie between"),
        ("x --guidance nan", "the guidance must be a number"),
        ("x --sampler magic", "there is no sampler 'magic'"),
        ("x --resolution -1", "resolution"),
        ("x --resolution 9999999", "the references' resolution is 9999999; give a side"),
        (f"x{' --reference ok.png' * 15}", "15 references were given; at most 14 are read"),
        ("--prompts none.txt", "none.txt cannot be read"),
        ("--prompts cut.png", "cut.png is not UTF-8"),
        ("--prompts empty.txt", "empty.txt holds no prompt"),
        ("\udcff", "not valid Unicode"),
        ("x --out cut.png/sub", "cut.png is no folder"),
        ("x --device nonsense", "--device nonsense cannot be used here"),
        ("x --device meta", "--device meta cannot be used here"),
        ("x --vram lots", "write auto, all, or a size such as 6GB"),
        ("x --vram 6GB --device cpu", "--vram 6GB is for an NVIDIA card"),
        ("x --dit none.safetensors", "--dit none.safetensors is no file"),
        ("x --dit a.safetensors", "a.safetensors is a Git LFS pointer"),
        ("x --dit a.safetensors --vae a.safetensors --encoder a.safetensors", "a.safetensors"),
        ("x --comfyui . --vae b", "is not ComfyUI's folder"),
    ],
)
def test_refusals_are_one_sentence(
    words: str, said: str, capsys: pytest.CaptureFixture[str], weights: list[str]
) -> None:
    picture("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:1000])
    picture("ok.png")
    Path("a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    Path("empty.txt").write_text("# nothing\n")
    own = [] if {"--dit", "--vae"} & set(words.split()) else weights
    assert said in refused(capsys, "generate", *words.split(), *own)
    assert not list(Path().glob("seedling*"))


def test_a_bug_is_a_traceback(weights: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("not one of ours")

    monkeypatch.setattr(generate, "load", broken)
    with pytest.raises(ValueError, match="not one of ours"):
        main(["generate", "x", *weights])


def test_ctrl_c_says_what_is_saved(
    weights: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Pipeline.run

    def stopped(self: Pipeline, task: Any):
        for event in run(self, task):
            if not isinstance(event, Picture) and event.image == 2:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(Pipeline, "run", stopped)
    words = ["generate", "x", "--steps", "1", "--count", "3", *weights]
    assert main(words) == 130
    said = capsys.readouterr().err
    assert "Stopped. Saved before: seedling_00001.png, seedling_00002.png" in said
    assert sorted(os.listdir()) == ["seedling_00001.png", "seedling_00002.png"]


class Terminal(io.StringIO):
    """Somewhere that a progress bar likes to be."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_progress_bar_has_seconds_per_step(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make("x", "--steps", 2, "--count", 2)
    assert "4/4 [" in terminal.getvalue() and "s/it]" in terminal.getvalue()


def test_non_commercial_terms_are_said_once(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published, a diffusers folder has no other terms; its VAE and encoder come along."""
    folder = tiny.tiny_diffusers(tmp_path / "pipeline")
    words = ["generate", "x", "--size", "32x32", "--steps", "1", "--seed", "3", "--dit"]
    assert main([*words, str(folder), "--out", "a.png"]) == 0
    assert capsys.readouterr().out.count("Licence, non-commercial") == 1
    assert main([*words, str(folder / "transformer"), "--out", "b.png"]) == 0
    assert torch.equal(pixels("a.png"), pixels("b.png"))
    assert main(["generate", "--from", "a.png", "--out", "c.png"]) == 0
    assert torch.equal(pixels("a.png"), pixels("c.png"))


def test_inspect(tiny_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_model.dit)]) == 0
    assert "Usable." in capsys.readouterr().out
    assert main(["inspect", str(tiny_model.dit), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["component"], report["problems"]) == (
        "qwen_image_21",
        "dit",
        [],
    )
    Path("cut.safetensors").write_bytes(tiny_model.dit.read_bytes()[:5000])
    assert main(["inspect", "cut.safetensors"]) == 2
    assert "Refused: cut.safetensors is cut short" in capsys.readouterr().out
    assert main(["inspect", "none.safetensors", "--json"]) == 2
    assert "none.safetensors" in json.loads(capsys.readouterr().out)["problems"][0]


def test_demo(
    weights: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("my photo.jpg", 90, 60)
    words = ["demo", "make it blue", "--picture", "my photo.jpg", "--out", "shown", *weights]
    for _ in range(2):  # a second demo replaces the first
        assert main(words) == 0
    made = ["text", "chinese", "edit", "your-edit", "composition", "sheet"]
    assert {f"{name}.png" for name in made} < set(os.listdir("shown"))
    said = capsys.readouterr().out
    assert all(f"{Path('shown') / name}.png" in said for name in made)
    recipe = read_recipe(Path("shown/your-edit.png"))
    assert recipe.prompt == "make it blue" and recipe.references[0].path == "yours.png"
    assert len(read_recipe(Path("shown/composition.png")).references) == 2
    assert main(["generate", "--from", "shown/your-edit.png", "--out", "again.png"]) == 0
    assert torch.equal(pixels("again.png"), pixels("shown/your-edit.png"))
    for name in demo.pieces(demo.Show()):
        assert all((demo.SCENES / reference).is_file() for reference in name.references)


def test_the_embedded_model_is_the_default(tmp_path: Path) -> None:
    """One run as a user has it: another process, no option, the model in assets/."""
    try:
        models.embedded()
    except ModelsError:
        pytest.skip("no embedded model in assets/")
    for words in (["a red star", "--seed", "1", "--out", "a.png"], ["--from", "a.png"]):
        command = [sys.executable, "-m", "seedling.host.cli", "generate", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_recipe(Path("a.png")).weights["dit"].path is None
    assert torch.equal(pixels("a.png"), pixels("seedling_00001.png"))


def test_another_process_refuses_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seedling.host.cli", "inspect", "none.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "none.safetensors" in done.stdout and not done.stderr


@pytest.mark.parametrize("kind", ["stored", "auto", "fp32", "bf16", "fp16"])
def test_precision_is_chosen_and_auto_says_what_it_took(
    make: Any, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make("red", "--steps", 2, "--precision", kind)
    said = capsys.readouterr().out
    note = "auto: what is not quantized is kept in"
    lines = [line for line in said.splitlines() if note in line and "tiny.safetensors" in line]
    assert bool(lines) == (kind == "auto") and all("on this processor" in line for line in lines)
    assert pixels("seedling_00001.png").isfinite().all()


def test_another_precision_is_another_model(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three networks get it; `demo` and `quantize` know the word too."""
    seen: list[Any] = []

    def load(*files: Any, **settings: Any) -> None:
        seen.append(settings["dtype"])
        raise generate.OrderError("enough")

    monkeypatch.setattr(generate.Pipeline, "load", load)
    Path("p.txt").write_text("red\n")
    for words in (
        ["generate", "red"],
        ["demo"],
        ["quantize", "--prompts", "p.txt", "--out", "q.safetensors"],
    ):
        assert main([*words, "--precision", "bf16"]) == 2
    assert seen == [torch.bfloat16] * 3
