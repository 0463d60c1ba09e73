"""Every attention kernel of the published models, compiled for every architecture and assembled by ptxas.

Nothing is timed and nothing runs on a GPU: a row says with how many registers and how much shared memory a kernel was
assembled, and whether one of them breaks a limit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.result import COUNT, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import MissingDependencyError
from evit_deploy.specs import ModelSpec, variant_names

if TYPE_CHECKING:
    from evit_deploy.kernels import KernelRow

NAME = "kernels"
TITLE = "the attention kernels of every published model, compiled for every architecture without a GPU"
GOAL = "every kernel compiles, spills no register and needs at most 48 KiB of shared memory"
QUANTITY = "architectures without a kernel"
QUICK_DTYPES = ("fp16",)
QUICK_ARCHES = (80,)
MAX_REASON_CHARS = 200


def run(settings: Settings, workspace: Workspace) -> Result:
    """Compile everything anew; one row for each kernel, its architectures in the details.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    from evit_kernels.aot import ARCHES
    from evit_kernels.cache import installed_triton

    from evit_deploy.kernels import DTYPES, compile_kernels, needed_kernels

    if installed_triton() is None:
        raise MissingDependencyError("Triton is not installed", hint="pip install 'evit-deploy[kernels]'")
    arches = QUICK_ARCHES if settings.quick else ARCHES
    dtypes = QUICK_DTYPES if settings.quick else tuple(DTYPES)
    specs = [ModelSpec.published(name, image_size=settings.image_size) for name in settings.models or variant_names()]
    needed = needed_kernels(specs, dtypes, workspace.progress)
    compiled = compile_kernels(needed, arches, workspace.folder / NAME, progress=workspace.progress)
    rows = [_row(compiled[i : i + len(arches)]) for i in range(0, len(compiled), len(arches))]
    protocol = {
        "image_size_px": settings.image_size,
        "dtypes": list(dtypes),
        "arches": list(arches),
        "memory_formats": "contiguous and channels_last",
        "cache": "empty",
        "run_on_a_gpu": False,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _row(rows: Sequence[KernelRow]) -> Row:
    """One kernel: a row of `compile_kernels` for each architecture."""
    first = rows[0]
    subject = " ".join(filter(None, (first.operator, first.size, first.channels_last and "channels_last", first.dtype)))
    missing = [row for row in rows if row.registers is None]
    details = {
        "operator": first.operator,
        "size": first.size,
        "channels_last": first.channels_last,
        "dtype": first.dtype,
        "model": first.model,
        "arches": {str(row.arch): _facts(row) for row in rows},
    }
    return Row(subject, QUANTITY, COUNT, float(len(missing)), goal=Goal("<=", 0), details=details)


def _facts(row: KernelRow) -> dict[str, Any]:
    if row.registers is None:
        return {"state": row.state, "reason": re.sub(r"(/[^\s/]+)+/", "", row.reason)[:MAX_REASON_CHARS]}
    return {
        "target": row.target,
        "registers": row.registers,
        "spill_bytes": row.spill_bytes,
        "shared_bytes": row.shared_bytes,
        "threads": row.threads,
    }
