"""LoRA in every form and naming, beside the multiply: as if the weights had been merged.

The oracle is a network whose weights are the sum, written out here with torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seedling.model_loaders.families.qwen_image_21.dit import DiT
from seedling.model_loaders.load import Loaded, load_dit
from seedling.model_loaders.lora import load_lora
from seedling.quant.lora import Adapters

Weights = dict[str, Tensor]
# Layers of the tiny network: width 64, feed-forward 192, 16 channels.
Q, OUT = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"
GATE, PROJ, DOWN = (f"transformer_blocks.0.img_mlp.{n}" for n in ("gate_layer", "proj", "out"))
NORM = "transformer_blocks.1.attn.norm_q"


@pytest.fixture(scope="module")
def loaded(tiny_model: Any) -> Loaded:
    return load_dit(tiny_model.dit)


@pytest.fixture(scope="module")
def base(loaded: Loaded) -> Weights:
    return {name: t.float().clone() for name, t in loaded.module.state_dict().items()}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Random, and of a size that changes a picture a lot but saturates nothing."""
    generator = torch.Generator().manual_seed(seed + 1000 * shape[0] + shape[-1])
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


@torch.no_grad()
def velocity(dit: Any) -> Tensor:
    """The network's answer to a prompt, a reference and a target, all noise."""
    slots = torch.tensor([False, False, True, False])
    prefix = dit.prefix(draw(1, 4, 64, seed=1), slots, [draw(1, 16, 2, 2, seed=2)], 16)
    return dit(draw(1, 16, 4, 4, seed=3), torch.tensor([0.7]), prefix).float()


def merged(loaded: Loaded, weights: Weights, deltas: Weights) -> Tensor:
    """The answer of a network with these weights and the deltas added, all in fp32."""
    dit = DiT(loaded.config)
    total = {name: t + deltas.get(name.removesuffix(".weight"), 0) for name, t in weights.items()}
    dit.load_state_dict(total)
    return velocity(dit)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@contextmanager
def on(loaded: Loaded, path: Path, strength: float = 1.0) -> Iterator[Any]:
    """With the LoRA file on the network; gives the unmatched."""
    adapters, lora = Adapters(loaded.module), load_lora(path, loaded)
    adapters.add(path, lora.branches, lora.vectors, strength)
    yield lora.unmatched
    adapters.remove(path)


def save(path: Path, tensors: Weights, **metadata: str) -> Path:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata or None)
    return path


@pytest.fixture
def agrees(loaded: Loaded, tmp_path: Path) -> Callable[..., None]:
    """A file of `tensors` must do what `deltas` do, and leave no trace."""

    def check(
        tensors: Weights, deltas: Weights, other: Loaded | None = None, **metadata: str
    ) -> None:
        network = other or loaded
        weights = {name: t.float() for name, t in network.module.state_dict().items()}
        before = velocity(network.module)
        with on(network, save(tmp_path / "l.safetensors", tensors, **metadata)) as unmatched:
            ours = velocity(network.module)
        assert unmatched is None
        theirs = merged(network, weights, deltas)
        assert error(ours, theirs) <= 1e-5 < 1e-2 < error(before, theirs)
        assert torch.equal(velocity(network.module), before)

    return check


# ---- forms -------------------------------------------------------------------------------------


def test_alpha_is_divided_by_the_rank(agrees: Any) -> None:
    down, up = draw(4, 64), draw(64, 4)
    pair = {
        "lora_unet_proj_out.lora_down.weight": down,
        "lora_unet_proj_out.lora_up.weight": up[:16],
    }
    agrees(
        {**pair, "lora_unet_proj_out.alpha": torch.tensor(10.0)}, {"proj_out": 2.5 * up[:16] @ down}
    )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ('{"transformer.r": 4, "transformer.lora_alpha": 10}', 2.5),
        ('{"transformer.lora_alpha": 6, "transformer.use_rslora": true}', 3.0),
        ('{"lora_alpha": 4, "alpha_pattern": {"attn.to_q": 8}}', 2.0),
        ("{}", 1.0),
    ],
)
def test_alpha_may_be_in_the_settings(settings: str, scale: float, agrees: Any) -> None:
    down, up = draw(4, 64), draw(64, 4)
    tensors = {f"transformer.{Q}.lora_A.weight": down, f"transformer.{Q}.lora_B.weight": up}
    agrees(tensors, {Q: scale * up @ down}, lora_adapter_metadata=settings)


def kron(tensors: Weights) -> Tensor:
    """The delta of LoKr, written out."""
    sides = []
    for w in ("w1", "w2"):
        if w in tensors:
            sides.append(tensors[w].flatten(1))
        elif w == "w2" and "t2" in tensors:
            core = tensors["t2"].flatten(1)
            sides.append(torch.einsum("ij,ip,jq->pq", core, tensors["w2_a"], tensors["w2_b"]))
        else:
            sides.append(tensors[f"{w}_a"] @ tensors[f"{w}_b"])
    return torch.kron(*sides)


LOKR: dict[str, tuple[Weights, float]] = {  # for DOWN, 64 x 192, with alpha 6
    "whole": ({"w1": draw(4, 8), "w2": draw(16, 24)}, 1.0),
    "w2 of rank 3": ({"w1": draw(4, 8), "w2_a": draw(16, 3), "w2_b": draw(3, 24)}, 2.0),
    "both": ({"w1_a": draw(8, 3), "w1_b": draw(3, 4), "w2_a": draw(8, 3), "w2_b": draw(3, 48)},
             2.0),
    "w1 of rank 2": ({"w1_a": draw(8, 2), "w1_b": draw(2, 4), "w2": draw(8, 48)}, 3.0),
    "tucker": ({"w1": draw(4, 8), "t2": draw(3, 3, 1, 1), "w2_a": draw(3, 16),
                "w2_b": draw(3, 24)}, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("form", LOKR)
def test_lokr(form: str, agrees: Any) -> None:
    parts, scale = LOKR[form]
    name = f"lycoris_{DOWN.replace('.', '_')}"
    tensors = {f"{name}.lokr_{part}": t for part, t in parts.items()}
    agrees({**tensors, f"{name}.alpha": torch.tensor(6.0)}, {DOWN: scale * kron(parts)})


LOHA: dict[str, Weights] = {  # for GATE, 192 x 64
    "plain": {"w1_a": draw(192, 3), "w1_b": draw(3, 64), "w2_a": draw(192, 3, seed=1),
              "w2_b": draw(3, 64, seed=1)},
    "tucker": {"t1": 20 * draw(3, 3, 1, 1), "w1_a": draw(3, 192), "w1_b": draw(3, 64),
               "t2": draw(3, 3, 1, 1, seed=1), "w2_a": draw(3, 192, seed=1),
               "w2_b": draw(3, 64, seed=1)},
}  # fmt: skip


def hadamard(t: Weights) -> Tensor:
    if "t1" not in t:
        return (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    one, two = (
        torch.einsum("ij,ip,jq->pq", t[f"t{i}"].flatten(1), t[f"w{i}_a"], t[f"w{i}_b"])
        for i in (1, 2)
    )
    return one * two


@pytest.mark.parametrize("form", LOHA)
def test_loha(form: str, agrees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seedling.quant.lora.BLOCK", 64 * 50)  # in four blocks, the last one short
    tensors = {f"diffusion_model.{GATE}.hada_{part}": t for part, t in LOHA[form].items()}
    alpha = {f"diffusion_model.{GATE}.alpha": torch.tensor(6.0)}
    agrees(tensors | alpha, {GATE: 2 * hadamard(LOHA[form])})


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """The difference that DoRA makes: the sum's rows are brought to the lengths `magnitude`."""
    total = weight + delta
    return magnitude.view(-1, 1) * total / total.norm(dim=1, keepdim=True) - weight


@pytest.mark.parametrize(
    "key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"]
)
def test_dora(key: str, agrees: Any, base: Weights) -> None:
    down, up, magnitude = draw(4, 192), draw(64, 4), draw(64).abs() + 1
    tensors = {f"{DOWN}.lora_A.weight": down, f"{DOWN}.lora_B.weight": up}
    stored = magnitude[:, None] if key == "dora_scale" else magnitude
    agrees(
        tensors | {f"{DOWN}.{key}": stored},
        {DOWN: dora(base[f"{DOWN}.weight"], up @ down, magnitude)},
    )


def test_dora_of_lokr(agrees: Any, base: Weights) -> None:
    parts, magnitude = LOKR["whole"][0], draw(64).abs() + 1
    tensors = {f"{DOWN}.lokr_{part}": t for part, t in parts.items()}
    agrees(tensors | {f"{DOWN}.dora_scale": magnitude[:, None]},
           {DOWN: dora(base[f"{DOWN}.weight"], kron(parts), magnitude)})  # fmt: skip


def test_whole_differences(agrees: Any) -> None:
    diff, norm = draw(64, 192), draw(32)
    tensors = {f"diffusion_model.{DOWN}.diff": diff, f"diffusion_model.{NORM}.w_norm": norm}
    agrees(tensors, {DOWN: diff, NORM: norm})


def test_kernels_of_one_pixel_are_matrices(agrees: Any) -> None:
    down, up = draw(4, 64), draw(64, 4)
    name = f"lora_unet_{OUT.removesuffix('.0').replace('.', '_')}"  # some leave out the index too
    tensors = {
        f"{name}.lora_down.weight": down[..., None, None],
        f"{name}.lora_up.weight": up[..., None, None],
    }
    agrees(tensors, {OUT: up @ down})


def test_biases(loaded: Loaded, tmp_path: Path) -> None:
    """Also of layers that have none: the output is shifted."""
    shift, down, up = draw(16), draw(4, 64), draw(16, 4)
    tensors = {"proj_out.diff_b": shift, "proj_out.lora_B.bias": 2 * shift,
               "proj_out.alpha": torch.tensor(8.0),
               "proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}  # fmt: skip
    x = draw(5, 64)
    before = loaded.module.proj_out(x)
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match="two biases"), on(loaded, path):
        pass
    del tensors["proj_out.diff_b"]
    with on(loaded, save(path, tensors)):
        theirs = before + 2 * (x @ down.T @ up.T + 2 * shift)
        assert error(loaded.module.proj_out(x), theirs) < 1e-5
    save(path, {"proj_out.diff_b": shift})
    with on(loaded, path):
        assert error(loaded.module.proj_out(x), before + shift) < 1e-5
    assert torch.equal(loaded.module.proj_out(x), before)


# ---- fused layers ------------------------------------------------------------------------------

FUSED = "transformer_blocks.0.img_mlp.gate_up"  # [gate_layer; proj], 384 x 64
FUSED_FORMS: dict[str, tuple[Weights, Tensor]] = {
    "LoRA": ({"lora_down.weight": draw(4, 64), "lora_up.weight": draw(384, 4)},
             draw(384, 4) @ draw(4, 64)),
    "LoKr along its blocks": ({"lokr_w1": draw(4, 8), "lokr_w2": draw(96, 8)},
                              torch.kron(draw(4, 8), draw(96, 8))),
    "LoKr across its blocks": ({"lokr_w1": draw(3, 8), "lokr_w2": draw(128, 8)},
                               torch.kron(draw(3, 8), draw(128, 8))),
    "LoHa": ({"hada_w1_a": draw(384, 3), "hada_w1_b": draw(3, 64),
              "hada_w2_a": draw(384, 2), "hada_w2_b": draw(2, 64)},
             (draw(384, 3) @ draw(3, 64)) * (draw(384, 2) @ draw(2, 64))),
    "difference": ({"diff": draw(384, 64)}, draw(384, 64)),
}  # fmt: skip


@pytest.mark.parametrize("glued", [False, True])
@pytest.mark.parametrize("form", FUSED_FORMS)
def test_a_fused_layer_is_split(form: str, glued: bool, agrees: Any) -> None:
    parts, delta = FUSED_FORMS[form]
    name = f"lora_unet_{FUSED.replace('.', '_')}" if glued else f"diffusion_model.{FUSED}"
    tensors = {f"{name}.{part}": t for part, t in parts.items()}
    agrees(tensors, {GATE: delta[:192], PROJ: delta[192:]})


def test_a_fused_dora_is_split(agrees: Any, base: Weights) -> None:
    down, up, magnitude = draw(4, 64), draw(384, 4), draw(384).abs() + 1
    tensors = {f"{FUSED}.lora_A.weight": down, f"{FUSED}.lora_B.weight": up,
               f"{FUSED}.dora_scale": magnitude[:, None]}  # fmt: skip
    whole = torch.cat([base[f"{GATE}.weight"], base[f"{PROJ}.weight"]])
    delta = dora(whole, up @ down, magnitude)
    agrees(tensors, {GATE: delta[:192], PROJ: delta[192:]})


def test_halves_go_into_a_network_that_fuses_them(loaded: Loaded, tmp_path: Path) -> None:
    """The other way round: a layer of the network is what two LoRAs are for."""
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.Module()])
    network.transformer_blocks[0].img_mlp = nn.Module()  # type: ignore
    fused = nn.Linear(64, 384, bias=False)
    network.transformer_blocks[0].img_mlp.gate_up = fused  # type: ignore
    down, up, x = draw(4, 64), draw(192, 4), draw(5, 64)
    length = draw(192).abs() + 1
    glued = f"lora_unet_{GATE.replace('.', '_')}"
    tensors = {f"{glued}.lora_down.weight": down, f"{glued}.lora_up.weight": up,
               f"transformer.{PROJ}.lora_A.weight": down, f"transformer.{PROJ}.lora_B.weight": -up,
               f"transformer.{PROJ}.dora_scale": length[:, None]}  # fmt: skip
    whole = replace(loaded, module=network)
    weight = fused.weight.detach().clone()
    with on(whole, save(tmp_path / "l.safetensors", tensors), 0.5), torch.no_grad():
        gate = weight[:192] + 0.5 * up @ down
        proj = weight[192:] + 0.5 * dora(weight[192:], -up @ down, length)
        assert error(fused(x), x @ torch.cat([gate, proj]).T) < 1e-5


def test_several_with_strengths_that_change(loaded: Loaded, base: Weights, tmp_path: Path) -> None:
    deltas, files, adapters = [], [], Adapters(loaded.module)
    before, states = velocity(loaded.module), loaded.module.state_dict()
    for i in range(3):
        down, up = draw(4, 64, seed=i), draw(64, 4, seed=i)
        tensors = {
            f"{Q}.lora_A.weight": down,
            f"{Q}.lora_B.weight": up,
            f"{NORM}.diff": draw(32, seed=i),
        }
        deltas.append({Q: up @ down, NORM: draw(32, seed=i)})
        files.append(save(tmp_path / f"{i}.safetensors", tensors))
    magnitude = draw(64).abs() + 1
    # One of them is a DoRA: the others must not change what it is of.
    low, high = draw(4, 64, seed=1), draw(64, 4, seed=1)
    tensors = {f"{Q}.lora_A.weight": low, f"{Q}.lora_B.weight": high,
               f"{NORM}.diff": draw(32, seed=1), f"{Q}.dora_scale": magnitude[:, None]}  # fmt: skip
    save(files[1], tensors)
    deltas[1][Q] = dora(base[f"{Q}.weight"], deltas[1][Q], magnitude)
    for file in files:
        lora = load_lora(file, loaded)
        adapters.add(file, lora.branches, lora.vectors)
    for strengths in ((1.0, 1.0, 1.0), (0.5, -0.25, 1.5), (0.0, 0.8, 0.0), (0.0, 0.0, 0.0)):
        for file, strength in zip(files, strengths, strict=True):
            adapters.set_strength(file, strength)
        total = {
            name: sum(s * d[name] for s, d in zip(strengths, deltas, strict=True))
            for name in (Q, NORM)
        }
        assert error(velocity(loaded.module), merged(loaded, base, total)) <= 1e-5  # pyright: ignore[reportArgumentType]
    assert torch.equal(velocity(loaded.module), before)  # with strengths of 0
    adapters.set_strength(files[2], 1.0)
    adapters.remove(files[0])
    adapters.remove(files[1])
    assert error(velocity(loaded.module), merged(loaded, base, deltas[2])) <= 1e-5
    adapters.remove(files[2])
    assert torch.equal(velocity(loaded.module), before)
    after = loaded.module.state_dict()
    assert states.keys() == after.keys()
    assert all(states[name].data_ptr() == after[name].data_ptr() for name in states)
    assert not any(layer._forward_hooks for layer in loaded.module.modules())


def test_bf16_weights_widened_on_the_fly(tiny: Any, tmp_path: Path, agrees: Any) -> None:
    """The network keeps its 16-bit weights, the LoRA its own; the sum is fp32's."""
    files = tiny.tiny_model(tmp_path, torch.bfloat16)
    network = load_dit(files.dit)
    assert {p.dtype for p in network.module.parameters()} == {torch.bfloat16}
    down, up = draw(4, 64).bfloat16(), draw(64, 4).half()
    parts, _ = LOKR["w2 of rank 3"]
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up,
               **{f"{DOWN}.lokr_{part}": t for part, t in parts.items()}}  # fmt: skip
    agrees(tensors, {Q: up.float() @ down.float(), DOWN: kron(parts)}, other=network)
    assert {p.dtype for p in network.module.parameters()} == {torch.bfloat16}


def test_nothing_is_merged_and_nothing_copied(loaded: Loaded, tmp_path: Path) -> None:
    """While a LoRA is on, the weights are the very same memory; its own lie in the file's pages."""
    path = save(
        tmp_path / "l.safetensors",
        {f"{Q}.lora_A.weight": draw(4, 64), f"{Q}.lora_B.weight": draw(64, 4)},
    )
    before = {name: t.data_ptr() for name, t in loaded.module.state_dict().items()}
    lora = load_lora(path, loaded)
    adapters = Adapters(loaded.module)
    adapters.add("a", lora.branches, lora.vectors)
    assert before == {name: t.data_ptr() for name, t in loaded.module.state_dict().items()}
    (branch,) = lora.branches[Q]
    hook: Any = next(iter(loaded.module.get_submodule(Q)._forward_hooks.values()))
    assert hook.branches["a"][0].delta.down.data_ptr() == branch.delta.down.data_ptr()  # type: ignore
    adapters.remove("a")


def test_a_linear_of_another_make_works_too() -> None:
    """All that is asked of a layer is that it is a module that maps x: a quantized one, say."""
    from seedling.quant.lora import Branch, LowRank

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.Parameter(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), False)
            self.in_features = self.out_features = 2

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.stored.float() * 0.5).T

    network = nn.Sequential(Rounded())
    adapters, x = Adapters(network), draw(3, 2)
    adapters.add("a", {"0": [Branch(LowRank(draw(1, 2), draw(2, 1)))]}, strength=0.5)
    whole = network[0].stored.float() * 0.5 + 0.5 * draw(2, 1) @ draw(1, 2)  # type: ignore
    assert error(network(x), x @ whole.T) < 1e-5
