"""The nodes over the stand-in of ComfyUI's interface: schema, refusals, pictures.

What they do inside ComfyUI is in comfy/test_comfyui.py.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SNAPSHOT = Path(__file__).with_name("nodes_schema.json")
WORKFLOWS = Path(__file__).with_name("workflows")
LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def pack(
    node_tools: ModuleType, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """seedling.nodes over the stand-in, with the tiny model as the embedded one."""
    with node_tools.package(tmp_path_factory.mktemp("studio")) as (nodes, inputs):
        assets = tmp_path_factory.mktemp("assets")
        for kind, path in (("diffusion_models", tiny_model.dit), ("vae", tiny_model.vae)):
            (assets / kind).mkdir()
            (assets / kind / "seedling-tiny.safetensors").symlink_to(path)
        (assets / "text_encoders").mkdir()
        (assets / "text_encoders" / "seedling-tiny.safetensors").symlink_to(tiny_model.encoder)
        (assets / "text_encoders" / "seedling-tiny.tokenizer.json").symlink_to(tiny_model.tokenizer)
        loaders: Any = importlib.import_module("seedling.nodes.loaders")
        real, loaders.ASSETS = loaders.ASSETS, assets
        nodes.input_folder, nodes.tools = inputs, node_tools
        yield nodes
        loaders.ASSETS = real


def listed(pack: Any) -> list[Any]:
    extension = asyncio.run(pack.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def call(pack: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    """What a node returns."""
    known = {node.__name__: node for node in listed(pack)}
    if known[name].define_schema().enable_expand:
        return pack.tools.together(known, name, **inputs)[0]
    return known[name].execute(**inputs).args


def wire(info: dict[str, Any]) -> dict[str, Any]:
    """A node's /object_info without words, which may change, and without this machine's files."""
    fixed = ("input", "input_order", "output", "output_is_list", "output_name", "output_node")
    kept = json.loads(json.dumps({key: info[key] for key in (*fixed, "display_name", "category")}))
    for group in kept["input"].values():
        for name, (_, *rest) in group.items():
            options = rest[0] if rest else {}
            options.pop("tooltip", None)
            if name in ("dit", "encoder", "vae") and "options" in options:
                del options["options"][1:]
    return kept


def test_saved_graphs_keep_working(pack: Any) -> None:
    """Inputs are only appended and ids never change: look at the difference, then store it with
    SEEDLING_WRITE_SNAPSHOT=1."""
    now = {node.__name__: wire(node.GET_SCHEMA().info("")) for node in listed(pack)}
    if os.environ.get("SEEDLING_WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert now == json.loads(SNAPSHOT.read_text("utf-8"))


def test_every_input_and_output_explains_itself(pack: Any) -> None:
    for node in listed(pack):
        schema = node.define_schema()
        assert schema.node_id.startswith("Seedling") and schema.description, schema.node_id
        assert schema.search_aliases or schema.is_dev_only
        assert schema.category.startswith("Seedling")
        for item in (*schema.inputs, *schema.outputs):
            assert item.tooltip and len(item.tooltip) > 10, f"{schema.node_id}.{item.id}"


def test_ids_are_literal_and_arguments_match(pack: Any) -> None:
    """Managers read ids from the source; an input that `execute` lacks would be a TypeError."""
    for node in listed(pack):
        schema = node.define_schema()
        assert f'node_id="{schema.node_id}"' in inspect.getsource(node)
        assert schema.node_id == node.__name__
        parameters = inspect.signature(node.execute).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            assert {p.name for p in parameters} == {item.id for item in schema.inputs}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_names_everything(pack: Any, root: Path, language: str) -> None:
    words = json.loads((root / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    schemas = [node.define_schema() for node in listed(pack)]
    schemas = [schema for schema in schemas if not schema.is_dev_only]  # those are in no menu
    assert set(words) == {schema.node_id for schema in schemas}
    for schema in schemas:
        known = words[schema.node_id]
        assert known["display_name"] and known["description"]
        assert set(known["inputs"]) == {item.id for item in schema.inputs}, schema.node_id
        assert all(item["name"] and item["tooltip"] for item in known["inputs"].values())
        assert len(known["outputs"]) == len(schema.outputs)
        if language == "en":  # the same words, whether a page reads the schema or the locale
            assert all(known["inputs"][i.id]["tooltip"] == i.tooltip for i in schema.inputs)
            assert known["description"] == schema.description
        page = root / "web" / "docs" / schema.node_id
        page = page.with_suffix(".md") if language == "en" else page / f"{language}.md"
        assert page.is_file(), f"{page} is missing"
        text = page.read_text("utf-8")
        for item in (*schema.inputs, *schema.outputs):
            assert f"`{item.id}`" in text, f"{page} does not explain {item.id}"


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.api.json")), ids=lambda p: p.stem)
def test_workflows_use_inputs_that_there_are(pack: Any, path: Path) -> None:
    schemas = {node.__name__: node.define_schema() for node in listed(pack)}
    graph = json.loads(path.read_text("utf-8"))
    for node in graph.values():
        if (schema := schemas.get(node["class_type"])) is None:
            continue
        inputs = {item.id: item for item in schema.inputs}
        given = {name.partition(".")[0] for name in node["inputs"]}
        needed = {
            i for i, item in inputs.items()
            if not item.optional and not hasattr(item, "template")
        }  # fmt: skip
        assert needed <= given <= set(inputs), f"{path.name}: {node['class_type']}"


# ---- what they make ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(pack: Any) -> dict[str, Any]:
    name = "seedling-tiny (embedded)"
    (model,) = call(pack, "SeedlingLoadDiT", dit=name, precision="as stored")
    (clip,) = call(pack, "SeedlingLoadEncoder", encoder=name, precision="as stored")
    (vae,) = call(pack, "SeedlingLoadVAE", vae=name, precision="as stored")
    return {"model": model, "clip": clip, "vae": vae}


@pytest.fixture(scope="module")
def pipeline(tiny_model: Any) -> Any:
    from seedling.sampling.pipeline import Pipeline

    return Pipeline.load(tiny_model.dit, tiny_model.vae, tiny_model.encoder)


def pictures(pipeline: Any, **task: Any) -> list[torch.Tensor]:
    """What the command line makes."""
    from seedling.sampling.pipeline import Picture, Task

    return [e.pixels for e in pipeline.run(Task(**task)) if isinstance(e, Picture)]


KNOBS = {"steps": 0, "guidance": 0.0, "sampler": "euler"}


def made(pack: Any, loaded: dict[str, Any], prompt: str, images: Any = None, **more: Any) -> Any:
    """Pictures through References, Canvas Size, Encode Instruction, Few-Step Sampler, VAE."""
    from seedling.nodes.runtime import runtime

    model, clip, vae = loaded["model"], loaded["clip"], loaded["vae"]
    references = None
    if images:
        named = {f"image_{i}": image[None] for i, image in enumerate(images, start=1)}
        (references,) = call(
            pack, "SeedlingReferences", size="model", images=named, model=model, strip=""
        )
    positive, negative = call(
        pack, "SeedlingEncodeInstruction", clip=clip, prompt=prompt, references=references, vae=vae
    )
    latent, *_ = call(
        pack, "SeedlingCanvasSize", preset="model", shape="", batch_size=more.pop("batch", 1),
        model=model, references=references,
    )  # fmt: skip
    settings = {**KNOBS, "seed": 3, "negative": negative, **more}
    done, sigmas = call(
        pack, "SeedlingFewStepSampler", model=model, positive=positive, latent=latent, **settings
    )
    assert len(sigmas) > 1 and "downscale_ratio_spacial" not in done
    return runtime().decode(vae, done["samples"])


def noise_picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.rand(height, width, channels, generator=generator)


def test_pictures_are_the_command_lines(pack: Any, loaded: dict[str, Any], pipeline: Any) -> None:
    """Bit for bit: from words, in a batch, from references of different shapes."""
    single = made(pack, loaded, "a red cat")
    assert torch.equal(single[0], pictures(pipeline, prompt="a red cat", seed=3)[0])
    batch = made(pack, loaded, "a red cat", batch=2, sampler="dpmpp_2m")
    alone = pictures(pipeline, prompt="a red cat", seed=3, count=2, sampler="dpmpp_2m")
    assert torch.equal(batch, torch.stack(alone))
    images = (noise_picture(96, 64), noise_picture(50, 70, 4))
    edit = made(pack, loaded, "make it red", images)
    assert torch.equal(
        edit[0], pictures(pipeline, prompt="make it red", references=images, seed=3)[0]
    )


def test_sigmas_and_guidance_can_be_given(pack: Any, loaded: dict[str, Any], pipeline: Any) -> None:
    sigmas = (1.0, 0.6, 0.0)
    own = made(
        pack, loaded, "up", sigmas=torch.tensor(sigmas), guidance=1.0, negative=None, steps=30
    )
    stored = tuple(torch.tensor(sigmas).tolist())
    wanted = pictures(pipeline, prompt="up", seed=3, sigmas=stored, guidance=1.0)
    assert torch.equal(own[0], wanted[0])
    with pytest.raises(ValueError, match="connect negative"):
        made(pack, loaded, "up", guidance=4.0, negative=None)


def test_previews_come_with_progress(pack: Any, loaded: dict[str, Any], monkeypatch: Any) -> None:
    """A call a step; a picture with it when the checkpoint says how latents look."""
    plain = importlib.import_module("seedling.nodes.plain")
    calls: list[tuple[int, int, Any]] = []
    monkeypatch.setattr(
        plain.Plain, "progress", lambda self, total: lambda *call: calls.append(call)
    )
    made(pack, loaded, "a red cat", batch=2)
    assert [call[:2] for call in calls] == [(k, 8) for k in range(1, 9)]
    assert calls[0][2] is None
    config = loaded["model"].checkpoint.config
    monkeypatch.setitem(config, "latent_rgb_factors", [[0.1, 0.0, -0.1]] * 16)
    made(pack, loaded, "a red cat")
    preview = calls[-1][2]
    assert preview.shape == (4, 4, 3) and 0 <= float(preview.min()) < float(preview.max()) <= 1


def test_a_changed_conditioning_is_refused(pack: Any, loaded: dict[str, Any]) -> None:
    positive, _ = call(pack, "SeedlingEncodeInstruction", clip=loaded["clip"], prompt="a")
    joined = [[torch.cat([positive[0][0]] * 2, dim=1), positive[0][1]]]
    latent = {"samples": torch.zeros(1, 16, 4, 4), "downscale_ratio_spacial": 16}
    settings = {**KNOBS, "guidance": 1.0, "seed": 1}
    with pytest.raises(ValueError, match="without concatenating"):
        call(
            pack, "SeedlingFewStepSampler", model=loaded["model"], positive=joined, latent=latent,
            **settings,
        )  # fmt: skip


def test_denoise_keeps_what_it_does_not_paint(pack: Any, loaded: dict[str, Any]) -> None:
    positive, negative = call(
        pack, "SeedlingEncodeInstruction", clip=loaded["clip"], prompt="a red cat"
    )
    latent = {"samples": torch.randn(1, 16, 4, 4)}
    common = {"model": loaded["model"], "positive": positive, "negative": negative, "seed": 1}
    done, _ = call(pack, "SeedlingFewStepSampler", latent=latent, denoise=0.0, **common, **KNOBS)
    assert torch.equal(done["samples"], latent["samples"])
    wrong = {"samples": torch.randn(1, 4, 4, 4)}
    with pytest.raises(ValueError, match="4 channels, the model needs 16"):
        call(pack, "SeedlingFewStepSampler", latent=wrong, **common, **KNOBS)


def test_a_set_is_its_pictures(pack: Any, loaded: dict[str, Any], pipeline: Any) -> None:
    latent, *_ = call(
        pack, "SeedlingCanvasSize", preset="model", shape="", batch_size=1, model=loaded["model"]
    )
    settings = {**KNOBS, "seed": 5, "count": 3, "prompts": "a red cat\n\nin a cup", **loaded}
    settings["negative"] = ""
    images, sheet = call(
        pack, "SeedlingImageSet", latent=latent, seeing="references only", output="list", **settings
    )
    prompts = ("a red cat", "in a cup", "a red cat")
    for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        assert torch.equal(image[0], pictures(pipeline, prompt=prompt, seed=5 + k)[0])
    assert sheet.shape == (1, 2 * 64 + 3 * 8, 2 * 64 + 3 * 8, 3)
    assert torch.allclose(sheet[0, 8:72, 80:144], images[1][0])
    seeing = "the pictures before it"
    chained, _ = call(
        pack, "SeedlingImageSet", latent=latent, seeing=seeing, output="batch", **settings
    )
    assert torch.equal(chained[0][:1], images[0])
    before = (images[0][0],)
    assert torch.equal(
        chained[0][1], pictures(pipeline, prompt="in a cup", seed=6, references=before)[0]
    )
    with pytest.raises(ValueError, match="more than 15"):
        many = {**settings, "count": 16}
        call(pack, "SeedlingImageSet", latent=latent, seeing=seeing, output="list", **many)


# ---- references and sizes ----------------------------------------------------------------------


def references(pack: Any, strip: Any = "", **given: Any) -> Any:
    text = strip if isinstance(strip, str) else json.dumps(strip)
    (found,) = call(pack, "SeedlingReferences", size="1K", strip=text, **given)
    return found


def test_the_list_orders_names_and_turns_off(pack: Any) -> None:
    from PIL import Image

    from seedling.nodes.references import instruction

    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(pack.input_folder / "cat.png")
    images = {f"image_{i}": torch.full((1, 4, 4, 3), i / 20) for i in (1, 2, 10)}
    plain = references(pack, images=images)
    assert [round(float(r.image[0, 0, 0]) * 20) for r in plain.items] == [1, 2, 10]
    found = references(
        pack,
        [
            {"image": "cat.png", "name": "cat", "role": "the animal"},
            {"image": "image_10", "name": "cathedral"},
            {"image": "image_1", "on": False},
        ],
        images=images,
    )
    assert [r.name for r in found.items] == ["cat", "cathedral", ""]
    assert found.items[0].image.shape == (6, 8, 4)
    assert torch.equal(found.items[2].image, images["image_2"][0])
    prompt = instruction("@cat in @cathedral, not @catalogue", found)
    assert prompt == "image 1 in image 2, not @catalogue Image 1: the animal."
    batch = references(pack, images={"image_1": torch.zeros(3, 4, 4, 3)})
    assert len(batch.items) == 3


def test_masks_and_strength_become_alpha(pack: Any) -> None:
    image, mask = torch.rand(1, 4, 4, 3), torch.zeros(1, 2, 2)
    none = references(
        pack, [{"image": "image_1", "mask": "none"}], images={"image_1": image},
        masks={"mask_1": mask + 1},
    )  # fmt: skip
    assert torch.equal(none.items[0].image, image[0]), "not even the one of its number"
    (same,) = references(pack, images={"image_1": image}, masks={"mask_1": mask}).items
    assert torch.equal(same.image, image[0]), "an all-black mask is no mask"
    mask[0, 0, 0] = 1
    strip = [{"image": "image_1", "strength": 0.5}]
    (seen,) = references(pack, strip, images={"image_1": image}, masks={"mask_1": mask}).items
    assert seen.image.shape == (4, 4, 4) and float(seen.image[0, 0, 3]) == 0.5
    assert float(seen.image[3, 3, 3]) == 0
    assert torch.equal(seen.image[..., :3], image[0])


@pytest.mark.parametrize(
    ("strip", "words"),
    [
        ("[", "not JSON"),
        ("{}", "JSON list"),
        ("[1]", "entry 1"),
        ('[{"image": "a.png", "strenght": 0.5}]', "'strenght', which means nothing"),
        ('[{"image": "a.png", "on": "no"}]', "give true or false"),
        ('[{"image": "a.png", "name": "x"}, {"image": "b.png", "name": "x"}]', "@x is the name"),
        ('[{"image": "cat.png", "strength": 2}]', "between 0 and 1"),
        ('["image_3"]', "nothing is connected"),
        ('["../seedling.png"]', "no ../seedling.png in the input folder"),
        ('["missing.png [temp]"]', "no missing.png in the temp folder"),
        ('["words.png"]', "cannot be read as a picture"),
    ],
)
def test_a_wrong_list_is_refused_in_words(pack: Any, strip: str, words: str) -> None:
    (pack.input_folder.parent / "seedling.png").touch()
    (pack.input_folder / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match=words):
        references(pack, strip)


def test_too_many_references_and_no_vae(pack: Any, loaded: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="15 references are on"):
        references(pack, images={"image_1": torch.zeros(15, 4, 4, 3)})
    one = references(pack, images={"image_1": torch.zeros(1, 4, 4, 3)})
    with pytest.raises(ValueError, match="connect Load VAE"):
        call(pack, "SeedlingEncodeInstruction", clip=loaded["clip"], prompt="x", references=one)


def test_a_file_that_changes_runs_again(pack: Any) -> None:
    node = next(n for n in listed(pack) if n.__name__ == "SeedlingReferences")
    path = pack.input_folder / "dog.png"
    path.write_bytes(b"1")
    first = node.fingerprint_inputs(strip='["dog.png"]')
    assert first == node.fingerprint_inputs(strip='["dog.png"]')
    path.write_bytes(b"12")
    assert first != node.fingerprint_inputs(strip='["dog.png"]')
    assert node.fingerprint_inputs(strip="[") == "["


@pytest.mark.parametrize(
    ("preset", "shape", "size"),
    [
        ("1K", "", (1024, 1024)),
        ("2K", "16:9", (2848, 1600)),
        ("1K", "海报", (832, 1248)),
        ("model", "1000x750", (1000, 750)),
        ("model", "", (64, 64)),
    ],
)
def test_sizes_from_words(
    pack: Any, loaded: dict[str, Any], preset: str, shape: str, size: tuple[int, int]
) -> None:
    latent, width, height = call(
        pack, "SeedlingCanvasSize", preset=preset, shape=shape, batch_size=2, model=loaded["model"]
    )
    assert (width, height) == size
    step = loaded["model"].family.step
    padded = [-(-side // step) * step for side in (height, width)]
    assert latent["samples"].shape == (2, 64, padded[0] // 16, padded[1] // 16)


def test_sizes_from_a_reference(pack: Any, loaded: dict[str, Any]) -> None:
    model = loaded["model"]
    found = references(pack, images={"image_1": torch.zeros(1, 300, 600, 3)})
    given = {"shape": "", "batch_size": 1, "references": found}
    _, *size = call(pack, "SeedlingCanvasSize", preset="model", model=model, **given)
    assert tuple(size) == found.sizes(model.family)[0] == (1440, 736)
    _, *large = call(pack, "SeedlingCanvasSize", preset="2K", model=model, **given)
    assert large == [2912, 1440]
    with pytest.raises(ValueError, match="connect Load DiT"):
        call(pack, "SeedlingCanvasSize", preset="model", **given)


def test_a_missing_embedded_model_is_said(pack: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("seedling.nodes.loaders.ASSETS", tmp_path)
    with pytest.raises(ValueError, match="install the pack again"):
        call(pack, "SeedlingLoadVAE", vae="seedling-tiny (embedded)", precision="as stored")
