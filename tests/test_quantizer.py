"""The quantizer's parts: grids and rounding, what is observed, and the choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seedling.quant.encode import BASES, WAYS, Encoded, EncodeError, bytes_of, encode, possible
from seedling.quant.layouts import Layout, Parts, layout_of
from seedling.quant.plan import Option, PlanError, choose, read_plan
from seedling.quant.quantizer import Calibration, Observed, Unit, groups, observing

OUT, IN = 128, 256
BITS = {"int8": 8, "int8 rotated": 8, "6 bits": 6.125, "4 bits in groups": 4.5,
        "4 bits in groups of 64": 4.125, "4 bits": 4, "nvfp4 smoothed": 4.5}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layout(made: Encoded, shape: tuple[int, int] = (OUT, IN)) -> Layout:
    return layout_of(made.format, Parts(made.tensors, shape, settings=made.settings))


def outliers() -> tuple[Tensor, Tensor]:
    """Inputs (n, IN) of which a few are correlated and a few are large."""
    x = draw(2000, IN) @ (torch.eye(IN) + 0.2 * draw(IN, IN, seed=1) / IN**0.5)
    x[:, ::50] *= 12
    return x, x.T @ x / len(x)


@pytest.mark.parametrize("name", BITS)
def test_a_weight_survives_in_every_format(name: str) -> None:
    """Within what rounding to so many bits allows, and in no more bytes than that."""
    weight = draw(OUT, IN) * draw(OUT, 1, seed=2).exp()
    made = encode(WAYS[name], weight)
    whole = layout(made).weight()
    limit = {8: 0.012, 6.125: 0.035, 4.5: 0.11, 4.125: 0.12, 4: 0.14}[BITS[name]]
    assert (whole - weight).norm() < limit * weight.norm()
    assert made.bytes == bytes_of(WAYS[name], (OUT, IN))
    assert made.bytes <= (BITS[name] / 8 * OUT * IN) * 1.03 + OUT * 4 + 68
    json.dumps(made.settings)


@pytest.mark.parametrize("name", BITS)
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
            group_size=made.settings["group_size"], output_dtype=torch.float32,
        )  # fmt: skip
    elif made.settings.get("convrot"):
        theirs = eager.dequantize_int8_convrot_weight(t["weight"], t["weight_scale"], 256)
    else:
        theirs = ck.dequantize_int8_simple(t["weight"], t["weight_scale"])
    assert (ours - theirs).abs().max() < 1e-2 * ours.abs().max()
    assert (ours - theirs).norm() < 5e-3 * ours.norm()


@pytest.mark.parametrize("name", BITS)
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


def test_inputs_that_are_no_numbers_are_told() -> None:
    moments = torch.full((IN, IN), torch.nan)
    with pytest.raises(EncodeError, match="no numbers"):
        encode(WAYS["4 bits"], draw(OUT, IN), moments)


def test_every_base_is_tested() -> None:
    assert [*BITS] == [way.name for way in BASES]


def test_inputs_are_multiplied_as_asked() -> None:
    """The same numbers; what the inputs are rounded to is said in the settings."""
    made = encode(WAYS["4 bits"], draw(OUT, IN))
    assert made.settings["linear_dtype"] == "int8"
    four = made.as_way(WAYS["4 bits, inputs too"])
    assert four.settings["linear_dtype"] == "int4" and four.tensors is made.tensors
    whole = made.as_way(WAYS["4 bits, inputs whole"])
    assert whole.settings["full_precision_matrix_mult"] and layout(whole).full
    assert not layout(made).full


def test_observing_is_exact_and_fair() -> None:
    """Rows of weight 3 count three times in the mean, and are three times as often in the sample,
    while that is small beside what was seen."""
    seen, x = Observed(torch.zeros(8, 8)), draw(40000, 8)
    generator = torch.Generator().manual_seed(0)
    for number, part in enumerate(x.split(700)):
        part[:, 0] = weight = 3.0 if number % 2 else 1.0
        seen.take(part[None], weight, generator)
    weights = x[:, :1].clone()
    wanted = (x * weights).T @ x / weights.sum()
    assert torch.allclose(seen.moments, wanted, rtol=1e-3, atol=1e-2)
    assert seen.sample.shape == (1024, 8) and len(seen.sample[:, 1].unique()) == 1024
    assert 0.68 < (seen.sample[:, 0] == 3).float().mean() < 0.81


class Reader(torch.nn.Module):
    """Reads once, then paints in steps, as a network with a prefix does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_what_is_read_once_counts_for_each_step() -> None:
    network, (prefix, target) = Reader(), (draw(5, 64), draw(7, 64, seed=1))
    unit = Unit("layer", (64, 64), {"layer": (0, 64)}, lambda: network.layer.weight.detach())
    with torch.no_grad(), observing(network, [unit]) as (found, served):
        served.steps = 3
        network.layer(prefix)
        for _ in range(3):
            network(target)
    rows = torch.cat((prefix, target)).repeat(3, 1)
    assert torch.allclose(found["layer"].moments, rows.T @ rows / len(rows), atol=1e-5)
    assert found["layer"].total == len(rows)


def test_damages_are_measured_with_pictures_from_everywhere() -> None:
    def picks(count: int) -> list[int]:
        return Calibration(count, lambda k: 1, lambda k: None, lambda k: torch.zeros(1)).probed

    assert picks(1) == [0] and picks(3) == [0, 1, 2] and picks(16) == [0, 3, 6, 9, 12, 15]


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
