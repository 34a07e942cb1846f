"""The routes of prompts, queue, history and nodes, as comfyui-frontend-package 1.49.6 asks."""

from __future__ import annotations

import os
import platform
import sys
import uuid
from typing import Any

from aiohttp import web

from .events import FEATURES, is_client_id
from .library import object_info
from .queue import FINISHED, QueueError, Row
from .server import STATE, BadRequest, State, body, refusal, strings, whole
from .validate import PromptError, Verdict, judge

INTERFACE = "0.33.0"  # the ComfyUI whose interface this is
STATUSES = ("pending", "in_progress", *FINISHED)
MOST_ROWS = 1000
NO_STORE = {"Cache-Control": "no-store"}


def add_routes(app: web.Application) -> None:
    """Every route, with and without /api in front."""
    from . import api_files, api_templates, api_user

    routes = [
        ("GET", "/prompt", prompt_info),
        ("POST", "/prompt", post_prompt),
        ("GET", "/queue", get_queue),
        ("POST", "/queue", post_queue),
        ("GET", "/history", get_history),
        ("GET", "/history/{id}", get_history_one),
        ("POST", "/history", post_history),
        ("GET", "/jobs", get_jobs),
        ("POST", "/jobs/cancel", cancel_jobs),
        ("GET", "/jobs/{id}", get_job),
        ("POST", "/jobs/{id}/cancel", cancel_job),
        ("POST", "/interrupt", interrupt),
        ("POST", "/free", free),
        ("GET", "/object_info", get_object_info),
        ("GET", "/object_info/{name}", get_object_info),
        ("GET", "/system_stats", system_stats),
        ("GET", "/features", features),
        *api_user.ROUTES,
        *api_files.ROUTES,
        *api_templates.ROUTES,
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
        app.router.add_route(method, f"/api{path}", handler)
    app.router.add_get("/ws", socket)
    api_templates.add_static(app)
    api_files.add_static(app)


async def socket(request: web.Request) -> web.StreamResponse:
    return await request.app[STATE].hub.serve(request)


# ---- prompts -----------------------------------------------------------------------------------


async def prompt_info(request: web.Request) -> web.Response:
    left = await request.app[STATE].queue.count("pending", "in_progress")
    return web.json_response({"exec_info": {"queue_remaining": left}})


async def post_prompt(request: web.Request) -> web.Response:
    """Judge a prompt and put it into the queue; the answer comes when the disk has it."""
    state = request.app[STATE]
    asked = checked_request(await body(request))
    library = await state.nodes()
    try:
        verdict: Verdict = await state.aside(judge, asked["prompt"], library, asked["targets"])
    except PromptError as error:
        return web.json_response({"error": error.body, "node_errors": {}}, status=400)
    if not verdict.outputs:
        return web.json_response(
            {"error": failed_validation(verdict), "node_errors": verdict.node_errors}, status=400
        )
    job = {"prompt": asked["prompt"], "targets": verdict.outputs, "extra": asked["extra"]}
    try:
        number = await state.queue.add(
            asked["id"], asked["client"], asked["number"], asked["front"], job
        )
    except QueueError as error:
        return refusal(400, str(error))
    state.runner.added()
    state.hub.status(await state.queue.count("pending", "in_progress"))
    return web.json_response(
        {"prompt_id": asked["id"], "number": number, "node_errors": verdict.node_errors}
    )


def checked_request(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of POST /prompt, each of its type; BadRequest names the one that is not."""
    client = data.get("client_id") or None
    if client is not None and not is_client_id(client):
        raise BadRequest("client_id must be a text of at most 64 letters, digits, '-', '_' or '.'.")
    extra = data.get("extra_data") or {}
    if not isinstance(extra, dict):
        raise BadRequest("extra_data must be a JSON object.")
    if not isinstance(extra.get("extra_pnginfo") or {}, dict):
        raise BadRequest("extra_data.extra_pnginfo must be a JSON object.")
    number = data.get("number")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
        raise BadRequest("number must be a number.")
    if number is not None and abs(number) > 2**53:
        raise BadRequest("number is too large.")
    targets = data.get("partial_execution_targets")
    if targets is not None:
        targets = strings(targets, "partial_execution_targets")
    return {
        "prompt": data.get("prompt"), "id": prompt_id(data.get("prompt_id")), "client": client,
        "extra": extra, "number": None if number is None else float(number), "targets": targets,
        "front": data.get("front") is True,
    }  # fmt: skip


def prompt_id(value: Any) -> str:
    """A new id, or the one that was given if it is a canonical UUID."""
    if value is None:
        return str(uuid.uuid4())
    try:
        canonical = isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        canonical = False
    if not canonical:
        raise BadRequest("prompt_id must be a UUID in lower case, with dashes.")
    return value


def failed_validation(verdict: Verdict) -> dict[str, Any]:
    """The summary that the page shows when no output can run."""
    lines = [
        f"{entry['class_type']} {node_id}: {error['message']}: {error['details']}"
        for node_id, entry in verdict.node_errors.items()
        for error in entry["errors"]
    ]
    return {
        "type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation",
        "details": "\n".join(lines[:20]), "extra_info": {},
    }  # fmt: skip


# ---- the queue ---------------------------------------------------------------------------------


def queue_item(row: Row) -> list[Any]:
    return [row.number, row.id, row.prompt, row.extra, row.targets]


async def get_queue(request: web.Request) -> web.Response:
    # One query: a job that starts meanwhile is in one of the lists, never in none.
    rows = await request.app[STATE].queue.rows(("in_progress", "pending"), limit=MOST_ROWS + 1)
    running = [queue_item(row) for row in rows if row.status == "in_progress"]
    pending = [queue_item(row) for row in rows if row.status == "pending"]
    return web.json_response({"queue_running": running, "queue_pending": pending})


async def post_queue(request: web.Request) -> web.Response:
    """{"clear": true} or {"delete": [ids]}: waiting jobs are taken out."""
    return await remove(request, request.app[STATE].queue.cancel)


async def post_history(request: web.Request) -> web.Response:
    """{"clear": true} or {"delete": [ids]}: finished jobs are forgotten."""
    return await remove(request, request.app[STATE].queue.forget)


async def remove(request: web.Request, how: Any) -> web.Response:
    state, asked = request.app[STATE], await body(request)
    if "delete" in asked:
        await how(strings(asked["delete"], "delete"))
    if asked.get("clear") is True:
        await how(None)
    state.hub.status(await state.queue.count("pending", "in_progress"))
    return web.json_response({})


async def interrupt(request: web.Request) -> web.Response:
    """Cancel the running job, or only the one that is named."""
    asked = (await body(request)).get("prompt_id")
    if asked is not None and not isinstance(asked, str):
        raise BadRequest("prompt_id must be a text.")
    await request.app[STATE].runner.interrupt(asked)
    return web.json_response({})


async def free(request: web.Request) -> web.Response:
    asked = await body(request)
    if asked.get("unload_models") or asked.get("free_memory"):
        request.app[STATE].runner.free()
    return web.json_response({})


# ---- history and jobs --------------------------------------------------------------------------


def history_item(row: Row) -> dict[str, Any]:
    """A finished job as GET /history has it."""
    return {
        "prompt": queue_item(row),
        "outputs": row.result.get("outputs", {}),
        "status": {
            "status_str": "success" if row.status == "completed" else "error",
            "completed": row.status == "completed",
            "messages": row.result.get("messages", []),
        },
        "meta": row.result.get("meta", {}),
    }


async def get_history(request: web.Request) -> web.Response:
    limit, offset = whole(request, "max_items", 200, MOST_ROWS), whole(request, "offset", 0, 10**9)
    rows = await request.app[STATE].queue.rows(FINISHED, limit, offset)
    return web.json_response({row.id: history_item(row) for row in reversed(rows)})


async def get_history_one(request: web.Request) -> web.Response:
    row = await request.app[STATE].queue.row(request.match_info["id"])
    done = row is not None and row.status in FINISHED
    return web.json_response({row.id: history_item(row)} if row and done else {})


def job_item(row: Row) -> dict[str, Any]:
    """A job as the lists of GET /jobs have it."""
    outputs = row.result.get("outputs", {})
    shown = [
        picture | {"nodeId": node_id, "mediaType": kind}
        for node_id, output in outputs.items()
        for kind, pictures in output.items()
        if isinstance(pictures, list)
        for picture in pictures
        if isinstance(picture, dict) and "filename" in picture
    ]
    saved = [picture for picture in shown if picture.get("type") == "output"]
    workflow = (row.extra.get("extra_pnginfo") or {}).get("workflow")
    item: dict[str, Any] = {
        "id": row.id, "status": row.status, "priority": row.number, "create_time": row.created,
        "execution_start_time": row.started, "execution_end_time": row.ended,
        "outputs_count": len(shown), "previewable_outputs_count": len(shown),
        "preview_output": (saved or shown or [None])[-1],
        "workflow_id": workflow.get("id") if isinstance(workflow, dict) else None,
    }  # fmt: skip
    errors = [data for kind, data in row.result.get("messages", []) if kind == "execution_error"]
    if errors or "error" in row.result:
        item["execution_error"] = errors[-1] if errors else plain_error(row)
    return {key: value for key, value in item.items() if value is not None}


def plain_error(row: Row) -> dict[str, Any]:
    """An error of a job that no node caused."""
    return {
        "prompt_id": row.id, "node_id": None, "node_type": None, "executed": [],
        "exception_message": row.result["error"]["message"], "exception_type": "HostError",
        "traceback": [], "current_inputs": {}, "current_outputs": [], "timestamp": row.ended,
    }  # fmt: skip


async def get_jobs(request: web.Request) -> web.Response:
    queue = request.app[STATE].queue
    wanted = [s for s in request.query.get("status", "").split(",") if s] or list(STATUSES)
    if unknown := sorted(set(wanted) - set(STATUSES)):
        raise BadRequest(
            f"There is no status {unknown[0][:40]!r}; choose from {', '.join(STATUSES)}."
        )
    limit, offset = whole(request, "limit", 100, MOST_ROWS), whole(request, "offset", 0, 10**9)
    newest = request.query.get("sort_order", "desc") != "asc"
    rows = await queue.rows(tuple(wanted), limit, offset, newest)
    total = await queue.count(*wanted)
    more = offset + len(rows) < total
    page = {"offset": offset, "limit": limit, "total": total, "has_more": more}
    return web.json_response({"jobs": [job_item(row) for row in rows], "pagination": page})


async def get_job(request: web.Request) -> web.Response:
    row = await request.app[STATE].queue.row(request.match_info["id"])
    if row is None:
        raise web.HTTPNotFound(text="There is no such job.")
    full = history_item(row)
    return web.json_response(
        job_item(row)
        | {"outputs": full["outputs"], "execution_status": full["status"]}
        | {"workflow": {"prompt": row.prompt, "extra_data": row.extra}}
    )


async def cancel_job(request: web.Request) -> web.Response:
    done = await cancel(request.app[STATE], [request.match_info["id"]])
    return web.json_response({"cancelled": done})


async def cancel_jobs(request: web.Request) -> web.Response:
    asked = strings((await body(request)).get("job_ids"), "job_ids")
    return web.json_response({"cancelled": await cancel(request.app[STATE], asked)})


async def cancel(state: State, ids: list[str]) -> bool:
    """Take jobs out of the queue, or stop the one that runs."""
    stopped = [await state.runner.interrupt(job_id) for job_id in ids]
    removed = await state.queue.cancel(ids)
    state.hub.status(await state.queue.count("pending", "in_progress"))
    return bool(removed) or any(stopped)


# ---- nodes and machine -------------------------------------------------------------------------


async def get_object_info(request: web.Request) -> web.Response:
    state, name = request.app[STATE], request.match_info.get("name")
    names = None if name is None else [name]
    return web.json_response(await state.aside(object_info, await state.nodes(), names))


async def features(request: web.Request) -> web.Response:
    return web.json_response(FEATURES)


async def system_stats(request: web.Request) -> web.Response:
    total, free_bytes = memory()
    system = {
        "os": sys.platform, "ram_total": total, "ram_free": free_bytes,
        "comfyui_version": INTERFACE, "python_version": platform.python_version(),
        "embedded_python": False, "argv": ["seedling", "studio"],
        "pytorch_version": version("torch"),
        "installed_templates_version": None, "required_templates_version": None,
    }  # fmt: skip
    device = {
        "name": platform.machine(), "type": "cpu", "index": 0, "vram_total": total,
        "vram_free": free_bytes, "torch_vram_total": total, "torch_vram_free": free_bytes,
    }  # fmt: skip
    return web.json_response({"system": system, "devices": [device]})


def memory() -> tuple[int, int]:
    """Bytes of memory, all and free; 0 where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def version(package: str) -> str:
    """The installed version of a package, without importing it."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
