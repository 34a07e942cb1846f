"""All-in-one checkpoints: each loader takes its part, and the pictures are those of three files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seedling.host.cli import main
from seedling.host.models import Choice, choose, table
from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.sampling.pipeline import Picture, Pipeline, Task

# As ComfyUI's Save Checkpoint writes them.
PREFIXES = {
    "dit": "model.diffusion_model.",
    "vae": "vae.",
    "encoder": "text_encoders.qwen3vl_8b.transformer.",
}
LOADERS = {"dit": load_dit, "vae": load_vae, "encoder": load_encoder}


@pytest.fixture(scope="module")
def three(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tiny_model(tmp_path_factory.mktemp("three"))


def bundle(three: Any, path: Path, kinds: tuple[str, ...] = ("dit", "vae", "encoder")) -> Path:
    """These parts of the tiny model in one file, its tokenizer beside it."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for kind in kinds:
        part = getattr(three, kind)
        tensors |= {PREFIXES[kind] + name: t for name, t in load_file(part).items()}
        with safe_open(part, "pt") as file:
            config |= json.loads((file.metadata() or {}).get("config", "{}"))
    tensors["text_encoders.qwen3vl_8b.logit_scale"] = torch.ones(())  # core writes it too
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"config": json.dumps(config)})
    path.with_name(f"{path.stem}.tokenizer.json").write_bytes(three.tokenizer.read_bytes())
    return path


def test_each_loader_takes_its_part(three: Any, tmp_path: Path) -> None:
    path = bundle(three, tmp_path / "all.safetensors")
    for kind, load in LOADERS.items():
        whole, part = load(path), load(getattr(three, kind))
        ours, theirs = ((x.module.model if kind == "encoder" else x.module) for x in (whole, part))
        wanted = theirs.state_dict()
        got = ours.state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert whole.config == part.config
        assert not [note for note in whole.notes if "not used" in note]
    task = Task("a red cup", seed=3, steps=2)
    pictures = [
        [event.pixels for event in pipeline.run(task) if isinstance(event, Picture)]
        for pipeline in (
            Pipeline.load(path, path, path),
            Pipeline.load(three.dit, three.vae, three.encoder),
        )
    ]
    assert torch.equal(pictures[0][0], pictures[1][0])


def test_inspect_names_the_parts(three: Any, tmp_path: Path) -> None:
    report = inspect(bundle(three, tmp_path / "all.safetensors"))
    assert report.usable and report.component is None
    words = report.words()
    assert "All in one, each loader takes its part: a diffusion model, a VAE, a text enc" in words
    assert words.count("  Usable.") == 3
    content = json.loads(report.json())
    assert [part["component"] for part in content["parts"]] == ["dit", "vae", "encoder"]
    single = [inspect(getattr(three, kind)) for kind in LOADERS]
    assert [p["parameters"] for p in content["parts"]] == [r.parameters for r in single]
    assert inspect(three.dit).parts == ()


def test_one_file_is_enough_on_the_command_line(
    three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    models = tmp_path / "comfy" / "models"
    path = bundle(three, models / "checkpoints" / "all.safetensors")
    (models / "vae").mkdir()
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)},
              models / "checkpoints" / "other.safetensors")  # fmt: skip
    comfy = tmp_path / "comfy"
    assert choose(Choice("all", comfyui=comfy)) == dict.fromkeys(("dit", "vae", "encoder"), path)
    own = choose(Choice("all", vae=str(three.vae), comfyui=comfy))
    assert own == {"dit": path, "vae": three.vae, "encoder": path}
    out = tmp_path / "one.png"
    words = ["--dit", "all", "--comfyui", str(comfy), "--steps", "1", "--out", str(out)]
    assert main(["generate", "a cup", *words]) == 0 and out.is_file()
    assert main(["generate", "--from", str(out), "--out", str(tmp_path / "two.png")]) == 0
    assert Image.open(tmp_path / "two.png").tobytes() == Image.open(out).tobytes()
    lines = table(comfy).splitlines()
    assert len([line for line in lines if line.startswith("  all ")]) == 3
    assert not [line for line in lines if "other" in line]


def test_a_part_that_is_not_there_is_missed_in_words(three: Any, tmp_path: Path) -> None:
    path = bundle(three, tmp_path / "two.safetensors", ("dit", "vae"))
    assert [part.component for part in inspect(path).parts] == ["dit", "vae"]
    assert load_vae(path).kind == "vae"
    with pytest.raises(CheckpointError, match="two.safetensors is a diffusion model .* but was gi"):
        load_encoder(path)
    alone = bundle(three, tmp_path / "one.safetensors", ("dit",))
    assert inspect(alone).parts == () and inspect(alone).component == "dit"


def test_nodes_offer_checkpoints_and_take_their_part(three: Any, nodes: Any) -> None:
    path = bundle(three, nodes.folder.parent / "models" / "checkpoints" / "all.safetensors")
    for name, kind in (("LoadDiT", "dit"), ("LoadVAE", "vae"), ("LoadEncoder", "encoder")):
        offered = nodes.known[f"Seedling{name}"].define_schema().inputs[0]
        assert offered.options["options"][-1] == "all.safetensors"
        (thing,) = nodes(name, **{kind: "all.safetensors"})
        assert thing.kind == kind and thing.checkpoint.path.samefile(path)
