"""Every published name and shape of Qwen-Image-2.1 finds its place, in diffusers' and ComfyUI's.

Full size, without weights: the published classes on the meta device give names and shapes, sparse
files give headers over gigabytes that are not there.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch

from seedling.model_loaders.checkpoint import CheckpointError, open_checkpoint
from seedling.model_loaders.detection import Found, compare, config_of, detect, table_of
from seedling.model_loaders.inspect import inspect
from seedling.quant.operations import TORCH

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Table = dict[str, tuple[int, ...]]


def table(module: torch.nn.Module) -> Table:
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def sparse(path: Path, shapes: Table, dtype: str = "BF16", metadata: dict | None = None) -> Path:
    """A safetensors file of any size whose tensors take no room on the disk."""
    size, entries, position = {"BF16": 2, "F32": 4, "F16": 2}[dtype], {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * size
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps({**({"__metadata__": metadata} if metadata else {}), **entries}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


@pytest.fixture(scope="module")
def dit() -> Table:
    with torch.device("meta"):
        return table(diffusers.QwenImage21Transformer2DModel())


@pytest.fixture(scope="module")
def vae() -> Table:
    with torch.device("meta"):
        return table(diffusers.AutoencoderKLQwenImage21())


@pytest.fixture(scope="module")
def encoder() -> Table:
    text = {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304,
        "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        return table(transformers.Qwen3VLForConditionalGeneration(config))


# What ComfyUI's files look like, written down from its modules rather than from our map.


def fused(shapes: Table, prefix: str = "") -> Table:
    """ComfyUI's DiT: one `gate_up` in place of `gate_layer` and `proj`."""
    out = {}
    for key, shape in shapes.items():
        if "img_mlp.gate_layer" in key:
            out[prefix + key.replace("gate_layer", "gate_up")] = (2 * shape[0], *shape[1:])
        elif "img_mlp.proj" not in key:
            out[prefix + key] = shape
    return out


def residual(name: str, ins: int, outs: int, taps: int) -> Table:
    rows = {
        "residual.0.gamma": (ins, 1, 1, 1),
        "residual.2.weight": (outs, ins, taps, 3, 3),
        "residual.2.bias": (outs,),
        "residual.3.gamma": (outs, 1, 1, 1),
        "residual.6.weight": (outs, outs, taps, 3, 3),
        "residual.6.bias": (outs,),
    }
    if ins != outs:
        rows |= {"shortcut.weight": (outs, ins, 1, 1, 1), "shortcut.bias": (outs,)}
    return {f"{name}.{key}": shape for key, shape in rows.items()}


def resample(name: str, width: int, time_out: int | None, taps: int) -> Table:
    rows = {"resample.1.weight": (width, width, 3, 3), "resample.1.bias": (width,)}
    if time_out:
        rows |= {"time_conv.weight": (time_out, width, taps, 1, 1), "time_conv.bias": (time_out,)}
    return {f"{name}.{key}": shape for key, shape in rows.items()}


def half(side: str, ins: int, widths: list[int], outs: int, time: list[bool], taps: int) -> Table:
    """Encoder (mid block last) or decoder (mid block first) of Wan 2.2's VAE."""
    down = side == "encoder"
    kind, blocks = ("downsamples", 2) if down else ("upsamples", 3)
    rows: Table = {f"{side}.conv1.weight": (widths[0], ins, taps, 3, 3)}
    rows[f"{side}.conv1.bias"] = (widths[0],)
    middle = widths[-1] if down else widths[0]
    rows |= residual(f"{side}.middle.0", middle, middle, taps)
    rows[f"{side}.middle.1.norm.gamma"] = (middle, 1, 1)
    for layer, width in (("to_qkv", 3 * middle), ("proj", middle)):
        rows[f"{side}.middle.1.{layer}.weight"] = (width, middle, 1, 1)
        rows[f"{side}.middle.1.{layer}.bias"] = (width,)
    rows |= residual(f"{side}.middle.2", middle, middle, taps)
    stages = len(widths) - 1
    for i in range(stages):
        where, width, out = f"{side}.{kind}.{i}.{kind}", widths[i], widths[i + 1]
        for j in range(blocks):
            rows |= residual(f"{where}.{j}", width, out, taps)
            width = out
        if i < stages - 1:
            time_out = (out if down else 2 * out) if time[i] else None
            rows |= resample(f"{where}.{blocks}", out, time_out, taps)
    rows[f"{side}.head.0.gamma"] = (widths[-1], 1, 1, 1)
    rows[f"{side}.head.2.weight"] = (outs, widths[-1], taps, 3, 3)
    rows[f"{side}.head.2.bias"] = (outs,)
    return rows


def native(taps: int = 1, channels: int = 4) -> Table:
    """ComfyUI's VAE: Wan 2.2's module, its kernels 5-D with `taps` in time (published: 1)."""
    time = [False, True, True, True]
    rows = half("encoder", channels, [96 * m for m in (1, 1, 2, 4, 8, 8)], 128, time, taps)
    decoder = [144 * m for m in (8, 8, 8, 4, 2, 1)]
    rows |= half("decoder", 64, decoder, channels, time[::-1], taps)
    for name, width in (("conv1", 128), ("conv2", 64)):
        rows |= {f"{name}.weight": (width, width, 1, 1, 1), f"{name}.bias": (width,)}
    return rows


def comfy_encoder(shapes: Table, head: str | None) -> Table:
    out = {}
    for key, shape in shapes.items():
        key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if key != "lm_head.weight":
            out[key] = shape
        elif head:
            out[head] = shape
    return out


def found_in(path: Path) -> Found:
    found = detect(open_checkpoint(path))
    assert found is not None
    return found


def canonical(path: Path) -> Table:
    found = found_in(path)
    return {key: info.shape for key, info in found.checkpoint.names.items()}


# One to one


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("fuse", [False, True])
def test_every_tensor_of_the_dit_is_found(tmp_path, dit, prefix, fuse):
    shapes = fused(dit, prefix) if fuse else {prefix + k: v for k, v in dit.items()}
    path = sparse(tmp_path / "dit.safetensors", shapes)
    assert canonical(path) == dit
    assert len(shapes) == (265 if fuse else 297)


@pytest.mark.parametrize("taps", [1, 3])
def test_every_tensor_of_the_vae_is_found(tmp_path, vae, taps):
    path = sparse(tmp_path / "vae.safetensors", native(taps))
    assert canonical(path) == vae
    assert canonical(sparse(tmp_path / "same.safetensors", vae)) == vae


@pytest.mark.parametrize("head", [None, "lm_head.weight", "model.lm_head.weight"])
def test_every_tensor_of_the_encoder_is_found(tmp_path, encoder, head):
    path = sparse(tmp_path / "te.safetensors", comfy_encoder(encoder, head))
    expected = {k: v for k, v in encoder.items() if head or k != "lm_head.weight"}
    assert canonical(path) == expected
    assert canonical(sparse(tmp_path / "same.safetensors", encoder)) == encoder


@pytest.mark.parametrize("component", ["dit", "vae", "encoder"])
def test_our_module_has_exactly_the_published_tensors(tmp_path, request, component):
    """The config is read from the header alone; our class built from it has the published table."""
    shapes = request.getfixturevalue(component)
    found = found_in(sparse(tmp_path / "x.safetensors", shapes))
    assert found.component.kind == component
    module = table_of(found, config_of(found), TORCH)
    differences = compare(found, module)
    assert differences.wrong == () and differences.unused == ()
    read_not = set(shapes) - set(module.state_dict())
    assert read_not == ({"lm_head.weight", "model.language_model.norm.weight"} & set(shapes))


@pytest.mark.parametrize(
    ("component", "layout", "count", "word"),
    [
        ("dit", fused, 7.08e9, "7.12 billion"),
        ("vae", lambda _: native(), 0.34e9, "million"),
        ("encoder", lambda e: comfy_encoder(e, "lm_head.weight"), 8.77e9, "8.77 billion"),
    ],
)
def test_inspect_knows_the_published_files(tmp_path, request, component, layout, count, word):
    shapes = layout(request.getfixturevalue(component))
    report = inspect(sparse(tmp_path / "renamed.safetensors", shapes))
    assert report.problems == () and report.notes == () and report.exit_code == 0
    assert (report.family, report.component) == ("qwen_image_21", component)
    assert report.parameters == pytest.approx(count, rel=0.02)
    assert (report.dtype, report.quantization, report.commercial) == ("bf16", None, False)
    assert word in report.words() and "Qwen Research Licence, non-commercial" in report.words()


# Configs


def test_the_published_configs_are_read_from_shapes(tmp_path, dit, vae):
    found = found_in(sparse(tmp_path / "dit.safetensors", dit))
    config = config_of(found)
    assert (config.in_channels, config.layers, config.heads, config.head_dim) == (64, 32, 32, 128)
    assert (config.context_dim, config.mlp_dim, config.axes) == (4096, 12288, (16, 56, 56))
    found = found_in(sparse(tmp_path / "vae.safetensors", vae))
    config, published = config_of(found), published_vae()
    assert (config.z_dim, config.base_dim, config.decoder_base_dim) == (64, 96, 144)
    assert tuple(config.dim_mult) == (1, 2, 4, 8, 8) and config.num_res_blocks == 2
    assert tuple(config.temporal_downsample) == (False, True, True, True)
    assert config.patch_size in (None, 1)
    assert list(config.latents_mean) == published["latents_mean"]
    assert list(config.latents_std) == published["latents_std"]


def published_vae() -> dict:
    with torch.device("meta"):
        return dict(diffusers.AutoencoderKLQwenImage21().config)


def test_a_vae_of_other_widths_must_bring_its_statistics(tmp_path):
    with torch.device("meta"):
        other = table(
            diffusers.AutoencoderKLQwenImage21(base_dim=32, decoder_base_dim=48, z_dim=16)
        )
    without = found_in(sparse(tmp_path / "a.safetensors", other))
    with pytest.raises(CheckpointError, match="needs latents_mean and latents_std"):
        config_of(without)
    given = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    path = sparse(tmp_path / "b.safetensors", other, metadata={"config": json.dumps(given)})
    assert config_of(found_in(path)).latents_std == (2.0,) * 16
    given["latents_std"][3] = 0.0
    path = sparse(tmp_path / "c.safetensors", other, metadata={"config": json.dumps(given)})
    with pytest.raises(CheckpointError, match="std above 0"):
        config_of(found_in(path))


# What only looks alike


def test_other_models_with_similar_names_are_not_taken_for_this_one(tmp_path, vae):
    with torch.device("meta"):
        wan = diffusers.AutoencoderKLWan(
            base_dim=160, z_dim=48, dim_mult=[1, 2, 4, 4], is_residual=True, in_channels=12,
            out_channels=12, patch_size=2, temperal_downsample=[False, True, True],
        )  # fmt: skip
        first = diffusers.QwenImageTransformer2DModel(num_layers=1)
        flux = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        )  # fmt: skip
    for i, shapes in enumerate([table(wan), table(first), table(flux), native(channels=3)]):
        found = detect(open_checkpoint(sparse(tmp_path / f"{i}.safetensors", shapes)))
        assert found is None or found.family.name != "qwen_image_21"
