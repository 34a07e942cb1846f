"""Sizes: what words mean, and how pixels meet the grid."""

from __future__ import annotations

import math
import random

import pytest

from seedling.sampling import SamplingError
from seedling.sampling.sizes import (
    MAX_RATIO,
    SEEDREAM,
    WORDS,
    Size,
    described,
    grid,
    parse_size,
    snap,
)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("1024x768", (1024, 768)),
        (" 1000 × 750 px ", (1000, 750)),  # exactly, on no grid
        ("640*480", (640, 480)),
        ("1K", (1024, 1024)),
        ("2K", (2048, 2048)),
        ("4k", (4096, 4096)),
        ("1.5K", (1536, 1536)),
        ("16:9", (1424, 800)),
        ("16:9@2K", (2848, 1600)),
        ("2K, 9:16", (1600, 2848)),
        ("32:18 2k", (2848, 1600)),
        ("21:9@4K", (6240, 2656)),
        ("3:4@3K", (2592, 3456)),
        ("1:1", (1024, 1024)),
        ("2:1", (1456, 720)),  # no bucket: computed
        ("square", (1024, 1024)),
        ("Portrait", (864, 1152)),
        ("landscape_2K", (2304, 1728)),
        ("poster", (832, 1248)),
        ("2K poster", (1664, 2496)),
        ("phone wallpaper@4K", (3040, 5504)),
        ("海报", (832, 1248)),
        ("2K海报", (1664, 2496)),
        ("手机壁纸、2K", (1600, 2848)),
        ("９：１６＠２Ｋ", (1600, 2848)),  # full width
    ],
)
def test_words(words: str, size: tuple[int, int]) -> None:
    parsed = parse_size(words)
    assert (parsed.width, parsed.height) == size
    assert parse_size(parsed.label) == parsed, "a label says the size again"


def test_labels() -> None:
    assert parse_size("1024 X 768").label == "1024x768"
    assert parse_size("2k  Poster").label == "poster@2K"
    assert parse_size("2k").label == "2K"


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("area", [128 * 128, 1024 * 1024, 2048 * 2048])
def test_every_word_has_its_shape_and_area(words: str, area: int) -> None:
    size = parse_size(words, area=area)
    width, height = map(int, WORDS[words].split(":"))
    coarse = 16 / math.sqrt(area) * 2
    assert size.width % 16 == 0 and size.height % 16 == 0
    assert size.width / size.height == pytest.approx(width / height, rel=0.02 + coarse)
    assert size.width * size.height == pytest.approx(area, rel=0.1 + coarse)


def test_another_model_knows_other_sizes() -> None:
    known = [(2752, 1536), (2528, 1696)]
    assert parse_size("16:9@2K", buckets=known) == Size(2752, 1536, "16:9@2K")
    assert parse_size("2:3@2K", buckets=known) == Size(1696, 2528, "2:3@2K")
    computed = parse_size("16:9@1K", buckets=known, multiple=32)
    assert (computed.width, computed.height) == (1376, 768)
    # 1424 is no multiple of 32
    assert parse_size("16:9", multiple=32) == Size(1376, 768, "16:9")


def test_the_hosted_sizes() -> None:
    assert len(set(SEEDREAM)) == 20
    for width, height in SEEDREAM:
        assert width >= height and width % 16 == height % 16 == 0
        assert 921_600 <= width * height <= 16_777_216


@pytest.mark.parametrize(
    "words", ["", "  ", "large", "1024", "16by9", "-5x10", "16:9:4", "K", "2KK"]
)
def test_not_a_size(words: str) -> None:
    with pytest.raises(SamplingError, match="is not a size. Write .* 1024x768.* 16:9.*phone wall"):
        parse_size(words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("1024x768@2K", "two sizes; keep 1024x768 or 2K"),
        ("17:1", "between 1:16 and 16:1"),
        ("1:17", "between 1:16 and 16:1"),
        ("0:1", "between 1:16 and 16:1"),
        ("1:0", "between 1:16 and 16:1"),
        ("0x512", "between 1 and 16384 pixels"),
        ("20000x20000", "between 1 and 16384 pixels"),
        ("99K", "between 1 and 16384 pixels"),
        ("4000x100", "40 times the other; at most 16"),
        ("0K", "0 pixels"),
    ],
)
def test_impossible_sizes(words: str, complaint: str) -> None:
    with pytest.raises(SamplingError, match=complaint):
        parse_size(words)


def test_snap_finds_the_nearest_size_on_the_grid() -> None:
    assert snap(1024, 768, 32) == Size(1024, 768)
    assert snap(1000, 750, 32) == Size(992, 736)
    assert snap(1000, 750, 16, "mine") == Size(1008, 752, "mine")
    assert snap(5, 3, 16) == Size(16, 16)
    # 1600x96 would be longer than 16:1
    assert snap(1610, 101, 32) == Size(1600, 128)


def test_grid_pads_right_and_below_and_says_what_to_crop() -> None:
    assert grid(1000, 750, 32) == (Size(1024, 768), (0, 0, 1000, 750))
    assert grid(1024, 768, 32) == (Size(1024, 768), (0, 0, 1024, 768))
    with pytest.raises(SamplingError, match="20 times"):
        grid(2000, 100, 16)


def test_any_size_can_be_snapped_and_padded() -> None:
    dice = random.Random(0)
    for _ in range(500):
        multiple = dice.choice([8, 16, 32])
        short = dice.randint(1, 1024)
        sides = [short, dice.randint(short, MAX_RATIO * short)]
        dice.shuffle(sides)
        width, height = sides
        snapped, (padded, box) = snap(width, height, multiple), grid(width, height, multiple)
        for size in (snapped, padded):
            assert size.width % multiple == 0 and size.height % multiple == 0
        assert abs(snapped.width - width) < multiple and abs(snapped.height - height) < multiple
        assert 0 <= padded.width - width < multiple and 0 <= padded.height - height < multiple
        assert box == (0, 0, width, height)


@pytest.mark.parametrize(
    ("size", "padded", "words"),
    [
        ((1216, 832), (1216, 832), "1216 x 832 pixels · 3:2 · 1.0 MP · 3952 tokens"),
        ((832, 1216), (832, 1216), "832 x 1216 pixels · 2:3 · 1.0 MP · 3952 tokens"),
        ((2848, 1600), (2848, 1600), "2848 x 1600 pixels · 16:9 · 4.6 MP · 17800 tokens"),
        ((64, 64), (64, 64), "64 x 64 pixels · 1:1 · 0.0 MP · 16 tokens"),
        (
            (1000, 640),
            (1024, 640),
            "1000 x 640 pixels · 1.56:1 · 0.6 MP · painted as 1024 x 640 · 2560 tokens",
        ),
        (
            (100, 800),
            (112, 800),
            "100 x 800 pixels · 1:8 · 0.1 MP · painted as 112 x 800 · 350 tokens",
        ),
    ],
)
def test_a_size_in_words(size: tuple[int, int], padded: tuple[int, int], words: str) -> None:
    assert described(*size, padded, 16) == words
