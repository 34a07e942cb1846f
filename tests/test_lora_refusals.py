"""LoRA files that do not fit: what is said, about which file, and that nothing has changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.families import FAMILIES
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import Loaded, load_dit
from seedling.model_loaders.lora import load_lora, open_lora, recognise
from seedling.model_loaders.lora_names import Names, shapes_of
from seedling.quant.operations import TORCH

Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def loaded(tiny_model: Any) -> Loaded:
    return load_dit(tiny_model.dit)


def pair(name: str = Q, outs: int = 64, ins: int = 64, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, ins),
        f"{name}.lora_B.weight": torch.ones(outs, rank),
    }


def refusal(tensors: dict[str, Tensor], loaded: Loaded, folder: Path, **metadata: str) -> str:
    """The one sentence with the file's name that a file of `tensors` gets, from both commands."""
    save_file(tensors, folder / "style.safetensors", metadata or None)
    with pytest.raises(CheckpointError) as error:
        load_lora(folder / "style.safetensors", loaded)
    text = str(error.value)
    assert "style.safetensors" in text and "\n" not in text and text.endswith(".")
    return text


def broken(part: str, number: float) -> dict[str, Tensor]:
    made = pair()
    made[f"{Q}.{part}.weight"][1, 1] = number
    return made


CASES: dict[str, tuple[dict[str, Tensor], str]] = {
    "half is missing": ({f"{Q}.lora_A.weight": torch.ones(2, 64)}, "is incomplete: up missing"),
    "unequal ranks": (
        {f"{Q}.lora_A.weight": torch.ones(2, 64), f"{Q}.lora_B.weight": torch.ones(64, 3)},
        "has down of 2 x 64, up of 64 x 3: unequal ranks",
    ),
    "a vector": (
        {f"{Q}.lora_A.weight": torch.ones(2), f"{Q}.lora_B.weight": torch.ones(64, 2)},
        r"has down of shape \(2,\), needed is a matrix",
    ),
    "a convolution": (
        {f"{Q}.lora_A.weight": torch.ones(2, 64, 3, 3), f"{Q}.lora_B.weight": torch.ones(64, 2)},
        r"needed is a matrix",
    ),
    "a middle": (
        {**pair(), f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "is a LoRA of a convolution",
    ),
    "numbers of another kind": (
        {
            f"{Q}.lora_A.weight": torch.ones(2, 64, dtype=torch.int8),
            f"{Q}.lora_B.weight": torch.ones(64, 2),
        },
        "is stored as I8, needed are floating-point numbers",
    ),
    "a long alpha": ({**pair(), f"{Q}.alpha": torch.ones(2)}, "has an alpha of 2 numbers"),
    "an infinite alpha": ({**pair(), f"{Q}.alpha": torch.tensor(torch.inf)}, "has an alpha of inf"),
    "half a LoKr": (
        {f"{Q}.lokr_w1": torch.ones(4, 4)},
        "is incomplete: lokr_w2_b and lokr_w2_a missing",
    ),
    "a LoHa of two shapes": (
        {
            f"{Q}.hada_w1_a": torch.ones(64, 2),
            f"{Q}.hada_w1_b": torch.ones(2, 64),
            f"{Q}.hada_w2_a": torch.ones(32, 2),
            f"{Q}.hada_w2_b": torch.ones(2, 64),
        },
        r"multiplies \(64, 64\) by \(32, 64\)",
    ),
    "a DoRA of inputs": (
        {**pair(), f"{Q}.dora_scale": torch.ones(1, 64)},
        "has a DoRA scale for inputs",
    ),
    "a bias of another length": (
        {**pair(), f"{Q}.diff_b": torch.ones(65)},
        r"has a bias of shape \(65,\)",
    ),
    "only a magnitude": ({f"{Q}.dora_scale": torch.ones(64, 1)}, "no part that changes the weight"),
    "another width": (
        pair(ins=3072, outs=3072),
        r"\.to_q is 3072 x 3072 \(outputs x inputs\), the layer is 64 x 64",
    ),
    "a norm of another width": (
        {"transformer_blocks.0.attn.norm_q.diff": torch.ones(31)},
        "the layer is 32",
    ),
    "no LoRA": ({"a.weight": torch.ones(2)}, "style.safetensors is no LoRA: it holds a.weight"),
    "only alphas": ({f"{Q}.alpha": torch.ones(())}, "is no LoRA"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_one_sentence(case: str, loaded: Loaded, tmp_path: Path) -> None:
    tensors, message = CASES[case]
    assert re.search(message, refusal(tensors, loaded, tmp_path))
    assert not any(layer._forward_hooks for layer in loaded.module.modules())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_numbers_that_are_none(part: str, number: float, loaded: Loaded, tmp_path: Path) -> None:
    """Torch's attention turns them into zeros: the picture would be quietly wrong."""
    save_file(broken(part, number), tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=rf"style.safetensors: the LoRA of {Q} has numbers"):
        load_lora(tmp_path / "style.safetensors", loaded)


def test_settings_that_are_no_settings(loaded: Loaded, tmp_path: Path) -> None:
    text = refusal(pair(), loaded, tmp_path, lora_adapter_metadata="{")
    assert "settings of PEFT that are not valid JSON" in text


@pytest.mark.parametrize("size", [0, 5, 60, 400])
def test_a_cut_file(size: int, loaded: Loaded, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "style.safetensors")
    data = (tmp_path / "style.safetensors").read_bytes()
    (tmp_path / "style.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"style\.safetensors .*download it again\.$"):
        load_lora(tmp_path / "style.safetensors", loaded)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_lora(tmp_path / "none.safetensors", loaded)


# ---- parts without a place ---------------------------------------------------------------------


def test_parts_without_a_place_are_listed(loaded: Loaded, tmp_path: Path) -> None:
    tensors = pair()
    for i in range(12):
        tensors |= pair(f"lora_te_text_model_layers_{i:02}_q_proj")
    save_file({**tensors, "note": torch.ones(1)}, tmp_path / "style.safetensors")
    lora = load_lora(tmp_path / "style.safetensors", loaded)
    assert [*lora.branches] == [Q] and lora.unmatched is not None
    assert len(lora.unmatched.names) == 13
    words = str(lora.unmatched)
    assert words.startswith(
        "style.safetensors: 13 of its 14 modules fit nothing here and are left out"
    )
    assert "lora_te_text_model_layers_09_q_proj and 3 more." in words and "_10_" not in words
    report = inspect(tmp_path / "style.safetensors")
    assert report.usable and "13 of its parts fit nothing there" in report.notes[1]


def test_names_cannot_write_to_the_terminal(loaded: Loaded, tmp_path: Path) -> None:
    save_file(pair() | pair("\x1b[31m.evil"), tmp_path / "style.safetensors")
    assert "\x1b" not in str(load_lora(tmp_path / "style.safetensors", loaded).unmatched)
    assert "\x1b" not in inspect(tmp_path / "style.safetensors").words()
    assert "\x1b" not in refusal(pair("\x1b[31m.evil"), loaded, tmp_path)


def test_a_lora_for_nobody(loaded: Loaded, tmp_path: Path) -> None:
    text = refusal(pair("lora_unet_input_blocks_1_1_proj_in"), loaded, tmp_path)
    assert "has nothing for tiny.safetensors: its layers are called as in no model that" in text
    assert "(lora_unet_input_blocks_1_1_proj_in); choose a LoRA for Qwen-Image-2.1." in text
    report = inspect(tmp_path / "style.safetensors")
    assert report.exit_code == 2 and "lora_unet_input_blocks_1_1_proj_in" in report.problems[0]


# ---- every family ------------------------------------------------------------------------------

PUBLISHED = [
    pytest.param(family, variant, id=f"{family.name}: {variant}")
    for family in FAMILIES
    if (dit := family.component("dit")) and dit.published
    for variant in dit.published()
]


def published(
    family: Any, variant: str, blocks: str = "[04]"
) -> tuple[Names, dict[str, tuple[int, ...]]]:
    """The layers of a published network, and the shapes of the linear ones in some blocks."""
    component = family.component("dit")
    network = component.build(component.published()[variant], TORCH, "meta")
    linear = {
        name: (layer.out_features, layer.in_features)
        for name, layer in network.named_modules()
        if hasattr(layer, "in_features")
        and re.search(rf"^((?!blocks).)*$|blocks\.{blocks}\.", name)
    }
    return Names(component, shapes_of(network)), linear


def test_every_family_says_what_was_published() -> None:
    assert {p.values[0].name for p in PUBLISHED} == {family.name for family in FAMILIES}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("family", "variant"), PUBLISHED)
def test_every_layer_is_found_under_every_prefix(family: Any, variant: str) -> None:
    names, linear = published(family, variant)
    assert len(linear) > 10
    for layer, shape in linear.items():
        glued = layer.replace(".", "_")
        dotted = ("", "transformer.", "base_model.model.", "diffusion_model.")
        prefixed = [prefix + layer for prefix in dotted]
        for name in (*prefixed, f"lora_unet_{glued}", f"lycoris_{glued}"):
            (place,) = names.find(name, shape)
            assert (place.layer, place.rows, place.taken) == (layer, None, None), name


@pytest.mark.parametrize(("family", "variant"), PUBLISHED)
def test_a_lora_is_recognised_and_refused_by_others(
    family: Any, variant: str, loaded: Loaded, tmp_path: Path
) -> None:
    """In kohya's names and as diffusers writes them, three layers of each block."""
    _, linear = published(family, variant, r"\d+")
    few = {n: s for n, s in linear.items() if re.search(r"blocks\.\d+\.attn\.(to_q|add_q)", n)}
    for name in (lambda n: f"transformer.{n}", lambda n: f"lora_unet_{n.replace('.', '_')}"):
        tensors: dict[str, Tensor] = {}
        for layer, (outs, ins) in few.items():
            tensors |= pair(name(layer), outs, ins, rank=1)
        save_file(tensors, tmp_path / "style.safetensors")
        match = recognise(open_lora(tmp_path / "style.safetensors"))
        assert match and (match.family.name, match.found) == (family.name, len(few))
        assert match.variant is not None and match.unmatched == ()
        report = inspect(tmp_path / "style.safetensors")
        assert (report.family, report.modules, report.ranks) == (family.name, len(few), (1,))
    only = {n: t for n, t in tensors.items() if "add" in n}
    if family is not loaded.family and only:
        text = refusal(only, loaded, tmp_path)
        assert (
            f"it was made for {match.variant}" in text
            and "choose a LoRA for Qwen-Image-2.1" in text
        )
