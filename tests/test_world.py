"""The procedural world: the same bytes, captions that mean what they say, an honest checker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import ndimage

from seedling.training import world
from seedling.training.world import vocabulary as words
from seedling.training.world.edits import matches, refer
from seedling.training.world.parse import parse

SEED = 20250909


def scenes(
    number: int, photo: float = 0.15, transparent: float = 0.05, objects: int | None = None
) -> list[world.Scene]:
    rng = np.random.default_rng(SEED)
    return [
        world.sample_scene(rng, count=objects, photo=photo, transparent=transparent)
        for _ in range(number)
    ]


def damaged(picture: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Noise of 6 levels, or a blur in pixels, or a lumpy bend of about 3 px."""
    pixels = picture.astype(np.float32)
    if kind == "noise":
        pixels[..., :3] += rng.normal(0, 6, pixels[..., :3].shape)
    elif kind == "lumpy":
        bends = [ndimage.gaussian_filter(rng.normal(size=pixels.shape[:2]), 4) for _ in range(2)]
        y, x = np.mgrid[: len(pixels), : len(pixels)]
        at = [y + 3 * bends[0] / bends[0].std(), x + 3 * bends[1] / bends[1].std()]
        parts = [
            ndimage.map_coordinates(pixels[..., c], at, order=1, mode="nearest") for c in range(4)
        ]
        pixels = np.stack(parts, -1)
    elif kind != "none":
        pixels = ndimage.gaussian_filter(pixels, (float(kind), float(kind), 0))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [128, 256])
def test_a_scene_determines_its_pixels(size: int) -> None:
    for scene in scenes(12):
        picture = world.render(scene, size)
        assert picture.shape == (size, size, 4) and picture.dtype == np.uint8
        assert np.array_equal(picture, world.render(scene, size))
        clear = scene.background.texture == words.TRANSPARENT
        assert (picture[..., 3].min() == 0) == clear


def test_two_sizes_show_the_same_picture() -> None:
    for scene in scenes(6):
        small = world.render(scene, 128).astype(np.float32)
        big = world.render(scene, 256).astype(np.float32)
        gap = np.abs(big.reshape(128, 2, 128, 2, 4).mean((1, 3)) - small)
        assert gap.mean() < 6


def test_objects_stay_inside_their_cells() -> None:
    cells = np.arange(128) * 3 // 128
    for scene in scenes(60):
        for thing in scene.objects:
            mask = world.object_mask(thing) > 0
            assert set(np.unique((cells[:, None] * 3 + cells)[mask])) == {thing.cell}


def test_the_same_seed_draws_the_same_scenes_captions_and_edits() -> None:
    def draw() -> list:
        rng = np.random.default_rng(3)
        scene = world.sample_scene(rng)
        return [scene, world.sample_caption(scene, rng), world.sample_edit(rng),
                world.sample_composition(rng)]  # fmt: skip

    assert draw() == draw()


def test_layout_and_object_map_agree_with_the_scene() -> None:
    for scene in scenes(40):
        shape, colour, _, _ = world.layout(scene)
        owner, classes = world.object_map(scene)
        assert owner.shape == (8, 8) and classes.shape == (len(scene.objects), 4)
        assert (shape > 0).sum() == len(scene.objects)
        for index, thing in enumerate(scene.objects):
            assert words.SHAPES[shape[divmod(thing.cell, 3)] - 1] == thing.shape
            assert words.COLOURS[classes[index, 1] - 1] == thing.colour
            assert colour[divmod(thing.cell, 3)] == classes[index, 1]
            if thing.size == "big" and thing.shape in ("circle", "square"):
                assert (owner == index + 1).any()


def test_held_out_is_disjoint_and_reachable() -> None:
    rng = np.random.default_rng(SEED)
    for held_out, side in ((False, "train"), (True, "held-out")):
        for _ in range(60):
            assert world.split(world.sample_scene(rng, held_out=held_out)) == side
            assert world.split(world.sample_edit(rng, held_out=held_out).after) == side
            assert world.split(world.sample_composition(rng, held_out=held_out).target) == side
    for _ in range(60):
        edit, made = world.sample_edit(rng), world.sample_composition(rng)
        assert {world.split(s) for s in (edit.before, *made.references)} == {"train"}
    scene = scenes(1)[0]
    other = tuple(replace(thing, seed=thing.seed + 1) for thing in scene.objects)
    moved = replace(scene, objects=other, grain=scene.grain + 1)
    assert world.split(moved) == world.split(scene), "the split must not depend on the nuisance"


@pytest.mark.parametrize("kind", world.EDIT_KINDS)
def test_an_edit_leaves_the_rest_identical(kind: str) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(15):
        edit = world.sample_edit(rng, kind=kind)
        before, after = world.render(edit.before), world.render(edit.after)
        kept = world.kept_mask(edit)
        assert kept.any() or not edit.before.objects
        assert np.array_equal(before[kept], after[kept])
        assert not np.array_equal(before, after)


def test_an_instruction_means_one_object() -> None:
    rng = np.random.default_rng(SEED)
    for scene in scenes(200):
        for index, thing in enumerate(scene.objects):
            spec = refer(scene, index, rng)
            assert [t for t in scene.objects if matches(t, spec)] == [thing]


def test_captions_in_both_languages_parse_to_their_request() -> None:
    rng = np.random.default_rng(SEED)
    languages, levels = set(), set()
    for scene in scenes(400):
        caption, request = world.sample_caption(scene, rng)
        languages.add(caption.language)
        levels.add(caption.level)
        assert parse(caption.text) == request
        for language in ("en", "zh"):
            text = world.write(request, language, rng)
            assert parse(text) == request, text
    assert languages == {"en", "zh"} and levels == {1, 2, 3}


@pytest.mark.parametrize(
    ("text", "shape", "relation"),
    [
        ("a red star left of a blue circle", "star", "left"),
        ("蓝色圆形左边的红色星形", "star", "left"),
        ("一个红色星形在蓝色圆形的上边", "star", "above"),
        ("a red star", "star", None),
    ],
)
def test_what_people_type(text: str, shape: str, relation: str | None) -> None:
    request = parse(text)
    first = request.objects[0]
    assert (first.shape, first.colour) == (shape, "red")
    assert [r.kind for r in request.relations] == ([relation] if relation else [])
    full = parse("a big yellow heart in the top left corner on a blue striped background")
    assert full.objects == (world.ObjectSpec("heart", "yellow", None, "big", "top left"),)
    assert (full.ground, full.texture) == ("blue", "striped")
    assert parse("two green circles").objects[0].count == 2


@pytest.mark.parametrize(("kind", "least"), [("none", 0.99), ("noise", 0.97), ("0.7", 0.97)])
def test_the_checker_accepts_the_truth(kind: str, least: float) -> None:
    rng = np.random.default_rng(SEED)
    verdicts = []
    for scene in scenes(70, photo=0.0):
        _, request = world.sample_caption(scene, rng, level=3)
        verdicts.append(world.check(damaged(world.render(scene), kind, rng), request).ok)
    assert np.mean(verdicts) >= least


def test_the_checker_accepts_truth_on_photographs() -> None:
    pytest.importorskip("skimage")
    right = [
        world.check(world.render(scene), world.describe(scene)).ok
        for scene in scenes(40, photo=1.0, transparent=0.0)
    ]
    assert np.mean(right) >= 0.85


@pytest.mark.parametrize(("kind", "most"), [("lumpy", 0.25), ("2.4", 0.1)])
def test_lumpy_and_blurred_shapes_fail_on_their_edges(kind: str, most: float) -> None:
    rng = np.random.default_rng(SEED)
    edges = [
        world.check(damaged(world.render(scene), kind, rng), world.describe(scene)).edges
        for scene in scenes(40, photo=0.0, transparent=0.0)
    ]
    assert np.mean(edges) <= most


def test_every_wrong_attribute_is_seen() -> None:
    rng = np.random.default_rng(SEED)
    others = {
        "shape": words.SHAPES, "colour": words.COLOURS, "fill": words.FILLS, "size": words.SIZES,
        "place": words.PLACES,
    }  # fmt: skip
    wrong = 0
    for scene in scenes(25, objects=2, photo=0.0, transparent=0.0):
        reading = world.read(world.render(scene))
        truth = world.describe(scene)
        wrong += not world.judge(reading, truth).ok
        for name, options in others.items():
            spec = truth.objects[0]
            taken = {getattr(s, name) for s in truth.objects}
            free = [o for o in options if o not in taken]
            if not free:
                continue
            false = replace(spec, **{name: free[int(rng.integers(len(free)))]})
            verdict = world.judge(reading, replace(truth, objects=(false, truth.objects[1])))
            assert not getattr(verdict, name) and not verdict.ok
        assert not world.judge(reading, replace(truth, objects=truth.objects[:1])).count
        ground = words.GROUNDS[words.GROUNDS.index(truth.ground or "sand") - 1]
        assert not world.judge(reading, replace(truth, ground=ground)).background
    assert wrong <= 1


def test_relations_are_judged() -> None:
    scene = scenes(1, objects=2, photo=0.0, transparent=0.0)[0]
    first, second = scene.objects
    scene = replace(
        scene,
        objects=(
            replace(first, shape="star", colour="red", cell=3),
            replace(second, shape="circle", colour="blue", cell=5),
        ),
    )
    picture = world.render(scene)
    assert world.check(picture, parse("a red star left of a blue circle")).ok
    assert not world.check(picture, parse("a red star right of a blue circle")).place
    assert not world.check(picture, parse("蓝色圆形上边的红色星形")).place


def test_edits_are_judged_against_the_given_picture() -> None:
    rng = np.random.default_rng(SEED)
    done, undone, dropped = [], [], []
    for _ in range(35):
        edit = world.sample_edit(rng, photo=0.0)
        before, after = world.render(edit.before), world.render(edit.after)
        verdict = world.check_edit(before, after, edit)
        done.append(verdict.done)
        assert verdict.background_psnr == 99.0
        undone.append(world.check_edit(before, before, edit).done)
        noisy = damaged(after, "noise", rng)
        dropped.append(world.check_edit(before, noisy, edit).background_psnr)
    assert np.mean(done) >= 0.97 and not any(undone)
    assert 31 < np.median(dropped) < 34


def test_compositions_hold_what_they_promise() -> None:
    rng = np.random.default_rng(SEED)
    right = []
    for _ in range(40):
        made = world.sample_composition(rng)
        assert len(made.references) in (2, 3)
        numbers = [n for n in "123" if n in made.instruction.text]
        ordinals = ("first", "second", "third", "第一", "第二", "第三")
        assert numbers or any(word in made.instruction.text for word in ordinals)
        known = {(t.shape, t.seed) for scene in made.references for t in scene.objects}
        if made.kind != "borrow":
            assert {(t.shape, t.seed) for t in made.target.objects} <= known
        right.append(world.check(world.render(made.target), made.request).ok)
    assert np.mean(right) >= 0.9
