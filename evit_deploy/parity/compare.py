"""One comparison, filled batch by batch, and the row it becomes in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evit_deploy.parity.diagnose import distance_fault, list_rows, order_dependence, row_order_faults
from evit_deploy.parity.gate import Tolerance, Verdict, agreement_holds, rows_within, worst_row
from evit_deploy.parity.metrics import RowMetrics, as_rows, compare_rows, rms
from evit_deploy.parity.report import VerifyRow, finite_or_none

MIN_SPREAD = 1e-3  # rows closer than this are one output with noise on it, whatever the tolerance
_SOUND, _ZERO, _NON_FINITE = 0, 1, 2  # what a reference row is


class Spread:
    """How far a reference's outputs are apart: max over rows of rms(r_i - r_0) / max(rms(r_i), rms(r_0)).

    Were it not above the tolerance, a model that answers r_0 to every image would pass.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._first: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, images: np.ndarray, reference: np.ndarray) -> None:
        """Take note of N images and their outputs; repetitions of the first image say nothing."""
        if reference.size == 0 or len(images) == 0:
            return
        rows = as_rows(reference)
        if self._first is None:
            self._first = (images[0].copy(), rows[0])
        image, row = self._first
        scale = np.maximum(rms(rows), rms(row))
        with np.errstate(all="ignore"):
            apart = np.where(scale > 0, rms(rows - row) / scale, 0.0)
        for index, value in enumerate(apart):
            if not np.array_equal(images[index], image) and np.isfinite(value):
                self.value = max(self.value or 0.0, float(value))

    def fault(self, tolerance: Tolerance) -> str:
        """Why the comparison says nothing, or an empty string."""
        if self.value is None or self.value > max(tolerance.rms_rel, MIN_SPREAD):
            return ""
        return (
            f"the reference's output does not depend on the input: different images differ by rms_rel {self.value:.2g} "
            f"(at least {max(tolerance.rms_rel, MIN_SPREAD):.2g} needed), so a model that ignores the image would pass "
            "(untrained weights whose BatchNorm statistics were never computed do this)"
        )


@dataclass
class Comparison:
    """The rows of one input source at one batch size in one order, of one output."""

    pair: str
    source: str
    batch: int
    permuted: bool
    output: str
    error: str = ""
    error_is_missing: bool = False
    faults: list[str] = field(default_factory=list)
    _metrics: list[RowMetrics] = field(default_factory=list)
    _labels: list[str] = field(default_factory=list)
    _reference: list[np.ndarray] = field(default_factory=list)

    @property
    def said_anything(self) -> bool:
        return bool(self._labels or self.faults or self.error)

    def add(
        self,
        reference: np.ndarray,
        candidate: np.ndarray,
        labels: Sequence[str],
        tolerance: Tolerance,
        other_order: np.ndarray | None = None,
    ) -> None:
        """Compare N rows.

        Args:
            reference: [N, ...].
            candidate: what the candidate gave, of any shape and dtype.
            labels: N names.
            tolerance: limits.
            other_order: the candidate's output for the same rows in another order, which must agree as well.
        """
        fault = _incomparable(reference, candidate, self.output)
        if fault:
            self.faults.append(fault)
            return
        r, c = as_rows(reference), as_rows(candidate)
        offset = len(self._labels)
        if other_order is not None and other_order.shape == candidate.shape:
            self.faults += order_dependence(as_rows(other_order), c, tolerance, offset)
        self.faults += row_order_faults(r, c, tolerance, offset)
        self._metrics.append(compare_rows(r, c, tie_rel=tolerance.max_rel))
        self._labels.extend(labels)
        state = np.where(np.isfinite(r).all(axis=1), np.where(r.any(axis=1), _SOUND, _ZERO), _NON_FINITE)
        self._reference.append(state)

    def row(self, tolerance: Tolerance, spread: float | None, *, candidate_ran: bool) -> VerifyRow:
        """The row of the report; an error of a candidate that ran on other batches is a failure of this one."""
        reasons = [*self.faults]
        metrics = RowMetrics.concatenate(self._metrics) if self._metrics else None
        if metrics is not None:
            reasons += self._value_faults(metrics, tolerance)
        if not self.said_anything:
            reasons.append("nothing was compared")
        status: Verdict = "fail" if reasons else "pass"
        if self.error:
            reasons.append(self.error)
            cannot_run = self.error_is_missing or not candidate_ran
            status = "unverified" if status == "pass" and cannot_run else "fail"
        row = VerifyRow(
            pair=self.pair,
            input=self.source,
            batch=self.batch,
            permuted=self.permuted,
            output=self.output,
            status=status,
            spread=spread,
            reason="; ".join(dict.fromkeys(reasons)),
        )
        return row if metrics is None else replace(row, **self._measured(metrics, tolerance))

    def _value_faults(self, metrics: RowMetrics, tolerance: Tolerance) -> list[str]:
        """What the numbers say, the most telling first; empty only if every row is within the tolerance."""
        total = len(metrics)
        state = np.concatenate(self._reference)
        found = [
            f"{words} in {list_rows(rows, total)}"
            for words, rows in (
                ("the reference itself has NaN or Inf", np.flatnonzero(state == _NON_FINITE)),
                ("NaN", np.flatnonzero(metrics.nan)),
                ("Inf", np.flatnonzero(metrics.inf)),
                ("there is nothing to compare with: the reference output is zero", np.flatnonzero(state == _ZERO)),
            )
            if len(rows)
        ]
        if found or self.faults:
            return found
        if not rows_within(metrics, tolerance).all():
            return [distance_fault(metrics, tolerance)]
        if not agreement_holds(metrics, tolerance):
            return [
                f"top-1 agrees in {metrics.top1.mean():.1%} and top-5 in {metrics.top5.mean():.1%} of the rows, "
                f"{tolerance.min_agreement:.1%} is required"
            ]
        return []

    def _measured(self, metrics: RowMetrics, tolerance: Tolerance) -> dict[str, Any]:
        worst = worst_row(metrics, tolerance)
        distances = ("max_abs", "max_rel", "rms_rel", "cosine", "psnr_db")
        return {
            "images": len(metrics),
            "worst_row": worst,
            "worst_label": self._labels[worst],
            **{name: finite_or_none(float(getattr(metrics, name)[worst])) for name in distances},
            "top1": float(metrics.top1.mean()),
            "top5": float(metrics.top5.mean()),
            "nan": int(metrics.nan.sum()),
            "inf": int(metrics.inf.sum()),
        }


def _incomparable(reference: np.ndarray, candidate: np.ndarray, output: str) -> str:
    if candidate.dtype.kind != "f" and candidate.dtype.name != "bfloat16":
        return f"dtype of {output!r} differs: got {candidate.dtype.name}, expected a floating-point type"
    if candidate.shape != reference.shape:
        return f"shape of {output!r} differs: got {list(candidate.shape)}, expected {list(reference.shape)}"
    if reference.size == 0:
        return f"nothing was compared: {output!r} has no elements, shape {list(reference.shape)}"
    return ""
