"""Qwen-Image on the command line: layers, and a variant that the file does not tell."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seedling.host.cli import main
from seedling.host.recipe import read_recipe

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
NEIGHBOUR = Path(__file__).with_name("tiny_qwen_image.py")
spec = importlib.util.spec_from_file_location("seedling_tests_tiny_qwen_image_cli", NEIGHBOUR)
assert spec is not None and spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_layers_are_saved_one_by_one_and_repeated(tmp_path: Path) -> None:
    folder = str(tiny.write(tmp_path / "model", "QwenImageLayeredPipeline"))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    words = ["--steps", "1", "--guidance", "1", "--seed", "3"]
    made = ["generate", "a red sheet", "--dit", folder, "--reference", str(tmp_path / "red.png")]
    size = ["--resolution", "48"]
    assert main([*made, *words, *size, "--layers", "2", "--out", str(tmp_path / "one.png")]) == 0
    layers = sorted(tmp_path.glob("one*.png"))
    assert [path.name for path in layers] == ["one_00001.png", "one_00002.png"]
    assert all(pixels(path).shape == (*pixels(layers[0]).shape[:2], 4) for path in layers)
    assert not np.array_equal(pixels(layers[0]), pixels(layers[1]))
    assert {read_recipe(path).layers for path in layers} == {2}
    assert main(["generate", "--from", str(layers[1]), "--out", str(tmp_path / "again")]) == 0
    again = sorted((tmp_path / "again").glob("*.png"))
    assert len(again) == 2
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(layers, again, strict=True))


def test_layers_and_a_region_do_not_go_together(tmp_path: Path, capsys: Any) -> None:
    folder = str(tiny.write(tmp_path / "model", "QwenImageLayeredPipeline"))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    words = ["--dit", folder, "--reference", str(tmp_path / "red.png"), "--region", "0,0,9,9"]
    assert main(["generate", "x", *words, "--out", str(tmp_path / "out")]) == 2
    assert "cannot edit a part of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layers_of_a_model_that_has_none(tmp_path: Path, capsys: Any) -> None:
    folder = str(tiny.write(tmp_path / "model", "QwenImagePipeline"))
    words = ["--dit", folder, "--steps", "1", "--out", str(tmp_path)]
    assert main(["generate", "x", *words, "--layers", "2"]) == 2
    assert "--layers is for models that paint in layers" in capsys.readouterr().err
    assert main(["generate", "x", *words, "--layers", "0"]) == 2
    assert "at least one layer must be painted" in capsys.readouterr().err


def test_a_lost_marker_is_asked_for_and_can_be_said(tmp_path: Path, capsys: Any) -> None:
    """A repack of Edit-2511: references of it are modulated at t = 0, others are not."""
    folder = tiny.write(tmp_path / "model", "QwenImageEditPlusPipeline")
    repack = tmp_path / "repack.safetensors"
    shutil.copy(next((folder / "transformer").glob("*.safetensors")), repack)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    words = [
        "generate", "a cup", "--dit", str(repack), "--vae", str(folder), "--encoder", str(folder),
        "--reference", str(tmp_path / "noise.png"), "--resolution", "0", "--steps", "1",
        "--guidance", "1", "--seed", "1",
    ]  # fmt: skip
    assert main([*words, "--variant", "nonsense"]) == 2
    assert "qwen-image-edit-2509, qwen-image-edit-2511" in capsys.readouterr().err
    files = [tmp_path / f"{name}.png" for name in ("2509", "2511", "again")]
    for file, variant in zip(files, ("qwen-image-edit-2509", "qwen-image-edit-2511"), strict=False):
        assert main([*words, "--variant", variant, "--out", str(file)]) == 0
        assert "Taken for Qwen-Image-Edit-25" in capsys.readouterr().out
        assert read_recipe(file).variant == variant
    assert not np.array_equal(pixels(files[0]), pixels(files[1]))
    assert main(["generate", "--from", str(files[1]), "--out", str(files[2])]) == 0
    assert np.array_equal(pixels(files[1]), pixels(files[2]))
    assert pixels(files[1]).shape[:2] == (32, 48)  # the reference's own
    plain = [word for word in words if word not in ("--reference", str(tmp_path / "noise.png"))]
    assert main([*plain, "--size", "32x32", "--out", str(tmp_path / "asked.png")]) == 0
    assert "if it is an editor, choose which under variant (--var" in capsys.readouterr().out
    assert main([*plain, "--size", "32x32", "--out", str(tmp_path / "once.png")]) == 0
    said = capsys.readouterr().out  # asked once, told at every start
    assert "Taken for Qwen-Image: nothing in the file" in said and "choose which" not in said
