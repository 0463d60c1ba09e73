"""`evit-deploy models`: the published variants of the three families, and what they cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from evit_deploy.cli.options import JsonFlag, check_family
from evit_deploy.cli.output import NOTHING, emit, emit_json, format_table
from evit_deploy.specs import FAMILY_TITLES

SCHEMA = "evit-deploy/models"
SCHEMA_VERSION = 1


def command(
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Only msa, mit or msra.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the families and their variants."""
    check_family(family)
    from evit_deploy.inspection import list_models

    rows = [row for row in list_models() if family in (None, row["family"])]
    if as_json:
        emit_json({"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "rows": rows})
    else:
        emit(models_text(rows))


def models_text(rows: list[dict[str, Any]]) -> str:
    """A table per family, under the family's title."""
    parts = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [
            (row["name"], f"{row['image_size']}", _millions(row["parameters"]), _billions(row["multiply_adds"]))
            for row in rows
            if row["family"] == family
        ]
        table = format_table(("name", "image px", "params M", "multiply-adds G"), cells)
        parts.append(f"{FAMILY_TITLES[family]}\n{table}")
    return "\n\n".join(parts)


def _millions(count: int | None) -> str:
    return NOTHING if count is None else f"{count / 1e6:.2f}"


def _billions(count: int | None) -> str:
    return NOTHING if count is None else f"{count / 1e9:.2f}"
