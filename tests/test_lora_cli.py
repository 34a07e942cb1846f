"""`seedling generate --lora`: into the picture, into its recipe and out again with `--from`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.host.cli import main
from seedling.host.models import lora_of
from seedling.host.pictures import read_picture
from seedling.host.recipe import read_recipe
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Task

LAYER = "transformer_blocks.0.attn.to_v"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)


@pytest.fixture
def weights(tiny_model: Any) -> list[str]:
    files = {"--dit": tiny_model.dit, "--vae": tiny_model.vae, "--encoder": tiny_model.encoder}
    return [str(word) for pair in files.items() for word in pair]


def lora(path: str, seed: int = 0, **more: Tensor) -> Path:
    """A LoRA file that changes every picture."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pair = {
        f"transformer.{LAYER}.lora_A.weight": down,
        f"transformer.{LAYER}.lora_B.weight": up / 2,
    }
    save_file(pair | more, path)
    return Path(path)


def make(out: str, *words: object, weights: list[str]) -> Tensor:
    command = ["generate", "a cup", "--seed", "3", "--steps", "2", "--out", out, *map(str, words)]
    assert main([*command, *weights]) == 0
    return read_picture(out).pixels


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("seedling: ") and "Traceback" not in said
    return said


def test_a_picture_with_loras_and_again(
    weights: list[str], tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = lora("my/one.safetensors", 1), lora("my/two.safetensors", 2)
    plain = make("plain.png", weights=weights)
    both = make("out/both.png", "--lora", f"{one}:0.5", "--lora", two, weights=weights)
    assert (
        "tiny.safetensors + one.safetensors at 0.5 + two.safetensors at 1 (Qwen"
        in capsys.readouterr().out
    )
    assert not torch.equal(plain, both)
    kept = read_recipe(Path("out/both.png")).loras
    assert [(s.file, s.path, s.strength) for s in kept] == [
        ("one.safetensors", "../my/one.safetensors", 0.5),
        ("two.safetensors", "../my/two.safetensors", 1.0),
    ]
    assert json.loads(read_recipe(Path("plain.png")).text())["loras"] == []

    pipeline = Pipeline.load(
        tiny_model.dit, tiny_model.vae, tiny_model.encoder, loras=[(two, 1), (one, 0.5)]
    )
    *_, last = pipeline.run(Task("a cup", seed=3, steps=2))
    assert isinstance(last, Picture)
    assert (last.pixels - both).abs().max() < 2 / 255

    assert main(["generate", "--from", "out/both.png", "--out", "again.png"]) == 0
    assert torch.equal(read_picture("again.png").pixels, both)
    assert [s.strength for s in read_recipe(Path("again.png")).loras] == [0.5, 1.0]
    assert (
        main(["generate", "--from", "out/both.png", "--lora", f"{one}:0", "--out", "without.png"])
        == 0
    )
    assert torch.equal(read_picture("without.png").pixels, plain)
    assert (
        "Note: without one.safetensors and two.safetensors, as --lora says."
        in capsys.readouterr().out
    )


def test_a_changed_or_missing_file_is_not_taken(
    weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora("style.safetensors", 1)
    make("a.png", "--lora", file, weights=weights)
    lora("style.safetensors", 2)
    said = refused(capsys, "generate", "--from", "a.png", "--out", "b.png")
    assert (
        "a.png was made with other weights than style.safetensors has now" in said
        and "--lora" in said
    )
    file.unlink()
    said = refused(capsys, "generate", "--from", "a.png", "--out", "b.png")
    assert "a.png was made with style.safetensors, which is not there any more" in said


def test_by_name_from_comfyuis_folder(weights: list[str], tmp_path: Path) -> None:
    file = lora("comfy/models/loras/mine/style.safetensors")
    comfyui = ["--comfyui", str(tmp_path / "comfy")]
    named = make("a.png", "--lora", "style:0.8", *comfyui, weights=weights)
    assert torch.equal(named, make("b.png", "--lora", f"{file}:0.8", weights=weights))


def test_what_a_strength_is(tmp_path: Path) -> None:
    for name in ("a.safetensors", "odd:0.5", "C:x.safetensors"):
        (tmp_path / name).touch()
    assert lora_of("a.safetensors", None) == (Path("a.safetensors"), 1.0)
    assert lora_of("a.safetensors:-0.25", None) == (Path("a.safetensors"), -0.25)
    assert lora_of("odd:0.5", None) == (Path("odd:0.5"), 1.0)  # a file of that name exists
    assert lora_of("odd:0.5:2", None) == (Path("odd:0.5"), 2.0)
    assert lora_of("C:x.safetensors", None) == (Path("C:x.safetensors"), 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "none.safetensors"], "--lora none.safetensors is no file, and nothing in"),
        (["--lora", "one.safetensors:nan"], "the strength must be a number such as 0.8"),
        (["--lora", "one.safetensors:0,8"], "the strength must be a number such as 0.8"),
        (["--lora", "one.safetensors:-1e300"], "from -100 to 100"),
        (["--lora", "one.safetensors", "--lora", "one.safetensors:2"], "a LoRA was given twice"),
        (["--lora", "other.safetensors"], "other.safetensors has nothing for tiny.safetensors"),
        (["--lora", "cut.safetensors"], "cut.safetensors is cut short"),
    ],
)
def test_what_cannot_be_used(
    words: list[str], message: str, weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = lora("one.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-4])
    save_file(
        {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)},
        "other.safetensors",
    )
    assert message in refused(capsys, "generate", "a cup", *words, *weights)
    assert not list(Path().glob("*.png"))


def test_parts_without_a_place_are_told(
    weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"te.layer.lora_A.weight": torch.ones(1, 2), "te.layer.lora_B.weight": torch.ones(2, 1)}
    make("a.png", "--lora", lora("one.safetensors", **more), weights=weights)  # pyright: ignore[reportArgumentType]
    said = capsys.readouterr().out
    assert (
        "Note: one.safetensors: 1 of its 2 modules fit nothing here and are left out: te.layer."
        in said
    )


def test_inspect_tells_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora("one.safetensors"))]) == 0
    said = capsys.readouterr().out
    assert (
        "  Qwen-Image-2.1 (qwen_image_21): LoRA\n  LoRA, diffusers names, for 1 layer, rank 4\n"
        in said
    )
    assert (
        "Its shapes are those of no published Qwen-Image-2.1: for a network of other sizes." in said
    )


# ---- Python ------------------------------------------------------------------------------------


def test_strengths_change_without_reading_anything(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = lora("one.safetensors", 1), lora("two.safetensors", 2)
    pipeline = Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder, loras=[(one, 1.0)])

    def pixels() -> Tensor:
        *_, last = pipeline.run(Task("a cup", seed=3, steps=1))
        assert isinstance(last, Picture)
        return last.pixels

    whole = pixels()
    pipeline.set_loras([(one, 1.0), (two, 0.7)])
    monkeypatch.setattr(
        "seedling.sampling.pipeline.load_lora", None
    )  # from here on nothing is read
    pipeline.set_loras([(two, 0.0), (one, 1.0)])
    assert torch.equal(pixels(), whole)
    pipeline.set_loras([(one, 0.4)])
    assert not torch.equal(pixels(), whole) and [*pipeline.loras] == [one]
    for wrong, message in (([(one, 1.0), (one, 2.0)], "twice"), ([(one, float("inf"))], "is inf")):
        with pytest.raises(SamplingError, match=message):
            pipeline.set_loras(wrong)
    pipeline.set_loras([(one, 1.0)])
    assert torch.equal(pixels(), whole)
    pipeline.set_loras([])
    plain = Pipeline(pipeline.dit, pipeline.vae, pipeline.encoder)
    *_, last = plain.run(Task("a cup", seed=3, steps=1))
    assert isinstance(last, Picture) and torch.equal(pixels(), last.pixels)
