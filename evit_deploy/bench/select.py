"""Which of the measured backends to deploy: the fastest whose error stays within a tolerance, and why not the others.

Fast and wrong never wins: a candidate needs finite outputs and parity before its speed is looked at. Where the
measurement cannot tell two candidates apart and their medians are within 3 %, one with a tenth of the error is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evit_deploy.bench.assemble import AA_SUFFIX, instability, paired_ratios
from evit_deploy.bench.report import FAILED, OK, AAResult, BenchRow
from evit_deploy.bench.state import ArmState
from evit_deploy.bench.statistics import (
    FASTER,
    MIN_DIFFERENCE,
    NO_DIFFERENCE,
    SLOWER,
    RatioEstimate,
    estimate_ratio,
    judge,
)

SELECTED = "selected"
OVER_TOLERANCE = "over the tolerance"
WRONG = "wrong"
NOT_CHECKED = "not checked"
CANNOT_RUN = "cannot run"
ACCURATE_FACTOR = (
    10.0  # an error so many times smaller decides between two that are as fast: two FP32 ones never differ so
)


@dataclass(frozen=True)
class Candidate:
    """One backend at one batch size, and what became of it.

    Attributes:
        verdict: "selected", or why not: "slower", "no difference" (and far less accurate), "over the tolerance",
            "wrong", "not checked", "cannot run" or "failed".
        reason: the verdict with its numbers, one line.
        rms_rel: the worst row's error against the reference; None where there is none.
        p50_ms: median latency; None where it was not measured.
        slowdown: its latency over that of the selected backend, with its interval; None for that one itself, for
            candidates whose speed does not matter, and where fewer than two processes were measured.
        unstable: why the two latencies should not be compared, "" where they can be.
    """

    backend: str
    precision: str | None
    verdict: str
    reason: str
    rms_rel: float | None = None
    p50_ms: float | None = None
    slowdown: RatioEstimate | None = None
    unstable: str = ""

    def to_json(self) -> dict[str, Any]:
        slowdown = self.slowdown
        return {
            "backend": self.backend,
            "precision": self.precision,
            "verdict": self.verdict,
            "reason": self.reason,
            "rms_rel": self.rms_rel,
            "p50_ms": self.p50_ms,
            "slowdown": {"value": slowdown.value, "ci_low": slowdown.ci_low, "ci_high": slowdown.ci_high}
            if slowdown
            else None,
            "unstable": self.unstable or None,
        }


@dataclass(frozen=True)
class BatchSelection:
    """The candidates of one batch size; at most one of them is selected."""

    batch: int
    candidates: tuple[Candidate, ...]

    @property
    def selected(self) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.verdict == SELECTED), None)

    @property
    def measured(self) -> bool:
        """Whether anything is known of any candidate's outputs."""
        return any(candidate.verdict not in (CANNOT_RUN, NOT_CHECKED) for candidate in self.candidates)

    @property
    def unstable(self) -> bool:
        """Whether a latency that the choice rests on was not reproducible."""
        return any(candidate.unstable for candidate in self.candidates)

    def to_json(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "selected": self.selected.backend if self.selected else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    def to_lines(self) -> list[str]:
        """The selected backend, then the others."""
        chosen = self.selected
        head = f"{chosen.backend} in {chosen.precision}, {chosen.reason}" if chosen else "none"
        others = [f"  {other.backend}: {other.reason}" for other in self.candidates if other is not chosen]
        return [f"batch {self.batch}: {head}", *others]


@dataclass(frozen=True)
class Selection:
    """What to deploy, by batch size.

    Attributes:
        tolerance_rms_rel: the largest RMS-relative error allowed in any row.
    """

    tolerance_rms_rel: float
    batches: tuple[BatchSelection, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "tolerance_rms_rel": self.tolerance_rms_rel,
            "batches": [batch.to_json() for batch in self.batches],
        }

    def to_lines(self) -> list[str]:
        """For people."""
        lines = [line for batch in self.batches for line in batch.to_lines()]
        return [f"selected at rms_rel <= {self.tolerance_rms_rel:g}", *(f"  {line}" for line in lines)]


def select_backends(
    states: Sequence[ArmState], rows: Sequence[BenchRow], aa: Sequence[AAResult], tolerance: float, seed: int
) -> Selection:
    """Choose for every batch size.

    Args:
        states: the arms with their samples; the A/A copy is no candidate.
        rows: of the report, with the parity of each.
        aa: what identical arms differed by.
        tolerance: largest RMS-relative error of any row.
        seed: of the bootstrap.
    """
    by_name = {state.name: state for state in states}
    batches = []
    for result in aa:
        found = [row for row in rows if row.batch == result.batch and not row.backend.endswith(AA_SUFFIX)]
        verdicts = {row.backend: _gate(row, tolerance) for row in found}
        able = [row for row in found if verdicts[row.backend] is None]
        compared = {candidate.backend: candidate for candidate in _rank(able, by_name, result.half_range or 0.0, seed)}
        candidates = [verdicts[row.backend] or compared[row.backend] for row in found]
        batches.append(BatchSelection(result.batch, tuple(candidates)))
    return Selection(tolerance, tuple(batches))


def _gate(row: BenchRow, tolerance: float) -> Candidate | None:
    """What keeps a backend out whatever its speed; None for one that may be selected."""
    parity = row.parity
    found = Candidate(
        row.backend,
        row.precision,
        verdict=CANNOT_RUN,
        reason="",
        rms_rel=parity.rms_rel if parity else None,
        p50_ms=row.latency.p50_ms if row.latency else None,
    )
    if row.status != OK:
        verdict = FAILED if row.status == FAILED else CANNOT_RUN
        return replace(found, verdict=verdict, reason=f"{verdict}: {row.reason}")
    if parity is None or parity.passed is None:
        reason = parity.reason if parity else "it gave no output"
        return replace(found, verdict=NOT_CHECKED, reason=f"{NOT_CHECKED}: {reason}")
    if parity.rms_rel is None or parity.nan:
        return replace(found, verdict=WRONG, reason=f"{WRONG}: {parity.reason}")
    if not parity.rms_rel <= tolerance:
        reason = f"{OVER_TOLERANCE}: {parity.rms_rel:.1e} > {tolerance:g}"
        return replace(found, verdict=OVER_TOLERANCE, reason=reason)
    if not parity.passed:
        return replace(found, verdict=WRONG, reason=f"{WRONG}: {parity.reason}")
    return None


def _rank(rows: Sequence[BenchRow], states: Mapping[str, ArmState], half_range: float, seed: int) -> list[Candidate]:
    """The candidates that may be selected, one of them selected."""
    if not rows:
        return []
    fastest = _fastest(rows, states, seed)
    pairs = {row.backend: _compare(row, fastest, states, half_range, seed) for row in rows if row is not fastest}
    tied = [row for row in rows if row is not fastest and _as_fast(*pairs[row.backend])]
    accurate = [row for row in tied if _rms_rel(row) * ACCURATE_FACTOR <= _rms_rel(fastest)]
    chosen = min(accurate, key=lambda row: (_rms_rel(row), _p50_ms(row)), default=fastest)
    candidates = []
    for row in rows:
        if row is chosen:
            candidates.append(_selected(row, fastest, len(rows)))
            continue
        estimate, ratio, is_certain = _compare(row, chosen, states, half_range, seed)
        unstable = instability(states[row.backend], states[chosen.backend], row.batch, half_range)
        if chosen is not fastest and (row is fastest or any(row is one for one in tied)):
            verdict, reason = NO_DIFFERENCE, f"{NO_DIFFERENCE}, less accurate: {_errors(row, chosen)}"
        else:
            verdict, reason = SLOWER, f"{SLOWER}: takes {ratio:.2f}x as long as {chosen.backend}"
            if estimate and not is_certain:
                reason += f", {estimate.ci_low:.2f}x to {estimate.ci_high:.2f}x: not certain"
        reason += f" ({unstable})" if unstable else ""
        numbers = _rms_rel(row), _p50_ms(row)
        candidates.append(Candidate(row.backend, row.precision, verdict, reason, *numbers, estimate, unstable))
    return candidates


def _fastest(rows: Sequence[BenchRow], states: Mapping[str, ArmState], seed: int) -> BenchRow:
    """By the rounds that two backends share: a slow spell of the machine then weighs on both."""
    return min(rows, key=lambda row: _compare(row, rows[0], states, 0.0, seed)[1])


def _as_fast(estimate: RatioEstimate | None, ratio: float, is_certain: bool) -> bool:
    """Whether accuracy may decide: neither surely slower, nor by more than 3 % in the median."""
    return not is_certain and (estimate is None or ratio <= 1.0 + MIN_DIFFERENCE)


def _selected(row: BenchRow, fastest: BenchRow, count: int) -> Candidate:
    reason = f"{_p50_ms(row):.3g} ms, rms_rel {_rms_rel(row):.1e}: "
    if row is not fastest:
        reason += f"{NO_DIFFERENCE} to {fastest.backend}, and more accurate"
    else:
        reason += "the fastest within the tolerance" if count > 1 else "the only one within the tolerance"
    return Candidate(row.backend, row.precision, SELECTED, reason, _rms_rel(row), _p50_ms(row))


def _compare(
    row: BenchRow, other: BenchRow, states: Mapping[str, ArmState], half_range: float, seed: int
) -> tuple[RatioEstimate | None, float, bool]:
    """How much longer a row takes than another one: with its interval, the number alone, and whether it surely does.

    With fewer than two processes there is no interval; then the medians decide.
    """
    ratios = paired_ratios(states[row.backend], states[other.backend], row.batch)
    estimate = estimate_ratio(ratios, seed=seed)
    if estimate is None:
        ratio = _p50_ms(row) / _p50_ms(other)
        return None, ratio, ratio > 1.0 + half_range
    # That the other one is faster than this one.
    return estimate, estimate.value, judge(estimate, half_range=half_range, unstable=False) == FASTER


def _errors(row: BenchRow, chosen: BenchRow) -> str:
    return f"{_rms_rel(row):.1e} > {_rms_rel(chosen):.1e}"


def _p50_ms(row: BenchRow) -> float:
    assert row.latency is not None
    return row.latency.p50_ms


def _rms_rel(row: BenchRow) -> float:
    assert row.parity is not None
    assert row.parity.rms_rel is not None
    return row.parity.rms_rel
