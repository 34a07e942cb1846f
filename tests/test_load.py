"""Loading: the right weights in the right layers, refusals before any weight, and memory."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders import load
from seedling.model_loaders.families.qwen_image_21.dit import DiT, DiTConfig
from seedling.model_loaders.families.qwen_image_21.vae import VAE, VAEConfig
from seedling.model_loaders.load import load_dit, load_encoder, load_vae
from seedling.quant.operations import TORCH, widened

DIT = DiTConfig(
    in_channels=8, layers=2, heads=2, head_dim=32, context_dim=24, mlp_dim=192, axes=(4, 14, 14)
)
VAE_CONFIG = VAEConfig(
    z_dim=8, base_dim=8, decoder_base_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1,
    temporal_downsample=(False, True), latents_mean=(0.5,) * 8, latents_std=(2.0,) * 8,
)  # fmt: skip


def randomised(module: Any) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.fixture(scope="module")
def dit() -> DiT:
    return randomised(DiT(DIT))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return randomised(VAE(VAE_CONFIG))


def save(path: Path, tensors: dict, config: dict | None = None, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata |= {"config": json.dumps(config)} if config else {}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def save_dit(path: Path, dit: DiT, dtype=torch.float32, config=None, **metadata: str) -> Path:
    return save(path, {k: v.to(dtype) for k, v in dit.state_dict().items()}, config, **metadata)


def vae_metadata() -> dict:
    return {"latents_mean": VAE_CONFIG.latents_mean, "latents_std": VAE_CONFIG.latents_std}


def same(module: torch.nn.Module, tensors: dict, dtype=None) -> bool:
    ours = module.state_dict()
    return ours.keys() == tensors.keys() and all(
        torch.equal(ours[k], v if dtype is None else v.to(dtype)) for k, v in tensors.items()
    )


# The right weights


def test_a_dit_comes_back_as_it_was_saved(tmp_path, dit):
    path = save_dit(tmp_path / "a.safetensors", dit)
    loaded = load_dit(path)
    assert same(loaded.module, dit.state_dict()) and loaded.config == DIT
    assert (loaded.family.name, loaded.kind, loaded.layout) == ("qwen_image_21", "dit", "diffusers")
    assert loaded.dtype == torch.float32 and loaded.notes == ()
    assert not loaded.module.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.module.parameters())
    assert type(loaded.module.img_in) is torch.nn.Linear
    mapped = loaded.checkpoint.tensor("img_in.weight")
    assert loaded.module.img_in.weight.data_ptr() == mapped.data_ptr()  # no copy


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_halves_of_gate_up_are_views_of_one_tensor(tmp_path, dit, prefix):
    tensors = {}
    for key, value in dit.state_dict().items():
        if "img_mlp.gate_layer" in key:
            up = dit.state_dict()[key.replace("gate_layer", "proj")]
            tensors[prefix + key.replace("gate_layer", "gate_up")] = torch.cat([value, up])
        elif "img_mlp.proj" not in key:
            tensors[prefix + key] = value
    loaded = load_dit(save(tmp_path / "fused.safetensors", tensors))
    assert same(loaded.module, dit.state_dict())
    mlp = loaded.module.transformer_blocks[1].img_mlp
    gate, up = mlp.gate_layer.weight, mlp.proj.weight
    assert up.data_ptr() == gate.data_ptr() + gate.numel() * gate.element_size()


def test_16_bits_stay_16_bits_and_compute_in_fp32_on_a_cpu(tmp_path, dit):
    path = save_dit(tmp_path / "b.safetensors", dit, torch.bfloat16)
    loaded, plain = load_dit(path), load_dit(path, dtype=torch.float32)
    assert same(loaded.module, dit.state_dict(), torch.bfloat16)
    assert same(plain.module, {k: v.bfloat16().float() for k, v in dit.state_dict().items()})
    assert loaded.dtype == torch.bfloat16 and plain.dtype == torch.float32
    text, slots = torch.randn(1, 5, DIT.context_dim), torch.zeros(5, dtype=torch.bool)
    x, t = torch.randn(1, DIT.in_channels, 4, 6), torch.tensor([0.7])
    with torch.no_grad():
        ours = loaded.module(x, t, loaded.module.prefix(text, slots))
        theirs = plain.module(x, t, plain.module.prefix(text, slots))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("units", [True, False])
def test_bf16_asked_for_by_name_may_compute_in_bf16(tmp_path, dit, monkeypatch, units):
    monkeypatch.setattr(load, "has_bf16_products", lambda: units)
    path = save_dit(tmp_path / "b.safetensors", dit, torch.bfloat16)
    named, stored = load_dit(path, dtype=torch.bfloat16), load_dit(path)
    x = torch.randn(3, DIT.in_channels)
    with torch.no_grad():
        ours, exact = named.module.img_in(x), stored.module.img_in(x)
    assert torch.equal(ours, exact) != units
    torch.testing.assert_close(ours, exact, atol=0.05, rtol=0.02)
    assert ("bf16" in " ".join(named.notes)) == units and not stored.notes


def test_dtype_and_operations_can_be_chosen(tmp_path, dit):
    path = save_dit(tmp_path / "c.safetensors", dit)
    halved = load_dit(path, dtype=torch.float16)
    assert same(halved.module, dit.state_dict(), torch.float16)
    assert type(halved.module.img_in) is not torch.nn.Linear  # widened
    plain = load_dit(path, dtype=torch.bfloat16, operations=TORCH)
    assert type(plain.module.img_in) is torch.nn.Linear
    tensors = {k: v.bfloat16() for k, v in dit.state_dict().items()}
    tensors["txt_in.text_norm.weight"] = tensors["txt_in.text_norm.weight"].float()
    mixed = save(tmp_path / "mixed.safetensors", tensors)
    assert load_dit(mixed, operations=widened()).module.txt_in.text_norm.weight.itemsize == 4
    assert load_dit(mixed, operations=TORCH).module.txt_in.text_norm.weight.itemsize == 2
    wide = load_dit(save_dit(tmp_path / "wide.safetensors", dit, torch.float64))
    assert same(wide.module, dit.state_dict())


@pytest.mark.parametrize("taps", [None, 1, 3])
def test_a_vae_takes_the_last_tap_of_every_kernel(tmp_path, vae, taps):
    tensors = {}
    for key, value in vae.state_dict().items():
        five = taps and value.ndim == 4 and value.shape[-1] in (1, 3) and ".gamma" not in key
        tensors[key] = value
        if five and "to_qkv" not in key and "proj" not in key and "resample" not in key:
            other = [torch.randn_like(value)] * (taps - 1)
            tensors[key] = torch.stack([*other, value], dim=2)
    loaded = load_vae(save(tmp_path / "vae.safetensors", tensors, vae_metadata()))
    assert same(loaded.module, vae.state_dict()) and loaded.config == VAE_CONFIG
    assert loaded.schedule is None
    assert all(p.is_contiguous() for p in loaded.module.parameters())
    pixels = torch.rand(1, 4, 16, 8)
    with torch.no_grad():
        assert torch.equal(loaded.module.encode(pixels), vae.encode(pixels))


def test_a_diffusers_pipeline_folder_is_enough(tmp_path, dit, vae):
    folder = tmp_path / "pipe"
    tensors = list(dit.state_dict().items())
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        save(folder / "transformer" / name, dict(part))
    weight_map = {k: names[i >= 9] for i, (k, _) in enumerate(tensors)}
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict())
    (folder / "vae" / "config.json").write_text(json.dumps(vae_metadata()))
    (folder / "model_index.json").write_text("{}")
    assert same(load_dit(folder).module, dit.state_dict())
    assert same(load_vae(folder).module, vae.state_dict())
    assert same(load_dit(folder / "transformer").module, dit.state_dict())


def test_an_encoder_comes_with_its_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    from seedling.model_loaders.families.qwen_image_21 import encoder as ours
    from seedling.model_loaders.tokenizers import byte_level_bpe

    letters = sorted("".join(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = byte_level_bpe({letter: i for i, letter in enumerate(letters)}, [])
    config = ours.tiny_config(
        tokenizer.get_vocab_size(with_added_tokens=True), hidden=64, heads=2, kv_heads=1,
        intermediate=64, vision_hidden=32, vision_heads=2, vision_intermediate=32, layers=2,
    )  # fmt: skip
    model = randomised(ours.Qwen3VL(config))
    tensors = {k: v.bfloat16() for k, v in model.state_dict().items()}
    path = save(tmp_path / "te.safetensors", tensors, config.to_json())
    with pytest.raises(ValueError, match="te.safetensors came without its tokenizer"):
        load_encoder(path)
    tokenizer.save(str(tmp_path / "te.tokenizer.json"))
    loaded = load_encoder(path)
    plain = load_encoder(path, dtype=torch.float32)
    assert loaded.config == config and loaded.kind == "encoder"
    assert same(loaded.module.model, model.state_dict(), torch.bfloat16)
    picture = torch.rand(64, 32, 4)
    one, two = (x.module.encode("an owl", [picture]).hidden for x in (loaded, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert one.dtype == torch.float32


# Memory

PROBE = """
import json, sys, torch
from pathlib import Path
from seedling.model_loaders.family import Schedule
from seedling.model_loaders.load import load_dit
from seedling.quant.operations import TORCH
def kilobytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
dtype = getattr(torch, sys.argv[3]) if sys.argv[3] else None
load_dit(sys.argv[1], dtype=dtype)  # imports, and what torch sets up once
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
module = load_dit(sys.argv[2], dtype=dtype).module
touched = sum(float(p.flatten().view(torch.uint8)[::4096].sum()) for p in module.parameters())
final = sum(p.numel() * p.element_size() for p in module.parameters())
print(json.dumps([(kilobytes("VmHWM") - before) * 1024, final]))
"""


def big_dit(path: Path, fuse: bool) -> Path:
    """About 200 MB in bf16."""
    config = DiTConfig(64, 6, 8, 128, 1024, 3072, (16, 56, 56))
    shapes = {k: tuple(v.shape) for k, v in DiT(config, device="meta").state_dict().items()}
    if fuse:
        shapes = {
            k.replace("gate_layer", "gate_up"): (2 * s[0], *s[1:]) if "gate_layer" in k else s
            for k, s in shapes.items()
            if "img_mlp.proj" not in k
        }
    entries, position = {}, 0
    for key, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        block = bytes(range(256)) * 4096
        while position > 0:
            file.write(block[:position])
            position -= len(block)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "fuse"), [("", False), ("float32", False), ("float16", True), ("float32", True)]
)
def test_the_peak_while_loading_is_the_model_itself(tmp_path, dit, dtype, fuse):
    small = save_dit(tmp_path / "small.safetensors", dit, torch.bfloat16)
    path = big_dit(tmp_path / "big.safetensors", fuse)
    out = subprocess.run(
        [sys.executable, "-c", PROBE, str(small), str(path), dtype],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    peak, final = json.loads(out.stdout)
    assert final > 180e6 * (2 if dtype == "float32" else 1)
    assert 0.9 * final < peak < 1.15 * final, f"peak {peak / 1e6:.0f} MB of {final / 1e6:.0f} MB"
