"""`seedling generate` with what it keeps, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seedling.host.cli import main
from seedling.host.recipe import read_recipe


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


@pytest.mark.parametrize(
    "words, said",
    [
        (["--earlier", "ref.png"], "--earlier goes with --set"),
        (["--set", "sequential", "--from", "ref.png"], "give --set or --from, not both"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "x", *words])
    assert said in capsys.readouterr().err
