"""Every published name and shape of Qwen-Image's models finds its place; which model a file is.

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
from seedling.model_loaders.families.qwen_image.variants import VARIANTS
from seedling.model_loaders.inspect import inspect
from seedling.model_loaders.load import find
from seedling.quant.operations import TORCH

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Table = dict[str, tuple[int, ...]]
MARKER = {"__index_timestep_zero__": (0,)}


def table(module: torch.nn.Module) -> Table:
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def sparse(path: Path, shapes: Table, metadata: dict[str, str] | None = None) -> Path:
    """A bf16 safetensors file of any size whose tensors take no room on the disk."""
    entries, position = {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * 2
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps({**({"__metadata__": metadata} if metadata else {}), **entries}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


@pytest.fixture(scope="module")
def dits() -> dict[str, Table]:
    layered = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    with torch.device("meta"):
        plain = table(diffusers.QwenImageTransformer2DModel())
        return {"plain": plain, "layered": table(diffusers.QwenImageTransformer2DModel(**layered))}


@pytest.fixture(scope="module")
def encoder() -> Table:
    text = {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
        "out_hidden_size": 3584,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        return table(transformers.Qwen2_5_VLForConditionalGeneration(config))


def native_vae(channels: int) -> Table:
    """Wan 2.1's own naming, which ComfyUI's file has, written down from its modules."""

    def residual(name: str, ins: int, outs: int) -> Table:
        rows = {
            "residual.0.gamma": (ins, 1, 1, 1), "residual.2.weight": (outs, ins, 3, 3, 3),
            "residual.2.bias": (outs,), "residual.3.gamma": (outs, 1, 1, 1),
            "residual.6.weight": (outs, outs, 3, 3, 3), "residual.6.bias": (outs,),
        }  # fmt: skip
        if ins != outs:
            rows |= {"shortcut.weight": (outs, ins, 1, 1, 1), "shortcut.bias": (outs,)}
        return {f"{name}.{key}": shape for key, shape in rows.items()}

    def layer(name: str, outs: int, ins: int, *kernel: int) -> Table:
        return {f"{name}.weight": (outs, ins, *kernel), f"{name}.bias": (outs,)}

    def side(name: str, ins: int, first: int, middle: int, last: int, outs: int) -> Table:
        rows = layer(f"{name}.conv1", first, ins, 3, 3, 3)
        rows |= residual(f"{name}.middle.0", middle, middle)
        rows[f"{name}.middle.1.norm.gamma"] = (middle, 1, 1)
        rows |= layer(f"{name}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
        rows |= layer(f"{name}.middle.1.proj", middle, middle, 1, 1)
        rows |= residual(f"{name}.middle.2", middle, middle)
        rows[f"{name}.head.0.gamma"] = (last, 1, 1, 1)
        return rows | layer(f"{name}.head.2", outs, last, 3, 3, 3)

    rows = layer("conv1", 32, 32, 1, 1, 1) | layer("conv2", 16, 16, 1, 1, 1)
    rows |= side("encoder", channels, 96, 384, 384, 32)
    rows |= side("decoder", 16, 384, 384, 96, channels)
    down = [(96, 96), (96, 96), "2d", (96, 192), (192, 192), "3d", (192, 384), (384, 384), "3d"]
    for i, what in enumerate([*down, (384, 384), (384, 384)]):
        name = f"encoder.downsamples.{i}"
        if isinstance(what, tuple):
            rows |= residual(name, *what)
        else:
            width = (96, 192, 384)[i // 3]
            rows |= layer(f"{name}.resample.1", width, width, 3, 3)
            rows |= layer(f"{name}.time_conv", width, width, 3, 1, 1) if what == "3d" else {}
    for stage, (ins, width) in enumerate([(384, 384), (192, 384), (192, 192), (96, 96)]):
        for j in range(3):
            rows |= residual(f"decoder.upsamples.{4 * stage + j}", width if j else ins, width)
        name = f"decoder.upsamples.{4 * stage + 3}"
        if stage < 3:
            rows |= layer(f"{name}.resample.1", width // 2, width, 3, 3)
        if stage < 2:
            rows |= layer(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
    return rows


def found_in(path: Path, variant: str | None = None) -> Found:
    found = detect(open_checkpoint(path), variant)
    assert found is not None and found.family.name == "qwen_image"
    return found


def fits(path: Path, kind: str, layout: str, unused: int = 0) -> Found:
    """The file is recognised, and its names and shapes are the table's, one to one."""
    found = found_in(path)
    assert (found.component.kind, found.layout.name) == (kind, layout)
    differences = compare(found, table_of(found, config_of(found), TORCH))
    assert differences.wrong == () and len(differences.unused) == unused
    return found


FILES = {  # of ComfyUI users, and what they are
    "qwen_image_bf16.safetensors": ("plain", "qwen-image"),
    "qwen_image_2512_fp8_e4m3fn.safetensors": ("plain", "qwen-image-2512"),
    "qwen_image_edit_bf16.safetensors": ("plain", "qwen-image-edit"),
    "qwen_image_edit_2509_bf16.safetensors": ("plain", "qwen-image-edit-2509"),
    "Qwen-Image-Edit-2511-repack.safetensors": ("plain", "qwen-image-edit-2511"),
    "qwen_image_layered_bf16.safetensors": ("layered", "qwen-image-layered"),
    "whatever_edit.safetensors": ("plain", "qwen-image-edit-2509"),
    "renamed.safetensors": ("plain", "qwen-image"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["plain", "layered"])
def test_full_size_dits_fit_in_every_layout(
    dits: dict, tmp_path: Path, kind: str, prefix: str
) -> None:
    marker = MARKER if kind == "plain" else {}
    shapes = {prefix + key: shape for key, shape in {**dits[kind], **marker}.items()}
    layout = "ComfyUI" if kind == "plain" else "diffusers"
    layout = "ComfyUI (with prefix)" if prefix else layout
    found = fits(sparse(tmp_path / "x.safetensors", shapes), "dit", layout)
    config = config_of(found)
    assert (config.layers, config.dim, config.layered) == (60, 3072, kind == "layered")
    assert config.zero_cond_t == (kind == "plain")
    reason = "the file holds its marker" if marker else "it has the tensor that only this one has"
    assert found.checkpoint.config["variant_reason"] == reason
    assert len(dits[kind]) == 1933 + (kind == "layered")
    assert sum(map(math.prod, dits[kind].values())) == pytest.approx(20.43e9, rel=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_names_of_files_say_which_they_are(dits: dict, tmp_path: Path, name: str) -> None:
    kind, variant = FILES[name]
    found = found_in(sparse(tmp_path / name, dits[kind]))
    config = config_of(found)
    assert (config.variant, found.layout.name) == (variant, "diffusers")
    assert config.zero_cond_t == (variant == "qwen-image-edit-2511")
    assert found.model == VARIANTS[variant]


@pytest.mark.parametrize(
    ("pipeline", "config", "folder", "variant"),
    [("QwenImagePipeline", {}, "a", "qwen-image"), ("QwenImagePipeline", {}, "Qwen-Image-2512",
     "qwen-image-2512"), ("QwenImageEditPipeline", {}, "qwen-image-edit", "qwen-image-edit"),
     ("QwenImageEditPlusPipeline", {}, "a", "qwen-image-edit-2509"),
     ("QwenImageEditPlusPipeline", {"zero_cond_t": True}, "a", "qwen-image-edit-2511"),
     ("QwenImageLayeredPipeline", {"use_additional_t_cond": True}, "a", "qwen-image-layered")],
)  # fmt: skip
def test_diffusers_folders_say_which_they_are(
    dits: dict, tmp_path: Path, pipeline: str, config: dict, folder: str, variant: str
) -> None:
    shapes = dits["layered" if variant == "qwen-image-layered" else "plain"]
    part = tmp_path / folder / "transformer"
    sparse(part / "diffusion_pytorch_model.safetensors", shapes)
    (part / "config.json").write_text(json.dumps(config))
    (part.parent / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert config_of(find("dit", part.parent)).variant == variant


def test_an_editor_without_a_version_or_its_marker_is_asked_about(
    dits: dict, tmp_path: Path
) -> None:
    """As conversions of Edit-2511 are, whose references would be modulated wrongly."""
    path = sparse(tmp_path / "my_edit_Q4.safetensors", dits["plain"])
    (note,) = inspect(path).notes
    assert note.startswith('Taken for Qwen-Image-Edit-2509: "edit" is in its name; a version is')
    assert "lose the marker of Edit-2511" in note and note.count(". ") == 0
    assert "under variant (--variant on the command line): qwen-image-edit," in note
    assert not config_of(find("dit", path)).zero_cond_t
    assert config_of(find("dit", path, "qwen-image-edit-2511")).zero_cond_t
    for name, shapes in {
        "my_edit_2511_Q4": dits["plain"], "my_edit": {**dits["plain"], **MARKER}
    }.items():  # fmt: skip
        (note,) = inspect(sparse(tmp_path / f"{name}.safetensors", shapes)).notes
        assert note.startswith("Taken for Qwen-Image-Edit-2511: ") and "choose" not in note


def test_a_file_that_does_not_say_is_asked_about_and_can_be_told(
    dits: dict, tmp_path: Path
) -> None:
    path = sparse(tmp_path / "mystery.safetensors", dits["plain"])
    report = inspect(path)
    assert report.usable and report.title == "Qwen-Image"
    assert "says which of the family it is; if it is an editor, choose which" in report.notes[0]
    told = find("dit", path, "qwen-image-edit-2511")
    assert config_of(told).zero_cond_t and told.model == "Qwen-Image-Edit-2511"
    assert told.checkpoint.config["variant_reason"] == "chosen"
    with pytest.raises(
        CheckpointError, match="has no variant edit-2999; choose one of qwen-image, "
    ):
        find("dit", path, "edit-2999")
    with pytest.raises(CheckpointError, match="is not Qwen-Image-Layered by its tensors"):
        config_of(find("dit", path, "qwen-image-layered"))
    layered = sparse(tmp_path / "y.safetensors", dits["layered"])
    with pytest.raises(CheckpointError, match="is Qwen-Image-Layered by its tensors"):
        config_of(find("dit", layered, "qwen-image-edit"))


@pytest.mark.parametrize("channels", [3, 4])
def test_full_size_vaes_fit_in_both_layouts(tmp_path: Path, channels: int) -> None:
    with torch.device("meta"):
        shapes = table(diffusers.AutoencoderKLQwenImage(input_channels=channels))
    found = fits(sparse(tmp_path / "a.safetensors", shapes), "vae", "diffusers")
    native = sparse(tmp_path / "b.safetensors", native_vae(channels))
    other = fits(native, "vae", "ComfyUI (Wan 2.1 naming)")
    assert config_of(found) == config_of(other)
    assert (config_of(found).in_channels, config_of(found).factor) == (channels, 8)
    assert set(found.checkpoint.names) == set(other.checkpoint.names)


@pytest.mark.parametrize(
    ("layout", "text", "vision"),
    [("transformers", "model.language_model.", "model.visual."), ("ComfyUI", "model.", "visual."),
     ("transformers (without head)", "language_model.", "visual.")],
)  # fmt: skip
def test_full_size_encoders_fit_in_every_layout(
    encoder: Table, tmp_path: Path, layout: str, text: str, vision: str
) -> None:
    def rename(key: str) -> str:
        key = key.replace("model.visual.", vision).replace("model.language_model.", text)
        return key

    shapes = {rename(key): shape for key, shape in encoder.items()}
    found = fits(sparse(tmp_path / "x.safetensors", shapes), "encoder", layout)
    config = config_of(found)
    assert (config.heads, config.kv_heads, config.layers, config.vision_depth) == (28, 4, 28, 32)
    assert len(shapes) == len(encoder) == 729


def test_what_is_missing_or_wrong_is_named(dits: dict, tmp_path: Path) -> None:
    shapes = dict(dits["plain"])
    del shapes["proj_out.weight"]
    assert "proj_out.weight is missing" in inspect(sparse(tmp_path / "a", shapes)).problems[0]
    shapes = {**dits["plain"], "transformer_blocks.59.txt_mod.1.bias": (7,)}
    problem = inspect(sparse(tmp_path / "b", shapes)).problems[0]
    assert "does not fit the diffusion model of Qwen-Image: 1 tensor differs" in problem
    assert "transformer_blocks.59.txt_mod.1.bias: found (7,), expected (18432,)" in problem
