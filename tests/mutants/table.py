"""Many faults of one file and one test as a table."""

from __future__ import annotations

from collections.abc import Mapping

from tests.mutants.fault import Fault

Table = Mapping[str, tuple[str, str]]  # a fault's name, the text that is right and what stands there instead


def faults(area: str, file: str, test: str, table: Table, select: str = "") -> tuple[Fault, ...]:
    """The faults of a table.

    Args:
        area: begins each name.
        file: where they are planted.
        test: what must catch each.
        table: name to right and wrong text.
        select: see `Fault`.
    """
    return tuple(
        Fault(f"{area}: {name}", file, right, wrong, (test,), select) for name, (right, wrong) in table.items()
    )
