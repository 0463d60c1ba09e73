"""What the commands print: tables and JSON documents on stdout, files written whole or not at all.

Data goes to stdout; everything else (errors, progress) goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evit_deploy.errors import EvitDeployError, UsageError

NOTHING = "-"  # a cell without a value


class StdoutClosed(Exception):
    """The reader of stdout went away, as `| head -1` does."""


def emit(text: str) -> None:
    """Write text and a newline to stdout, now.

    Raises:
        StdoutClosed: nobody reads any more.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise StdoutClosed from error


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def json_text(document: Mapping[str, Any]) -> str:
    """One JSON document, indented; NaN and infinities become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def emit_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout."""
    emit(json_text(document))


def check_destination(path: Path, option: str) -> None:
    """Refuse a file that could not be written at the end, before the work begins.

    Raises:
        UsageError: the folder is not there, or the path is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder", hint="name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}", hint="make it first")


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a full disk or a kill leaves the old file or none.

    Raises:
        EvitDeployError: the file cannot be written.
    """
    special = path.exists() and not path.is_file()  # a device or a named pipe has no name to replace
    staging = path if special else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text, encoding="utf-8")
        if not special:
            staging.replace(path)
    except OSError as error:
        hint = "free some space or name another file"
        raise EvitDeployError(f"cannot write {path}, {error.strerror or error}", hint=hint) from error
    finally:
        if not special:
            staging.unlink(missing_ok=True)


def format_number(value: float | int | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash for None, the word for NaN and infinities."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude > 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def format_bytes(count: int | None) -> str:
    """A size in units of 1024: "13.4 MiB"."""
    if count is None:
        return NOTHING
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024 or unit == "GiB":
            break
    return f"{size:.1f} {unit}"


def _is_numeric(cell: str) -> bool:
    return cell == NOTHING or cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit()) or cell in ("nan", "inf")


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, two spaces between columns; columns of numbers are aligned right, the others left.

    Args:
        columns: headings, with units.
        rows: one cell per column, already formatted.
    """
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    right = [bool(rows) and all(_is_numeric(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for cells in (columns, *rows):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def format_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one a line, the values aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs)
