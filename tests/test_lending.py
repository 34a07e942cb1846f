"""Weights that only turn times into numbers stay in the file, and change no bit of a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.families.qwen_image.dit import DiT, DiTConfig
from seedling.model_loaders.lending import Lent
from seedling.model_loaders.load import load_dit
from seedling.quant.encode import BASES, WAYS, encode, possible
from seedling.quant.linear import Holder
from seedling.quant.lora import Adapters, Branch, LowRank
from seedling.quant.operations import TORCH, widened

SMALL = DiTConfig(
    in_channels=16, out_channels=4, layers=3, heads=2, head_dim=64, context_dim=24, mlp_dim=256,
    axes=(8, 28, 28), variant="qwen-image-edit-2511", zero_cond_t=True,
)  # fmt: skip
TIMES = (1.0, 0.7, 0.2)


def write(path: Path, config: DiTConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A file of Qwen-Image-Edit-2511, told by its name."""
    torch.manual_seed(0)
    table = DiT(config, device="meta").state_dict()
    save_file({k: (torch.randn(t.shape) * 0.05).to(dtype) for k, t in table.items()}, path)
    return path


@torch.no_grad()
def steps(dit: Any, config: DiTConfig, ahead: bool = True) -> list[Tensor]:
    """The velocities of a schedule, one reference beside the target."""
    torch.manual_seed(1)
    text, reference = torch.randn(1, 5, config.context_dim), torch.randn(1, 4, 4, 6)
    x, made = torch.randn(1, 4, 4, 4), []
    prefix = dit.prefix(text, references=[reference])
    table = dit.modulations(TIMES, torch.float32) if ahead else [None] * len(TIMES)
    for t, known in zip(TIMES, table, strict=True):
        made.append(dit(x, torch.tensor([t]), prefix, known))
    return made


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [True, False])
def test_lent_weights_give_the_same_bits(tmp_path: Path, dtype: torch.dtype, ahead: bool) -> None:
    path = write(tmp_path / "qwen_image_edit_2511.safetensors", SMALL, dtype)
    plain = load_dit(path, operations=TORCH if dtype == torch.float32 else widened())
    lent = load_dit(path, dtype=None)
    assert plain.module.each is iter and lent.module.each is not iter
    assert equal(steps(lent.module, SMALL, ahead), steps(plain.module, SMALL, False))
    assert not any("stay in the file" in note for note in plain.notes)
    assert any("stay in the file" in note for note in lent.notes)


def test_a_lora_on_lent_layers_works_and_is_not_forgotten(tmp_path: Path) -> None:
    path = write(tmp_path / "qwen_image_edit_2511.safetensors", SMALL)
    made = {}
    for name, chosen in {"lent": None, "plain": TORCH}.items():
        dit = load_dit(path, operations=chosen).module
        adapters, seed = Adapters(dit), torch.manual_seed(2)
        layer, width = "transformer_blocks.1.img_mod.1", SMALL.dim
        down, up = (torch.randn(s, generator=seed) for s in [(4, width), (6 * width, 4)])
        made[name] = [steps(dit, SMALL)]
        adapters.add("a", {layer: [Branch(LowRank(down, up))]}, strength=0.5)
        made[name].append(steps(dit, SMALL))
        adapters.set_strength("a", 1.0)
        made[name].append(steps(dit, SMALL))
        adapters.remove("a")
        made[name].append(steps(dit, SMALL))
    assert all(equal(a, b) for a, b in zip(made["lent"], made["plain"], strict=True))
    assert equal(made["lent"][0], made["lent"][3])
    assert not equal(made["lent"][1], made["lent"][2])


def test_the_weights_of_a_schedule_are_read_once(tmp_path: Path, monkeypatch: Any) -> None:
    dit = load_dit(write(tmp_path / "qwen_image_edit_2511.safetensors", SMALL)).module
    read: list[str] = []
    checkpoint = type(dit.each.__self__.checkpoint)
    copy = checkpoint.copy_into
    monkeypatch.setattr(
        checkpoint, "copy_into", lambda self, name, *a: (read.append(name), copy(self, name, *a))
    )
    first = steps(dit, SMALL)
    assert len(read) == len(set(read)) == SMALL.layers * 2 * 2  # t = 0 of the references with them
    assert equal(steps(dit, SMALL), first)
    assert len(read) == SMALL.layers * 2 * 2
    with torch.no_grad():
        dit.modulations(TIMES[1:], torch.float32)
    assert len(read) == 2 * SMALL.layers * 2 * 2


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "qwen_image_edit_2511.safetensors", SMALL)
    dit = load_dit(path).module
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        dit.modulations(TIMES, torch.float32)


def write_quantized(path: Path, config: DiTConfig, way: str) -> Path:
    """The same, every layer that `way` takes quantized so, the others in int8."""
    torch.manual_seed(0)
    tensors = {}
    for name, like in DiT(config, device="meta").state_dict().items():
        weight = torch.randn(like.shape) * 0.05
        if weight.ndim != 2:
            tensors[name] = weight
            continue
        layer = name.removesuffix(".weight")
        made = encode(WAYS[way if possible(WAYS[way], tuple(like.shape)) else "int8"], weight)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in made.tensors.items()}
        said = json.dumps(made.settings).encode()
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("way", [way.name for way in BASES])
def test_quantized_weights_are_lent_and_give_the_same_bits(tmp_path: Path, way: str) -> None:
    config = replace(SMALL, heads=4)
    path = write_quantized(tmp_path / "qwen_image_edit_2511.safetensors", config, way).resolve()
    lent, plain = load_dit(path), load_dit(path, operations=widened())
    lender = lent.module.each.__self__
    assert len(lender.keys) == 2 * config.layers and plain.module.each is iter
    holders = [m for m in plain.module.modules() if isinstance(m, Holder)]
    mods = [b.get_submodule(f"{x}_mod.1") for b in plain.module.blocks for x in ("img", "txt")]
    biases = sum(m.bias.nbytes for m in mods)
    assert lender.bytes == sum(m.layout.bytes for m in mods) + biases
    assert equal(steps(lent.module, config), steps(plain.module, config, False))
    assert equal(steps(lent.module, config, False), steps(plain.module, config))
    kept = sum(m.layout.bytes for m in lent.module.modules() if isinstance(m, Holder))
    assert kept == sum(m.layout.bytes for m in holders) - (lender.bytes - biases)


def test_a_lora_on_lent_quantized_layers(tmp_path: Path) -> None:
    """One with a magnitude too, which needs the lengths of the weight's rows."""
    config = replace(SMALL, heads=4)
    path = write_quantized(tmp_path / "qwen_image_edit_2511.safetensors", config, "int8")
    made = []
    for chosen in (None, widened()):
        dit, seed = load_dit(path, operations=chosen).module, torch.manual_seed(2)
        layer, width = "transformer_blocks.1.img_mod.1", config.dim
        down, up = (torch.randn(s, generator=seed) for s in [(4, width), (6 * width, 4)])
        adapters = Adapters(dit)
        adapters.add("a", {layer: [Branch(LowRank(down, up), magnitude=torch.ones(6 * width))]})
        made.append(steps(dit, config))
    assert equal(*made)


def mapped(path: Path) -> int:
    """Bytes of the file's mapping that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells it")
@pytest.mark.parametrize("lent", [True, False])
def test_a_third_of_the_weights_is_never_resident(tmp_path: Path, lent: bool) -> None:
    config = replace(SMALL, heads=4, head_dim=128, axes=(16, 56, 56), mlp_dim=2048)
    path = write(tmp_path / "qwen_image_edit_2511.safetensors", config).resolve()
    loaded = load_dit(path, operations=None if lent else TORCH)
    steps(loaded.module, config)
    size, resident = path.stat().st_size, mapped(path)
    modulation = config.layers * 2 * 6 * config.dim * (config.dim + 1) * 4
    assert modulation > 0.32 * size
    if lent:
        assert loaded.module.each.__self__.bytes == modulation
        assert resident <= (size - modulation) * 1.02 + (1 << 20)
    else:
        assert resident >= size * 0.9  # the last layer leaves out the text


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells it")
def test_lent_quantized_weights_are_never_resident(tmp_path: Path) -> None:
    config = replace(SMALL, heads=4, head_dim=128, axes=(16, 56, 56), mlp_dim=2048)
    path = tmp_path / "qwen_image_edit_2511.safetensors"
    path = write_quantized(path, config, "int8").resolve()
    dit = load_dit(path).module
    steps(dit, config)
    size, lent = path.stat().st_size, dit.each.__self__.bytes
    assert lent > 0.32 * size
    assert mapped(path) <= (size - lent) * 1.02 + (2 << 20)
    assert all(m.layout.bytes == 0 for m in dit.modules()
               if isinstance(m, Holder) and isinstance(m.layout, Lent))  # fmt: skip


def test_the_share_of_the_published_network() -> None:
    table = DiT(DiTConfig(), device="meta").state_dict()
    lent = sum(t.numel() for k, t in table.items() if "_mod.1." in k)
    assert lent == 6_796_984_320
    assert lent / sum(t.numel() for t in table.values()) > 0.33
