"""Sets of pictures: what belongs together stays, the checker sees what does not, rows to train."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from seedling.sampling.pipeline import Picture, Pipeline, Task
from seedling.sampling.sets import plan_set, run_set
from seedling.training import world
from seedling.training.data import SIZE, batches, draw
from seedling.training.evaluate import from_assets, paint_sets
from seedling.training.world import vocabulary as words
from seedling.training.world.sets import TURN_SPAN, turned

ASSETS = Path(__file__).parents[1] / "assets"
TOKENIZER = ASSETS / "text_encoders" / "seedling-tiny.tokenizer.json"
CHANGING = {"places": "cell", "moves": "cell", "colours": "colour", "growing": ""}


def sets(number: int, seed: int = 5, **options) -> list[world.PictureSet]:
    """So many of each kind."""
    rng = np.random.default_rng(seed)
    pairs = itertools.product(range(number), world.SET_KINDS)
    return [world.sample_set(rng, kind=kind, **options) for _, kind in pairs]


def rendered(made: world.PictureSet) -> list[np.ndarray]:
    return [world.render(panel.scene) for panel in made.panels]


def test_only_what_is_told_changes() -> None:
    languages, counts = set(), set()
    for made in sets(40):
        scenes = [panel.scene for panel in made.panels]
        languages |= {panel.caption.language for panel in made.panels}
        counts.add(len(scenes))
        assert len({(scene.background, scene.grain) for scene in scenes}) == 1
        for before, after in itertools.pairwise(scenes):
            first, *others = zip(before.objects, after.objects, strict=False)
            assert all(old == new for old, new in others)
            name = CHANGING[made.kind]
            if name:
                assert getattr(first[0], name) != getattr(first[1], name)
                assert replace(first[0], **{name: getattr(first[1], name)}) == first[1]
            assert len(after.objects) == len(before.objects) + (made.kind == "growing")
    assert languages == {"en", "zh"} and counts == {2, 3, 4}


def test_held_out_sets_end_in_held_out_scenes_and_others_have_none() -> None:
    for made in sets(5, held_out=True):
        assert world.split(made.panels[-1].scene) == "held-out"
    for made in sets(30):
        assert {world.split(panel.scene) for panel in made.panels} == {"train"}


def test_the_words_say_where_the_object_goes() -> None:
    steps = {"left": -1, "左": -1, "right": 1, "右": 1, "up": -3, "上": -3, "down": 3, "下": 3}
    ends = re.compile(r"(?<!top )(?<!bottom )\b(left|right|up|down)\.?$|[向往]([左右上下])移")
    seen = {"step": 0, "back": 0, "place": 0}
    for made in sets(150, count=3):
        cells = [panel.scene.objects[0].cell for panel in made.panels]
        for k, panel in enumerate(made.panels[1:], start=1):
            text = panel.caption.text
            if made.kind == "moves" and (found := ends.search(text)):
                assert cells[k] == cells[k - 1] + steps[found[1] or found[2]], text
                seen["step"] += 1
            elif made.kind == "moves" and ("began" in text or "开始" in text):
                assert cells[k] == cells[0] != cells[k - 1], text
                seen["back"] += 1
            elif made.kind == "places":
                table = words.CHINESE_PLACES if panel.caption.language == "zh" else places()
                assert any(name in text for name in table[words.PLACES[cells[k]]]), text
                seen["place"] += 1
    assert min(seen.values()) >= 5, seen


def places() -> dict[str, tuple[str, ...]]:
    """English places without their prepositions, as after "to"."""
    return {
        place: (f"the {place}", *(name.split(" ", 1)[1] for name in names))
        for place, names in words.ENGLISH_PLACES.items()
    }


def test_the_checker_accepts_true_sets() -> None:
    verdicts = [world.check_set(rendered(made), made) for made in sets(10, count=4, photo=0.0)]
    assert np.mean([v.identity for v in verdicts]) >= 0.95
    assert np.mean([all(v.told) for v in verdicts]) >= 0.95
    assert all(v.attributes for v in verdicts if v.identity)


def other(scene: world.Scene, name: str) -> world.Scene:
    """The scene with its first object replaced by one that differs in one thing."""
    thing = scene.objects[0]
    values: dict = {
        "shape": "star" if thing.shape != "star" else "heart",
        "colour": "red" if thing.colour != "red" else "green",
        "fill": "plain" if thing.fill != "plain" else "striped",
        "size": "small" if thing.size == "big" else "big",
    }
    return replace(scene, objects=(replace(thing, **{name: values[name]}), *scene.objects[1:]))


@pytest.mark.parametrize("name", ["shape", "colour", "fill", "size"])
def test_another_object_is_not_the_same(name: str) -> None:
    for made in sets(2, count=3, photo=0.0):
        if name == "colour" and made.kind == "colours":
            continue
        pictures = rendered(made)
        pictures[2] = world.render(other(made.panels[2].scene, name))
        verdict = world.check_set(pictures, made)
        assert verdict.kept[0] and not verdict.kept[1] and not verdict.identity
        assert verdict.attributes == (name == "size")


def test_another_rotation_is_not_the_same() -> None:
    rng, seen = np.random.default_rng(3), 0
    for made in sets(8, count=2, photo=0.0):
        scene = made.panels[1].scene
        first, *rest = scene.objects
        moved = replace(first, seed=int(rng.integers(1 << 31)))
        pictures = [world.render(made.panels[0].scene)]
        pictures.append(world.render(replace(scene, objects=(moved, *rest))))
        found = [[f for f in world.read(p).objects if f.shape == first.shape] for p in pictures]
        if any(len(f) != 1 for f in found):
            continue
        gap = turned(found[0][0], found[1][0])
        assert world.check_set(pictures, made).identity == (gap <= TURN_SPAN)
        seen += gap > TURN_SPAN
    assert seen >= 5


def test_pictures_in_another_order_are_not_as_told() -> None:
    for made in sets(4, count=4, photo=0.0):
        first, second, third, fourth = rendered(made)
        verdict = world.check_set([first, fourth, second, third], made)
        assert not all(verdict.told)
        stuck = world.check_set([first] * 4, made)  # the first picture over and over again
        if made.kind != "growing":
            assert stuck.identity
        assert not stuck.told[1]


def test_a_number_of_pictures_that_does_not_fit_is_refused() -> None:
    made = sets(1, count=3)[0]
    with pytest.raises(ValueError, match="has 3 pictures, but 2 were given"):
        world.check_set(rendered(made)[:2], made)


def test_a_row_of_a_set_sees_all_pictures_before_it() -> None:
    rng = np.random.default_rng(0)
    samples = [draw(rng, (0, 0, 0, 1)) for _ in range(200)]
    assert {len(s.references) for s in samples} == {1, 2, 3}
    assert all(s.own for s in samples)
    empty = [s for s in samples if not s.prompt]
    assert 0 < len(empty) < 40 and all(s.target == s.references[-1] for s in empty)
    for sample in samples:
        assert len({s.background for s in (*sample.references, sample.target)}) == 1
    three = [draw(np.random.default_rng(7), (0.5, 0.3, 0.2)) for _ in range(20)]
    four = [draw(np.random.default_rng(7), (0.5, 0.3, 0.2, 0.0)) for _ in range(20)]
    assert three == four and not any(s.own for s in three)


def test_rows_of_a_batch_fit_together() -> None:
    made = batches(TOKENIZER, 1, 4, (0.0, 0.4, 0.2, 0.4))
    own = []
    for batch in itertools.islice(made, 6):
        assert batch.ids.shape[0] == len(batch.pictures) == len(batch.own) == 4
        assert batch.labels.shape[:2] == batch.pictures.shape[:2]
        own += batch.own.tolist()
    assert any(own) and not all(own)


def test_the_student_redraws_what_some_rows_of_sets_see() -> None:
    from seedling.training import transformer as trainer
    from seedling.training.prompts import Prompts

    model = from_assets(ASSETS)
    prompts = Prompts(TOKENIZER)
    student = trainer.Student(prompts)
    student.dit, student.reader = model.dit, model.encoder
    rng = np.random.default_rng(2)
    scenes = [world.sample_scene(rng) for _ in range(24)]
    pixels = torch.from_numpy(np.stack([world.render(s, SIZE) for s in scenes]))
    with torch.no_grad():
        latents = model.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    latents = latents.unflatten(0, (8, 3))
    own = torch.tensor([True, False] * 4)
    torch.manual_seed(0)
    new = trainer.redrawn(student, prompts, latents, own)
    changed = (new != latents).flatten(2).any(2)
    assert changed[:, :2].any() and not changed[:, 2].any(), "the target stays"
    assert not changed[~own].any()
    assert (changed[:, 0] == changed[:, 1]).all()
    error = (new - latents)[changed].square().mean() / latents.square().mean()
    assert 1e-4 < error < 0.1, "nearly, but not quite, what they were"
    assert torch.equal(trainer.redrawn(student, prompts, latents, own & False), latents)


def test_sets_are_judged_as_the_engine_makes_them() -> None:
    """The evaluation's batches of sets give the pictures of `run_set`."""
    made = [one.panels[:3] for one in sets(1, count=3)[:2]]
    texts = [[panel.caption.text for panel in panels] for panels in made]
    painted = paint_sets(from_assets(ASSETS), texts, seeing=True, steps=2, guidance=1.0, seed=4)
    name = "seedling-tiny.safetensors"
    places = ("diffusion_models", "vae", "text_encoders")
    pipeline = Pipeline.load(*(ASSETS / place / name for place in places))
    for i, prompts in enumerate(texts):
        plan = plan_set("\n".join(prompts), seeing="sequential", seed=4 + i)
        events = run_set(pipeline, Task("", steps=2, guidance=1.0), plan)
        pictures = [event.pixels for event in events if isinstance(event, Picture)]
        assert len(pictures) == 3
        for mine, engines in zip(painted[i], pictures, strict=True):
            gap = torch.from_numpy(mine[..., :3]) / 255 - engines[..., :3]
            assert gap.abs().mean() < 1.5 / 255
