"""Names stay in their folders (G11), pictures are measured before they are opened (G12)."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from seedling.host.paths import PathError, checked_parts, existing, inside


def load(name: str) -> Any:
    """A neighbour of this file; importlib mode has no other way."""
    known = f"seedling_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


tools = load("host_tools")
host = tools.host
JSON, one = tools.JSON, tools.one

# Each names, in the eyes of some system, a file outside; or is no name at all.
NAMES = [
    "../secret.txt",
    "../../secret.txt",
    "a/../../secret.txt",
    "..\\secret.txt",
    "..\\..\\secret.txt",
    "/etc/passwd",
    "//etc/passwd",
    "\\etc\\passwd",
    "\\\\server\\share",
    "C:\\secret.txt",
    "C:secret.txt",
    "c:/secret.txt",
    "~/secret.txt",
    "~root/x",
    "a\x00b",
    "a\nb",
    "a\rb",
    "a\x7fb",
    "file:///etc/passwd",
    "x:stream",
    "a:b",
    "CON",
    "nul.png",
    "com1.png",
    "LPT9",
    "aux.tar.gz",
    "a/CON/b",
    "a.",
    "a ",
    "a/.. /b",
    "../",
    "..",
    "a/..",
    "./../secret.txt",
    ".//..//secret.txt",
    "a/b/../../../secret.txt",
    "\u202egnp.x",
    "a\u200fb",
    "a\u2066b",
    "x" * 300,
    "é" * 150,
    "\ud800",
    "link/passwd",
    "linked.txt",
    "hard.txt",
    "loop/x",
    "..\u2215secret.txt/..",
    "../secret.txt\x00.png",
    "....//secret.txt/../..",
    "sub/../../secret.txt",
    "sub/link2",
    "sub\\..\\..\\secret.txt",
    "sub/\x01",
    "/proc/self/environ",
    "/dev/zero",
    "../user/default/comfy.settings.json",
    "../queue.sqlite",
    "./../queue.sqlite",
    "..//queue.sqlite",
    "/../queue.sqlite",
]
LINKS = {
    "link/passwd",
    "linked.txt",
    "hard.txt",
    "loop/x",
    "..\u2215secret.txt/..",
    "sub/link2",
}


@pytest.fixture(scope="module")
def traps(host: Any) -> Any:
    """Secrets beside the studio's folders, and links to them inside."""
    secret = host.home.parent / "secret.txt"
    secret.write_text("do not read")
    (host.home / "secret.txt").write_text("do not read")
    for kind in ("input", "output", "temp", "user/default"):
        folder = host.home / kind
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "link").symlink_to("/etc")
        (folder / "linked.txt").symlink_to(secret)
        (folder / "sub" / "link2").symlink_to(host.home / "secret.txt")
        os.link(secret, folder / "hard.txt")
        (folder / "loop").symlink_to(folder / "loop")
    (host.log).write_text("")
    return host


def url(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def routes(name: str) -> list[tuple[str, str]]:
    """Every route that takes a name, with this one in each place."""
    n = url(name)
    return [
        *(("GET", f"/api/view?filename={n}&type={kind}") for kind in ("input", "output", "temp")),
        ("GET", f"/api/view?filename=x.png&subfolder={n}"),
        ("GET", f"/view?filename=x.png&type={n}"),
        ("GET", f"/api/view?filename={n}&preview=webp;90"), ("GET", f"/api/userdata/{n}"),
        ("GET", f"/api/userdata?dir={n}&full_info=true&recurse=true"),
        ("DELETE", f"/api/userdata/{n}"),
        ("POST", f"/api/userdata/{n}/move/{n}"), ("POST", f"/api/userdata/{n}?overwrite=true"),
        ("GET", f"/extensions/seedling/{n}"), ("GET", f"/extensions/{n}"), ("GET", f"/{n}"),
        ("GET", f"/assets/{n}"), ("GET", f"/templates/{n}.json"),
        ("GET", f"/api/models/{n}"), ("GET", f"/api/experiment/models/{n}"),
        ("GET", f"/internal/files/{n}"), ("GET", f"/api/global_subgraphs/{n}"),
        ("GET", f"/templates/{n}"), ("GET", f"/api/jobs/{n}"), ("GET", f"/api/settings/{n}"),
    ]  # fmt: skip


def opened(host: Any) -> str:
    """What the server has opened since the traps were set."""
    return host.log.read_text()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_leaves_its_folder(traps: Any, name: str) -> None:
    """0 opens outside the roots over every route and node that takes a name; never a 5xx."""
    for method, path in routes(name):
        body = b"{}" if method == "POST" else None
        status, _, data = traps.ask(method, path, body, JSON)
        assert status < 500, (method, path)
        assert b"do not read" not in data and b"root:" not in data
    for kind in ("LoadImage", "SaveImage"):
        inputs = (
            {"image": name}
            if kind == "LoadImage"
            else {"images": ["2", 0], "filename_prefix": name}
        )
        prompt = one(kind, **inputs) | {
            "2": {"class_type": "TestNoise", "inputs": {"seed": 1, "size": 8}}
        }
        assert traps.post("/api/prompt", {"prompt": prompt})[0] < 500
    seen = opened(traps)
    assert "secret" not in seen and "passwd" not in seen and "/etc/" not in seen
    assert not (traps.home.parent / "x.png").exists()
    assert (traps.home / "secret.txt").read_text() == "do not read"


def test_the_gate_itself(tmp_path: Path) -> None:
    for name in NAMES:
        if name in LINKS:
            continue
        with pytest.raises(PathError):
            checked_parts(name)
    for name in ("a.png", "sub/b.png", "ä ö.png", "图.png", "a..b", "...x", ".hidden"):
        assert inside(tmp_path, name) == tmp_path.resolve() / name
    (tmp_path / "file").touch()
    (tmp_path / "out").symlink_to(tmp_path.parent)
    (tmp_path / "in").symlink_to(tmp_path / "file")
    assert existing(tmp_path, "in") == (tmp_path / "file").resolve()
    with pytest.raises(PathError, match="out of its folder"):
        inside(tmp_path, "out", "x")


def test_saving_outside_is_an_error_of_the_job(traps: Any) -> None:
    prompt = {
        "1": {"class_type": "TestNoise", "inputs": {"seed": 1, "size": 8}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "../../x"},
        },
    }
    ended = traps.finished(traps.queue(prompt))
    assert "cannot be part of a file name" in tools.error_of(ended)


# ---- uploads -----------------------------------------------------------------------------------


def picture(
    kind: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", **more: Any
) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, (200, 100, 50, 128)[: len(mode)]).save(data, kind, **more)
    return data.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of any size in few bytes: rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width * 3)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_upload_is_seen_loaded_and_kept_once(host: Any) -> None:
    data = picture()
    assert host.upload("a.png", data) == (200, {"name": "a.png", "subfolder": "", "type": "input"})
    assert host.upload("a.png", data)[1]["name"] == "a.png"
    assert host.upload("a.png", picture(size=(9, 6)))[1]["name"] == "a (1).png"
    assert host.upload("a.png", picture(size=(7, 6)), overwrite="true")[1]["name"] == "a.png"
    options = host.get("/api/object_info/LoadImage")[1]["LoadImage"]["input"]["required"]["image"]
    assert {"a.png", "a (1).png"} <= set(options[1]["options"])
    status, headers, seen = host.ask("GET", "/api/view?filename=a.png&type=input")
    assert status == 200 and headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(seen)).size == (7, 6)


def test_load_image_gives_comfyui_s_pixels_and_mask(host: Any) -> None:
    host.upload("alpha.png", picture(mode="RGBA"))
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "alpha.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "LoadImageMask", "inputs": {"image": "alpha.png", "channel": "alpha"}},
        "4": {"class_type": "TestCount", "inputs": {"value": ["3", 0]}},
    }
    ended = host.finished(host.queue(graph))
    (shown,) = ended["outputs"]["2"]["images"]
    data = host.ask("GET", f"/api/view?filename={shown['filename']}&type={shown['type']}")[2]
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (200, 100, 50)


def test_a_saved_picture_carries_its_graph(host: Any) -> None:
    graph = {
        "1": {"class_type": "TestNoise", "inputs": {"seed": 5, "size": 16, "count": 2}},
        "2": {"class_type": "SaveImage",
              "inputs": {"images": ["1", 0], "filename_prefix": "set/%width%"}},
    }  # fmt: skip
    flow = {"nodes": [], "version": 0.4}
    job = host.queue(graph, extra_data={"extra_pnginfo": {"workflow": flow}})
    images = host.finished(job)["outputs"]["2"]["images"]
    assert [i["filename"] for i in images] == ["16_00001_.png", "16_00002_.png"]
    assert {i["subfolder"] for i in images} == {"set"}
    with Image.open(host.home / "output" / "set" / "16_00001_.png") as saved:
        assert json.loads(saved.text["prompt"]) == graph
        assert json.loads(saved.text["workflow"]) == flow
    assert not list((host.home / "output").rglob("*.part"))


NOT_PICTURES = {
    "page.html": b"<script>alert(1)</script>", "a.svg": b"<svg onload='x'/>", "a.py": b"import os",
    "cut.png": picture()[:40], "empty.png": b"", "half.jpg": picture("JPEG", (64, 64))[:300],
    "a.pdf": b"%PDF-1.4", "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n", "tiff.png": picture("TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_only_pictures_are_kept(host: Any, name: str) -> None:
    status, answer = host.upload(name, NOT_PICTURES[name])
    assert status == 400 and answer["error"]["message"]
    assert not (host.home / "input" / name).exists()


def test_a_polyglot_is_only_a_picture(host: Any) -> None:
    """A PNG that is HTML too gets a picture's name, a picture's type and a sandbox."""
    name = host.upload("x.html", picture() + b"<script>alert(1)</script>")[1]["name"]
    assert name == "x.html.png"
    headers = host.ask("GET", f"/api/view?filename={name}&type=input")[1]
    assert headers["content-type"] == "image/png"
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    (host.home / "output" / "page.html").write_text("<script>alert(1)</script>")
    headers = host.ask("GET", "/api/view?filename=page.html")[1]
    assert headers["content-disposition"] == "attachment"
    assert headers["content-type"] == "application/octet-stream"


def test_uploads_end_at_the_limit(host: Any) -> None:
    head = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(2**31)}
    assert host.ask("POST", "/upload/image", None, head)[0] == 413
    many = {f"field{number}": "x" for number in range(100)}
    assert host.upload("a.png", picture(), **many)[0] == 400
    assert host.upload("a.png", picture(), type="zzz")[0] == 400
    assert host.upload("a.png", picture(), subfolder="../..")[0] == 400


def test_a_mask_joins_its_picture(host: Any) -> None:
    host.upload("base.png", picture())
    reference = json.dumps({"filename": "base.png", "type": "input", "subfolder": ""})
    status, answer = host.upload(
        "masked.png", picture(mode="RGBA"), "/upload/mask", original_ref=reference
    )
    assert status == 200
    with Image.open(host.home / "input" / answer["name"]) as masked:
        assert masked.getpixel((0, 0)) == (200, 100, 50, 128)
    outside = json.dumps({"filename": "../../secret.txt", "type": "input"})
    assert host.upload("m.png", picture(), "/upload/mask", original_ref=outside)[0] == 400


# ---- bombs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return png_of(14_000, 14_000)


@pytest.mark.parametrize("way", ["upload", "view", "preview", "node"])
def test_a_bomb_is_refused_by_its_header(host: Any, bomb: bytes, way: str) -> None:
    """14,000 x 14,000 in 0.6 MB: nothing of it is decoded. The goal is 50 ms and 32 MiB."""
    (host.home / "input" / "bomb.png").write_bytes(bomb)
    host.get("/api/view?filename=none.png")
    before, start = host.memory(), time.perf_counter()
    if way == "upload":
        status = host.upload("b.png", bomb)[0]
    elif way == "node":
        graph = one("LoadImage", image="bomb.png") | {
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        }
        status = host.post("/api/prompt", {"prompt": graph})[0]
    else:
        smaller = "&preview=webp;90" if way == "preview" else ""
        status = host.get(f"/api/view?filename=bomb.png&type=input{smaller}")[0]
    seconds = time.perf_counter() - start
    more = host.memory() - before
    sys.stdout.write(f"{way}: {seconds * 1e3:.0f} ms, {more / 2**20:+.0f} MiB\n")
    assert status == 400 and seconds < 0.5
    assert more < 32 * 2**20


def test_many_frames_are_refused(host: Any) -> None:
    frames = [Image.new("L", (4, 4), number % 256) for number in range(400)]
    data = io.BytesIO()
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    status, answer = host.upload("many.webp", data.getvalue())
    assert status == 400 and "frames" in answer["error"]["message"]


def test_a_large_text_is_no_danger(host: Any) -> None:
    text = PngInfo()
    text.add_text("workflow", "x" * (20 * 2**20), zip=True)
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=text)
    before = host.memory()
    assert host.upload("text.png", data.getvalue())[0] == 400
    assert host.memory() - before < 32 * 2**20
