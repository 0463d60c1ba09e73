"""Words for what differs, and checks that hold whatever the tolerance is: swapped, repeated and leaking rows.

Rows are counted from 0. All arrays are [N, C] float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evit_deploy.parity.gate import Tolerance
from evit_deploy.parity.metrics import RowMetrics, rms

OTHER_WEIGHTS_RMS_REL = 0.1  # below it even INT8 of the same weights stays; other weights differ by 1 and more
NEARER = 0.5  # a row belongs to another image when it is at least twice as near to that image's reference
DISTINCT = 0.01  # references this far apart, as rms_rel, are two images at any precision
REPEATED = 0.01  # two candidate rows are one when they differ by under 1 % of what their references differ by
_ORDER_MATTERS = "an output depends on its place or on the other rows"


def list_rows(rows: Sequence[int] | np.ndarray, total: int | None = None) -> str:
    """ "row 3 of 8", "rows 1, 3 and 5 of 8", "every row of 8"; without `total`, without "of"."""
    rows = [int(row) for row in rows]
    of_total = "" if total is None else f" of {total}"
    if len(rows) == total and total > 1:
        return f"every row{of_total}"
    if len(rows) == 1:
        return f"row {rows[0]}{of_total}"
    if len(rows) > 6:
        return f"rows {', '.join(map(str, rows[:5]))} and {len(rows) - 5} more{of_total}"
    return f"rows {', '.join(map(str, rows[:-1]))} and {rows[-1]}{of_total}"


def distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, M]: rms of the difference of each pair of rows."""
    return np.stack([rms(rows - other) for other in others], axis=1)


def swapped_rows(reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance) -> list[tuple[int, int]]:
    """Pairs (i, j) whose outputs stand in each other's place; near-duplicates are never a pair."""
    distance = distances(candidate, reference)
    rows = np.arange(len(distance))
    nearest = distance.argmin(axis=1)
    scale = rms(reference)
    apart = rms(reference - reference[nearest]) > min(tolerance.rms_rel, DISTINCT) * np.maximum(scale, scale[nearest])
    elsewhere = apart & (distance[rows, nearest] < NEARER * distance[rows, rows])
    return [(i, int(j)) for i, j in enumerate(nearest) if i < j and nearest[j] == i and elsewhere[i] and elsewhere[j]]


def displaced_rows(reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance) -> list[tuple[int, int]]:
    """(i, j) where row i holds, within the tolerance, the output of row j and not its own."""
    distance = distances(candidate, reference)
    rows = np.arange(len(distance))
    nearest = distance.argmin(axis=1)
    limit = tolerance.rms_rel * rms(reference)
    own = distance[rows, rows]
    moved = (distance[rows, nearest] <= limit[nearest]) & (own > limit) & (distance[rows, nearest] < NEARER * own)
    return [(int(i), int(nearest[i])) for i in np.flatnonzero(moved)]


def repeated_rows(reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance) -> tuple[int, list[int]] | None:
    """(j, rows) where the candidate repeats row j for rows whose references differ by more than the tolerance."""
    scale = rms(reference)
    for j in range(len(candidate) - 1):
        apart = rms(reference - reference[j])
        differs = apart > tolerance.rms_rel * np.maximum(scale, scale[j])
        again = np.flatnonzero(differs & (rms(candidate - candidate[j]) < REPEATED * apart))
        if len(again):
            return j, [int(i) for i in again]
    return None


def row_order_faults(reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance, offset: int = 0) -> list[str]:
    """What is wrong with the order of the rows, in words; only finite arrays of two rows and more say anything.

    Args:
        reference: [N, C].
        candidate: [N, C].
        tolerance: limits.
        offset: added to each row number in the words.
    """
    if len(reference) < 2 or not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return []
    repeated = repeated_rows(reference, candidate, tolerance)
    if repeated is not None:
        source, rows = repeated
        verb = "repeats" if len(rows) == 1 else "repeat"
        return [
            f"{list_rows([offset + i for i in rows])} {verb} row {offset + source}: the candidate ignores these images"
        ]
    swapped = swapped_rows(reference, candidate, tolerance)
    if swapped:
        pairs = ", ".join(f"rows {offset + i} and {offset + j}" for i, j in swapped[:3])
        more = f" and {len(swapped) - 3} more pairs" if len(swapped) > 3 else ""
        return [f"{pairs}{more} are swapped"]
    displaced = displaced_rows(reference, candidate, tolerance)
    if displaced:
        i, j = displaced[0]
        verb = "stands" if len(displaced) == 1 else "stand"
        listed = list_rows([offset + row for row, _ in displaced])
        return [f"{listed} {verb} in another row's place: row {offset + i} holds the output of row {offset + j}"]
    return []


def order_dependence(first: np.ndarray, restored: np.ndarray, tolerance: Tolerance, offset: int = 0) -> list[str]:
    """In words, the rows whose output changed when the batch was fed in another order.

    Args:
        first: [N, C] of the batch as it was.
        restored: [N, C] of the permuted batch, rows put back.
        tolerance: limits.
        offset: added to each row number in the words.
    """
    if not (np.isfinite(first).all() and np.isfinite(restored).all()):
        return []
    changed = np.flatnonzero(rms(first - restored) > tolerance.rms_rel * np.maximum(rms(first), rms(restored)))
    if not len(changed):
        return []
    if len(changed) == len(first):
        return [f"every row changes with the order of the batch: {_ORDER_MATTERS}"]
    verb = "changes" if len(changed) == 1 else "change"
    return [f"{list_rows(changed + offset)} {verb} with the order of the batch: {_ORDER_MATTERS}"]


def distance_fault(metrics: RowMetrics, tolerance: Tolerance) -> str:
    """How far outside the tolerance the worst rows are, in words; at least one of them is, all distances are finite."""
    outside = ~((metrics.rms_rel <= tolerance.rms_rel) & (metrics.max_rel <= tolerance.max_rel))
    rms_rel, max_rel = np.max(metrics.rms_rel[outside]), np.max(metrics.max_rel[outside])
    if (metrics.rms_rel > max(OTHER_WEIGHTS_RMS_REL, tolerance.rms_rel)).all():
        highest = np.max(metrics.cosine)
        return f"the outputs differ everywhere (rms_rel {rms_rel:.2g}, cosine at most {highest:.2g}): other weights?"
    if rms_rel > tolerance.rms_rel:
        excess = f"rms_rel {rms_rel:.2g} exceeds {tolerance.rms_rel:.2g}"
    else:
        excess = f"max_rel {max_rel:.2g} exceeds {tolerance.max_rel:.2g}"
    return f"{excess} in {list_rows(np.flatnonzero(outside), len(metrics))}"
