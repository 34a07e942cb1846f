"""The quantizer: grids and rounding, the choice, and whole runs on a tiny model."""

from __future__ import annotations

import json
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
from seedling.quant.encode import WAYS, Encoded, encode, possible
from seedling.quant.layouts import Layout, Parts, layout_of
from seedling.quant.plan import PLAIN, Option, PlanError, choose, read_plan
from seedling.quant.quantizer import Observed, Unit, groups
from seedling.sampling.pipeline import Pipeline, Task
from seedling.sampling.quantizing import Wish, quantize, runner, units_of

OUT, IN = 128, 256
BITS = {"int8": 8, "int8 rotated": 8, "6 bits": 6.5, "4 bits in groups": 4.5, "4 bits": 4,
        "4 bits, inputs too": 4, "nvfp4 smoothed": 4.5}  # fmt: skip


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


def layout(made: Encoded, shape: tuple[int, int] = (OUT, IN)) -> Layout:
    return layout_of(made.format, Parts(made.tensors, shape, settings=made.settings))


def outliers() -> tuple[Tensor, Tensor]:
    """Inputs (n, IN) of which a few are correlated and a few are large."""
    x = draw(2000, IN) @ (torch.eye(IN) + 0.2 * draw(IN, IN, seed=1) / IN**0.5)
    x[:, ::50] *= 12
    return x, x.T @ x / len(x)


@pytest.mark.parametrize("name", WAYS)
def test_a_weight_survives_in_every_format(name: str) -> None:
    """Within what rounding to so many bits allows, and in no more bytes than that."""
    weight = draw(OUT, IN) * draw(OUT, 1, seed=2).exp()
    made = encode(WAYS[name], weight)
    whole = layout(made).weight()
    limit = {8: 0.012, 6.5: 0.03, 4.5: 0.11, 4: 0.14}[BITS[name]]
    assert (whole - weight).norm() < limit * weight.norm()
    assert made.bytes <= (BITS[name] / 8 * OUT * IN) * 1.03 + OUT * 4 + 68
    json.dumps(made.settings)


@pytest.mark.parametrize("name", WAYS)
def test_comfy_kitchen_reads_what_was_encoded(name: str) -> None:
    """The other reader of these formats finds the same numbers."""
    ck = pytest.importorskip("comfy_kitchen")
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    made = encode(WAYS[name], draw(OUT, IN))
    t, ours = made.tensors, layout(made).weight()
    if made.format == "nvfp4":
        theirs = ck.dequantize_nvfp4(
            t["weight"], t["weight_scale_2"], t["weight_scale"], torch.float32
        )
    elif made.format == "convrot_w4a4":
        theirs = ck.dequantize_convrot_w4a4_weight(t["weight"], t["weight_scale"])
        theirs = theirs.float()
    elif made.format == "asym_w4a8_int8":
        theirs = ck.dequantize_w4a8_int8_weight(
            t["weight"], t["weight_s_rel"], t["weight_s_channel"], t.get("weight_codebook"),
            output_dtype=torch.float32,
        )  # fmt: skip
    elif made.settings.get("convrot"):
        theirs = eager.dequantize_int8_convrot_weight(t["weight"], t["weight_scale"], 256)
    else:
        theirs = ck.dequantize_int8_simple(t["weight"], t["weight_scale"])
    assert (ours - theirs).abs().max() < 1e-2 * ours.abs().max()
    assert (ours - theirs).norm() < 5e-3 * ours.norm()


@pytest.mark.parametrize("name", WAYS)
def test_rounding_that_knows_the_inputs_loses_less(name: str) -> None:
    x, moments = outliers()
    weight = draw(OUT, IN, seed=3)
    blind, seeing = (layout(encode(WAYS[name], weight, m)).weight() for m in (None, moments))
    error = [((w - weight) @ x.T).norm() for w in (blind, seeing)]
    assert error[1] < (0.95 if "int8" in name else 0.8) * error[0]


def test_smoothing_divides_the_inputs() -> None:
    smooth = draw(IN, seed=5).exp()
    weight, (_, moments) = draw(OUT, IN), outliers()
    made = encode(WAYS["nvfp4 smoothed"], weight, moments, smooth)
    found = layout(made)
    assert (found.weight() - weight).norm() < 0.5 * weight.norm()
    x = draw(3, IN, seed=6)
    assert torch.allclose(found.inputs(x), x / smooth, rtol=1e-5)


def test_what_the_widths_allow() -> None:
    assert not possible(WAYS["4 bits"], (64, 48)) and possible(WAYS["4 bits"], (64, 192))
    assert not possible(WAYS["nvfp4 smoothed"], (60, 64))


def test_observing_is_exact_and_fair() -> None:
    seen, x = Observed(torch.zeros(8, 8), torch.zeros(1024, 8)), draw(4000, 8)
    x[:, 0] = torch.arange(4000)
    generator = torch.Generator().manual_seed(0)
    for part in x.split(700):
        seen.take(part[None], generator)
    assert torch.allclose(seen.moments, x.T @ x / 4000, rtol=1e-3, atol=1.0)
    assert 1850 < seen.sample[:, 0].mean() < 2150 and len(seen.sample[:, 0].unique()) == 1024


def test_groups_stay_within_memory() -> None:
    units = [Unit(str(i), (4, 100), {}, lambda: torch.empty(0)) for i in range(5)]
    own = 4 * 100 * (100 + 1024)
    assert [len(g) for g in groups(units, 2 * own)] == [2, 2, 1]
    assert [len(g) for g in groups(units, 1)] == [1] * 5


# ---- the choice --------------------------------------------------------------------------------


def options(*pairs: tuple[int, float]) -> dict[str, Option]:
    return {f"{size}": Option(size, damage, damage) for size, damage in pairs}


def test_the_choice_is_the_best_there_is() -> None:
    """Against all combinations, on convex options."""
    import itertools

    own = {
        "a": options((4, 9.0), (6, 3.0), (8, 1.0), (16, 0.0)),
        "b": options((4, 2.0), (6, 1.0), (8, 0.9), (16, 0.0)),
        "c": options((4, 30.0), (6, 12.0), (8, 3.0), (16, 0.0)),
    }
    for budget in (12, 14, 18, 22, 30, 48):
        made = choose(own, dict.fromkeys(own, 8), budget)
        damage = sum(e.chosen.damage for e in made.values())
        every = [made for made in itertools.product(*(o.values() for o in own.values()))
                 if sum(x.bytes for x in made) <= budget]  # fmt: skip
        best = min(sum(x.damage for x in combination) for combination in every)
        assert sum(e.chosen.bytes for e in made.values()) <= budget
        assert damage <= 1.5 * best + 1e-9


def test_the_fewest_bytes_for_a_loss() -> None:
    own = {"a": options((4, 9.0), (6, 3.0), (16, 0.0)), "b": options((4, 2.0), (8, 0.5), (16, 0.0))}
    weights = dict.fromkeys(own, 8)
    for limit, bytes in ((20.0, 8), (5.0, 10), (3.5, 14), (0.5, 24), (0.0, 32)):
        made = choose(own, weights, damage=limit)
        assert sum(e.chosen.damage for e in made.values()) <= limit
        assert sum(e.chosen.bytes for e in made.values()) == bytes


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(PlanError, match="3 bits for each weight are too few; the least .* is 4"):
        choose({"a": options((4, 1.0), (8, 0.0))}, {"a": 8}, 3)


def test_an_option_that_is_larger_and_worse_is_never_taken() -> None:
    own = {"a": options((4, 1.0), (5, 2.0), (6, 0.5), (16, 0.0))}
    assert choose(own, {"a": 8}, 5)["a"].choice == "4"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "layers": 3}'])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlanError, match=r"p\.json"):
        read_plan(tmp_path / "p.json")


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny_model: Any) -> Pipeline:
    return Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)


def tasks() -> list[Task]:
    return [Task("a red circle", steps=2, seed=1), Task("red", (torch.rand(64, 64, 3),), steps=2)]


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
    run, exact = (
        runner(Pipeline(load_dit(out), pipeline.vae, pipeline.encoder), tasks()),
        runner(pipeline, tasks()),
    )
    assert (run(0) - exact(0)).norm() < 0.2 * exact(0).norm()

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
    before = {f.name: f.stat().st_mtime_ns for f in out.with_suffix(".trials").iterdir()}
    assert len(before) == 3 and not out.exists()
    seen: list[int] = []
    quantize(pipeline, tasks()[:1], out, Wish(8), lambda done, of: seen.append(done))
    after = {f.name: f.stat().st_mtime_ns for f in out.with_suffix(".trials").iterdir()}
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
        wish = replace(wish, trials=trials, fast=name == "fast")
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
    with pytest.raises(ValueError, match="no name for a file"):
        quantize_dit(**names, **words, name="../x")
