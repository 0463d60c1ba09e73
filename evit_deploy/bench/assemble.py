"""From the samples of the arms to the rows of the report: parity first, then ratios where parity allows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from evit_deploy.bench.report import FAILED, OK, AAResult, BenchRow, ParityResult, Ratio
from evit_deploy.bench.state import ArmState
from evit_deploy.bench.statistics import (
    BASELINE,
    MIN_PROCESSES,
    UNSTABLE_SPREAD,
    WITHHELD,
    RatioEstimate,
    aa_half_range,
    estimate_ratio,
    judge,
    relative_spread,
    summarize_latencies,
)
from evit_deploy.constants import OUTPUT_NAME, SOFTMAX_OUTPUT_NAME
from evit_deploy.parity.compare import Comparison
from evit_deploy.parity.gate import TOLERANCES, Tolerance, tolerance_for

AA_SUFFIX = " (A/A)"
Outputs = dict[str, np.ndarray]
ToleranceChoice = Callable[[str], Tolerance | None]


@dataclass(frozen=True)
class Subject:
    """What was measured, apart from the samples.

    Attributes:
        tolerance: in the place of `limit_of`, which takes the precision's own limits.
        unchecked: why graphs of a precision cannot be judged on these inputs, by precision.
    """

    batches: Sequence[int]
    threads: int
    onnx_sha256: str
    seed: int
    tolerance: ToleranceChoice | None = None
    unchecked: Mapping[str, str] = field(default_factory=dict)


def assemble_rows(
    states: Sequence[ArmState], reference: ArmState, base: ArmState, subject: Subject
) -> tuple[tuple[BenchRow, ...], tuple[AAResult, ...]]:
    """The rows by batch size and arm, and the A/A results by batch size.

    Raises:
        ValueError: the A/A copy of the baseline is not among the arms; without it no ratio can be judged.
    """
    copy = next((state for state in states if state.name == base.name + AA_SUFFIX), None)
    if copy is None:
        raise ValueError(f"{base.name!r} has no A/A copy among {[state.name for state in states]}")
    rows: list[BenchRow] = []
    results: list[AAResult] = []
    for batch in subject.batches:
        parity = {state.name: check_parity(state, reference, batch, subject) for state in states}
        aa_ratios = paired_ratios(base, copy, batch)
        half_range = aa_half_range(aa_ratios)
        results.append(
            AAResult(batch, (base.name, copy.name), half_range, estimate_ratio(aa_ratios, seed=subject.seed))
        )
        for state in states:
            ratio = None
            if state is base and state.samples.get(batch):
                itself = RatioEstimate(1.0, 1.0, 1.0, state.processes(batch), len(state.samples[batch]))
                ratio = Ratio(base.name, itself, BASELINE)
            elif state.samples.get(batch):
                ratio = judged_ratio(state, base, batch, parity, 0.0 if state is copy else half_range, subject.seed)
            rows.append(_row(state, batch, subject, parity[state.name], ratio))
    return tuple(rows), tuple(results)


def limit_of(precision: str) -> Tolerance | None:
    """The tolerance of a precision, None where there is none for it."""
    return TOLERANCES.get(precision)


def overridden(rms_rel: float, *, only_widen: bool) -> ToleranceChoice:
    """`limit_of` with another limit of the RMS-relative error.

    Args:
        rms_rel: the limit.
        only_widen: it holds only where it is wider than the precision's own.

    Raises:
        UsageError: it is no tolerance.
    """
    tolerance_for("fp32", rms_rel=rms_rel)

    def choose(precision: str) -> Tolerance | None:
        own = limit_of(precision)
        if own is None or (only_widen and rms_rel <= own.rms_rel):
            return own
        return tolerance_for(precision, rms_rel=rms_rel)

    return choose


def check_parity(state: ArmState, reference: ArmState, batch: int, subject: Subject) -> ParityResult | None:
    """Compare the first outputs of all processes of an arm with the reference's; None if the arm gave none."""
    paths = state.outputs.get(batch, [])
    if not paths:
        return None
    truths = reference.outputs.get(batch, [])
    if not truths:
        lost = reference.lost.get(batch)
        return ParityResult(None, reason=f"no reference: {lost.reason if lost else 'it did not run'}")
    precision = state.graph_precision or ""
    if precision in subject.unchecked:
        return ParityResult(None, reason=subject.unchecked[precision])
    tolerance = (subject.tolerance or limit_of)(precision)
    if tolerance is None:
        return ParityResult(None, reason=f"no tolerance for precision {state.graph_precision!r}")
    result = compare_outputs(_load(truths[0]), [_load(path) for path in paths], tolerance)
    more = _compare_more(state, reference, batch, tolerance)
    return result if more is None else _worst([more, result])


def _compare_more(state: ArmState, reference: ArmState, batch: int, tolerance: Tolerance) -> ParityResult | None:
    """The images that one process of both was given beside the first batch; None where one of them had no time for any.

    Each had as many as its time allowed: the fewer of both are compared.
    """
    if batch not in state.checked or batch not in reference.checked:
        return None
    (path, rows), (truth_path, truth_rows) = state.checked[batch], reference.checked[batch]
    truth, outputs = _load(truth_path), _load(path)
    if rows > truth_rows:
        outputs = {name: value[: len(value) - (rows - truth_rows)] for name, value in outputs.items()}
    return compare_outputs({name: value[:rows] for name, value in truth.items()}, [outputs], tolerance)


def compare_outputs(truth: Outputs, candidates: Sequence[Outputs], tolerance: Tolerance) -> ParityResult:
    """The gate over the outputs of several processes: the first that fails, else the worst.

    Args:
        truth: the reference's logits [B, C]; a candidate that gives probabilities is compared with their softmax.
        candidates: named outputs of each process, at least one.
        tolerance: limits.
    """
    results = [_compare_one(truth[OUTPUT_NAME], outputs, tolerance) for outputs in candidates]
    return _worst(results)


def _worst(results: Sequence[ParityResult]) -> ParityResult:
    """The first that fails, else the one with the largest error; with the most images that any of them compared."""
    failed = [result for result in results if not result.passed]
    found = failed[0] if failed else max(results, key=lambda result: result.rms_rel or 0.0)
    return replace(found, images=max(result.images for result in results))


def _compare_one(logits: np.ndarray, outputs: Outputs, tolerance: Tolerance) -> ParityResult:
    truths = {OUTPUT_NAME: logits, SOFTMAX_OUTPUT_NAME: _softmax(logits)}
    name = next((name for name in truths if name in outputs), None)
    if name is None:
        reason = f"no output named {OUTPUT_NAME!r}, got {', '.join(map(repr, sorted(outputs))) or 'none'}"
        return ParityResult(False, tolerance_rms_rel=tolerance.rms_rel, reason=reason)
    comparison = Comparison("reference -> backend", "random images", len(logits), False, name)
    comparison.add(truths[name], outputs[name], [str(row) for row in range(len(logits))], tolerance)
    row = comparison.row(tolerance, None, candidate_ran=True)
    return ParityResult(
        passed=row.status == "pass",
        max_abs=row.max_abs,
        rms_rel=row.rms_rel,
        nan=row.nan + row.inf,
        tolerance_rms_rel=tolerance.rms_rel,
        reason=row.reason,
        images=row.images,
    )


def paired_ratios(base: ArmState, state: ArmState, batch: int) -> list[list[float]]:
    """Per process, the speedups of the rounds that both arms were measured in, from the medians of each."""
    medians = [
        {(s.process, s.round): median(s.latencies_s) for s in arm.samples.get(batch, [])} for arm in (base, state)
    ]
    processes: dict[int, list[float]] = {}
    for key in sorted(medians[0].keys() & medians[1].keys()):
        processes.setdefault(key[0], []).append(medians[0][key] / medians[1][key])
    return list(processes.values())


def judged_ratio(
    state: ArmState,
    base: ArmState,
    batch: int,
    parity: dict[str, ParityResult | None],
    half_range: float | None,
    seed: int,
) -> Ratio:
    """The ratio of an arm that was measured, or why there is none.

    A speedup over, or of, something that computes another result is not a speedup: it is withheld, number included.
    """
    for name in (state.name, base.name):
        result = parity[name]
        if result is not None and result.passed is False:
            return Ratio(base.name, None, WITHHELD, f"{name} failed parity")
        if result is None or result.passed is None:
            return Ratio(base.name, None, WITHHELD, f"the parity of {name} was not checked")
    estimate = estimate_ratio(paired_ratios(base, state, batch), seed=seed)
    if estimate is None:
        too_few = f"measured in fewer than {MIN_PROCESSES} processes: give it more time"
        return Ratio(base.name, None, WITHHELD, too_few)
    if half_range is None:
        return Ratio(base.name, None, WITHHELD, f"there is no A/A result of {base.name}")
    reason = instability(state, base, batch, half_range)
    verdict = judge(estimate, half_range=half_range, unstable=bool(reason))
    return Ratio(base.name, estimate, verdict, reason)


def instability(state: ArmState, base: ArmState, batch: int, half_range: float) -> str:
    """Why two arms cannot be compared, "" if they can."""
    for arm in (state, base):
        spread = _spread(arm, batch)
        if spread > UNSTABLE_SPREAD:
            return f"the rounds of {arm.name} spread by {100 * spread:.0f} % (interquartile range / median)"
    if half_range > UNSTABLE_SPREAD:
        return f"two identical arms differed by {100 * half_range:.0f} %"
    return ""


def _row(state: ArmState, batch: int, subject: Subject, parity: ParityResult | None, ratio: Ratio | None) -> BenchRow:
    samples = state.samples.get(batch, [])
    lost = state.lost.get(batch)
    broken = lost is not None and lost.status == FAILED
    if not samples or broken:
        status, reason = (lost.status, lost.reason) if lost else ("skipped", "the budget ended before its first round")
        return BenchRow(
            backend=state.name, batch=batch, status=status, reason=reason, precision=state.precision,
            notes=state.notes, threads=subject.threads, parity=parity, onnx_sha256=subject.onnx_sha256,
            over_budget=lost is None or lost.over_budget,
        )  # fmt: skip
    return BenchRow(
        backend=state.name,
        batch=batch,
        status=OK,
        reason=lost.reason if lost and state.processes(batch) < MIN_PROCESSES else "",
        precision=state.precision,
        notes=state.notes,
        threads=subject.threads,
        latency=summarize_latencies([value for sample in samples for value in sample.latencies_s]),
        spread=_spread(state, batch),
        processes=state.processes(batch),
        rounds=len(samples),
        first_call_s=median(state.first_call_s[batch]),
        peak_memory_bytes=state.peak_memory_bytes.get(batch),
        ratio=ratio,
        parity=parity,
        onnx_sha256=subject.onnx_sha256,
    )


def _spread(state: ArmState, batch: int) -> float:
    return relative_spread([median(sample.latencies_s) for sample in state.samples.get(batch, [])])


def _load(path: Path) -> Outputs:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        result: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
