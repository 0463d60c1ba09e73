"""Figures and outputs in README and docs: filled in from the results, and checked against them.

A section between `<!-- figures: NAME -->` and `<!-- /figures -->` belongs to this module. `python -m benchmarks readme`
writes it; a test fails when a section is not what the results say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import build_trt, digits_precision, kernel_floors, kernels, precision_error, selection, tour
from benchmarks.families import families_table
from benchmarks.floor_tables import SECTIONS
from benchmarks.kernel_tables import kernels_table
from benchmarks.program import ROOT
from benchmarks.result import RESULTS, read_results
from benchmarks.table import markdown
from evit_deploy.errors import EvitDeployError

DOCUMENTS = (
    "README.md",
    "docs/performance.md",
    "docs/build_trt.md",
    "docs/precision.md",
    "docs/backends.md",
    "kernels/evit_kernels/cascaded_attention/README.md",
    "kernels/evit_kernels/lite_mla/README.md",
    "kernels/evit_kernels/multi_scale_attention/README.md",
    "kernels/evit_kernels/projected_multi_scale_attention/README.md",
    "docs/kernels.md",
)
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    build_trt.NAME: lambda result: markdown([result]),
    digits_precision.NAME: digits_precision.accuracy_table,
    precision_error.NAME: lambda result: markdown([result]),
    selection.NAME: selection.selection_table,
    kernels.NAME: kernels_table,
}
_SECTION = re.compile(r"(<!-- figures: (?P<name>[a-z0-9 -]+) -->\n).*?(\n<!-- /figures -->)", re.DOTALL)
_TOUR = re.compile(r"tour (\d)")


def filled(text: str, results: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """A document with every section as the results say.

    Args:
        text: Markdown with sections.
        results: benchmark results by name.
        order: names of the measured benchmarks, as they stand in the table "speed".

    Raises:
        EvitDeployError: a section nobody knows, or one whose result is missing.
    """
    return _SECTION.sub(lambda match: match[1] + _content(match["name"], results, order) + match[3], text)


def write_documents(order: Sequence[str], *, folder: Path = ROOT, results: Path = RESULTS) -> list[str]:
    """Fill in every document; returns the names of those that changed."""
    found = read_results(results)
    changed = []
    for name in DOCUMENTS:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        new = filled(text, found, order)
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed.append(name)
    return changed


def _content(name: str, results: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    if name == "families":
        return families_table()
    if name == "speed":
        return markdown([_required(results, benchmark) for benchmark in order])
    if name in TABLES:
        return TABLES[name](_required(results, name))
    if name in SECTIONS:
        return SECTIONS[name](_required(results, kernel_floors.NAME))
    step = _TOUR.fullmatch(name)
    if step is None:
        known = ", ".join(("families", "speed", *TABLES, *SECTIONS, "tour N"))
        raise EvitDeployError(f"no figures are called {name!r}", hint=f"known: {known}")
    row = _required(results, tour.NAME)["rows"][int(step[1])]
    return f"```\n$ {row['subject']}\n{row['details']['stdout'].rstrip()}\n```"


def _required(results: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    if name not in results:
        raise EvitDeployError(f"there is no result of {name}", hint=f"python -m benchmarks {name} measures it")
    return results[name]
