"""Every published name and shape of FLUX.2 finds its place, in diffusers', BFL's and ComfyUI's.

Full size, without weights: the published classes on the meta device give names and shapes, sparse
files give headers over gigabytes that are not there. What BFL's names are is written down here and
checked with diffusers' own converters.
"""

from __future__ import annotations

import json
import math
import re
import struct
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.detection import (
    Found,
    compare,
    config_of,
    detect,
    table_of,
)
from seedling.model_loaders.families.flux2.configs import published_dits
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import find, load_vae
from seedling.quant.operations import TORCH, widened

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
converters = pytest.importorskip("diffusers.loaders.single_file_utils")

Table = dict[str, tuple[int, ...]]
# Double and single blocks, heads, text channels, tensors, billions of weights.
SIZES = {
    "4b": (5, 20, 24, 7680, 169, 3.88), "9b": (8, 24, 32, 12288, 233, 9.08),
    "dev": (8, 48, 48, 15360, 331, 32.2),
}  # fmt: skip


def table(module: torch.nn.Module) -> Table:
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def sparse(path: Path, shapes: Table, metadata: dict | None = None) -> Path:
    """A safetensors file of any size, in bf16, whose tensors take no room on the disk."""
    entries, position = {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * 2
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps({**({"__metadata__": metadata} if metadata else {}), **entries}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


@lru_cache
def dit(size: str) -> Table:
    double, single, heads, text, *_ = SIZES[size]
    with torch.device("meta"):
        return table(diffusers.Flux2Transformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads,
            joint_attention_dim=text, guidance_embeds=size == "dev",
        ))  # fmt: skip


def bfl_dit(size: str, norm: str = "scale") -> Table:
    """BFL's names, written down; `norm` is what a norm's weight is called."""
    double, single, heads, text, *_ = SIZES[size]
    dim, mlp = 128 * heads, 3 * 128 * heads
    rows: Table = {
        "img_in.weight": (dim, 128), "txt_in.weight": (dim, text),
        "time_in.in_layer.weight": (dim, 256), "time_in.out_layer.weight": (dim, dim),
        "double_stream_modulation_img.lin.weight": (6 * dim, dim),
        "double_stream_modulation_txt.lin.weight": (6 * dim, dim),
        "single_stream_modulation.lin.weight": (3 * dim, dim),
        "final_layer.linear.weight": (128, dim),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
    }  # fmt: skip
    if size == "dev":
        rows["guidance_in.in_layer.weight"] = (dim, 256)
        rows["guidance_in.out_layer.weight"] = (dim, dim)
    for i in range(double):
        for stream in ("img", "txt"):
            where = f"double_blocks.{i}.{stream}"
            rows[f"{where}_attn.qkv.weight"] = (3 * dim, dim)
            rows[f"{where}_attn.proj.weight"] = (dim, dim)
            rows[f"{where}_attn.norm.query_norm.{norm}"] = (128,)
            rows[f"{where}_attn.norm.key_norm.{norm}"] = (128,)
            rows[f"{where}_mlp.0.weight"] = (2 * mlp, dim)
            rows[f"{where}_mlp.2.weight"] = (dim, mlp)
    for i in range(single):
        where = f"single_blocks.{i}"
        rows[f"{where}.linear1.weight"] = (3 * dim + 2 * mlp, dim)
        rows[f"{where}.linear2.weight"] = (dim, dim + mlp)
        rows[f"{where}.norm.query_norm.{norm}"] = rows[f"{where}.norm.key_norm.{norm}"] = (128,)
    return rows


def canonical_dit(shapes: Table) -> Table:
    """diffusers' table with the two halves of `norm_out` apart."""
    out = dict(shapes)
    rows, dim = out.pop("norm_out.linear.weight")
    half = {f"norm_out.{part}.weight": (rows // 2, dim) for part in ("scale", "shift")}
    return out | half


@lru_cache
def vae() -> Table:
    with torch.device("meta"):
        return table(diffusers.AutoencoderKLFlux2())


def bfl_vae_name(key: str) -> str:
    """BFL's name of a tensor of the VAE: stages of the decoder from the finest."""
    key = re.sub(r"^(encoder|decoder)\.mid_block\.resnets\.0", r"\1.mid.block_1", key)
    key = re.sub(r"^(encoder|decoder)\.mid_block\.resnets\.1", r"\1.mid.block_2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.down\w+\.0", r"encoder.down.\1.downsample", key)
    if up := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.(.*)", key):
        kind = "block" if up[2] == "resnets" else "upsample"
        key = f"decoder.up.{3 - int(up[1])}.{kind}.{up[3]}"
    if attention := re.match(r"(.+)\.mid_block\.attentions\.0\.(\w+)(\.0)?\.(\w+)", key):
        name = {"group_norm": "norm", "to_out": "proj_out"}.get(attention[2], attention[2][-1])
        key = f"{attention[1]}.mid.attn_1.{name}.{attention[4]}"
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"^quant_conv", "encoder.quant_conv", key)
    return re.sub(r"^post_quant_conv", "decoder.post_quant_conv", key)


def is_convolution(key: str, sides: int) -> bool:
    """Whether diffusers has this matrix of the attention as a 1x1 convolution's in BFL's file."""
    return ".attentions." in key and sides == 2


@lru_cache
def bfl_vae() -> Table:
    return {
        bfl_vae_name(key): (*shape, 1, 1) if is_convolution(key, len(shape)) else shape
        for key, shape in vae().items()
    }


@lru_cache
def encoder(name: str) -> Table:
    if name == "mistral":
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16, "head_dim": 64, "patch_size": 14}  # fmt: skip
        text = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": 131072, "model_type": "mistral"}  # fmt: skip
        config = transformers.Mistral3Config(
            text_config=text, vision_config={"model_type": "pixtral", **vision}
        )
        with torch.device("meta"):
            return table(transformers.Mistral3ForConditionalGeneration(config))
    hidden, intermediate = {"qwen3-4b": (2560, 9728), "qwen3-8b": (4096, 12288)}[name]
    config = transformers.Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return table(transformers.Qwen3ForCausalLM(config))


def found_in(path: Path) -> Found:
    found = detect(open_checkpoint(path))
    assert found is not None and found.family.name == "flux2"
    return found


def canonical(path: Path) -> Table:
    return {key: info.shape for key, info in found_in(path).checkpoint.names.items()}


def meta(shapes: Table) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


# One to one


@pytest.mark.parametrize("size", SIZES)
def test_bfls_names_are_what_diffusers_converts(size):
    convert = converters.convert_flux2_transformer_checkpoint_to_diffusers
    assert {k: tuple(t.shape) for k, t in convert(meta(bfl_dit(size))).items()} == dit(size)
    rows = {
        key.replace("encoder.quant", "quant").replace("decoder.post", "post"): shape
        for key, shape in bfl_vae().items()
    }
    converted = converters.convert_ldm_vae_checkpoint(meta(rows), VAE_CONFIG)
    got = {k: tuple(t.shape) for k, t in converted.items()}
    assert got == {k: s for k, s in vae().items() if not k.startswith("bn.")}


VAE_CONFIG = {"down_block_types": (1, 2, 3, 4), "up_block_types": (1, 2, 3, 4)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("norm", ["scale", "weight"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_the_dit_is_found(tmp_path, size, norm, prefix):
    shapes = {prefix + key: shape for key, shape in bfl_dit(size, norm).items()}
    assert canonical(sparse(tmp_path / "a.safetensors", shapes)) == canonical_dit(dit(size))


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_diffusers_dit_is_found_and_ours_has_just_these(tmp_path, size):
    *_, tensors, billions = SIZES[size]
    assert len(dit(size)) == tensors
    found = found_in(sparse(tmp_path / "a.safetensors", dit(size)))
    config = config_of(found)
    assert config in published_dits().values()
    module = table_of(found, config, TORCH)
    differences = compare(found, module)
    assert differences.wrong == () and differences.unused == ()
    assert table(module) == canonical_dit(dit(size))
    weights = sum(math.prod(s) for s in dit(size).values())
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_tensor_of_the_vae_is_found(tmp_path):
    nested = sparse(tmp_path / "bfl.safetensors", bfl_vae())
    assert canonical(nested) == vae()
    flat = {k.replace("encoder.quant", "quant").replace("decoder.post", "post"): s
            for k, s in bfl_vae().items()}  # fmt: skip
    assert canonical(sparse(tmp_path / "comfy.safetensors", flat)) == vae()
    found = found_in(sparse(tmp_path / "same.safetensors", vae()))
    differences = compare(found, table_of(found, config_of(found), TORCH))
    assert differences.wrong == () and differences.unused == ()
    config = config_of(found)
    assert (config.z_dim, config.factor, config.widths) == (128, 16, (128, 256, 512, 512))


def test_bfls_vae_is_the_same_network(tmp_path):
    """Small and with weights: what is a convolution there is a matrix here."""
    small = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2
    )
    config = {"config": json.dumps({"norm_num_groups": 2})}
    theirs = small.state_dict()
    bfl = {bfl_vae_name(k): t[..., None, None] if is_convolution(k, t.ndim) else t
           for k, t in theirs.items()}  # fmt: skip
    save_file({k: t.contiguous() for k, t in bfl.items()}, tmp_path / "vae.safetensors", config)
    for dtype in (None, torch.bfloat16):  # mapped, and copied through a buffer
        loaded = load_vae(tmp_path / "vae.safetensors", dtype=dtype, operations=widened())
        assert loaded.notes == ()
        for key, tensor in loaded.module.state_dict().items():
            assert torch.equal(tensor, theirs[key].to(dtype or torch.float32)), key


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-8b", "mistral"])
def test_encoders_lack_nothing_and_explain_what_they_leave(tmp_path, name):
    shapes = encoder(name)
    found = found_in(sparse(tmp_path / "a.safetensors", shapes))
    config = config_of(found)
    differences = compare(found, table_of(found, config, TORCH))
    assert differences.wrong == () and differences.unused == ()
    fits = {"qwen3-4b": 7680, "qwen3-8b": 12288, "mistral": 15360}
    assert config.width == fits[name] and (config.heads, config.kv_heads) == (32, 8)
    read = sum(math.prod(s) for s in table(table_of(found, config, TORCH)).values())
    layers = {k: s for k, s in shapes.items() if "vision" not in k and "layers" in k}
    share = sum(math.prod(s) for k, s in layers.items() if _number(k) < max(config.read))
    assert share / sum(map(math.prod, layers.values())) == pytest.approx(0.75, abs=0.001)
    assert read < sum(map(math.prod, shapes.values()))


def _number(key: str) -> int:
    found = re.search(r"layers\.(\d+)", key)
    assert found is not None
    return int(found[1])


def test_mistral_is_found_under_every_name(tmp_path):
    new = encoder("mistral")
    names = {
        "model.language_model.": "language_model.model.", "model.vision_tower": "vision_tower",
        "model.multi_modal": "multi_modal", "lm_head": "language_model.lm_head",
    }  # fmt: skip
    old = {}
    for key, shape in new.items():
        now = next(now for now in names if key.startswith(now))
        old[key.replace(now, names[now])] = shape
    comfy = {key.replace("model.language_model.", "model."): shape for key, shape in new.items()
             if "language_model" in key}  # fmt: skip
    comfy["tekken_model"] = (100,)
    a, b, c = (sparse(tmp_path / f"{i}.safetensors", s) for i, s in enumerate((new, old, comfy)))
    assert canonical(a) == canonical(b)
    text = {k: s for k, s in canonical(a).items() if k.startswith("model.")}
    assert {k: s for k, s in canonical(c).items() if k != "tekken_model"} == text
    assert {found_in(p).layout.name for p in (a, b, c)} == {
        "transformers", "transformers 5", "ComfyUI"
    }  # fmt: skip


# What does not fit


def test_files_in_the_wrong_slot_and_other_models_are_refused(tmp_path):
    files = {
        "dit": sparse(tmp_path / "dit.safetensors", bfl_dit("4b")),
        "vae": sparse(tmp_path / "vae.safetensors", bfl_vae()),
        "encoder": sparse(tmp_path / "encoder.safetensors", encoder("qwen3-4b")),
    }
    for kind in files:
        for other, path in files.items():
            if other != kind:
                with pytest.raises(CheckpointError, match=r"flux2.*needed is"):
                    find(kind, path)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        first = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            num_hidden_layers=30, hidden_size=64, vocab_size=100, intermediate_size=64,
        ))  # fmt: skip
        old = diffusers.AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    for i, shapes in enumerate([table(first), table(llama), table(old)]):
        path = sparse(tmp_path / f"{i}.safetensors", shapes)
        found = detect(open_checkpoint(path))
        assert found is None or found.family.name != "flux2"


def test_a_damaged_header_is_named(tmp_path):
    shapes = bfl_dit("4b")
    del shapes["single_blocks.7.linear2.weight"]
    report = inspect(sparse(tmp_path / "a.safetensors", shapes))
    assert any("single_transformer_blocks.7.attn.to_out.weight" in p for p in report.problems)
    short = {k: v for k, v in encoder("qwen3-4b").items() if "layers" not in k or _number(k) < 20}
    with pytest.raises(CheckpointError, match="has 20 layers"):
        config_of(found_in(sparse(tmp_path / "b.safetensors", short)))
