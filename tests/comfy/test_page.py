"""The pack's scripts on the real page of a real ComfyUI: the same hands, the same strip.

The tests are those of test_host_browser_strip.py, which drive the studio's page, as far as they are
about the strip; here the page, the uploads and the nodes are ComfyUI's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.comfyui, pytest.mark.browser, pytest.mark.slow]


def load(name: str) -> ModuleType:
    """A file of tests/ as a module; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, TESTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


shared = load("test_host_browser_strip")
strip, pictures, MODES = shared.strip, shared.pictures, shared.MODES
test_the_mouse_reorders = shared.test_the_mouse_reorders
test_the_list_in_words_is_out_of_sight = shared.test_the_list_in_words_is_out_of_sight
test_the_keyboard_reorders = shared.test_the_keyboard_reorders_toggles_and_undoes
test_a_tile_opens_its_settings = shared.test_a_tile_opens_its_settings
test_files_are_dropped_pasted_and_run = shared.test_files_are_dropped_pasted_and_run
test_the_list_follows_its_links = shared.test_the_list_follows_its_links
test_masks_stay_with_their_pictures = shared.test_masks_stay_with_their_pictures
test_saving_and_copying_keep_the_list = shared.test_saving_and_copying_keep_the_list
test_it_works_inside_a_subgraph = shared.test_it_works_inside_a_subgraph
sets = load("test_host_browser_sets")


@pytest.fixture(scope="module")
def host(server: Any, hands: Any) -> Any:
    """The ComfyUI as the browser's tests know a studio: `port`, and `home` with its folders."""
    server.ask("/api/settings", hands.SETTINGS)
    return SimpleNamespace(home=server.base, port=int(server.url.rpartition(":")[2]))


@pytest.fixture(scope="module")
def page(host: Any, hands: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from hands.browser(host, tmp_path_factory.mktemp("profile"))


def test_the_page_starts_without_a_complaint_of_ours(page: Any) -> None:
    """The page itself, offline and without these tests, says more than the studio's."""
    ours = [text for text in page.said if "seedling" in text.lower()]
    assert ours == []


test_a_set_shows_all_that_is_done = sets.test_a_set_shows_all_that_is_done
test_what_was_shown_is_there_again = sets.test_what_was_shown_is_there_again


def test_what_failed_is_said_in_words(page: Any, hands: Any) -> None:
    """ComfyUI's page hides it behind one sentence for all errors."""
    flow = json.loads((TESTS.parent / "example_workflows" / "Image Set.json").read_text("utf-8"))
    node = next(n for n in flow["nodes"] if n["type"] == "SeedlingImageSet")
    values = node["widgets_values"]
    values[1], values[values.index("references only")] = 16, "the pictures before it"
    del node["widgets_values_named"]
    hands.set_nodes_2(page, False)
    hands.open_flow(page, flow)
    hands.run(page)
    page.get_by_text("are more than 15").first.wait_for(timeout=hands.SLOW)
