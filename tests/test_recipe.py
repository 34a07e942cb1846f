"""A recipe comes out of a picture as it went in, and is checked: a picture comes from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from seedling.host.pictures import PictureError
from seedling.host.recipe import RecipeError, read_recipe, source


@pytest.fixture
def recipe() -> dict[str, Any]:
    source = {"file": "a.safetensors", "path": None, "hash": "0"}
    return {
        "format": 1, "prompt": "x", "negative": "", "references": [source], "size": [64, 64],
        "steps": 1, "guidance": 1, "seed": 0, "sampler": "euler", "sigmas": [1, 0],
        "schedule": "base", "resolution": None, "made_with": {},
        "weights": {"dit": source, "vae": source, "encoder": source},
    }  # fmt: skip


def write(path: Path, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("seedling", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_it_comes_out_as_it_went_in(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = read_recipe(write(tmp_path / "a.png", json.dumps(recipe)))
    assert first.seed == 0 and first.sigmas == (1.0, 0.0) and first.weights["vae"].path is None
    assert read_recipe(write(tmp_path / "b.png", first.text())) == first


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"prompt": 5}, {"size": [64]}, {"size": [64, "64"]}, {"seed": True},
        {"sigmas": [1.0]}, {"sigmas": None}, {"weights": {}}, {"weights": 5}, {"references": [5]},
        {"guidance": float("nan")}, {"guidance": 10**400}, {"steps": "4"}, {"resolution": "big"},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_is_checked(
    change: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.png", json.dumps({**recipe, **change}))
    with pytest.raises(RecipeError, match=r"bad\.png cannot be followed"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["", "{", "5", "[]", "[" * 100_000, '{"format": NaN}'])
def test_what_is_no_recipe_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bad\.png cannot be followed"):
        read_recipe(write(tmp_path / "bad.png", text))


def test_only_a_png_has_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(PictureError, match=r"a\.jpg .*give a PNG file"):
        read_recipe(tmp_path / "a.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"a\.png carries no recipe"):
        read_recipe(tmp_path / "a.png")


def test_files_are_named_as_the_picture_sees_them(tmp_path: Path) -> None:
    made = source(tmp_path / "refs" / "a\udcff.png", "0", tmp_path / "out")
    assert (made.file, made.path) == ("a\ufffd.png", "../refs/a\ufffd.png")
