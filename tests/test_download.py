"""`seedling download` against a local server that answers as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seedling.host import download
from seedling.host.cli import main
from seedling.model_loaders.family import Licence, Offer, PublishedFile

pytest.importorskip("huggingface_hub")

COMMIT = "c" * 40
LARGE = bytes(range(256)) * 4096  # 1 MiB, kept by its SHA-256
SMALL = b'{"version": "1.0"}'  # kept by git
TERMS = Licence("Some Licence", "", commercial=False, notice="For nobody's profit.")
OFFER = Offer(
    "toy", "Toy model", TERMS,
    (
        PublishedFile("diffusion_models", "some/toy", "split_files/toy.safetensors"),
        PublishedFile("text_encoders", "some/words", "tokenizer.json", "toy.tokenizer.json"),
    ),
)  # fmt: skip


class Hub(http.server.ThreadingHTTPServer):
    """Two repositories; what goes wrong is set by the tests."""

    files = {
        "some/toy/split_files/toy.safetensors": LARGE,
        "some/words/tokenizer.json": SMALL,
    }
    cut: int | None = None  # bytes of a body after which the connection ends
    flip = False  # deliver another byte than was promised
    elsewhere = ""  # another server that the bytes are at
    ranges: list[str]
    asked: list[str]
    tokens: list[tuple[str, str | None]]

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def reply(self, body: bool) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        data = self.server.files.get(f"{repository}/{rest.partition('/')[2]}")
        self.server.asked.append(f"{self.command} {self.path}")
        self.server.tokens.append((self.command, self.headers.get("Authorization")))
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, wanted = 0, self.headers.get("Range")
        if body and wanted:
            self.server.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-").split("-")[0])
        moved = self.server.elsewhere and not body
        self.send_response(302 if moved else 206 if wanted else 200)
        if moved:
            self.send_header("Location", self.server.elsewhere + self.path)
            self.send_header("X-Linked-Size", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        if self.server.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        end = len(data) if self.server.cut is None else min(len(data), start + self.server.cut)
        self.wfile.write(data[start:end])
        if end < len(data):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def tag(data: bytes) -> str:
    if len(data) > 1000:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    server.ranges, server.asked, server.tokens = [], [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = importlib.import_module("huggingface_hub.constants")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url())
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "offers", lambda: {OFFER.name: OFFER})
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    return tmp_path


def files(comfy: Path) -> dict[str, bytes]:
    """All files under models/ but those of a download that is not done."""
    models = comfy / "models"
    return {
        path.relative_to(models).as_posix(): path.read_bytes()
        for path in models.rglob("*")
        if path.is_file() and download.STAGING not in path.parts
    }


def fetch(comfy: Path, *more: str) -> int:
    return main(["download", "toy", "--comfyui", str(comfy), *more])


def test_files_arrive_under_their_names(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(comfy, "--accept-licence") == 0
    assert files(comfy) == {
        "diffusion_models/toy.safetensors": LARGE, "text_encoders/toy.tokenizer.json": SMALL,
    }  # fmt: skip
    assert not (comfy / "models" / download.STAGING).exists()
    said = capsys.readouterr().out
    assert "Some Licence, non-commercial. For nobody's profit." in said
    assert said.index("Some Licence") < said.index("0.00105 GB")
    assert [line.split("/resolve/")[0] for line in server.asked] == [
        "HEAD /some/toy", "HEAD /some/words", "GET /some/toy", "GET /some/words",
    ]  # fmt: skip
    server.asked.clear()
    assert fetch(comfy, "--accept-licence") == 0
    assert "is there already" in capsys.readouterr().out
    assert not [line for line in server.asked if line.startswith("GET")]


def test_nothing_is_fetched_before_the_licence_is_accepted(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(comfy) == 2
    assert "add --accept-licence" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: "n")
    assert fetch(comfy) == 2
    assert "nothing was downloaded" in capsys.readouterr().err
    assert server.asked == [] and files(comfy) == {}
    monkeypatch.setattr("builtins.input", lambda text: "Yes")
    assert fetch(comfy) == 0
    assert len(files(comfy)) == 2


def test_a_broken_download_goes_on_where_it_stopped(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself while anything arrives, and in the next run after the user had enough."""

    def enough(seconds: float) -> None:
        if len(server.ranges) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", enough)
    part = server.cut = len(LARGE) // 16
    assert fetch(comfy, "--accept-licence") == 130
    assert files(comfy) == {}
    server.cut = None
    assert fetch(comfy, "--accept-licence") == 0
    assert files(comfy)["diffusion_models/toy.safetensors"] == LARGE
    assert server.ranges[:4] == [f"bytes={part * i}-" for i in range(4)]


def test_a_dead_server_is_given_up(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cut = 0
    assert fetch(comfy, "--accept-licence") == 2
    assert "the connection ended too early. What arrived is kept" in capsys.readouterr().err
    assert len(server.ranges) == download.TRIES and files(comfy) == {}


def test_the_token_is_told_to_nobody_but_the_hub(
    server: Hub, comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes come from elsewhere: another name of this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.elsewhere = server.url().replace("127.0.0.1", "localhost")
    assert fetch(comfy, "--accept-licence") == 0
    assert files(comfy)["diffusion_models/toy.safetensors"] == LARGE
    assert set(server.tokens) == {("HEAD", "Bearer hf_secret"), ("GET", None)}
    server.elsewhere = ""
    server.tokens.clear()
    for path in (comfy / "models").rglob("toy*"):
        path.unlink()
    assert fetch(comfy, "--accept-licence") == 0
    assert set(server.tokens) == {("HEAD", "Bearer hf_secret"), ("GET", "Bearer hf_secret")}


def test_another_byte_is_noticed(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.flip = True
    assert fetch(comfy, "--accept-licence") == 2
    assert "arrived damaged" in capsys.readouterr().err
    assert files(comfy) == {}
    server.flip = False
    assert fetch(comfy, "--accept-licence") == 0
    assert files(comfy)["diffusion_models/toy.safetensors"] == LARGE


def test_a_file_of_the_users_is_never_written_over(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = comfy / "models" / "text_encoders" / "toy.tokenizer.json"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    assert fetch(comfy, "--accept-licence") == 2
    assert "is another file" in capsys.readouterr().err
    assert files(comfy) == {"text_encoders/toy.tokenizer.json": b"mine"}


def test_what_cannot_be_done_is_said(
    server: Hub, comfy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["download", "other", "--comfyui", str(comfy)]) == 2
    assert "There is no other; known are toy" in capsys.readouterr().err
    assert main(["download", "toy"]) == 2
    assert "Where is ComfyUI" in capsys.readouterr().err
    monkeypatch.setattr(server, "files", {})
    assert fetch(comfy, "--accept-licence") == 2
    assert "some/toy/split_files/toy.safetensors cannot be fetched" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 5}))
    monkeypatch.setattr(server, "files", Hub.files)
    assert fetch(comfy, "--accept-licence") == 2
    assert "needs 0.0 GB" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert fetch(comfy, "--accept-licence") == 2
    assert "pip install 'seedling[download]'" in capsys.readouterr().err


def test_a_file_without_a_checksum_is_not_fetched(server: Hub, comfy: Path, monkeypatch: Any,
                                                  capsys: Any) -> None:  # fmt: skip
    monkeypatch.setitem(globals(), "tag", lambda data: "weak")
    assert fetch(comfy, "--accept-licence") == 2
    assert "without size and checksum" in capsys.readouterr().err


def test_the_list_names_every_licence(capsys: pytest.CaptureFixture[str]) -> None:
    """And every published set is complete: a diffusion model, an encoder with tokenizer, a VAE."""
    assert main(["download"]) == 0
    said = capsys.readouterr().out
    for offer in download.offers().values():
        line = next(line for line in said.splitlines() if line.startswith(f"{offer.name} "))
        assert offer.title in line and offer.licence.name in line
        assert ("non-commercial" in line) != offer.licence.commercial
        folders = sorted(file.folder for file in offer.files)
        assert folders == ["diffusion_models", "text_encoders", "text_encoders", "vae"]
        weights, words = (f for f in offer.files if f.folder == "text_encoders")
        assert words.name == weights.name.replace(".safetensors", ".tokenizer.json")
