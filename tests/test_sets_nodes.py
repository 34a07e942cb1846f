"""The prefix store and image sets through the nodes, over the stand-in of ComfyUI's interface."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

KNOBS = {"steps": 2, "guidance": 1.0, "sampler": "euler", "seed": 5}
PROMPTS = "a red cat\nin a cup\nat night"


@pytest.fixture
def loaded(pack: Any, tiny_model: Any) -> dict[str, Any]:
    """Fresh networks: nothing is known of earlier tests."""
    from seedling.nodes.plain import Plain

    here = Plain()
    paths = {"model": ("dit", tiny_model.dit), "clip": ("encoder", tiny_model.encoder),
             "vae": ("vae", tiny_model.vae)}  # fmt: skip
    return {name: here.load(kind, str(path), None) for name, (kind, path) in paths.items()}


def call(pack: Any, name: str, **inputs: Any) -> Any:
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return next(n for n in nodes if n.define_schema().node_id == name).execute(**inputs)


def shown(output: Any) -> str:
    """The text on the node."""
    ui = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
    return "\n".join(ui["text"])


def picture_of(seed: int) -> Tensor:
    return torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(seed))


def references(pack: Any, loaded: dict[str, Any], *seeds: int) -> Any:
    images = {f"image_{i}": picture_of(seed)[None] for i, seed in enumerate(seeds, start=1)}
    output = call(pack, "SeedlingReferences", size="model", images=images, model=loaded["model"])
    return output.args[0]


def canvas(pack: Any, loaded: dict[str, Any], shape: str = "64x64") -> Any:
    given = {"preset": "model", "shape": shape, "batch_size": 1, "model": loaded["model"]}
    return call(pack, "SeedlingCanvasSize", **given).args[0]


# ---- what is kept ------------------------------------------------------------------------------


def edit(pack: Any, loaded: dict[str, Any], prompt: str, **more: Any) -> tuple[Tensor, str, str]:
    """Latents of an edit with two references, and what both nodes say."""
    given = {"clip": loaded["clip"], "vae": loaded["vae"]}
    found = references(pack, loaded, *more.pop("pictures", (0, 1)))
    read = call(pack, "SeedlingEncodeInstruction", prompt=prompt, references=found, **given)
    latent = canvas(pack, loaded, more.pop("shape", "64x64"))
    settings = {**KNOBS, **more, "model": loaded["model"], "latent": latent}
    done = call(pack, "SeedlingFewStepSampler", positive=read.args[0], **settings)
    return done.args[0]["samples"], shown(read), shown(done)


def test_the_nodes_say_what_was_known(pack: Any, loaded: dict[str, Any]) -> None:
    cold, read, done = edit(pack, loaded, "a red cat")
    assert "known before: 0 of 2 latents (0%)" in read and "known before: 0 of" in done
    warm, read, done = edit(pack, loaded, "a red cat")
    assert torch.equal(warm, cold)
    assert "2 of 2 latents (100%)" in read and "tokens read (100%)" in read
    assert "tokens (100%)" in done and "kB kept (auto)" in done
    _, read, done = edit(pack, loaded, "a blue dog", seed=9, shape="96x64")
    assert "2 of 2 latents (100%)" in read and "tokens (100%)" not in done
    share = int(done.split(" tokens (")[1].split("%")[0])
    assert 50 < share < 100, "the references were known, the words were not"


def test_what_is_known_is_what_fresh_networks_compute(
    pack: Any, loaded: dict[str, Any], tiny_model: Any
) -> None:
    from seedling.nodes.plain import Plain

    for prompt, seed, pictures in (("a", 1, (0,)), ("b", 2, (0, 1)), ("b", 1, (1, 0))):
        known, *_ = edit(pack, loaded, prompt, seed=seed, pictures=pictures)
        fresh = {
            "model": Plain().load("dit", str(tiny_model.dit), None),
            "clip": Plain().load("encoder", str(tiny_model.encoder), None),
            "vae": Plain().load("vae", str(tiny_model.vae), None),
        }
        assert torch.equal(known, edit(pack, fresh, prompt, seed=seed, pictures=pictures)[0])


def test_the_cache_can_be_off_or_rounded(pack: Any, loaded: dict[str, Any]) -> None:
    exact, _, _ = edit(pack, loaded, "a red cat")
    off, _, done = edit(pack, loaded, "a red cat", cache="off")
    assert torch.equal(off, exact) and "0 B kept (0 B)" in done
    _, _, done = edit(pack, loaded, "a red cat", cache="off")
    assert "known before: 0 of" in done
    rounded, _, done = edit(pack, loaded, "a red cat", cache="6GB:int8")
    assert "kept (6 GB), int8 with an error of 0." in done and not torch.equal(rounded, exact)
    back, _, done = edit(pack, loaded, "a red cat", cache="auto:host")
    assert torch.equal(back, exact) and "error" not in done
    with pytest.raises(ValueError, match="budget of the prefix store is 'lots'"):
        edit(pack, loaded, "a red cat", cache="lots")


# ---- sets --------------------------------------------------------------------------------------


@pytest.fixture
def image_set(pack: Any, loaded: dict[str, Any], node_tools: ModuleType) -> Any:
    """Pictures and sheet of a set, and what was said."""
    extension = asyncio.run(pack.comfy_entrypoint())
    known = {node.__name__: node for node in asyncio.run(extension.get_node_list())}

    def run(seeing: str, **more: Any) -> Any:
        given = {**KNOBS, "count": 0, "prompts": PROMPTS, "output": "list", "negative": "", **more}
        latent = canvas(pack, loaded)
        return node_tools.together(
            known, "SeedlingImageSet", latent=latent, seeing=seeing, **loaded, **given
        )

    return run


SEEING = ["references only", "the pictures before it"]


@pytest.mark.parametrize("seeing", SEEING)
def test_a_set_goes_on_with_what_another_day_made(image_set: Any, seeing: str) -> None:
    (whole, _), _ = image_set(seeing)
    (again, sheet), _ = image_set(seeing, start=2, earlier=whole[0])
    assert len(again) == 3 and sheet.shape[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_what_is_missing_for_going_on_is_said(image_set: Any) -> None:
    with pytest.raises(ValueError, match="the 1 before it are needed; 0 were given"):
        image_set(SEEING[1], start=2)


def test_a_picture_that_fails_says_which(
    image_set: Any, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seedling.nodes import set_parts

    told: list[str] = []
    decode, calls = loaded["vae"].module.decode, []

    def failing(latents: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(latents)

    here = type(set_parts.runtime())
    monkeypatch.setattr(here, "tell", lambda self, text: told.append(text))
    monkeypatch.setattr(loaded["vae"].module, "decode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        image_set(SEEING[0])
    assert told[-1].startswith("picture 2 of 3 failed; those before it are kept")


def test_a_set_reads_its_references_once(pack: Any, loaded: dict[str, Any], image_set: Any) -> None:
    found = references(pack, loaded, 0, 1)
    (pictures, _), said = image_set(SEEING[1], references=found, seeds="the same")
    assert len(pictures) == 3 and "3 pictures" in said and "picture 3 of 3, seed 5" in said
    share = int(said.split(" tokens (")[-1].split("%")[0])
    assert share > 40
    assert loaded["vae"].module.prefix_store.counts["latents"].computed == 2 + 2


def test_numbered_prompts_and_words_say_how_many(image_set: Any) -> None:
    (listed, _), _ = image_set(SEEING[0], prompts="In ink.\n1. a cat\n2. a dog")
    (plain, _), _ = image_set(SEEING[0], prompts="In ink. a cat\nIn ink. a dog")
    assert len(listed) == 2
    assert all(torch.equal(a, b) for a, b in zip(listed, plain, strict=True))
    (two, _), _ = image_set(SEEING[0], prompts="a fox in two panels")
    assert len(two) == 2


def test_pictures_may_be_painted_at_once(image_set: Any, loaded: dict[str, Any], pack: Any) -> None:
    """The engine's joint set, bit for bit, with guidance and references."""
    from seedling.sampling.pipeline import Picture, Pipeline, Task
    from seedling.sampling.sets import plan_set, run_set

    found = references(pack, loaded, 0, 1)
    (made, sheet), said = image_set(
        "each other, all at once", references=found, guidance=2.5, negative="blue"
    )
    assert len(made) == 3 and sheet.shape[0] == 1 and "3 pictures at once" in said
    pipeline = Pipeline(loaded["model"], loaded["vae"], loaded["clip"])
    task = Task("", (picture_of(0), picture_of(1)), steps=2, guidance=2.5, negative="blue")
    plan = plan_set(PROMPTS, seeing="joint", seed=5, references=2)
    events = run_set(pipeline, task, plan)
    expected = [event.pixels for event in events if isinstance(event, Picture)]
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours[0], theirs)
    (batch,), _ = image_set(
        "each other, all at once", references=found, guidance=2.5, negative="blue", output="batch"
    )[0]
    assert torch.equal(batch, torch.cat(list(made)))


def test_a_model_that_cannot_paint_at_once_says_so(
    image_set: Any, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(loaded["model"].module), "joint")
    with pytest.raises(ValueError, match="Qwen-Image-2.1 cannot paint pictures at once"):
        image_set("each other, all at once")
