"""Shared set-up: a clean import path, two torch threads, no network, skips for what is missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("127.", "localhost", "::1", "0.0.0.0", "::")

# `python -m pytest` puts the working directory on sys.path: from there our nodes/ would shadow
# ComfyUI's nodes.py, and tests could import files that an installed package does not offer.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def refuse_network(event: str, arguments: tuple) -> None:
    """Audit hook: a test that reaches for another machine fails, with or without a network here."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket has a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not str(host).startswith(MACHINE):
        raise RuntimeError(f"a test asked for the network: {event} {host!r}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked `slow` too")


def pytest_configure() -> None:
    sys.addaudithook(refuse_network)
    # Libraries that would look for a newer version of a local file are told not to.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import torch

    # The models of these tests are tiny: more threads make them slower, not faster.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def missing(marker: str, config: pytest.Config) -> str | None:
    """Say why a test with this marker cannot run here, or None when it can."""
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "no CUDA device"
    if marker == "comfyui":
        folder = os.environ.get("COMFYUI_DIR")
        if not folder:
            return "COMFYUI_DIR is not set"
        if not (Path(folder) / "comfy_api").is_dir():
            # Set but wrong is a mistake, not a part that is missing: a skip would hide it.
            raise pytest.UsageError(
                f"COMFYUI_DIR={folder} has no comfy_api/; point it at a ComfyUI checkout"
            )
        return None
    if marker == "browser":
        return neighbour("browser_tools").missing()
    return None if config.getoption("--slow") else "slow: run with --slow"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("gpu", "comfyui", "browser", "slow"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing(marker, config) if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What programs remember of a user is not remembered in the home of who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


def neighbour(name: str) -> ModuleType:
    """A file beside this one as a module; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py, which writes random tiny models."""
    return neighbour("tiny")


@pytest.fixture(scope="session")
def nunchaku() -> ModuleType:
    """tests/nunchaku_tools.py: layers packed as Nunchaku's files hold them."""
    return neighbour("nunchaku_tools")


@pytest.fixture(scope="session")
def peak() -> Any:
    """How many bytes of tensors a call has alive at once: tests/live_bytes.py."""
    return neighbour("live_bytes").peak


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads cut a convolution by its size: with few channels its last bits may change."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quant_families() -> ModuleType:
    """tests/quant_families.py: tiny networks of all families, and what their files must do."""
    return neighbour("quant_families")


@pytest.fixture(scope="session")
def hands() -> ModuleType:
    """tests/browser_tools.py: what a person does with the page."""
    return neighbour("browser_tools")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The nodes with the embedded model, over the stand-in: tests/node_tools.py."""
    yield from neighbour("node_tools").nodes(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="session")
def node_tools() -> ModuleType:
    """tests/node_tools.py: the nodes without ComfyUI."""
    return neighbour("node_tools")


@pytest.fixture(scope="module")
def pack(node_tools: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package seedling.nodes over the stand-in."""
    with node_tools.package(tmp_path_factory.mktemp("studio")) as (package, _):
        yield package


# One studio and one browser for a file: while the browser is there its event loop runs in this
# thread, and tests of other files that start a loop of their own would fail.
@pytest.fixture(scope="module")
def host(hands: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio for browser tests; files that test the studio itself have a `host` of their own."""
    yield from hands.studio(neighbour("host_tools"), tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def page(host: Any, hands: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page in a browser, loaded, with everything that its console said in `page.said`."""
    yield from hands.browser(host, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="session")
def tiny_model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random tiny model in fp32 as files: paths `dit`, `vae`, `encoder`. Write nothing to it."""
    return tiny.tiny_model(tmp_path_factory.mktemp("tiny"))
