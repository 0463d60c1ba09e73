"""Faults of what compares: parity, its reports, where a fault begins, and benchmarks' statistics and choices."""

from __future__ import annotations

from tests.mutants.table import faults

_PARITY = "evit_deploy/parity"
_BENCH = "evit_deploy/bench"
_GATE_TEST = "tests/test_parity_gate.py"
_STATISTICS_TEST = "tests/test_bench_statistics.py"
_REPORT_TEST = "tests/test_bench_report.py"

PARITY_FAULTS = (
    *faults(
        "parity",
        f"{_PARITY}/gate.py",
        _GATE_TEST,
        {
            "comparing nothing passes": ('if not seen or "fail" in seen:', 'if "fail" in seen:'),
            "what could not run passes": ('return "unverified" if "unverified" in seen else "pass"', 'return "pass"'),
            "FP32 tolerance a hundred times too wide": ("rms_rel=2e-5, max_rel=1e-4", "rms_rel=2e-3, max_rel=1e-2"),
            "a tolerance of NaN or 1 accepted": ("if not (0.0 <= value < 1.0):", "if value < 0.0:"),
            "row with NaN not the worst": (
                "np.where(np.isfinite(load), load, np.inf)",
                "np.where(np.isfinite(load), load, 0.0)",
            ),
        },
    ),
    *faults(
        "metrics",
        f"{_PARITY}/metrics.py",
        "tests/test_parity_metrics.py",
        {
            "mean for the largest": (
                "max_rel=(np.abs(error) / floor).max(axis=1)",
                "max_rel=(np.abs(error) / floor).mean(axis=1)",
            ),
            "no floor below small values": ("floor = np.maximum(np.abs(r), scale[:, None])", "floor = np.abs(r)"),
            "NaN of the reference counted": ("nan=np.isnan(c).sum(axis=1)", "nan=np.isnan(r).sum(axis=1)"),
            "error where a row is not finite": ("np.where(finite[:, None], c - r, np.nan)", "np.nan_to_num(c - r)"),
            "ties are no ties": ("(kth_best - margin)[:, None]", "kth_best[:, None]"),
            "compared in the inputs' own type": ("np.asarray(output).astype(np.float64)", "np.asarray(output)"),
        },
    ),
    *faults(
        "parity",
        f"{_PARITY}/compare.py",
        _GATE_TEST,
        {
            "first row only": (
                "compare_rows(r, c, tie_rel=tolerance.max_rel)",
                "compare_rows(r[:1], c[:1], tie_rel=tolerance.max_rel)",
            ),
            "distance of rows not looked at": (
                "if not rows_within(metrics, tolerance).all():",
                "if not rows_within(metrics, tolerance).any():",
            ),
            "a reference that ignores the image accepted": (
                "if self.value is None or self.value > max(tolerance.rms_rel, MIN_SPREAD):",
                "if self.value is None or self.value >= 0.0:",
            ),
            "NaN of the reference no fault": (
                "np.flatnonzero(state == _NON_FINITE)",
                "np.flatnonzero(state > _NON_FINITE)",
            ),
            "a batch size that fails unverified": (
                "cannot_run = self.error_is_missing or not candidate_ran",
                "cannot_run = True",
            ),
            "another shape no fault": (
                "if candidate.shape != reference.shape:",
                "if candidate.ndim != reference.ndim:",
            ),
        },
    ),
    *faults(
        "parity",
        f"{_PARITY}/verify.py",
        _GATE_TEST,
        {
            "permuted batch not compared": ("for permuted in (False, True):", "for permuted in (False,):"),
            "permuted rows not put back": (
                "restored[order] = value[: len(order)]",
                "restored[:] = value[: len(order)]",
            ),
            "largest batch left out": (
                "for size in (1, ODD_BATCH, OPTIMAL_BATCH, max_batch) if",
                "for size in (1, ODD_BATCH, OPTIMAL_BATCH) if",
            ),
            "a surplus output no fault": ("surplus = [name for name in got if name not in expected]", "surplus = []"),
        },
    ),
    *faults(
        "parity",
        f"{_PARITY}/diagnose.py",
        _GATE_TEST,
        {
            "order of rows in small batches not looked at": (
                "if len(reference) < 2 or not",
                "if len(reference) < 65 or not",
            ),
            "a repeated row tolerated": ("if repeated is not None:", "if repeated is not None and not repeated[1]:"),
            "rows that depend on their neighbours tolerated": (
                "if not len(changed):",
                "if len(changed) <= len(first):",
            ),
        },
    ),
    *faults(
        "parity report",
        f"{_PARITY}/report.py",
        _GATE_TEST,
        {"a finding of no single row passes": ('"fail" if self.failures else overall(', "overall(")},
    ),
    *faults(
        "parity report",
        f"{_PARITY}/report.py",
        "tests/test_export_precision.py",
        {
            "rows of the second runtime lost": ("rows=first.rows + second.rows,", "rows=first.rows,"),
        },
        "is_blind",
    ),
    *faults(
        "localize",
        f"{_PARITY}/localize.py",
        "tests/test_localize.py",
        {
            "NaN is within the tolerance": ("if not error <= tolerance.rms_rel:", "if error > tolerance.rms_rel:"),
            "first row only": ("rows = len(expected)\n", "rows, expected, got = 1, expected[:1], got[:1]\n"),
            "last bad block for the first": ("for name in compared:", "for name in reversed(compared):"),
        },
        "not_finite or one_bad_row or two_faults",
    ),
    *faults(
        "junit",
        f"{_PARITY}/junit.py",
        "tests/test_junit.py",
        {
            "unverified rows are green": ('if row.status != "pass":', 'if row.status == "fail":'),
            "comparing nothing is green": (
                'report.failures if report.rows or report.failures else ("nothing was compared",)',
                "report.failures",
            ),
            "findings of no single row are green": (
                "for index, failure in enumerate(failures):",
                "for index, failure in ():",
            ),
        },
    ),
    *faults(
        "bench statistics",
        f"{_BENCH}/statistics.py",
        _STATISTICS_TEST,
        {
            "faster by the estimate, not its interval": ("if ratio.ci_low > threshold:", "if ratio.value > threshold:"),
            "A/A not asked": ("1.0 + max(MIN_DIFFERENCE, half_range)", "1.0 + MIN_DIFFERENCE"),
            "A/A of the best process": ("return math.exp(max(logs)) - 1.0", "return math.exp(min(logs)) - 1.0"),
            "rounds resampled, processes not": (
                "drawn = rng.integers(0, n, size=(resamples, n))",
                "drawn = np.tile(np.arange(n), (resamples, 1))",
            ),
            "one process has an interval": ("if n < MIN_PROCESSES:", "if n < 1:"),
            "unstable is judged": ("    if unstable:\n", "    if unstable and not half_range:\n"),
            "few processes have no wider interval": ("widen = _small_sample_factor(n)", "widen = 1.0"),
        },
    ),
    *faults(
        "bench",
        f"{_BENCH}/assemble.py",
        _REPORT_TEST,
        {
            "speedup inverted": ("medians[0][key] / medians[1][key]", "medians[1][key] / medians[0][key]"),
            "speedup beside failed parity": (
                "if result is not None and result.passed is False:",
                "if result is not None and result.passed is False and result.nan:",
            ),
            "speedup where parity was not checked": (
                "if result is None or result.passed is None:",
                "if result is None:",
            ),
            "a process without a number for its error is the best one": (
                "found = failed[0] if failed else max(",
                "found = max(",
            ),
            "spread of rounds not told": ("if spread > UNSTABLE_SPREAD:", "if spread > 10 * UNSTABLE_SPREAD:"),
            "identical arms that differ not told": ("if half_range > UNSTABLE_SPREAD:", "if half_range > 1.0:"),
        },
    ),
    *faults(
        "bench",
        f"{_BENCH}/report.py",
        _REPORT_TEST,
        {
            "failed parity is exit code 0": (
                "for p in (*passed, *(row.parity.passed for row in self.rows if row.parity))",
                "for p in ()",
            ),
            "parity not checked is exit code 0": ("if None in passed:", "if not passed:"),
        },
    ),
    *faults(
        "select",
        f"{_BENCH}/select.py",
        "tests/test_select.py",
        {
            "over the tolerance may win": ("if not parity.rms_rel <= tolerance:", "if not parity.rms_rel <= 1.0:"),
            "failed parity may win": ("if not parity.passed:", "if not parity.passed and not parity.reason:"),
            "slowest for the fastest": (
                "return min(rows, key=lambda row: _compare(",
                "return max(rows, key=lambda row: _compare(",
            ),
            "unstable choice not told": ("return any(candidate.unstable for", "return all(candidate.unstable for"),
        },
        "not digits",
    ),
)
