"""Whole runs of the quantizer on a tiny model: from Python, the command line and the canvas."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from seedling.host.cli import main
from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import load_dit
from seedling.quant import quantizer
from seedling.quant.plan import PLAIN, PlanError
from seedling.sampling.pipeline import Pipeline, Task
from seedling.sampling.quantizing import Wish, calibration, quantize, units_of


def contents(path: Path) -> dict[str, Any]:
    """Metadata, and every tensor's type, shape and bytes; the library writes names in any order."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = {"metadata": file.metadata()}
        for name in file.keys():
            tensor = file.get_tensor(name).contiguous()
            numbers = tensor.flatten().view(torch.uint8).numpy().tobytes()
            found[name] = tensor.dtype, tuple(tensor.shape), numbers
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipeline(tiny_model: Any) -> Pipeline:
    return Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)


def tasks() -> list[Task]:
    picture = draw(64, 64, 3, seed=4).sigmoid()
    return [Task("a red circle", steps=2, seed=1), Task("red", (picture,), steps=2)]


def test_a_model_is_quantized_and_reads_back(tmp_path: Path, pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "six.safetensors"
    made = quantize(pipeline, tasks(), out, Wish(6), lambda *n: seen.append(n))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == len(made.entries)
    assert made.bits <= 6 and made.bytes == out.stat().st_size
    assert made.psnr > 15  # its weights are random: nothing damps an error
    report = inspect(out)
    assert report.usable and report.quantization
    assert str(out) in made.words() and "dB from full precision" in made.words()
    found, exact = (
        calibration(one, tasks()).probe(0)
        for one in (Pipeline(load_dit(out), pipeline.vae, pipeline.encoder), pipeline)
    )
    assert (found - exact).norm() < 0.2 * exact.norm()

    again = tmp_path / "again.safetensors"
    trials = out.with_suffix(".trials")
    plan = out.with_suffix(".plan.json")
    quantize(pipeline, tasks(), again, Wish(plan=plan, trials=trials))
    assert contents(again) == contents(out)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, pipeline: Pipeline) -> None:
    """With the same result, and without trying again what was tried."""
    out = tmp_path / "q.safetensors"

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline, tasks()[:1], out, Wish(8), stop)
    before = {f.name: f.stat().st_mtime_ns for f in out.with_suffix(".trials").glob("*.s*")}
    assert len(before) == 3 and not out.exists()
    seen: list[int] = []
    quantize(pipeline, tasks()[:1], out, Wish(8), lambda done, of: seen.append(done))
    after = {f.name: f.stat().st_mtime_ns for f in out.with_suffix(".trials").glob("*.s*")}
    assert seen[0] == 3 and all(after[name] == time for name, time in before.items())


def test_more_bits_are_nearer(tmp_path: Path, pipeline: Pipeline) -> None:
    found = []
    for bits in (4.5, 8, 16):
        wish = Wish(bits, trials=tmp_path / "trials")
        made = quantize(pipeline, tasks()[:1], tmp_path / f"{bits}.safetensors", wish)
        found.append(made.psnr)
        assert made.bits <= bits
    assert found[0] < found[1] < found[2]


def test_a_loss_or_inputs_of_4_bits_may_be_asked_for(tmp_path: Path, pipeline: Pipeline) -> None:
    """The smallest file that is measured to stay within; and 4-bit products only when asked for."""
    made, trials = {}, tmp_path / "trials"
    for name, wish in {
        "small": Wish(loss=20.0),
        "large": Wish(loss=2.0),
        "fast": Wish(4.6),
    }.items():
        wish = replace(wish, trials=trials, inputs=4 if name == "fast" else 8)
        made[name] = quantize(pipeline, tasks()[:1], tmp_path / f"{name}.safetensors", wish)
    small, large = made["small"], made["large"]
    for one, limit in ((small, 0.2), (large, 0.02)):
        assert sum(e.chosen.damage for e in one.entries.values()) <= limit**2
    assert small.bits < large.bits and small.psnr < large.psnr
    chosen = {name: {e.choice for e in one.entries.values()} for name, one in made.items()}
    assert "4 bits, inputs too" in chosen["fast"] and "4 bits" not in chosen["fast"]
    assert "4 bits, inputs too" not in chosen["small"] | chosen["large"]
    report = (tmp_path / "small.report.txt").read_text("utf-8")
    assert all(name in report for name in small.entries) and "dB from full precision" in report
    fast = load_dit(tmp_path / "fast.safetensors")
    marks = [i.form.settings["linear_dtype"] for i in fast.checkpoint.names.values()
             if i.form and i.form.format == "convrot_w4a4"]  # fmt: skip
    assert marks and {*marks} == {"int4"}


def test_a_fused_tensor_stays_one(tmp_path: Path, tiny: Any, tiny_model: Any) -> None:
    """The new file has the names of the old one, and its metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model.dit)
    for i in range(2):
        mlp = f"transformer_blocks.{i}.img_mlp"
        gate, up = state.pop(f"{mlp}.gate_layer.weight"), state.pop(f"{mlp}.proj.weight")
        state[f"{mlp}.gate_up.weight"] = torch.cat((gate, up))
    with safe_open(str(tiny_model.dit), "pt") as file:
        metadata = file.metadata()
    named = {f"model.diffusion_model.{k}": t for k, t in state.items()}
    save_file(named, tmp_path / "f.safetensors", metadata)
    pipeline = Pipeline.load(tmp_path / "f.safetensors", tiny_model.vae, tiny_model.encoder)
    assert any(len(unit.layers) == 2 for unit in units_of(pipeline.dit))
    made = quantize(pipeline, tasks()[:1], tmp_path / "q.safetensors", Wish(8))
    with safe_open(str(made.out), "pt") as file:
        names = set(file.keys())
        assert file.metadata()["config"] == metadata["config"]
    layers = {n.rpartition(".")[0] for n in names}
    assert layers == {f"model.diffusion_model.{n.rpartition('.')[0]}" for n in state}
    assert made.psnr > 30


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, pipeline: Pipeline) -> None:
    out = tmp_path / "q.safetensors"
    made = quantize(pipeline, tasks()[:1], out, Wish(8))
    with pytest.raises(PlanError, match="exists"):
        quantize(pipeline, tasks(), made.out, Wish(8))
    with pytest.raises(PlanError, match="no prompt"):
        quantize(pipeline, [], tmp_path / "x.safetensors", Wish(8))
    twice = Pipeline(load_dit(out), pipeline.vae, pipeline.encoder)
    with pytest.raises(CheckpointError, match=r"q\.safetensors is quantized already"):
        quantize(twice, tasks(), tmp_path / "x.safetensors", Wish(8))
    plan = out.with_suffix(".plan.json")
    plan.write_text(plan.read_text().replace(f'"choice": "{PLAIN}"', '"choice": "3 bits"', 1)
                    .replace('"choice": "int8', '"choice": "3 bits', 1))  # fmt: skip
    with pytest.raises(PlanError, match="the plan says '3 bits"):
        quantize(pipeline, tasks()[:1], tmp_path / "x.safetensors", Wish(plan=plan))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(3), "3 bits for each weight are too few; the least .* is 4"),
        (Wish(float("nan")), "bits must be a number above 0"),
        (Wish(loss=-1), "loss must be a number above 0"),
        (Wish(inputs=5), "inputs can have 16, 8 or 4 bits, 5"),
        (Wish(memory=0), "memory"),
    ],
)
def test_a_wish_that_cannot_be_met_is_told_at_once(
    tmp_path: Path, pipeline: Pipeline, wish: Wish, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        quantize(pipeline, tasks(), tmp_path / "q.safetensors", wish)
    assert not [*tmp_path.iterdir()]  # before anything was tried


def test_places_that_cannot_be_written_are_told_at_once(tmp_path: Path, pipeline: Pipeline) -> None:
    with pytest.raises(PlanError, match="does not end in"):
        quantize(pipeline, tasks(), tmp_path / "q.gguf", Wish(8))
    with pytest.raises(PlanError, match="there is no folder"):
        quantize(pipeline, tasks(), tmp_path / "no" / "q.safetensors", Wish(8))
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(PlanError, match=r"taken cannot be written \(.+\)"):
        quantize(pipeline, tasks(), tmp_path / "q.safetensors", Wish(8, trials=taken))


def test_a_full_disk_is_told_and_what_was_tried_is_kept(
    tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = quantizer.save_file, []

    def full(tensors: Any, path: Path, *about: Any) -> None:
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        real(tensors, path, *about)

    monkeypatch.setattr(quantizer, "save_file", full)
    out = tmp_path / "q.safetensors"
    with pytest.raises(PlanError, match="No space left on device.*the same command goes on"):
        quantize(pipeline, tasks()[:1], out, Wish(8))
    assert len([*out.with_suffix(".trials").glob("*.safetensors")]) == 2 and not out.exists()


def test_trials_and_plans_of_others_are_refused(tmp_path: Path, pipeline: Pipeline) -> None:
    out, trials = tmp_path / "q.safetensors", tmp_path / "trials"
    quantize(pipeline, tasks()[:1], out, Wish(8, trials=trials))
    again = tmp_path / "again.safetensors"
    with pytest.raises(PlanError, match="trials of another list of prompts"):
        quantize(pipeline, tasks(), again, Wish(8, trials=trials))
    plan = out.with_suffix(".plan.json")
    layer = next(iter(json.loads(plan.read_text())["layers"]))
    plan.write_text(plan.read_text().replace(f'"{layer}"', '"other"'))
    with pytest.raises(PlanError, match=f"says nothing of {layer}.* plan of another model"):
        quantize(pipeline, tasks()[:1], again, Wish(plan=plan, trials=trials))
    (trials / "about.json").write_text("{")
    with pytest.raises(PlanError, match="trials of another format and another model"):
        quantize(pipeline, tasks()[:1], again, Wish(8, trials=trials))


def test_inputs_that_are_not_rounded(tmp_path: Path, pipeline: Pipeline) -> None:
    """All layers say so in the file, and at the same bytes less is lost."""
    found = []
    for inputs in (8, 16):
        wish = Wish(8.25, trials=tmp_path / "trials", inputs=inputs, six=True)
        made = quantize(pipeline, tasks(), tmp_path / f"{inputs}.safetensors", wish)
        found.append(sum(e.chosen.damage for e in made.entries.values()))
        names = load_dit(made.out).checkpoint.names.values()
        marks = {
            info.form.settings.get("full_precision_matrix_mult") for info in names if info.form
        }
        assert marks == {True} if inputs == 16 else None in marks
    assert found[1] < found[0]


def test_the_command(tmp_path: Path, tiny_model: Any, capsys: Any) -> None:
    prompts, picture = tmp_path / "prompts.txt", tmp_path / "p.png"
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(picture)
    prompts.write_text("# mine\nred circle\nred\tp.png\n")
    words = ["quantize", "--dit", str(tiny_model.dit), "--vae", str(tiny_model.vae), "--encoder",
             str(tiny_model.encoder), "--prompts", str(prompts), "--steps", "2", "--device", "cpu",
             "--bits", "8"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "q.safetensors")]) == 0
    assert "dB from full precision" in capsys.readouterr().out
    assert {"q.safetensors", "q.png", "q.plan.json", "q.report.txt", "q.trials"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert main([*words, "--out", str(tmp_path / "q.safetensors")]) == 2
    assert "q.safetensors exists" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "r.safetensors"), "--plan", "x"]) == 2


def test_the_node(tiny: Any, nodes: Any) -> None:
    """From the canvas: a new file among the diffusion models, a comparison, a report."""
    models = nodes.folder.parent / "models"
    tiny.tiny_model(models)
    names = {kind: "tiny.safetensors" for kind in ("dit", "vae", "encoder")}
    words = {"prompts": "red\n\n", "bits": 8.0}
    quantize_dit = nodes.known["SeedlingQuantizeDiT"].execute
    image, report = quantize_dit(**names, **words, name="mine").args
    assert image.shape == (1, 64, 128, 3) and "dB from full precision" in report
    assert inspect(models / "diffusion_models" / "mine.safetensors").usable
    (model,) = nodes("LoadDiT", dit="mine.safetensors", precision="auto")
    assert "multiplied" in " ".join(model.notes)
    quantize_dit(**names, **words, name="whole", six=True, inputs="not rounded")
    made = load_dit(models / "diffusion_models" / "whole.safetensors").checkpoint.names.values()
    forms = [info.form.settings for info in made if info.form]
    assert forms and all(form["full_precision_matrix_mult"] for form in forms)
    with pytest.raises(ValueError, match="no name for a file"):
        quantize_dit(**names, **words, name="../x")
