"""One arm against a baseline arm, model by model, with the engine of `evit-deploy bench`: from its report to rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.result import RATIO, Goal, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from evit_deploy.backends import Backend
from evit_deploy.bench.measure import run_bench
from evit_deploy.bench.plan import Effort
from evit_deploy.bench.report import OK, BenchReport, BenchRow
from evit_deploy.bench.statistics import UNSTABLE, WITHHELD

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

MIN_PROCESSES = 5  # fresh processes that a speedup must come from
# ONNX Runtime's threads spin for some 30 ms after a call, and so take a core from the arm that is measured next: the
# warm-up lasts longer than that.
SPIN_S = 0.08
# One process more than needed: an estimate of the time that was too low may cost one.
FULL = Effort(target_processes=MIN_PROCESSES + 1, warmup_s=SPIN_S, min_round_s=0.4)
QUICK = Effort(target_processes=2, max_rounds=2, warmup_calls=1, warmup_s=0.0, min_calls=2, min_round_s=0.0)
QUICK_DURATION_S = 120.0  # never needed: the effort ends it in seconds
# What differs from model to model stands in each row.
_PER_MODEL = ("duration_s", "elapsed_s", "processes", "idle_cpu_share", "batches")


@dataclass(frozen=True)
class Case:
    """One model of a comparison.

    Attributes:
        model: FAMILY-VARIANT.
        goal: for its speedup, None where nothing is promised.
        duration_s: budget that lets `FULL` finish on two cores.
    """

    model: str
    goal: Goal | None
    duration_s: float


@dataclass(frozen=True)
class Comparison:
    """Which arm is measured against which.

    Attributes:
        quantity: what the ratio is, in words.
        ours, baseline: arms of the engine.
        batches: batch sizes.
    """

    quantity: str
    ours: Backend
    baseline: Backend
    batches: tuple[int, ...]


def compare(
    bundle: Bundle,
    case: Case,
    comparison: Comparison,
    settings: Settings,
    progress: Callable[[str], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Measure one model.

    Returns:
        One row per batch size, and the protocol as far as it is the same for every model.
    """
    default_s = QUICK_DURATION_S if settings.quick else case.duration_s
    report = run_bench(
        bundle,
        batches=settings.batches or comparison.batches,
        backends=[comparison.baseline, comparison.ours],
        baseline=comparison.baseline.name,
        duration_s=settings.duration_s or default_s,
        threads=settings.threads,
        seed=WEIGHT_SEED,
        progress=lambda line: progress(f"{case.model}: {line}"),
        effort=QUICK if settings.quick else FULL,
    )
    needed = QUICK.target_processes if settings.quick else MIN_PROCESSES
    return rows_of(report, case, comparison, needed), shared_protocol(report, settings)


def rows_of(report: BenchReport, case: Case, comparison: Comparison, min_processes: int) -> list[Row]:
    """A row per batch size: the paired ratio of our arm, both latencies, and what could make them wrong."""
    rows = []
    for batch in dict.fromkeys(row.batch for row in report.rows):
        ours = _find(report.rows, comparison.ours.name, batch)
        base = _find(report.rows, comparison.baseline.name, batch)
        estimate = ours.ratio.estimate if ours.ratio else None
        rows.append(
            Row(
                subject=case.model,
                quantity=comparison.quantity,
                unit=RATIO,
                value=estimate.value if estimate else None,
                batch=batch,
                ci_low=estimate.ci_low if estimate else None,
                ci_high=estimate.ci_high if estimate else None,
                goal=case.goal,
                reason=why_not(ours, base, min_processes),
                unstable=_is_only_unstable(ours, base, min_processes),
                details=_details(report, ours, base),
            )
        )
    return rows


def why_not(ours: BenchRow, base: BenchRow, min_processes: int) -> str:
    """Why the ratio of a row does not count, "" where it does."""
    for row in (base, ours):
        if row.status != OK:
            return f"{row.backend} {row.status}: {row.reason}"
    if ours.ratio is None:
        return "not compared"
    if ours.ratio.estimate is None or ours.ratio.verdict == WITHHELD:
        return f"{ours.ratio.verdict}: {ours.ratio.reason}"
    processes = ours.ratio.estimate.processes
    if processes < min_processes:
        return f"measured in {processes} fresh processes, {min_processes} are needed: give it more time"
    if ours.ratio.verdict == UNSTABLE:
        return f"{UNSTABLE}: {ours.ratio.reason}"
    return ""


def _is_only_unstable(ours: BenchRow, base: BenchRow, min_processes: int) -> bool:
    return why_not(ours, base, min_processes).startswith(f"{UNSTABLE}: ")


def shared_protocol(report: BenchReport, settings: Settings) -> dict[str, Any]:
    """The settings of the measurement that are the same for every model."""
    engine = {key: value for key, value in report.protocol.items() if key not in _PER_MODEL}
    return {
        "image_size_px": settings.image_size,
        "weights": f"random, seed {WEIGHT_SEED}",
        "threads": settings.threads,
        "thread_variables": report.environment["thread_variables"],
        "governor": report.environment["governor"],
        "quick": settings.quick,
        **engine,
    }


def _details(report: BenchReport, ours: BenchRow, base: BenchRow) -> dict[str, Any]:
    aa = next((aa for aa in report.aa if aa.batch == ours.batch), None)
    estimate = ours.ratio.estimate if ours.ratio else None
    return {
        "verdict": ours.ratio.verdict if ours.ratio else None,
        "ours": _arm(ours),
        "baseline": _arm(base),
        "aa_half_range": aa.half_range if aa else None,
        "processes": estimate.processes if estimate else 0,
        "rounds": estimate.rounds if estimate else 0,
        "duration_s": report.protocol["duration_s"],
        "elapsed_s": report.protocol["elapsed_s"],
        "idle_cpu_share": report.protocol["idle_cpu_share"],
        "load_average": [report.environment[f"load_average_{when}"] for when in ("start", "end")],
        "onnx_sha256": report.onnx_sha256,
    }


def _arm(row: BenchRow) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "precision": row.precision,
        "p50_ms": row.latency.p50_ms if row.latency else None,
        "mean_ms": row.latency.mean_ms if row.latency else None,
        "spread": row.spread,
        "peak_memory_bytes": row.peak_memory_bytes,
        "parity": row.parity.to_json() if row.parity else None,
    }


def _find(rows: Sequence[BenchRow], backend: str, batch: int) -> BenchRow:
    return next(row for row in rows if row.backend == backend and row.batch == batch)
