"""What `seedling doctor` finds out, on a machine whose files are known."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from seedling.host import doctor
from seedling.host.cli import main
from seedling.model_loaders.load import load_encoder
from seedling.model_loaders.tokenizers import TokenizerError


@pytest.fixture
def comfy(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    tiny.tiny_model(tmp_path / "models", name="mine")
    return tmp_path


def report(comfy: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The lines of each section."""
    assert main(["doctor", "--comfyui", str(comfy)]) == 0
    sections: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(" "):
            sections[list(sections)[-1]].append(line[2:])
        else:
            sections[line] = []
    return sections


def partners(lines: list[str], model: str) -> dict[str, str]:
    at = lines.index(model)
    pairs = [line.strip().split(": ", 1) for line in lines[at + 1 : at + 3]]
    return {kind: names for kind, names in pairs}


def test_what_fits_together_is_listed(comfy: Path, capsys: Any) -> None:
    lines = report(comfy, capsys)["Models"]
    found = partners(lines, "mine.safetensors")
    assert "mine.safetensors" in found["VAE"] and "mine.safetensors" in found["text encoder"]
    assert not [line for line in lines if "cannot be used" in line]


def test_a_missing_part_is_named_with_a_file_that_would_fit(comfy: Path, capsys: Any,
                                                            monkeypatch: Any) -> None:  # fmt: skip
    monkeypatch.setattr("seedling.host.models.ASSETS", comfy / "nothing")
    (comfy / "models" / "vae" / "mine.safetensors").unlink()
    lines = report(comfy, capsys)["Models"]
    found = partners(lines, "mine.safetensors")
    assert found["VAE"].startswith("missing, for example qwen_image_2.1_vae")
    assert found["text encoder"].startswith("none that fits together with the rest")
    (comfy / "models" / "diffusion_models" / "mine.safetensors").unlink()
    lines = report(comfy, capsys)["Models"]
    assert lines == ["mine.safetensors: a text encoder of Qwen-Image-2.1, without a model"]


def test_files_that_do_not_fit_each_other_are_kept_apart(
    comfy: Path, tiny: ModuleType, capsys: Any
) -> None:
    """A text encoder of another width is of the family, but not of this model."""
    lines = report(comfy, capsys)["Models"]
    embedded = partners(lines, "seedling-tiny (embedded)")
    assert "seedling-tiny (embedded)" in embedded["text encoder"]
    assert "mine.safetensors" not in embedded["text encoder"]


def test_what_cannot_be_used_says_why(comfy: Path, capsys: Any) -> None:
    encoders = comfy / "models" / "text_encoders"
    for tokenizer in encoders.glob("*.json"):
        tokenizer.unlink()
    (comfy / "models" / "vae" / "page.safetensors").write_bytes(b"<html>")
    shutil.copy(comfy / "models" / "vae" / "mine.safetensors", encoders / "vae.safetensors")
    lines = report(comfy, capsys)["Models"]
    assert any("page.safetensors cannot be used: page.safetensors is a web" in x for x in lines)
    assert any("mine.safetensors came without its tokenizer" in line for line in lines)
    assert any("vae.safetensors is a VAE" in line for line in lines)


def test_an_encoder_is_judged_as_the_loader_judges_it(
    comfy: Path, tiny: ModuleType, capsys: Any
) -> None:
    """Files made for ComfyUI come without a tokenizer; the ComfyUI around them has Qwen's."""
    encoder = comfy / "models" / "text_encoders" / "mine.safetensors"
    tokenizer = encoder.with_name("mine.tokenizer.json")
    with_own = load_encoder(encoder).module.tokenizer.text("a red cup")
    tokenizer.unlink()
    with pytest.raises(TokenizerError, match="came without its tokenizer"):
        load_encoder(encoder)
    assert any("came without its tokenizer" in x for x in report(comfy, capsys)["Models"])
    model = json.loads(tiny.tiny_tokenizer().to_str())["model"]
    place = comfy / "comfy" / "text_encoders" / "qwen25_tokenizer"
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert load_encoder(encoder).module.tokenizer.text("a red cup") == with_own
    lines = report(comfy, capsys)["Models"]
    assert "mine.safetensors" in partners(lines, "mine.safetensors")["text encoder"]
    assert not [line for line in lines if "cannot be used" in line]


def test_packages_that_are_missing_or_old(comfy: Path, capsys: Any, monkeypatch: Any) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "huggingface_hub":
            raise metadata.PackageNotFoundError(name)
        return "2.6.1+cu128" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    lines = report(comfy, capsys)["Packages"]
    assert "huggingface_hub is missing: needed for seedling download" in lines
    assert "torch 2.6.1+cu128, too old: 2.7 is needed for everything" in lines
    assert f"safetensors {real('safetensors')}" in lines


@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), "fp32, fp16, int8"), ((8, 6), "bf16, int8"), ((9, 0), "fp8"), ((12, 0), "nvfp4")],
)
def test_a_cards_abilities(capability: tuple[int, int], words: str, monkeypatch: Any) -> None:
    class Card:
        name, total_memory = "Card", 24 << 30
        major, minor = capability

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Card)
    card = next(line for line in doctor.devices() if line.startswith("cuda:0"))
    assert card.startswith("cuda:0: Card, 24 GiB, multiplies fp32") and card.endswith(words)


def test_workflows_name_what_they_lack(comfy: Path, capsys: Any, monkeypatch: Any) -> None:
    lines = report(comfy, capsys)["Example workflows"]
    titles = [path.stem for path in doctor.WORKFLOWS.glob("*.json")]
    assert titles and all(f"{t}: ready, with the files it names" in lines for t in titles)
    assert any(line.endswith("; seedling download qwen-image-2.1") for line in lines)
    for kind, name in [
        ("diffusion_models", "qwen_image_2.1_bf16"), ("text_encoders", "qwen3vl_8b_bf16"),
        ("vae", "qwen_image_2.1_vae_bf16"),
    ]:  # fmt: skip
        (comfy / "models" / kind / f"{name}.safetensors").write_bytes(b"")
    assert not [x for x in report(comfy, capsys)["Example workflows"] if "published" in x]
    other = comfy / "workflows"
    other.mkdir()
    node = {
        "properties": {"models": [{"directory": "vae", "name": "a.safetensors"}]},
        "widgets_values": ["absent.safetensors"],
    }
    (other / "Mine.json").write_text(json.dumps({"nodes": [node, {"type": "Note"}]}))
    monkeypatch.setattr(doctor, "WORKFLOWS", other)
    lines = report(comfy, capsys)["Example workflows"]
    assert lines == [
        "Mine: lacks vae/absent.safetensors",
        "  for its published model: a.safetensors",
    ]
