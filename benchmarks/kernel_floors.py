"""The least time of every fused attention call that the published models make on an H200: calculated, not measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.result import RATIO, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.specs import variant_names

NAME = "kernel-floors"
TITLE = "the fused attention calls: bytes, operations, and the least time on an H200 (calculated, FP16)"
GOAL = "a call moves fewer bytes than its definition does operation by operation, in one launch"
BATCHES = (1, 64)
SHARE = "bytes of a call over its definition's, the most"

# Assumed, not measured: what other kernels reached on an H200 (memory, matrix) and quotes of an H100's (exponentials).
BANDWIDTH = 4.3e12
MATRIX_FLOPS_PER_S = 790e12
EXPONENTIALS_PER_S = 3.9e12


def run(settings: Settings, workspace: Workspace) -> Result:
    """Count every distinct size; nothing is computed and nothing is timed."""
    from benchmarks.floor_rows import floor_rows  # imports torch

    batches = settings.batches or BATCHES
    workspace.progress("counting the attention calls")
    ceilings = (BANDWIDTH, MATRIX_FLOPS_PER_S, EXPONENTIALS_PER_S)
    rows = floor_rows(settings.models or variant_names(), batches, settings.image_size, *ceilings)
    rows += [_worst_share(rows, batch) for batch in batches]
    protocol = {
        "calculated": True,
        "verified_on_a_gpu": False,
        "ceilings": {
            "bytes_per_s": BANDWIDTH,
            "dense_fp16_flops_per_s": MATRIX_FLOPS_PER_S,
            "exponentials_per_s": EXPONENTIALS_PER_S,
            "source": "assumed for an H200; not measured here",
        },
        "floor": "the largest of bytes, matrix operations and exponentials over its ceiling; no launch overhead",
        "counted": "every input and output once, parameters once a batch, useful operations only (no padding to tiles)",
        "definition": "every operation that makes no view reads its inputs once and writes its outputs once",
        "dtype": "fp16",
        "image_size_px": settings.image_size,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _worst_share(rows: Sequence[Row], batch: int) -> Row:
    shares = {
        row.subject: (row.details["read_bytes"] + row.details["written_bytes"]) / row.details["definition"]["bytes"]
        for row in rows
        if row.batch == batch
    }
    worst = max(shares, key=lambda subject: shares[subject])
    return Row(worst, SHARE, RATIO, shares[worst], batch, goal=Goal("<", 1.0))
