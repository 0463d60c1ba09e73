"""What a benchmark found: rows, environment, protocol; as JSON and as a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evit_deploy.bench.statistics import (
    BASELINE,
    UNSTABLE,
    WITHHELD,
    LatencySummary,
    RatioEstimate,
)
from evit_deploy.errors import EXIT_LIMIT, EXIT_MISSING, EXIT_OK, EXIT_PARITY

if TYPE_CHECKING:
    from evit_deploy.bench.select import Selection

SCHEMA = "evit-deploy/bench"
SCHEMA_VERSION = 1

OK = "ok"
SKIPPED = "skipped"
FAILED = "failed"

_COLUMNS = ("", "prec", "p50 ms", "p90", "p95", "p99", "mean", "img/s", "peak MiB")


@dataclass(frozen=True)
class ParityResult:
    """Agreement of one arm with the reference on the same input.

    Attributes:
        passed: None where it could not be checked.
        max_abs, rms_rel: the worst row of all processes; None where undefined (NaN, wrong shape, not checked).
        nan: number of outputs that are NaN or infinite.
        tolerance_rms_rel: limit of `rms_rel`; None where the precision has no tolerance.
        reason: why it did not pass or was not checked.
        images: rows of one process that were compared.
    """

    passed: bool | None
    max_abs: float | None = None
    rms_rel: float | None = None
    nan: int = 0
    tolerance_rms_rel: float | None = None
    reason: str = ""
    images: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "images": self.images,
            "max_abs": _finite(self.max_abs),
            "rms_rel": _finite(self.rms_rel),
            "nan": self.nan,
            "tolerance_rms_rel": self.tolerance_rms_rel,
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Ratio:
    """Speedup over another arm: latency there / latency here.

    Attributes:
        against: the baseline's name.
        estimate: None where it must not be stated (parity failed) or cannot be (fewer than two processes).
        verdict: "faster", "slower", "no difference", "unstable" or "withheld"; "baseline" for the baseline itself.
        reason: why the verdict is "withheld" or "unstable".
    """

    against: str
    estimate: RatioEstimate | None
    verdict: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        estimate = self.estimate
        return {
            "against": self.against,
            "value": estimate.value if estimate else None,
            "ci_low": estimate.ci_low if estimate else None,
            "ci_high": estimate.ci_high if estimate else None,
            "verdict": self.verdict,
            "reason": self.reason or None,
            "processes": estimate.processes if estimate else None,
            "rounds": estimate.rounds if estimate else None,
        }


@dataclass(frozen=True)
class BenchRow:
    """One backend at one batch size.

    Attributes:
        status: "ok", "skipped" (it cannot run here, or not within the budget) or "failed" (it ran and broke).
        reason: why it is not "ok"; on an "ok" row, why it was not measured to the end.
        notes: what the backend says about how it runs.
        spread: interquartile range / median of the round medians.
        first_call_s: median over the processes of the first call, compilation included.
        over_budget: the time budget is why it is not "ok".
    """

    backend: str
    batch: int
    status: str
    reason: str = ""
    precision: str | None = None
    notes: tuple[str, ...] = ()
    threads: int | None = None
    latency: LatencySummary | None = None
    spread: float | None = None
    processes: int = 0
    rounds: int = 0
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    ratio: Ratio | None = None
    parity: ParityResult | None = None
    onnx_sha256: str = ""
    over_budget: bool = False

    @property
    def throughput_ips(self) -> float | None:
        """Images per second at the mean latency."""
        return self.batch * 1e3 / self.latency.mean_ms if self.latency else None

    @property
    def unstable(self) -> bool:
        return self.ratio is not None and self.ratio.verdict == UNSTABLE

    def to_json(self) -> dict[str, Any]:
        latency = self.latency
        return {
            "backend": self.backend,
            "batch": self.batch,
            "status": self.status,
            "reason": self.reason or None,
            "precision": self.precision,
            "notes": list(self.notes),
            "threads": self.threads,
            "latency_ms": {
                "p50": latency.p50_ms,
                "p90": latency.p90_ms,
                "p95": latency.p95_ms,
                "p99": latency.p99_ms,
                "mean": latency.mean_ms,
            }
            if latency
            else None,
            "samples": latency.samples if latency else 0,
            "processes": self.processes,
            "rounds": self.rounds,
            "spread": self.spread,
            "throughput_ips": self.throughput_ips,
            "first_call_s": self.first_call_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "ratio": self.ratio.to_json() if self.ratio else None,
            "parity": self.parity.to_json() if self.parity else None,
            "onnx_sha256": self.onnx_sha256,
        }


@dataclass(frozen=True)
class AAResult:
    """What two identical arms differed by at one batch size: the resolution of this measurement.

    Attributes:
        half_range: largest deviation of their ratio from 1 in any process; None if they were not measured.
    """

    batch: int
    arms: tuple[str, str]
    half_range: float | None
    estimate: RatioEstimate | None

    def to_json(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "arms": list(self.arms),
            "half_range": self.half_range,
            "value": self.estimate.value if self.estimate else None,
            "ci_low": self.estimate.ci_low if self.estimate else None,
            "ci_high": self.estimate.ci_high if self.estimate else None,
        }


@dataclass(frozen=True)
class BenchReport:
    """A whole benchmark.

    Attributes:
        bundle: name of the bundle's folder.
        model: FAMILY-VARIANT.
        onnx_sha256: of the ONNX file that was measured.
        rows: by batch size, then backend; the A/A copy is a row of its own.
        aa: one per batch size.
        environment: versions, CPU, threads, load average, date, command line.
        protocol: every setting of the measurement.
        selection: which backend to deploy, where that was asked.
    """

    bundle: str
    model: str
    onnx_sha256: str
    rows: tuple[BenchRow, ...]
    aa: tuple[AAResult, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None

    @property
    def exit_code(self) -> int:
        """3 if parity failed in a row; 4 if it was not verified; 5 if a row is unstable; 4 or 5 if nothing ran; 0 else.

        Nothing ran: 5 where the time budget is the reason, 4 otherwise. Where a backend was to be selected, one that is
        wrong only loses: 3 if a batch size has none, 5 if a choice rests on unstable latencies or was not
        reached in time.
        """
        measured = [row for row in self.rows if row.status == OK]
        if not measured:
            return EXIT_LIMIT if any(row.over_budget for row in self.rows) else EXIT_MISSING
        if self.selection is not None:
            return self._selection_code(self.selection)
        passed = [row.parity.passed if row.parity else None for row in measured]
        if any(p is False for p in (*passed, *(row.parity.passed for row in self.rows if row.parity))):
            return EXIT_PARITY
        if None in passed:
            return EXIT_MISSING
        return EXIT_LIMIT if any(row.unstable for row in measured) else EXIT_OK

    def _selection_code(self, selection: Selection) -> int:
        without = [batch for batch in selection.batches if batch.selected is None]
        if any(batch.measured for batch in without):
            return EXIT_PARITY
        if without:
            return EXIT_LIMIT if any(row.over_budget for row in self.rows) else EXIT_MISSING
        return EXIT_LIMIT if any(batch.unstable for batch in selection.batches) else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """The document of docs/schemas/bench.schema.json."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "bundle": self.bundle,
            "model": self.model,
            "onnx_sha256": self.onnx_sha256,
            "rows": [row.to_json() for row in self.rows],
            "aa": [aa.to_json() for aa in self.aa],
            "selection": self.selection.to_json() if self.selection else None,
            "environment": self.environment,
            "protocol": self.protocol,
        }

    def to_text(self) -> str:
        """A table per batch size, then what limits the numbers."""
        lines = [f"{self.model}  {self.bundle}  model.onnx {self.onnx_sha256[:12]}"]
        for batch in dict.fromkeys(row.batch for row in self.rows):
            lines += ["", *self._batch_lines(batch)]
        if self.selection is not None:
            lines += ["", *self.selection.to_lines()]
        return "\n".join([*lines, "", *self._footer_lines()])

    def _batch_lines(self, batch: int) -> list[str]:
        rows = [row for row in self.rows if row.batch == batch]
        against = next((row.ratio.against for row in rows if row.ratio), "baseline")
        table = [
            (*_COLUMNS, f"speedup over {against}", "parity"),
            *(_cells(row) for row in rows if row.status == OK),
        ]
        lines = [f"batch {batch}", *_aligned(table)] if len(table) > 1 else [f"batch {batch}"]
        notes: dict[str, list[str]] = {}
        for row in rows:
            for note in (_note(row), *row.notes):
                notes.setdefault(note, []).append(row.backend)
        lines += [f"  {', '.join(backends)}: {note}" for note, backends in notes.items() if note]
        compared = {row.parity.images for row in rows if row.parity and row.parity.images}
        if compared - {batch}:
            counts = dict.fromkeys(str(count) for count in (min(compared), max(compared)))
            lines.append(f"  parity compares {' to '.join(counts)} images")
        half_range = next((aa.half_range for aa in self.aa if aa.batch == batch), None)
        if half_range is not None:
            lines.append(f"  two identical arms differed by up to {100 * half_range:.1f} % (A/A)")
        if any(row.latency and row.latency.samples < 100 for row in rows):
            lines.append("  * fewer than 100 calls: p99 is the slowest call")
        return lines

    def _footer_lines(self) -> list[str]:
        protocol, environment = self.protocol, self.environment
        cpu = environment.get("cpu", {})
        engines = protocol.get("engines", {})
        return [
            *(f"{backend} runs {engine}" for backend, engine in engines.items()),
            f"{cpu.get('model') or 'CPU'}, {environment.get('threads')} threads, "
            f"fresh processes per backend: {protocol.get('processes')}; inputs and outputs in host memory",
            f"took {protocol.get('elapsed_s', 0.0):.0f} s of {protocol.get('duration_s', 0.0):g} s; "
            f"load average {_load(environment, 'start')} before, {_load(environment, 'end')} after",
        ]


def _load(environment: dict[str, Any], when: str) -> str:
    load = environment.get(f"load_average_{when}")
    return f"{load[0]:.2f}" if load else "unknown"


def _cells(row: BenchRow) -> tuple[str, ...]:
    assert row.latency is not None
    assert row.throughput_ips is not None
    latency = row.latency
    p99 = _milliseconds(latency.p99_ms) + ("*" if latency.samples < 100 else "")
    values = [_milliseconds(v) for v in (latency.p50_ms, latency.p90_ms, latency.p95_ms)]
    peak = f"{row.peak_memory_bytes / 1024**2:.0f}" if row.peak_memory_bytes is not None else "?"
    rate = f"{row.throughput_ips:.1f}" if row.throughput_ips < 1000 else f"{row.throughput_ips:.0f}"
    speed = (row.backend, row.precision or "?", *values, p99, _milliseconds(latency.mean_ms), rate, peak)
    return (*speed, _ratio_cell(row.ratio), _parity_cell(row.parity))


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    if ratio.estimate is None or ratio.verdict == BASELINE:
        return ratio.verdict
    e = ratio.estimate
    return f"{e.value:.2f}x [{e.ci_low:.2f}, {e.ci_high:.2f}] {ratio.verdict}"


def _parity_cell(parity: ParityResult | None) -> str:
    if parity is None or parity.passed is None:
        return "not checked"
    if not parity.passed:
        return "FAIL"
    return f"pass, rms {parity.rms_rel:.1e}" if parity.rms_rel is not None else "pass"


def _note(row: BenchRow) -> str:
    if row.status != OK:
        return f"{row.status}: {row.reason}"
    notes = [row.reason]
    if row.parity is not None and not row.parity.passed:
        notes.append(f"parity: {row.parity.reason}")
    if row.ratio is not None and row.ratio.verdict in (UNSTABLE, WITHHELD):
        notes.append(f"{row.ratio.verdict}: {row.ratio.reason}")
    return "; ".join(dict.fromkeys(note for note in notes if note))


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: text left, numbers right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text_columns = {0, 1, len(widths) - 2, len(widths) - 1}
    lines = []
    for row in table:
        cells = zip(row, widths, strict=True)
        padded = (c.ljust(w) if i in text_columns else c.rjust(w) for i, (c, w) in enumerate(cells))
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
