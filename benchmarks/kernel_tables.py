"""The result `kernels` as the table that docs/kernels.md quotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def kernels_table(document: Mapping[str, Any]) -> str:
    """A table per operator with a row per size and dtype: registers and KiB of shared memory on each architecture."""
    arches = [str(arch) for arch in document["protocol"]["arches"]]
    by_operator: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        by_operator.setdefault(row["details"]["operator"], []).append(row["details"])
    header = ["size", "first in", "dtype", *(f"sm_{arch}" for arch in arches)]
    parts = []
    for operator, kernels in by_operator.items():
        cells = [header, ["---"] * len(header)]
        for kernel in sorted(kernels, key=lambda kernel: (bool(kernel["channels_last"]), kernel["size"])):
            size = f"{kernel['size']}{' cl' if kernel['channels_last'] else ''}"
            facts = (_cell(kernel["arches"][arch]) for arch in arches)
            cells.append([size, f"`{kernel['model']}`", kernel["dtype"], *facts])
        lines = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        parts.append(f"`{operator}`\n\n{lines}")
    kernels_count = len(document["rows"]) * len(arches)
    missing = sum(int(row["value"]) for row in document["rows"])
    verdict = "All of them are within the limits." if missing == 0 else f"**{missing} of them are not there.**"
    quick = " Compiled with --quick: a small part." if document["protocol"]["quick"] else ""
    conditions = (
        f"Triton {document['versions'].get('triton', 'unknown')} and its ptxas; {document['date'][:10]}.{quick}"
    )
    return "\n\n".join([*parts, f"{kernels_count} kernels. {verdict}", conditions])


def _cell(facts: Mapping[str, Any]) -> str:
    if "reason" in facts:
        return f"**{facts['state']}**"
    spills = f", **{facts['spill_bytes']} B spilled**" if facts["spill_bytes"] else ""
    return f"{facts['registers']} / {facts['shared_bytes'] / 1024:g}{spills}"
