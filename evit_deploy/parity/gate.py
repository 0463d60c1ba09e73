"""The tolerance table and the verdict.

Every comparison is written so that NaN fails: `value <= tolerance` must be true for a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from evit_deploy.errors import EXIT_MISSING, EXIT_OK, EXIT_PARITY, UsageError, unknown_name_hint
from evit_deploy.parity.metrics import RowMetrics

Verdict = Literal["pass", "fail", "unverified"]

EXIT_CODES: dict[Verdict, int] = {"pass": EXIT_OK, "fail": EXIT_PARITY, "unverified": EXIT_MISSING}

MAX_REL_FACTOR = (
    5.0  # max_rel tolerance per rms_rel tolerance: the largest of 1000 normal errors is 3.3 rms, and margin
)


@dataclass(frozen=True)
class Tolerance:
    """The largest error that passes, per row; see `metrics` for the definitions.

    Attributes:
        precision: the row of the table, or "custom" where a value was overridden.
        rms_rel: limit of the RMS-relative error.
        max_rel: limit of the largest element's relative error.
        min_agreement: share of rows whose top-1, and whose top-5, must agree, ties within max_rel aside.
    """

    precision: str
    rms_rel: float
    max_rel: float
    min_agreement: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rms_rel", self.rms_rel), ("max_rel", self.max_rel)):
            if not (0.0 <= value < 1.0):
                raise UsageError(
                    f"a {name} tolerance of {value:g} is no tolerance",
                    hint="give at least 0 and less than 1: at 1 an output of zeros passes",
                )

    def to_json(self) -> dict[str, str | float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"rms_rel <= {self.rms_rel:.3g}, max_rel <= {self.max_rel:.3g} ({self.precision})"


# Measured on models with random weights and BatchNorm statistics calibrated on the same kind of input (without that
# the classifier's bias is the whole output), 224 px, 1000 classes, five inputs of different scale and smoothness; the
# worst row of timm's efficientvit_b1, b3, l2, m3, m5. Errors are against FP64 for FP16 and BF16 (the whole network
# in PyTorch half precision on a CPU, attention included) and against PyTorch FP32 for FP32 (ONNX Runtime) and INT8.
#   precision   measured rms_rel, max_rel      margin
#   fp32        3.7e-6 (b3), 1.3e-5 (b3)       5x, 8x
#   fp16        9.0e-3 (b1), 3.0e-2 (b3)       2x, 3x
#   bf16        1.0e-1 (b3), 4.1e-1 (b3)       2x, 2x
#   int8        2.6e-1 (m3), 9.0e-1 (m3)       1x, 1x (ONNX Runtime static QDQ of Conv and Gemm, per channel)
# INT8 of b1 with random weights is off by 7.2e-1 and does not pass: INT8 is judged on trained weights and real images.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance("fp32", rms_rel=2e-5, max_rel=1e-4),
    "fp16": Tolerance("fp16", rms_rel=2e-2, max_rel=1e-1),
    "bf16": Tolerance("bf16", rms_rel=2e-1, max_rel=8e-1),
    "int8": Tolerance("int8", rms_rel=3e-1, max_rel=9e-1),
}


def tolerance_for(precision: str, *, rms_rel: float | None = None, max_rel: float | None = None) -> Tolerance:
    """The row of the table, with either limit overridden; an overridden rms_rel alone carries max_rel with it.

    Raises:
        UsageError: an unknown precision, or a limit that is negative, not finite, or so wide that zeros would pass.
    """
    if precision not in TOLERANCES:
        raise UsageError(f"no tolerance for precision {precision!r}", hint=unknown_name_hint(precision, TOLERANCES))
    row = TOLERANCES[precision]
    if rms_rel is None and max_rel is None:
        return row
    rms_limit = row.rms_rel if rms_rel is None else rms_rel
    carried = MAX_REL_FACTOR * rms_limit if math.isfinite(rms_limit) else rms_limit
    max_limit = min(carried, math.nextafter(1.0, 0.0)) if max_rel is None else max_rel
    return Tolerance(f"custom, from {precision}", rms_limit, max_limit, row.min_agreement)


def rows_within(metrics: RowMetrics, tolerance: Tolerance) -> np.ndarray:
    """One bool per row: finite, and both errors within the tolerance."""
    clean = (metrics.nan == 0) & (metrics.inf == 0)
    within: np.ndarray = clean & (metrics.rms_rel <= tolerance.rms_rel) & (metrics.max_rel <= tolerance.max_rel)
    return within


def agreement_holds(metrics: RowMetrics, tolerance: Tolerance) -> bool:
    """Whether enough rows agree in top-1 and in top-5; no rows is no agreement."""
    return len(metrics) > 0 and all(
        float(np.mean(hits)) >= tolerance.min_agreement for hits in (metrics.top1, metrics.top5)
    )


def worst_row(metrics: RowMetrics, tolerance: Tolerance) -> int:
    """The row that decides: first one that is not finite, else the one furthest up to or over its limits."""
    tiny = np.finfo(np.float64).tiny
    load = np.maximum(
        metrics.rms_rel / max(tolerance.rms_rel, tiny),
        metrics.max_rel / max(tolerance.max_rel, tiny),
    )
    return int(np.argmax(np.where(np.isfinite(load), load, np.inf)))


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """One failure fails; else one unverified comparison leaves it unverified; no comparison at all is a failure."""
    seen = set(verdicts)
    if not seen or "fail" in seen:
        return "fail"
    return "unverified" if "unverified" in seen else "pass"
