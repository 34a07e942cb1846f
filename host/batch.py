"""`seedling run`: a workflow again and again with other values, on any ComfyUI or studio."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .batch_values import (
    MOST_VALUES,
    BatchError,
    assignment,
    csv_rows,
    from_cell,
    jsonl_rows,
    spread,
)
from .batch_workflow import (
    Graph,
    Info,
    Place,
    find,
    is_canvas,
    is_link,
    key_of,
    read,
    spec_of,
    with_values,
)

MOST_SHOWN = 20  # failures that are listed one by one
Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `seedling run`."""
    add = parser.add_argument
    add("workflow", type=Path, metavar="WORKFLOW", help="JSON in API format; as the editor saves "
        "it, where that carries enough")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="NAME: an input, 'node "
        "title.input' or 'node id.input'; VALUE: one, a|b|c, or 1..20; several make every "
        "combination")  # fmt: skip
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--csv", type=Path, metavar="FILE", help="a row a job, columns are NAMEs")
    table.add_argument("--jsonl", type=Path, metavar="FILE", help="a line a job, keys are NAMEs")
    add("--out", type=Path, metavar="FOLDER", help="pictures and manifest.jsonl; the same command "
        "again makes what is missing there; default: WORKFLOW_batch")  # fmt: skip
    add("--server", metavar="URL", help="a ComfyUI or a studio; default: an engine of its own")
    home = os.environ.get("SEEDLING_HOME") or Path.home() / "seedling"
    add("--home", type=Path, default=home, metavar="FOLDER", help="the studio's folder, without "
        "--server; default: %(default)s, or $SEEDLING_HOME")  # fmt: skip
    add("--models", type=Path, action="append", default=[], metavar="DIR", help="a ComfyUI's "
        "models folder, without --server; may be given more than once")  # fmt: skip


def run(given: argparse.Namespace, saved: list[Path], say: Say) -> int:
    """Run a batch; 0, or 1 when some of it is missing. BatchError when nothing could be begun."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise BatchError("seedling run needs aiohttp: pip install 'seedling[run]'.") from None
    content = read(given.workflow)
    sets = [assignment(text) for text in given.set]
    rows = csv_rows(given.csv) if given.csv else jsonl_rows(given.jsonl) if given.jsonl else [{}]
    check_names(content, sets, rows)
    return asyncio.run(served(given, content, sets, rows, saved, say))


def check_names(content: Any, sets: Sequence[tuple[str, str]], rows: Sequence[dict]) -> None:
    """Refuse what can be refused before any server is asked."""
    names = [name for name, _ in sets]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise BatchError(f"{twice[0]} is set twice; write all values in one: {twice[0]}=a|b|c.")
    columns = dict.fromkeys(name for row in rows for name in row)
    both = [name for name in names if name in columns]
    if both:
        raise BatchError(f"{both[0]} is set by --set and by the table; take one of them out.")
    if not is_canvas(content):
        located(content, [*names, *columns])


def located(graph: Graph, names: Sequence[str]) -> dict[str, Place]:
    """The input behind each name; BatchError when two names mean one."""
    found: dict[str, Place] = {}
    for name in names:
        place = find(graph, name)
        for other, taken in found.items():
            if taken == place:
                raise BatchError(f"{other!r} and {name!r} are the same input; set one of them.")
        found[name] = place
    return found


async def served(
    given: argparse.Namespace,
    content: Any,
    sets: Sequence[tuple[str, str]],
    rows: Sequence[dict[str, Any]],
    saved: list[Path],
    say: Say,
) -> int:
    """With a server: the one that was named, or one for this run."""
    from .batch_client import Client
    from .batch_server import engine

    async def with_server(url: str) -> int:
        async with Client(url) as client:
            await client.greet()
            graph, info = await understood(client, content)
            jobs = plan(graph, info, sets, rows)
            return await made(given, client, jobs, saved, say)

    if given.server is not None:
        return await with_server(given.server)
    say("Starting the engine ...")
    models = tuple(path.expanduser().resolve() for path in given.models)
    async with engine(Path(given.home).expanduser().resolve(), models) as url:
        return await with_server(url)


async def understood(client: Any, content: Any) -> tuple[Graph, Info]:
    """The workflow in API format, and what the server says of its nodes."""
    if not is_canvas(content):
        return content, await client.object_info([n["class_type"] for n in content.values()])
    from .batch_canvas import convert

    kinds = [node["type"] for node in content["nodes"] if isinstance(node, dict) and "type" in node]
    info = await client.object_info(kinds)
    return convert(content, info), info


# ---- jobs --------------------------------------------------------------------------------------


def plan(
    graph: Graph,
    info: Info,
    sets: Sequence[tuple[str, str]],
    rows: Sequence[dict[str, Any]],
) -> list[Any]:
    """Every job: each row with every combination of the sets, the last set changing fastest."""
    from .batch_run import Job

    columns = dict.fromkeys(name for row in rows for name in row)
    inputs = located(graph, [*columns, *(name for name, _ in sets)])

    def about(name: str) -> tuple[list[Any] | None, Any]:
        place = inputs[name]
        now = graph[place.node]["inputs"][place.input]
        assert not is_link(now)
        return spec_of(info, graph, place), now

    lists = [[(name, value) for value in spread(name, text, *about(name))] for name, text in sets]
    count = len(rows)
    for values in lists:
        count *= len(values)
    if count > MOST_VALUES:
        raise BatchError(f"These are {count} jobs; at most {MOST_VALUES} are run as one batch.")
    jobs: list[Job] = []
    seen: Counter[str] = Counter()
    for row in rows:
        cells = {name: from_cell(name, value, *about(name)) for name, value in row.items()}
        for combination in itertools.product(*lists):
            values = cells | dict(combination)
            changed = with_values(graph, {inputs[name]: value for name, value in values.items()})
            key = key_of(changed)
            seen[key] += 1
            key = key if seen[key] == 1 else f"{key}-{seen[key]}"  # asked for twice: made twice
            jobs.append(Job(len(jobs) + 1, key, changed, values))
    return jobs


async def made(
    given: argparse.Namespace, client: Any, jobs: Sequence[Any], saved: list[Path], say: Say
) -> int:
    """Run what is missing of these jobs, and say how it went."""
    from .batch_client import GoneError
    from .batch_manifest import ROWS, Manifest
    from .batch_run import Run

    stem = given.workflow.name.removesuffix(".json").removesuffix(".api") or "picture"
    manifest = Manifest(given.out or Path(f"{stem}_batch"), stem)
    manifest.open()
    done = manifest.done()
    missing = [job for job in jobs if job.key not in done]
    before = f", {len(jobs) - len(missing)} of them done before" if len(missing) < len(jobs) else ""
    say(f"{_counted(len(jobs), 'job')}{before}; into {manifest.folder}")
    bar = TerminalBar(len(jobs), len(jobs) - len(missing))
    batch = Run(client, manifest, saved, bar, given.workflow.name)
    start, gone = time.monotonic(), ""
    try:
        await batch.all(missing)
    except GoneError as error:
        gone = str(error)
    finally:
        bar.close()
    spent = time.monotonic() - start
    ok = len(missing) - len(batch.failures) - len(batch.waiting) - len(batch.flying)
    pace = f", {60 * ok / spent:.1f} jobs a minute" if ok and spent else ""
    say(f"{_counted(ok, 'job')} done in {spent:.1f} s{pace}: "
        f"{_counted(len(saved), 'file')}, {manifest.folder / ROWS}")  # fmt: skip
    if gone:
        sys.stderr.write(f"{gone} When it is back, the same command goes on from here.\n")
    if batch.failures:
        list_failures(batch.failures)
    if gone or batch.failures:
        return 1
    manifest.complete()
    return 0


def list_failures(failures: Sequence[tuple[Any, str]]) -> None:
    """What failed, and why; one reason for many jobs is told once."""
    sys.stderr.write(f"{_counted(len(failures), 'job')} failed; the same command tries again:\n")
    reasons: dict[str, list[Any]] = {}
    for job, why in failures:
        reasons.setdefault(why, []).append(job)
    for why, jobs in list(reasons.items())[:MOST_SHOWN]:
        values = ", ".join(f"{name}={str(value)[:60]}" for name, value in jobs[0].values.items())
        more = f", and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        sys.stderr.write(f"  job {jobs[0].number} ({values}){more}: {why}\n")
    if len(reasons) > MOST_SHOWN:
        sys.stderr.write(f"  and for {len(reasons) - MOST_SHOWN} other reasons\n")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class TerminalBar:
    """The progress of a batch on stderr; nothing where that is no terminal."""

    def __init__(self, jobs: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=jobs, initial=done, unit="job", disable=None, dynamic_ncols=True)

    def landed(self, job: Any) -> None:
        self.bar.update()

    def step(self, value: float, most: float) -> None:
        self.bar.set_postfix_str(f"step {value:.0f} of {most:.0f}", refresh=False)

    def close(self) -> None:
        self.bar.close()
