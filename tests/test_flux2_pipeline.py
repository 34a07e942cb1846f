"""FLUX.2 from a prompt and pictures to pixels, against diffusers' pipelines on the same weights.

Tiny random networks as files: the DiT under BFL's names, VAE and text encoder under the published
ones. fp32.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from seedling.model_loaders.checkpoint import CheckpointError
from seedling.model_loaders.load import load_dit
from seedling.model_loaders.tokenizers import QWEN_CONTROL, byte_level_bpe
from seedling.sampling.composite import Where
from seedling.sampling.noise import noise
from seedling.sampling.pipeline import Picture, Pipeline, Task

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

HIDDEN, READ = 32, (1, 2, 3)
TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
DIT = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": HIDDEN * len(READ),
    "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 4,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
PROMPT = "a red cup, it's on the table"


def qwen_tokenizer() -> Tokenizer:
    """Qwen3's rules and control tokens over 256 bytes; its thoughts are no special tokens."""
    vocab = {word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))}
    added = {str(i): {"content": token} for i, token in enumerate(QWEN_CONTROL)}
    added |= {str(20 + i): {"content": t, "special": False}
              for i, t in enumerate(["<think>", "</think>"])}  # fmt: skip
    return byte_level_bpe(vocab, [], added)


@torch.no_grad()
def draw(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep the length of what they multiply; gains around 1."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return module.eval()


def bfl_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' DiT under BFL's names, as BFL's converter reads them."""
    left, out = dict(weights), {}
    scale, shift = left.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    top = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }  # fmt: skip
    for theirs, bfl in top.items():
        if f"{theirs}.weight" in left:
            out[f"{bfl}.weight"] = left.pop(f"{theirs}.weight")
    for i in range(DIT["num_layers"]):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for kind, qkv, names in (
            ("img", ("to_q", "to_k", "to_v"), ("to_out.0", "norm_q", "norm_k", "ff")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"),
             ("to_add_out", "norm_added_q", "norm_added_k", "ff_context")),
        ):  # fmt: skip
            parts = [left.pop(f"{old}.attn.{name}.weight") for name in qkv]
            out[f"{new}.{kind}_attn.qkv.weight"] = torch.cat(parts)
            proj, q, k, ff = names
            out[f"{new}.{kind}_attn.proj.weight"] = left.pop(f"{old}.attn.{proj}.weight")
            out[f"{new}.{kind}_attn.norm.query_norm.scale"] = left.pop(f"{old}.attn.{q}.weight")
            out[f"{new}.{kind}_attn.norm.key_norm.scale"] = left.pop(f"{old}.attn.{k}.weight")
            out[f"{new}.{kind}_mlp.0.weight"] = left.pop(f"{old}.{ff}.linear_in.weight")
            out[f"{new}.{kind}_mlp.2.weight"] = left.pop(f"{old}.{ff}.linear_out.weight")
    for i in range(DIT["num_single_layers"]):
        old, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        out[f"{new}.linear1.weight"] = left.pop(f"{old}.to_qkv_mlp_proj.weight")
        out[f"{new}.linear2.weight"] = left.pop(f"{old}.to_out.weight")
        out[f"{new}.norm.query_norm.scale"] = left.pop(f"{old}.norm_q.weight")
        out[f"{new}.norm.key_norm.scale"] = left.pop(f"{old}.norm_k.weight")
    assert not left
    return out


def write(path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "config": json.dumps(config)}
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata)
    return path


class Model:
    """diffusers' modules, and our files of them."""

    def __init__(self, folder: Path, guided: bool = False) -> None:
        torch.manual_seed(0)
        tokenizer = qwen_tokenizer()
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.dit = draw(diffusers.Flux2Transformer2DModel(**DIT, guidance_embeds=guided))
        self.vae = draw(diffusers.AutoencoderKLFlux2(**VAE))
        self.vae.bn.running_mean.normal_(std=0.3)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        self.vae.bn.running_var.uniform_(0.5, 2.0)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        config = transformers.Qwen3Config(vocab_size=size, **TEXT)
        self.encoder = draw(transformers.Qwen3ForCausalLM(config))
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<|endoftext|>", chat_template=CHAT
        )
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15,
            max_image_seq_len=4096, time_shift_type="exponential",
        )  # fmt: skip
        self.folder, self.names = folder, bfl_names(self.dit.state_dict())
        settings = {"axes_dims_rope": DIT["axes_dims_rope"], "resolution": 64}
        self.files = {
            "dit": write(folder / "diffusion_models/tiny.safetensors", self.names, settings),
            "vae": write(folder / "vae/tiny.safetensors", self.vae.state_dict(), VAE),
            "encoder": write(
                folder / "text_encoders/tiny.safetensors",
                {k: v for k, v in self.encoder.state_dict().items() if k != "lm_head.weight"},
                {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "read_layers": READ},
            ),
        }
        qwen_tokenizer().save(str(folder / "text_encoders/tiny.tokenizer.json"))

    def ours(self, variant: str | None = None) -> Pipeline:
        pipeline = Pipeline.load(**self.files)  # pyright: ignore[reportArgumentType]
        if variant:
            pipeline.dit = load_dit(self.files["dit"], variant=variant)
        return pipeline

    def theirs(self, kind: str = "Flux2KleinPipeline", **settings: Any) -> Any:
        parts = {
            "scheduler": self.scheduler, "vae": self.vae, "text_encoder": self.encoder,
            "tokenizer": self.tokenizer, "transformer": self.dit,
        }  # fmt: skip
        pipeline = getattr(diffusers, kind)(**parts, **settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("flux2"))


def pictures(*sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Random pictures (H, W, 3) in steps of 1/255, of `sizes` (width, height)."""
    torch.manual_seed(1)
    return tuple(torch.randint(0, 256, (h, w, 3)) / 255 for w, h in sizes)


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().numpy().astype(np.uint8))


def pixels_of(pipeline: Pipeline, task: Task) -> Tensor:
    return next(p.pixels for p in pipeline.run(task) if isinstance(p, Picture))


def published(theirs: Any, task: Task, **settings: Any) -> Tensor:
    width, height = task.size or (64, 64)
    start = noise(task.seed, 0, (DIT["in_channels"], height // 16, width // 16), "cpu")
    out = theirs(
        image=[as_pil(p) for p in task.references] or None, prompt=task.prompt, width=width,
        height=height, num_inference_steps=task.steps or 4, latents=start[None],
        text_encoder_out_layers=READ, output_type="np", **settings,
    )  # fmt: skip
    return torch.from_numpy(out.images[0])


def error(ours: Tensor, theirs: Tensor) -> float:
    """In parts of the range; `pytest -rP` shows them all."""
    found = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    logging.warning("error %.1e", found)
    return found


def test_an_edit_keeps_the_rest(model: Model) -> None:
    """Its latents are finer than its tokens, and its references are never scaled up to a size."""
    (image,), where = pictures((75, 50)), Where("20, 10, 30, 20")
    region = where.region(image)
    assert region is not None
    edit = where.edit(image, region, 16, 64)
    task = Task("make it green", (edit.seen(),), steps=2, edit=edit)
    assert edit.padded == (80, 64)
    done = pixels_of(model.ours(), task)
    assert done.shape == image.shape and torch.equal(done[region == 0], image[region == 0])
    assert (done != image)[region > 0].float().mean() > 0.9


FOUR = ((64, 64), (80, 64), (64, 112), (64, 64))


@pytest.mark.parametrize("sizes", [(), FOUR[:1], FOUR], ids=len)
def test_klein_equals_diffusers(model, sizes):
    task = Task(PROMPT, pictures(*sizes), size=(80, 64), seed=3, resolution=0)
    theirs = published(model.theirs(), task, guidance_scale=1.0)
    ours = model.ours()
    assert ours.plan(task).guidance == 1 and len(ours.plan(task).sigmas) == 5
    got = pixels_of(ours, task)
    assert got.shape == (64, 80, 3) and theirs.std() > 0.05
    assert error(got, theirs) < 1e-4


@pytest.mark.parametrize("sizes", [(), FOUR[:1]], ids=len)
def test_the_base_model_with_guidance_equals_diffusers(model, sizes):
    """Published without a distillation, it takes 50 steps and a guidance of 4."""
    task = Task(PROMPT, pictures(*sizes), size=(64, 96), steps=6, seed=1)
    ours = model.ours("klein-base-4b")
    plain = ours.plan(replace(task, steps=None))
    assert (plain.guidance, len(plain.sigmas)) == (4.0, 51)
    theirs = model.theirs(is_distilled=False)
    assert error(pixels_of(ours, task), published(theirs, task, guidance_scale=4.0)) < 1e-4


def test_cached_references_equal_diffusers(model):
    task = Task(PROMPT, pictures(*FOUR[:3]), size=(80, 64), resolution=0)
    ours = model.ours("klein-9b-kv")
    got = pixels_of(ours, task)
    try:
        theirs = published(model.theirs("Flux2KleinKVPipeline"), task)
    finally:
        model.dit.set_attn_processor(_plain_processors(model.dit))
    assert error(got, theirs) < 1e-4
    uncached = pixels_of(model.ours(), task)
    assert error(got, uncached) > 1e-2  # another function of the same weights


def _plain_processors(dit: Any) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_flux2 as flux2

    return {
        name: flux2.Flux2ParallelSelfAttnProcessor()
        if name.startswith("single") else flux2.Flux2AttnProcessor()
        for name in dit.attn_processors
    }  # fmt: skip


def test_a_network_that_reads_the_guidance_equals_diffusers(tmp_path):
    """As dev: one run per step, the guidance as a number; the words are klein's here."""
    model = Model(tmp_path, guided=True)
    task = Task(PROMPT, pictures(*FOUR[:2]), size=(80, 64), steps=3, guidance=3.0, resolution=0)
    ours = model.ours()
    schedule = ours.dit.schedule
    assert schedule is not None and schedule.embedded_guidance
    assert (schedule.name, schedule.steps, schedule.guidance) == ("dev", 50, 4.0)
    width, height = task.size or (0, 0)
    words = ours.encoder.module.encode(task.prompt).hidden
    start = noise(0, 0, (DIT["in_channels"], height // 16, width // 16), "cpu")
    out = model.theirs("Flux2Pipeline")(
        image=[as_pil(p) for p in task.references], prompt_embeds=words, width=width,
        height=height, num_inference_steps=3, guidance_scale=3.0, latents=start[None],
        output_type="np",
    )  # fmt: skip
    got = pixels_of(ours, task)
    assert error(got, torch.from_numpy(out.images[0])) < 1e-4
    assert error(pixels_of(ours, replace(task, guidance=6.0)), got) > 1e-3


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (37, 81), (100, 33), (5, 50)])
def test_an_edit_has_exactly_the_size_of_its_picture(model, size):
    """Whatever it is: padded to whole tokens, painted, cropped; the reference on the same grid."""
    ours, task = model.ours(), Task(PROMPT, pictures(size))
    plan = ours.plan(task)
    assert plan.size == size and plan.references == (size,)
    width, height = size
    shown = ours.family.resize(task.references[0], size)
    assert (shown.shape[1], shown.shape[0]) == plan.padded
    assert torch.equal(shown[:height, :width], task.references[0])
    assert torch.equal(shown[-1, :width], task.references[0][-1])
    assert pixels_of(ours, task).shape == (height, width, 3)


def test_large_references_shrink_to_the_area_and_0_keeps_them(model):
    ours, size = model.ours(), (160, 96)
    task = Task(PROMPT, pictures(size))  # the tiny model's own side is 64
    assert ours.plan(task).references == ((82, 49),)  # diffusers: int(w * scale), int(h * scale)
    assert ours.plan(replace(task, resolution=0)).size == size
    assert pixels_of(ours, replace(task, resolution=0)).shape == (96, 160, 3)


def test_a_picture_with_alpha_is_laid_on_white(model):
    (picture,) = pictures((64, 64))
    alpha = torch.ones(64, 64, 1)
    alpha[:32] = 0
    seen = torch.where(alpha > 0, picture, torch.ones(()))
    ours = model.ours()
    one, other = (
        pixels_of(ours, Task(PROMPT, (p,))) for p in (torch.cat([picture, alpha], -1), seen)
    )
    assert torch.equal(one, other)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["prefix", "weight", "diffusers", "fused"])
def test_every_layout_gives_the_same_network(model, layout, tmp_path):
    names = {
        "prefix": {f"model.diffusion_model.{k}": v for k, v in model.names.items()},
        "weight": {k.replace(".scale", ".weight"): v for k, v in model.names.items()},
        "diffusers": model.dit.state_dict(),
        "fused": fused(model.dit.state_dict()),
    }[layout]
    config = {"axes_dims_rope": DIT["axes_dims_rope"]}
    other = load_dit(write(tmp_path / "tiny.safetensors", names, config))
    mine = load_dit(model.files["dit"])
    assert other.notes == mine.notes
    wanted = mine.module.state_dict()
    got = other.module.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' `fuse_qkv_projections` saves."""
    out = dict(weights)
    for name, parts in (("to_qkv", ("to_q", "to_k", "to_v")),
                        ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))):  # fmt: skip
        where = "transformer_blocks.0.attn"
        whole = torch.cat([out.pop(f"{where}.{part}.weight") for part in parts])
        out[f"{where}.{name}.weight"] = whole
    return out


def test_parts_that_do_not_fit_are_refused(model, tmp_path):
    files = model.files
    with pytest.raises(CheckpointError, match="is a VAE .flux2., but was given as"):
        Pipeline.load(files["vae"], files["vae"], files["encoder"])
    config = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "read_layers": (1, 2)}
    weights = {k: v for k, v in model.encoder.state_dict().items() if k != "lm_head.weight"}
    other = write(tmp_path / "encoder.safetensors", weights, config)
    qwen_tokenizer().save(str(tmp_path / "encoder.tokenizer.json"))
    with pytest.raises(CheckpointError, match="32 channels, 2 for each word, .* reads 96"):
        Pipeline.load(files["dit"], files["vae"], other)
