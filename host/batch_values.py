"""What a batch varies: values typed as `--set NAME=VALUE`, or the rows of a table.

Values that were typed are lists (`a|b|c`) and ranges (`1..20`); a cell of a table is one value.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_VALUES = 100_000  # of one range, and jobs of one batch
NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}


class BatchError(ValueError):
    """A batch that cannot be run as it was asked for; the message says what to change."""


# ---- values as they are typed ------------------------------------------------------------------


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE as (name, value). BatchError without a name or an equals sign."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise BatchError(f"--set takes NAME=VALUE, such as seed=1..20; {text!r} was given.")
    return name.strip(), value


def alternatives(text: str) -> list[str]:
    r"""The parts between `|` marks; `\|` is the mark itself."""
    return [part.replace("\\|", "|") for part in re.split(r"(?<!\\)\|", text)]


def spread(name: str, text: str, spec: Sequence[Any] | None, now: Any) -> list[Any]:
    """All values that a `--set` stands for, of the type that the input takes.

    `spec` is the input's entry in /object_info ([type, options]), None where the server does not
    list it: then `now`, the workflow's value, says the type. BatchError names what does not fit.
    """
    values: list[Any] = []
    for part in alternatives(text):
        found = re.fullmatch(r"\s*(-?\d+)\.\.(-?\d+)\s*", part)
        if found and kind_of(spec, now) in NUMBERS:
            first, last = int(found[1]), int(found[2])
            if not first <= last < first + MOST_VALUES:
                raise BatchError(
                    f"{name}: the range {part.strip()} must count up, and have at most "
                    f"{MOST_VALUES} values."
                )
            values += range(first, last + 1)
        else:
            values.append(typed(name, part, spec, now))
    return values


def kind_of(spec: Sequence[Any] | None, now: Any) -> str:
    """The type of an input: INT, FLOAT, STRING, BOOLEAN, COMBO, or another name."""
    if spec:
        return "COMBO" if isinstance(spec[0], list) else str(spec[0])
    kinds = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}
    return kinds.get(type(now), "JSON")


def typed(name: str, text: str, spec: Sequence[Any] | None, now: Any) -> Any:
    """One value that was written as text."""
    kind = kind_of(spec, now)
    if kind in NUMBERS:
        try:
            return int(text) if kind == "INT" else float(text)
        except ValueError:
            raise unfit(name, NUMBERS[kind], text) from None
    if kind == "BOOLEAN":
        if text.strip().lower() not in ("true", "false"):
            raise unfit(name, "true or false", text)
        return text.strip().lower() == "true"
    if kind == "COMBO":
        return chosen(name, text, spec)
    if kind == "JSON":
        try:
            return json.loads(text)
        except ValueError:
            raise unfit(name, "JSON", text) from None
    return text


def chosen(name: str, text: str, spec: Sequence[Any] | None) -> Any:
    """The choice of that name. A list that the server fills later is not known here."""
    options = choices(spec)
    if not options:
        return text
    for option in options:
        if str(option) == text:
            return option
    shown = ", ".join(map(str, options[:12])) + (", ..." if len(options) > 12 else "")
    raise unfit(name, f"one of {shown}", text)


def choices(spec: Sequence[Any] | None) -> list[Any]:
    """The options of a combo, in the old and the new form of /object_info."""
    if not spec:
        return []
    if isinstance(spec[0], list):
        return spec[0]
    options = spec[1].get("options") if len(spec) > 1 and isinstance(spec[1], Mapping) else None
    return options if isinstance(options, list) else []


def unfit(name: str, wanted: str, given: Any) -> BatchError:
    return BatchError(f"{name} takes {wanted}; {str(given)[:80]!r} was given.")


def from_cell(name: str, value: Any, spec: Sequence[Any] | None, now: Any) -> Any:
    """One value of a table: text as it is typed, JSON of the type that the input takes."""
    if isinstance(value, str):
        return typed(name, value, spec, now)
    kind = kind_of(spec, now)
    fits = {
        "INT": isinstance(value, int) and not isinstance(value, bool),
        "FLOAT": isinstance(value, int | float) and not isinstance(value, bool),
        "BOOLEAN": isinstance(value, bool), "STRING": False,
    }  # fmt: skip
    if not fits.get(kind, True):
        wanted = NUMBERS | {"BOOLEAN": "true or false", "STRING": "a text"}
        raise unfit(name, wanted[kind], json.dumps(value))
    return value


# ---- tables ------------------------------------------------------------------------------------


def csv_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV with a header, empty cells left out. BatchError names file and line."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    names = reader.fieldnames or []
    if not names or any(not (name or "").strip() for name in names):
        raise BatchError(f"{path} needs a first line that names every column, such as prompt,seed.")
    if len(set(names)) < len(names):
        raise BatchError(f"{path} has two columns of the same name; rename one.")
    rows = []
    try:
        for row in reader:
            if None in row:
                raise BatchError(
                    f"{path}, line {reader.line_num}: more cells than columns; put text with "
                    "commas in double quotes."
                )
            rows.append({name.strip(): value for name, value in row.items() if value})
    except csv.Error as error:
        raise BatchError(f"{path}, line {reader.line_num}: {error}.") from error
    return _some(path, rows)


def jsonl_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, null left out. BatchError names file and line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BatchError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise BatchError(f"{path}, line {number} must be an object, such as {{'seed': 1}}.")
        rows.append({name: value for name, value in row.items() if value is not None})
    return _some(path, rows)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _some(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        raise BatchError(f"{path} has no row; write one for each job.")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
