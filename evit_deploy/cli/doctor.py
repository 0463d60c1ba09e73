"""`evit-deploy doctor`: what this machine has, what a missing part costs, and how to get it."""

from __future__ import annotations

from typing import Any

from evit_deploy.cli.options import JsonFlag
from evit_deploy.cli.output import NOTHING, emit, emit_json, format_table
from evit_deploy.cli.progress import working
from evit_deploy.errors import MissingDependencyError

MAX_FOUND_CHARS = 68  # keeps the table within 100 columns; --json has the whole text


def command(as_json: JsonFlag = False) -> None:
    """Say what is installed, and what is missing."""
    with working() as progress:
        from evit_deploy.doctor import doctor_report

        progress("importing each package")
        document = doctor_report()
    if as_json:
        emit_json(document)
    else:
        emit(doctor_text(document["rows"]))
    missing = [row["name"] for row in document["rows"] if row["required"] and row["status"] == "missing"]
    if missing:
        raise MissingDependencyError(
            f"needed and not there: {', '.join(missing)}", hint="the report says how to get it"
        )


def doctor_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, then what each lack costs and how to mend it."""
    lines = [format_table(("part", "status", "found"), [(r["name"], _status(r), _found(r)) for r in rows])]
    for row in rows:
        if row["without_it"]:
            remedy = f"\n  {row['how_to_get']}" if row["how_to_get"] else ""
            lines.append(f"{row['name']} (for {row['needed_for']}): {row['without_it']}{remedy}")
    return "\n".join([lines[0], "", *lines[1:]] if len(lines) > 1 else lines)


def _status(row: dict[str, Any]) -> str:
    return "not there" if row["status"] == "missing" and not row["required"] else str(row["status"])


def _found(row: dict[str, Any]) -> str:
    found = row["found"] or NOTHING
    return found if len(found) <= MAX_FOUND_CHARS else found[: MAX_FOUND_CHARS - 3] + "..."
