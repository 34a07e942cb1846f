"""Blocks whose weights come and go: the same bits, and only two of them on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seedling.host.vram import vram_of
from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.families.flux2 import dit as flux2
from seedling.model_loaders.families.qwen_image import dit as qwen_image
from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.load import load_dit
from seedling.quant.layouts import Parts, layout_of
from seedling.quant.linear import Buffer, Holder, QuantizedLinear
from seedling.quant.lora import Adapters, Branch, LowRank
from seedling.quant.operations import widened
from seedling.quant.streaming import RoomError, Streamer, gigabytes, stream, tensors_of
from seedling.sampling import SamplingError
from seedling.sampling.pipeline import Picture, Pipeline, Task

CONFIG = DiTConfig(
    in_channels=16, layers=6, heads=2, head_dim=32, context_dim=64, mlp_dim=192, axes=(4, 14, 14)
)
KINDS = ("fp32", "bf16 widened", "int8_tensorwise", "convrot_w4a4", "float8_e4m3fn", "gguf")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind: str, weight: Tensor) -> QuantizedLinear:
    out, width = weight.shape
    settings: dict[str, Any] = {"convrot_groupsize": 16}
    bytes = torch.randint(0, 256, (out, width), generator=torch.Generator().manual_seed(out))
    if kind == "gguf":
        settings = {"type": "Q8_0"}
        raw = bytes.to(torch.uint8).view(out, -1, 32)
        scale = torch.full((out, raw.shape[1], 1), 1e-3).half().view(torch.uint8)
        tensors = {"weight": torch.cat((scale, raw), dim=2).flatten(1)}
    elif kind == "float8_e4m3fn":
        tensors = {"weight": weight.to(torch.float8_e4m3fn)}
    else:
        half = 2 if kind == "convrot_w4a4" else 1
        codes = bytes[:, : width // half].to(torch.uint8).view(torch.int8)
        tensors = {"weight": codes, "weight_scale": draw(out, 1).abs() / 200}
    return QuantizedLinear(layout_of(kind, Parts(tensors, (out, width), settings=settings)),
                           None, SHARED)  # fmt: skip


SHARED = Buffer()


def network(kind: str = "fp32", config: DiTConfig = CONFIG) -> Any:
    """The same weights every time."""
    ops = {"operations": widened()} if kind == "bf16 widened" else {}
    made: Any = DiT(config, **ops).requires_grad_(False).eval()
    for seed, (name, weight) in enumerate(made.named_parameters()):
        weight.copy_(draw(*weight.shape, seed=seed) / max(weight[0].numel(), 1) ** 0.5)
        if kind == "bf16 widened" and name.startswith("transformer_blocks"):
            weight.data = weight.bfloat16()
    if kind in ("fp32", "bf16 widened"):
        return made
    for path, layer in [*made.transformer_blocks.named_modules()]:
        if isinstance(layer, nn.Linear):
            made.transformer_blocks.set_submodule(path, layer_of(kind, layer.weight))
    return made


@torch.no_grad()
def outputs(dit: Any) -> Tensor:
    """Of two steps after a prefix with a reference, in which blocks are used in parts too."""
    slots = torch.tensor([False] * 5 + [True] * 4 + [False] * 3)
    prefix = dit.prefix(draw(1, 12, 64), slots, [draw(1, 16, 4, 4, seed=1)], room=16)
    return torch.cat([dit(draw(1, 16, 4, 4, seed=2), torch.tensor([t]), prefix) for t in (1, 0.5)])


def weights(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def moving(block: nn.Module) -> int:
    return sum(t.nbytes for *_, t in tensors_of(block))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_two_blocks_on_the_device(kind: str) -> None:
    dit = network(kind)
    whole, sizes = weights(dit), [moving(block) for block in dit.transformer_blocks]
    expected = outputs(network(kind))
    streamer = stream(dit, "cpu")
    assert streamer is not None
    assert torch.equal(outputs(dit), expected)
    assert torch.equal(outputs(dit), expected)  # and again, from the last block to the first
    rest = whole - sum(sizes)
    held = sum(room.run.nbytes for room in streamer.rooms)
    assert 2 * max(sizes) <= held <= 2 * max(sizes) + 2 * 256 * 16  # and what alignment takes
    assert streamer.bytes == rest + held
    for layer in (m for m in dit.transformer_blocks.modules() if isinstance(m, Holder)):
        assert getattr(layer.layout, "packed", None) is None  # nothing was kept of what passed


@pytest.mark.parametrize("kind", ["fp32", "int8_tensorwise"])
def test_every_layer_works_with_weights_on_the_device(kind: str) -> None:
    """Not with those in the host's memory, which a card could not read."""
    dit = network(kind)
    streamer = stream(dit, "cpu")
    assert streamer is not None
    rooms = {room.run.untyped_storage().data_ptr() for room in streamer.rooms}
    seen = set()

    def look(layer: nn.Module, inputs: Any, output: Any) -> None:
        own = [*layer.parameters(), *layer.buffers()]
        places = {t.untyped_storage().data_ptr() for t in own if t.ndim > 1}
        assert places <= rooms
        seen.add(id(layer))

    layers = [layer for block in dit.transformer_blocks for layer, *_ in tensors_of(block)]
    for layer in layers:
        layer.register_forward_hook(look)
    outputs(dit)
    assert seen == {id(layer) for layer in layers} and len(seen) >= 6 * 6


FLUX2 = flux2.DiTConfig(
    in_channels=16, double=2, single=3, heads=2, head_dim=32, context_dim=48, mlp_dim=96,
    axes=(8, 8, 8, 8),
)  # fmt: skip
QWEN = qwen_image.DiTConfig(
    in_channels=16, out_channels=4, layers=4, heads=2, head_dim=32, context_dim=48, mlp_dim=96,
    axes=(4, 14, 14),
)  # fmt: skip


@pytest.mark.parametrize(("family", "config", "channels", "count"), [
    (flux2, FLUX2, 16, 5), (qwen_image, QWEN, 4, 4)
])  # fmt: skip
@torch.no_grad()
def test_other_families(family: Any, config: Any, channels: int, count: int) -> None:
    """Blocks of two kinds, one after the other; weights that other code asks for by name."""
    found = []
    for streamed in (False, True):
        dit = family.DiT(config).requires_grad_(False).eval()
        for seed, weight in enumerate(dit.parameters()):
            weight.copy_(draw(*weight.shape, seed=seed) / max(weight[0].numel(), 1) ** 0.5)
        if streamed:
            made = stream(dit, "cpu")
            assert made is not None and len(made.blocks) == count
        given = [draw(1, channels, 4, 4, seed=2)]
        prefix = dit.prefix(draw(1, 6, 48), references=given)
        x = draw(1, channels, 4, 4, seed=1)
        found.append(torch.cat([dit(x, torch.tensor([t]), prefix) for t in (0.9, 0.3)]))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_a_budget_keeps_blocks_on_the_device() -> None:
    expected, whole = outputs(network()), weights(network())
    size = max(moving(block) for block in network().transformer_blocks)
    rest = whole - 6 * size
    streamer = stream(dit := network(), "cpu", rest + 4 * size + 2048)
    assert streamer is not None
    assert torch.equal(outputs(dit), expected)
    assert len(streamer.blocks) == 4  # two stay, and the rooms
    assert streamer.bytes <= rest + 4 * size + 2048
    assert stream(dit := network(), "cpu", whole) is None
    assert torch.equal(outputs(dit), expected)


def test_too_small_a_budget_is_told_with_the_least_that_works() -> None:
    with pytest.raises(RoomError, match=r"0\.0005 GB are too little.*it takes 0\.00\d+ GB"):
        stream(network(), "cpu", 500_000)
    small = network(config=DiTConfig(**{**CONFIG.__dict__, "layers": 2}))
    with pytest.raises(RoomError, match="0.0005 GB are too little"):
        stream(small, "cpu", 500_000)
    assert stream(small, "cpu") is None  # two rooms would be all of it


def test_the_least_that_is_told_is_enough() -> None:
    """Rounded up: 1.2341 GB would be told as 1.23, and refused again."""
    for size in (1, 999, 1_234_100_000, 6_000_000_001, 59_999_999_999):
        assert size <= float(gigabytes(size)) * 1e9 * (1 + 1e-12) <= 1.01 * size + 2
    with pytest.raises(RoomError) as error:
        stream(network(), "cpu", 500_000)
    told = re.search(r"it takes (\S+) GB", str(error.value))
    assert told and stream(network(), "cpu", round(float(told[1]) * 1e9)) is not None


def test_after_an_error_in_the_middle_the_next_run_is_right() -> None:
    expected, dit = outputs(network()), network()
    stream(dit, "cpu")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = dit.transformer_blocks[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        outputs(dit)
    handle.remove()
    assert torch.equal(outputs(dit), expected)


def test_blocks_may_be_used_in_any_order() -> None:
    plain, dit, x = network(), network(), draw(1, 5, 64)
    stream(dit, "cpu")
    for index in (3, 1, 1, 5, 0, 4):
        ours, theirs = (n.transformer_blocks[index].attn.to_q(x) for n in (dit, plain))
        assert torch.equal(ours, theirs)


def test_state_is_whole_at_any_time() -> None:
    """Also while some of it lies in the rooms."""
    dit = network()
    stream(dit, "cpu")
    outputs(dit)
    for name, tensor in network().state_dict().items():
        assert torch.equal(dit.state_dict()[name], tensor), name


def test_a_file_is_loaded_with_little_on_the_device(tmp_path: Path) -> None:
    """As users do, by the budget; what is said then."""
    path = tmp_path / "dit.safetensors"
    save_file(network().state_dict(), path)
    size = max(moving(block) for block in network().transformer_blocks)
    whole = load_dit(path)
    least = load_dit(path, vram=0)
    assert whole.resident == weights(network()) and not whole.notes
    assert least.resident < whole.resident - 3 * size
    assert "6 of its blocks" in least.notes[0] and "wait in the host's memory" in least.notes[0]
    assert torch.equal(outputs(least.module), outputs(whole.module))
    assert load_dit(path, vram=1 << 40).resident == whole.resident
    with pytest.raises(CheckpointError, match="dit.safetensors: 0.0001 GB are too little"):
        load_dit(path, vram=100_000)


def test_a_pipeline_within_a_budget(tiny_model: Any) -> None:
    """The encoder gets the least, the DiT what is left; the picture is the same."""
    files = tiny_model.dit, tiny_model.vae, tiny_model.encoder
    task = Task("a red star", seed=3, size=(64, 64))
    pictures = [next(iter(pipeline_pictures(Pipeline.load(*files, vram=budget), task)))
                for budget in (None, 1 << 30)]  # fmt: skip
    assert torch.equal(*pictures)
    with pytest.raises(CheckpointError, match="GB are too little"):
        Pipeline.load(*files, vram=1)


def pipeline_pictures(pipeline: Pipeline, task: Task) -> Iterator[Tensor]:
    for done in pipeline.run(task):
        if isinstance(done, Picture):
            yield done.pixels


@pytest.mark.parametrize("words", ["auto", "all", " ALL "])
def test_without_a_card_all_weights_are_where_they_are_used(words: str) -> None:
    assert vram_of(words, torch.device("cpu"), []) is None


def test_the_budget_that_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, file = torch.device("cuda"), tmp_path / "a.safetensors"
    file.write_bytes(bytes(900))
    monkeypatch.setattr("seedling.host.vram.free_memory", lambda device: 1000)
    assert vram_of("auto", card, [file]) == 750
    monkeypatch.setattr("seedling.host.vram.free_memory", lambda device: 1200)
    assert vram_of("auto", card, [tmp_path]) is None  # in a folder
    assert vram_of("6GB", card, []) == 6 * 10**9
    for words in ("lots", "0", "-1GB", ""):
        with pytest.raises(SamplingError, match="write auto, all, or a size"):
            vram_of(words, card, [])
    with pytest.raises(SamplingError, match="is for an NVIDIA card, and this runs on cpu"):
        vram_of("6GB", torch.device("cpu"), [])


@pytest.fixture
def branches() -> Iterator[dict[str, list[Branch]]]:
    path = "transformer_blocks.{}.attn.to_q"
    down, up = draw(4, 64, seed=5), draw(64, 4, seed=6)
    yield {
        path.format(1): [Branch(LowRank(down, up))],
        path.format(4): [Branch(LowRank(down, up), magnitude=torch.ones(64))],
    }


@pytest.mark.parametrize("kind", ["fp32", "int8_tensorwise"])
def test_loras_hang_on_streamed_layers(kind: str, branches: Any) -> None:
    found = []
    for streamed in (False, True):
        dit = network(kind)
        if streamed:
            stream(dit, "cpu")
        before = outputs(dit)
        adapters = Adapters(dit)
        vector = {"transformer_blocks.2.attn.norm_q.weight": torch.ones(32)}
        adapters.add("a", branches, vector, 0.5)
        found.append(outputs(dit))
        assert not torch.equal(found[-1], before)
        adapters.remove("a")
        assert torch.equal(outputs(dit), before)
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()  # lengths of its rows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_card_the_same_bits_in_less_memory(kind: str) -> None:
    """Compared with the same network wholly on the card."""

    def run(streamed: bool) -> tuple[Tensor, int, Streamer | None]:
        dit = network(kind)
        made = stream(dit, "cuda", None if streamed else 1 << 60)
        torch.cuda.reset_peak_memory_stats()
        with torch.device("cuda"):
            slots = torch.tensor([False] * 5)
            prefix = dit.prefix(draw(1, 5, 64).cuda(), slots, [], room=16)
            ys = [dit(draw(1, 16, 4, 4).cuda(), torch.tensor([t]), prefix) for t in (1, 0.5, 0.1)]
        return torch.cat(ys).cpu(), torch.cuda.max_memory_allocated(), made

    with torch.no_grad():
        whole, memory, none = run(streamed=False)
        assert none is None
        passing, less, made = run(streamed=True)
    assert made is not None and torch.equal(passing, whole)
    assert less < memory
