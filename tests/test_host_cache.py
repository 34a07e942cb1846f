"""The cache of results: what stays, what goes, and that a run costs nothing for what stays."""

from __future__ import annotations

import torch

from seedling.host import cache as module
from seedling.host.cache import Cache, Result


def put(cache: Cache, key: str, value: object) -> None:
    cache.put(key, Result([[value]], None))


def test_models_go_at_once_and_the_oldest_results_first() -> None:
    cache = Cache(budget=300)
    cache.start()
    put(cache, "model", torch.nn.Linear(1, 1))
    for key in "abc":
        put(cache, key, torch.zeros(25))  # 100 bytes
    cache.trim()
    assert list(cache.results) == ["model", "a", "b", "c"]  # all were used by this run
    cache.start()
    assert cache.get("a") is not None and cache.get("none") is None
    cache.trim()
    assert list(cache.results) == ["b", "c", "a"]  # the model was not used, and nothing is too much
    cache.start()
    put(cache, "d", torch.zeros(50))
    put(cache, "d", torch.zeros(25))  # another value under the same key counts once
    cache.trim()
    assert list(cache.results) == ["c", "a", "d"] and cache.bytes == 300
    cache.clear()
    assert cache.bytes == 0 and not cache.results and not cache.models


def test_a_run_larger_than_the_budget_keeps_what_it_used() -> None:
    cache = Cache(budget=100)
    cache.start()
    for key in "ab":
        put(cache, key, torch.zeros(100))
    cache.trim()
    assert list(cache.results) == ["a", "b"]
    cache.start()
    cache.trim()
    assert not cache.results


def test_what_stays_is_not_searched_again(monkeypatch) -> None:
    """A long batch fills the cache; what a run costs must not grow with it."""
    cache = Cache(budget=2**30)
    for key in range(module.MOST_RESULTS + 10):
        cache.start()
        put(cache, str(key), key)
        cache.trim()
    assert len(cache.results) == module.MOST_RESULTS
    looked = []
    monkeypatch.setattr(module, "walk", lambda value: looked.append(value) or [])
    cache.start()
    cache.trim()
    assert looked == [] and len(cache.results) == module.MOST_RESULTS
