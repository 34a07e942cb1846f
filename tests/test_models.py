"""Where model files are looked for, and what `seedling models` says about them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from seedling.host import models
from seedling.host.cli import main
from seedling.host.models import Choice, ModelsError, choose, fingerprint, look_up
from seedling.model_loaders.checkpoint import open_checkpoint


@pytest.fixture
def comfy(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ComfyUI with the files mine, sub/my and mine in its three folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    tiny.tiny_model(tmp_path / "comfy" / "models", name="mine")
    vae = tmp_path / "comfy" / "models" / "vae"
    (vae / "sub").mkdir()
    (vae / "mine.safetensors").rename(vae / "sub" / "my.safetensors")
    return tmp_path / "comfy"


def test_names_are_looked_up_in_comfyui(comfy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(Choice("mine", "my", "mine.safetensors", comfyui=comfy))
    vae = comfy / "models" / "vae"
    assert found["dit"] == comfy / "models" / "diffusion_models" / "mine.safetensors"
    assert found["vae"] == vae / "sub" / "my.safetensors"
    assert look_up("vae", "sub/my.safetensors", comfy) == found["vae"]
    assert look_up("vae", "my", comfy / "models") == found["vae"]
    monkeypatch.setenv("COMFYUI_DIR", str(comfy))
    assert look_up("vae", "my") == found["vae"]
    words = ["--dit", "mine", "--vae", "my", "--encoder", "mine", "--steps", "1"]
    assert main(["generate", "x", *words]) == 0
    shutil.copy(found["vae"], vae / "my.safetensors")
    assert look_up("vae", "my") == vae / "my.safetensors"  # the nearest


def test_a_name_that_means_two_files_is_refused(comfy: Path) -> None:
    vae = comfy / "models" / "vae"
    (vae / "two").mkdir()
    shutil.copy(vae / "sub" / "my.safetensors", vae / "two" / "my.safetensors")
    with pytest.raises(ModelsError, match="could be .*sub.* and .*two"):
        look_up("vae", "my", comfy)
    with pytest.raises(ModelsError, match="nothing in .* is called so"):
        look_up("vae", "../diffusion_models/mine", comfy)


def test_a_wrong_comfyui_is_named(comfy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelsError, match="is not ComfyUI's folder.*--comfyui"):
        look_up("vae", "my", comfy / "models" / "vae")
    monkeypatch.setenv("COMFYUI_DIR", "nowhere")
    with pytest.raises(ModelsError, match="nowhere is not ComfyUI's folder.*COMFYUI_DIR"):
        look_up("vae", "my")


def test_the_list_says_what_each_file_is(comfy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (comfy / "models" / "vae" / "other.safetensors").write_bytes(b"<html>")
    assert main(["models", "--comfyui", str(comfy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    mine = next(line for line in lines if line.startswith("  mine "))
    assert "Qwen-Image-2.1" in mine and "GB" in mine and "Apache-2.0" in mine
    other = next(line for line in lines if line.startswith("  other "))
    assert "cannot be used: other.safetensors is a web page" in other


def test_without_the_embedded_model_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "ASSETS", tmp_path / "assets")
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    assert main(["generate", "x"]) == 2
    assert "assets/ lacks diffusion_models/seed" in capsys.readouterr().err
    assert main(["models"]) == 0
    assert capsys.readouterr().out.count("  none") == 3


@pytest.mark.parametrize("place", [-1, -3_000, 20_000])
def test_fingerprints_tell_weights_apart(place: int, comfy: Path) -> None:
    """One bit of one weight in a small file; of a large one only samples are read."""
    file = comfy / "models" / "diffusion_models" / "mine.safetensors"
    before = fingerprint(open_checkpoint(file))
    assert fingerprint(open_checkpoint(file)) == before
    data = bytearray(file.read_bytes())
    assert len(data) < models.SAMPLES * models.SAMPLE
    data[place] ^= 1
    file.write_bytes(bytes(data))
    assert fingerprint(open_checkpoint(file)) != before
