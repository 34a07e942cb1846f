"""FLUX.2 through the nodes, over the stand-in of ComfyUI's interface."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from seedling.model_loaders.families.flux2.dit import DiT, DiTConfig
from seedling.model_loaders.families.flux2.encoder import EncoderConfig, TextModel
from seedling.model_loaders.families.flux2.vae import VAE, VAEConfig
from seedling.model_loaders.tokenizers import QWEN_CONTROL, byte_level_bpe

pytest.importorskip("transformers")


def call(pack: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return next(n for n in nodes if n.define_schema().node_id == name).execute(**inputs).args


def files(folder: Path, guided: bool) -> dict[str, Path]:
    """A tiny FLUX.2 under our own names, which are a published layout but for `norm_out`."""
    vocab = {word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))}
    added = {str(i): {"content": t} for i, t in enumerate((*QWEN_CONTROL, "<think>", "</think>"))}
    tokenizer = byte_level_bpe(vocab, [], added)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    text = EncoderConfig("qwen3", size, 32, (1, 2), 2, 1, 16, 48)
    dit = DiTConfig(16, 1, 2, 2, 16, 64, 96, guided=guided, axes=(4, 4, 4, 4))
    vae = VAEConfig(4, 3, (8, 8, 16, 16), (8, 8, 16, 16), 1, 4)
    config = {
        "dit": {"axes_dims_rope": dit.axes, "resolution": 64},
        "vae": {"norm_num_groups": vae.groups}, "encoder": text.to_json(),
    }  # fmt: skip
    torch.manual_seed(0)
    paths = {}
    for kind, module in (("dit", DiT(dit)), ("vae", VAE(vae)), ("encoder", TextModel(text))):
        paths[kind], weights = folder / f"{kind}.safetensors", module.state_dict()
        if kind == "dit":
            halves = [weights.pop(f"norm_out.{half}.weight") for half in ("scale", "shift")]
            weights["norm_out.linear.weight"] = torch.cat(halves)
        metadata = {"config": json.dumps(config[kind])}
        save_file({k: v.contiguous() for k, v in weights.items()}, paths[kind], metadata)
    tokenizer.save(str(folder / "encoder.tokenizer.json"))
    return paths


@pytest.mark.parametrize(
    ("variant", "guidance"), [("klein-9b-kv", 0.0), ("klein-base-4b", 2.5), ("dev", 3.0)]
)
def test_nodes_make_the_command_lines_picture(pack, tmp_path, variant, guidance):
    """From a reference of any size, bit for bit; guidance runs twice, or the network reads it."""
    from seedling.nodes.loaders import facts
    from seedling.nodes.runtime import runtime
    from seedling.sampling.pipeline import Picture, Pipeline, Task

    here, paths = runtime(), files(tmp_path, variant == "dev")
    model = here.load("dit", str(paths["dit"]), None, variant)
    clip, vae = (here.load(kind, str(paths[kind]), None) for kind in ("encoder", "vae"))
    assert "FLUX.2" in facts(model) and f"{variant}: " in facts(model)
    picture = torch.rand(45, 70, 4)
    (references,) = call(
        pack, "SeedlingReferences", size="model", images={"image_1": picture[None]}, model=model,
        strip="",
    )  # fmt: skip
    positive, negative = call(
        pack, "SeedlingEncodeInstruction", clip=clip, prompt="make it red", references=references,
        vae=vae, model=model,
    )  # fmt: skip
    latent, width, height = call(
        pack, "SeedlingCanvasSize", preset="model", shape="", batch_size=1, model=model,
        references=references,
    )  # fmt: skip
    assert (width, height) == (70, 45) and latent["samples"].shape[-2:] == (3, 5)
    done, _ = call(
        pack, "SeedlingFewStepSampler", model=model, positive=positive, negative=negative,
        latent=latent, seed=5, steps=3, guidance=guidance, sampler="euler", denoise=1.0,
    )  # fmt: skip
    got = here.decode(vae, done["samples"])[0]

    pipeline = Pipeline(model, vae, clip)
    task = Task("make it red", (picture,), steps=3, guidance=guidance or None, seed=5)
    made = next(p.pixels for p in pipeline.run(task) if isinstance(p, Picture))
    assert made.shape == (45, 70, 3) and got.shape == (48, 80, 3)
    assert torch.equal(got[:45, :70], made)


def test_a_shape_is_taken_from_a_reference_at_any_number_of_pixels(pack, tmp_path):
    from seedling.nodes.runtime import runtime

    model = runtime().load("dit", str(files(tmp_path, False)["dit"]), None)
    (references,) = call(
        pack, "SeedlingReferences", size="model", images={"image_1": torch.rand(1, 30, 60, 3)},
        model=model, strip="",
    )  # fmt: skip
    given = {"shape": "", "batch_size": 1, "model": model, "references": references}
    _, *large = call(pack, "SeedlingCanvasSize", preset="2K", **given)
    assert large == [2896, 1456]
