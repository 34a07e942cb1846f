"""Pictures in and out, and the files that the page is made of."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web
from PIL import Image

from .api_user import read_settings, write_settings
from .images import FORMATS, PictureError, header, opened, write_new, write_over
from .paths import KINDS, PathError, annotated, checked_parts, existing, files_below, inside
from .server import LARGEST_UPLOAD, STATE, BadRequest, parse_json

MOST_FIELDS = 16
LARGEST_FIELD = 16 * 2**10
SUFFIXES = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",), "GIF": (".gif",),
            "BMP": (".bmp",)}  # fmt: skip
# A file from a folder of the user is shown, but never a page: no script, no form, no frame.
SAFE = {"Content-Security-Policy": "sandbox; default-src 'none'", "Cache-Control": "no-cache"}
PACK = "seedling"
WELCOME = "Text to Image"  # the template that a first visit opens
TUTORIAL = "Comfy.TutorialCompleted"  # the page's setting: false for a user that it does not know
VISITED_DAYS = 365  # browsers keep a cookie for 400 at most; every visit renews it


# ---- pictures out ------------------------------------------------------------------------------


async def view(request: web.Request) -> web.StreamResponse:
    """GET /view?filename=&subfolder=&type=[&preview=webp;90][&channel=rgb|rgba|a]."""
    state, query = request.app[STATE], request.query
    name, kind = annotated(query.get("filename", ""), query.get("type", "output"))
    if not name:
        raise BadRequest("Say which file: ?filename=.")
    path = existing(state.options.folders.of(kind), query.get("subfolder", ""), name)
    try:
        found = await asyncio.to_thread(header, path)
    except PictureError as error:
        if "pixels" in str(error):
            raise BadRequest(str(error)) from None
        # Not a picture: handed over, not shown.
        attach = {"Content-Type": "application/octet-stream", "Content-Disposition": "attachment"}
        return web.FileResponse(path, headers=SAFE | attach)
    preview, channel = query.get("preview"), query.get("channel", "rgba")
    if preview is None and channel == "rgba":
        return web.FileResponse(path, headers=SAFE | {"Content-Type": FORMATS[found.format]})
    data, mime = await asyncio.to_thread(redrawn, path, preview, channel)
    return web.Response(body=data, headers=SAFE | {"Content-Type": mime})


def redrawn(path: Path, preview: str | None, channel: str) -> tuple[bytes, str]:
    """A picture as a smaller file, or one of its channels."""
    if channel not in ("rgb", "rgba", "a"):
        raise BadRequest("channel must be rgb, rgba or a.")
    kind, _, quality = (preview or "png").partition(";")
    if kind not in ("webp", "jpeg", "png") or not re.fullmatch(r"\d{0,3}", quality):
        raise BadRequest("preview must be webp, jpeg or png, with a quality: webp;90.")
    with opened(path) as (image, _):
        try:
            picture = image.convert("RGBA" if "A" in image.getbands() else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise BadRequest(f"{path.name} is damaged: {error}") from None
    if channel == "a":
        alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
        picture = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        if alpha is not None:
            picture.putalpha(alpha)
    elif channel == "rgb" or kind == "jpeg":
        picture = picture.convert("RGB")
    data = io.BytesIO()
    options = {} if kind == "png" else {"quality": max(1, min(int(quality or 90), 100))}
    picture.save(data, kind.upper(), **options)
    return data.getvalue(), f"image/{kind}"


# ---- pictures in -------------------------------------------------------------------------------


async def form(request: web.Request) -> tuple[dict[str, str], tuple[str, bytes]]:
    """The fields of an upload, and its file as (name, bytes). BadRequest without one."""
    if request.content_type != "multipart/form-data":
        raise BadRequest("An upload is multipart/form-data with a part called 'image'.")
    fields: dict[str, str] = {}
    file: tuple[str, bytes] | None = None
    try:
        reader = await request.multipart()
        count = 0
        while (part := await reader.next()) is not None:
            count += 1
            if count > MOST_FIELDS or not isinstance(part, BodyPartReader):
                raise BadRequest(f"An upload has at most {MOST_FIELDS} plain parts.")
            is_file = part.name == "image" and part.filename is not None
            data = await limited(part, LARGEST_UPLOAD if is_file else LARGEST_FIELD)
            if is_file:
                file = (part.filename or "", data)
            else:
                fields[part.name or ""] = data.decode("utf-8", "strict")
    except (ValueError, AssertionError, LookupError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest("The upload is not well-formed multipart/form-data.") from None
    if file is None:
        raise BadRequest("The upload has no file called 'image'.")
    return fields, file


async def limited(part: BodyPartReader, most: int) -> bytes:
    """The bytes of a part; 413 when there are more than `most`."""
    data = bytearray()
    while chunk := await part.read_chunk(2**18):
        data += chunk
        if len(data) > most:
            raise web.HTTPRequestEntityTooLarge(max_size=most, actual_size=len(data))
    return bytes(data)


def decodable(data: bytes) -> str:
    """The format of an uploaded picture, decoded once to be sure; BadRequest otherwise."""
    try:
        with opened(io.BytesIO(data)) as (image, found):
            image.load()
            return found.format
    except PictureError as error:
        raise BadRequest(str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadRequest(f"The upload is a damaged picture: {error}") from None


def keep(folder: Path, name: str, kind: str, data: bytes, overwrite: bool) -> str:
    """Write an upload under its name, with the suffix of its format; the name that it got."""
    parts = checked_parts(name.replace("\\", "/").rpartition("/")[2])
    if not parts:
        raise PathError("The uploaded file has no name.")
    plain = parts[0].lstrip(".") or "picture"
    if not plain.lower().endswith(SUFFIXES[kind]):
        plain += SUFFIXES[kind][0]
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        write_over(inside(folder, plain), data)
        return plain
    stem, _, suffix = plain.rpartition(".")
    for number in range(10_000):
        candidate = plain if number == 0 else f"{stem} ({number}).{suffix}"
        path = inside(folder, candidate)
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return candidate
        if write_new(path, data):
            return candidate
    raise PathError("There are too many files of that name.")


async def upload_image(request: web.Request) -> web.Response:
    """POST /upload/image: image, and optionally type, subfolder, overwrite."""
    fields, (name, data) = await form(request)
    kind, subfolder = fields.get("type") or "input", fields.get("subfolder", "")
    folder = inside(request.app[STATE].options.folders.of(kind), subfolder)
    found = await asyncio.to_thread(decodable, data)
    overwrite = fields.get("overwrite", "") in ("1", "true")
    kept = await asyncio.to_thread(keep, folder, name, found, data, overwrite)
    return web.json_response({"name": kept, "subfolder": subfolder, "type": kind})


async def upload_mask(request: web.Request) -> web.Response:
    """POST /upload/mask: the original with the alpha of the uploaded picture."""
    fields, (name, data) = await form(request)
    folders = request.app[STATE].options.folders
    source = parse_json(fields.get("original_ref", "null"))
    if not isinstance(source, dict) or not all(isinstance(v, str) for v in source.values()):
        raise BadRequest("original_ref must be a JSON object of texts: filename, subfolder, type.")
    plain, kind = annotated(source.get("filename", ""), source.get("type") or "output")
    original = existing(folders.of(kind), source.get("subfolder", ""), plain)
    target, subfolder = fields.get("type") or "input", fields.get("subfolder", "")
    folder = inside(folders.of(target), subfolder)
    await asyncio.to_thread(decodable, data)
    masked = await asyncio.to_thread(with_mask, original, data)
    overwrite = fields.get("overwrite", "") in ("1", "true")
    kept = await asyncio.to_thread(keep, folder, name, "PNG", masked, overwrite)
    return web.json_response({"name": kept, "subfolder": subfolder, "type": target})


def with_mask(original: Path, mask: bytes) -> bytes:
    try:
        with opened(original) as (image, _):
            picture, text = image.convert("RGBA"), dict(getattr(image, "text", {}))
        with opened(io.BytesIO(mask)) as (image, _):
            alpha = image.convert("RGBA").getchannel("A").resize(picture.size)
    except PictureError as error:
        raise BadRequest(str(error)) from None
    from PIL.PngImagePlugin import PngInfo

    picture.putalpha(alpha)
    recipe = PngInfo()
    for key, value in text.items():
        recipe.add_text(key, value)
    data = io.BytesIO()
    picture.save(data, "PNG", pnginfo=recipe, compress_level=4)
    return data.getvalue()


async def internal_files(request: web.Request) -> web.Response:
    """GET /internal/files/{type}: names, the newest first."""
    kind = request.match_info["type"]
    if kind not in KINDS:
        raise BadRequest("There are the folders input, output and temp.")
    found = [
        (entry.stat().st_mtime, name)
        for name, entry in files_below(request.app[STATE].options.folders.of(kind), links=False)
        if "/" not in name
    ]
    return web.json_response([name for _, name in sorted(found, reverse=True)])


# ---- the pack's own files ----------------------------------------------------------------------


async def extensions(request: web.Request) -> web.Response:
    """The scripts that the page imports: the front end's own and ours."""
    options = request.app[STATE].options
    listed = []
    if options.page is not None:
        core = options.page / "extensions"
        listed += [f"/extensions/{name}" for name, _ in files_below(core) if name.endswith(".js")]
    web_folder = options.root / "web"
    listed += [
        f"/extensions/{PACK}/{name}" for name, _ in files_below(web_folder) if name.endswith(".js")
    ]
    return web.json_response(sorted(listed))


async def i18n(request: web.Request) -> web.Response:
    """locales/<language>/{main,nodeDefs,commands,settings}.json as one object."""
    folder = request.app[STATE].options.root / "locales"
    answer: dict[str, Any] = {}
    for language in sorted(folder.iterdir()) if folder.is_dir() else []:
        entry = answer.setdefault(language.name, {})
        for part in ("nodeDefs", "commands", "settings"):
            if (file := language / f"{part}.json").is_file():
                entry[part] = json.loads(file.read_text(encoding="utf-8"))
        if (file := language / "main.json").is_file():
            entry |= json.loads(file.read_text(encoding="utf-8"))
    return web.json_response(answer)


def own_file(folder: Path, *names: str) -> Path:
    """A file of the pack or the front end. Their links are followed: pip and uv may make some."""
    path = folder.joinpath(*(part for name in names for part in checked_parts(name)))
    if not path.is_file():
        raise FileNotFoundError(path.name)
    return path


# ---- the page ----------------------------------------------------------------------------------


async def index(request: web.Request) -> web.StreamResponse:
    page = request.app[STATE].options.page
    if page is None:
        raise web.HTTPNotFound(
            text="The editor is not installed: pip install 'seedling[host]', then start again."
        )
    answer: web.StreamResponse = web.FileResponse(page / "index.html")
    if await first_visit(request):
        address = f"/?template={WELCOME.replace(' ', '-')}&source=default"
        answer = web.Response(status=302, headers={"Location": address})
    answer.headers["Cache-Control"] = "no-store"
    answer.set_cookie(
        visited(request), "1", max_age=VISITED_DAYS * 86400, samesite="Lax", httponly=True
    )
    return answer


def visited(request: web.Request) -> str:
    """The cookie of a browser that was here. It keeps tabs by port, cookies for all ports."""
    return f"{PACK}-{request.url.port}"


async def first_visit(request: web.Request) -> bool:
    """Whether this browser opens the page for the first time, and so has no tabs to go back to.

    The page then shows its own default graph, whose nodes are not here, unless it also takes its
    user for a new one and the address names a template; so it is told both.
    """
    state = request.app[STATE]
    is_person = "text/html" in request.headers.get("Accept", "")
    if not is_person or request.query_string or visited(request) in request.cookies:
        return False
    if not (state.options.root / "example_workflows" / f"{WELCOME}.json").is_file():
        return False
    if read_settings(state).get(TUTORIAL):
        await write_settings(state, {TUTORIAL: False})
    return True


async def extension_file(request: web.Request) -> web.StreamResponse:
    """/extensions/seedling/... is web/; the rest is the front end's."""
    options, name = request.app[STATE].options, request.match_info["file"]
    pack, _, rest = name.partition("/")
    if pack == PACK:
        return web.FileResponse(own_file(options.root / "web", rest))
    if options.page is None:
        raise web.HTTPNotFound
    return web.FileResponse(own_file(options.page / "extensions", name))


async def page_file(request: web.Request) -> web.StreamResponse:
    options, name = request.app[STATE].options, request.match_info["file"]
    if options.page is None or name.startswith("api/"):
        raise web.HTTPNotFound
    # Names below assets/ carry a hash of their content.
    lasting = name.startswith(("assets/", "fonts/"))
    kept = "public, max-age=31536000, immutable" if lasting else "no-cache"
    return web.FileResponse(own_file(options.page, name), headers={"Cache-Control": kept})


def add_static(app: web.Application) -> None:
    """Routes without /api, the page's last: it takes every name that is left."""
    app.router.add_get("/", index)
    app.router.add_get("/extensions/{file:.+}", extension_file)
    app.router.add_get("/{file:.+}", page_file)


ROUTES = [
    ("GET", "/view", view),
    ("POST", "/upload/image", upload_image),
    ("POST", "/upload/mask", upload_mask),
    ("GET", "/internal/files/{type}", internal_files),
    ("GET", "/extensions", extensions),
    ("GET", "/i18n", i18n),
]
