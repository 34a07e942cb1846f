"""`seedling generate` with what it keeps, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seedling.host.cli import main
from seedling.host.recipe import read_recipe
from seedling.sampling import SamplingError


@pytest.fixture
def made(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Any:  # fmt: skip
    """Run `seedling generate` with the tiny model in an empty folder; what it says."""
    monkeypatch.chdir(tmp_path)
    weights = ["--dit", tiny_model.dit, "--vae", tiny_model.vae, "--encoder", tiny_model.encoder]
    Image.effect_noise((64, 64), 90).convert("RGB").save("ref.png")

    def run(*words: object) -> str:
        given = ["generate", *words, *weights, "--steps", 2, "--seed", 3]
        assert main([str(word) for word in given]) == 0
        return capsys.readouterr().out

    return run


def pixels(name: str | Path) -> np.ndarray:
    return np.array(Image.open(name))


def test_it_says_what_was_known(made: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cup\na blue cup\n")
    said = made("--prompts", "prompts.txt", "--reference", "ref.png", "--guidance", 1)
    last = said.splitlines()[-1]
    assert last.startswith("Prompts and references known before: ") and "1 of 2 latents" in last
    assert "kB kept (auto)." in last
    words = ("a red cup", "--reference", "ref.png", "--guidance", 1, "--out", "off.png")
    assert "0 B kept (0 B)." in made(*words, "--cache", "off")
    assert np.array_equal(pixels("off.png"), pixels("seedling_00001.png"))
    assert "int8 with an error of 0." in made("a red cup", "--cache", "1GB:int8")


def test_a_sequence_is_saved_picture_by_picture_and_each_can_be_repeated(
    made: Any, tmp_path: Path
) -> None:
    story = "A fox.\n1. asleep\n2. awake\n3. away"
    made(story, "--set", "sequential", "--reference", "ref.png", "--sheet")
    files = sorted(tmp_path.glob("seedling_0*.png"))
    assert [f.name for f in files] == [f"seedling_0000{k}.png" for k in (1, 2, 3)]
    recipes = [read_recipe(f) for f in files]
    assert [r.prompt for r in recipes] == ["A fox. asleep", "A fox. awake", "A fox. away"]
    assert [r.seed for r in recipes] == [3, 4, 5]
    assert [[s.file for s in r.references] for r in recipes] == [
        ["ref.png"],
        ["ref.png", "seedling_00001.png"],
        ["ref.png", "seedling_00001.png", "seedling_00002.png"],
    ]
    assert (tmp_path / "seedling_sheet_00001.png").exists()
    assert main(["generate", "--from", str(files[2]), "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels(files[2]))
    made(
        story, "--set", "sequential", "--reference", "ref.png", "--out", "rest",
        "--earlier", files[0], "--earlier", files[1],
    )  # fmt: skip
    (rest,) = Path("rest").glob("*.png")
    assert np.array_equal(pixels(rest), pixels(files[2]))


def test_an_independent_set_sees_its_references_only(made: Any, tmp_path: Path) -> None:
    made("a fox in two panels", "--set", "independent", "--reference", "ref.png")
    files = sorted(tmp_path.glob("seedling_0*.png"))
    assert len(files) == 2
    assert all(len(read_recipe(f).references) == 1 for f in files)


def test_pictures_that_are_painted_at_once_can_each_be_repeated(
    made: Any, tmp_path: Path, capsys: Any
) -> None:
    words = ("A fox.\n1. asleep\n2. awake\n3. away", "--set", "joint", "--reference", "ref.png")
    assert "Making 3 pictures of 64 x 64" in (said := made(*words)) and "seeds 3 to 5." in said
    files = sorted(tmp_path.glob("seedling_0*.png"))
    recipes = [read_recipe(f) for f in files]
    assert [r.prompt for r in recipes] == ["A fox. asleep", "A fox. awake", "A fox. away"]
    assert [(r.seed, r.place) for r in recipes] == [(3, 0), (4, 1), (5, 2)]
    assert all(r.together == recipes[0].together for r in recipes)
    assert main(["generate", "--from", str(files[1]), "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels(files[1]))
    assert main(["generate", "other words", "--from", str(files[1])]) == 2
    assert "painted at once with 2 others" in capsys.readouterr().err
    made(*words[:1], "--set", "independent", "--reference", "ref.png", "--out", "apart")
    assert not np.array_equal(pixels("apart/seedling_00001.png"), pixels(files[0]))


def test_seeds_count_up_or_are_the_same(made: Any, tmp_path: Path) -> None:
    made("a fox in two panels", "--set", "independent", "--same-seed")
    first, second = sorted(tmp_path.glob("seedling_0*.png"))
    assert [read_recipe(f).seed for f in (first, second)] == [3, 3]
    assert np.array_equal(pixels(first), pixels(second)), "one prompt, one noise"


def test_a_numbered_list_may_be_a_file(made: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("# a story\nA fox.\n1. asleep\n2. awake,\n   ears up\n")
    made("--prompts", "story.txt", "--set", "sequential", "--out", "story")
    recipes = [read_recipe(f) for f in sorted(Path("story").glob("*.png"))]
    assert [r.prompt for r in recipes] == ["A fox. asleep", "A fox. awake, ears up"]


def test_a_set_that_was_stopped_goes_on(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After Ctrl-C in the midst of the third picture; what comes is what would have come."""
    from seedling.sampling import pipeline

    words = ("A fox.\n1. asleep\n2. awake\n3. away\n4. back", "--reference", "ref.png")
    for seeing in ("sequential", "independent"):
        set_words = (*words, "--set", seeing, "--out")
        made(*set_words, f"{seeing}-whole")
        decode, calls = pipeline.finished, []

        def stopped(*given: Any, calls: list[int] = calls, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return decode(*given, **more)  # noqa: B023

        monkeypatch.setattr(pipeline, "finished", stopped)
        with pytest.raises(AssertionError):  # of `made`: it did not end with 0
            made(*set_words, f"{seeing}-part")
        monkeypatch.setattr(pipeline, "finished", decode)
        done = sorted(Path(f"{seeing}-part").glob("*.png"))
        assert len(done) == 2 and f"Stopped. Saved before: {done[0]}, " in capsys.readouterr().err
        earlier = [word for file in done for word in ("--earlier", file)]
        made(*set_words, f"{seeing}-part", *earlier)
        whole = sorted(Path(f"{seeing}-whole").glob("*.png"))
        parts = sorted(Path(f"{seeing}-part").glob("*.png"))
        assert len(parts) == len(whole) == 4
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(parts, whole, strict=True))


def test_an_independent_picture_that_fails_takes_no_other_with_it(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Exit code 1. A sequence ends there, with 2, because the next would have seen it."""
    from seedling.sampling import pipeline

    finished, words = pipeline.finished, ("A fox.\n1. asleep\n2. awake\n3. away", "--out")
    for seeing, code, left, told in (
        ("independent", 1, [3, 5], "picture 2 failed: odd. The others go on."),
        ("sequential", 2, [3], "seedling: odd"),
    ):
        calls: list[int] = []

        def failing(*given: Any, calls: list[int] = calls, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise SamplingError("odd")
            return finished(*given, **more)

        monkeypatch.setattr(pipeline, "finished", failing)
        with pytest.raises(AssertionError, match=f"{code} == 0"):
            made(*words, seeing, "--set", seeing)
        said = "".join(capsys.readouterr())
        assert told in said
        assert [read_recipe(f).seed for f in sorted(Path(seeing).glob("*.png"))] == left


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--set", "sequential", "--count", 15, "--reference", "ref.png"],
            "1 references and 15 pi",
        ),
        (["--set", "joint", "--count", 15, "--reference", "ref.png"], "are more than 15"),
        (["--set", "joint", "--count", 3, "--earlier", "ref.png"], "cannot go on from finished"),
        (["--set", "sequential", "--count", 1, "--earlier", "ref.png"], "cannot begin with"),
    ],
)
def test_a_set_that_cannot_be_is_refused(
    made: Any, words: list[object], said: str, capsys: Any
) -> None:
    with pytest.raises(AssertionError):
        made("a fox", *words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--earlier", "ref.png"], "--earlier goes with --set"),
        (["--same-seed"], "--same-seed goes with --set"),
        (["--set", "sequential", "--from", "ref.png"], "give --set or --from, not both"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "x", *words])
    assert said in capsys.readouterr().err


def test_the_count_of_a_set(made: Any, tmp_path: Path) -> None:
    """As many as its prompts say, or exactly so many: one too."""
    story = "1. asleep\n2. awake\n3. away"
    for words, count in (((), 3), (("--count", 0), 3), (("--count", 1), 1), (("--count", 2), 2)):
        said = made(story, "--set", "independent", *words)
        number = "1 picture " if count == 1 else f"{count} pictures "
        assert f"Making {number}" in said, words
