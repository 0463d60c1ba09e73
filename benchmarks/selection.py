"""What `bench --select` gains: trained weights at the size that models are deployed at, on pictures of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import FULL, MIN_PROCESSES, QUICK, QUICK_DURATION_S, shared_protocol, why_not
from benchmarks.result import RATIO, Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.trained import DIGITS, PROTOCOL, train_digits, trained_models
from benchmarks.workspace import Workspace
from evit_deploy.bench.measure import run_bench
from evit_deploy.bench.select import OVER_TOLERANCE, SELECTED
from evit_deploy.bench.statistics import UNSTABLE

if TYPE_CHECKING:
    from evit_deploy.bench.report import BenchReport, BenchRow
    from evit_deploy.bench.select import BatchSelection
    from evit_deploy.bundle import Bundle

NAME = "select"
TITLE = "what `bench --select` names, against our FP32 graph in ONNX Runtime, and against the best single backend"
GOAL = "at 1e-2: 1.3x for msra-m3 at batch 1, 1.7x for it at batch 8 and for mit-b1; at 1e-5: within 3 % of the best"
BASELINE = "onnxruntime"
MODELS = ("msra-m3", "mit-b1")
BATCHES = (1, 8)
LOOSE, TIGHT = 1e-2, 1e-5
SPEEDUPS = {
    ("msra-m3", 1): Goal(">=", 1.3),
    ("msra-m3", 8): Goal(">=", 1.7),
    ("mit-b1", 1): Goal(">=", 1.7),
    ("mit-b1", 8): Goal(">=", 1.7),
}
NEAR_BEST = Goal(">=", 0.97)
DURATION_S = 280.0  # lets FULL finish on two cores


def run(settings: Settings, workspace: Workspace) -> Result:
    """Select at both tolerances for every model.

    Raises:
        EvitDeployError: training failed.
    """
    rows: list[Row] = []
    protocol: dict[str, Any] = {}
    for model in trained_models(settings, MODELS):
        bundle = _export(model, settings, workspace)
        loose, tight = (_select(bundle, tolerance, settings, workspace) for tolerance in (LOOSE, TIGHT))
        assert loose.selection is not None
        assert tight.selection is not None
        rows += [_speedup(model, batch, loose, settings) for batch in loose.selection.batches]
        rows += [_near_best(model, batch, tight, loose, settings) for batch in tight.selection.batches]
        protocol = shared_protocol(tight, settings)
    protocol |= {"weights": PROTOCOL, "images": "the 48 held-out pictures", "tolerances": [LOOSE, TIGHT]}
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _export(model: str, settings: Settings, workspace: Workspace) -> Bundle:
    from evit_deploy import api
    from evit_deploy.bundle import Bundle

    path = workspace.folder / f"{model}-select.evit"
    if path.exists():
        return Bundle.open(path)
    checkpoint = train_digits(model, settings, workspace) / "digits.pt"
    workspace.progress(f"{model}: export")
    image_size = None if model == DIGITS else settings.image_size
    return api.export(checkpoint, path, image_size=image_size, verify=False).bundle


def _select(bundle: Bundle, tolerance: float, settings: Settings, workspace: Workspace) -> BenchReport:
    model = bundle.path.stem.removesuffix("-select")
    return run_bench(
        bundle,
        batches=settings.batches or BATCHES,
        baseline=BASELINE,
        duration_s=settings.duration_s or (QUICK_DURATION_S if settings.quick else DURATION_S),
        threads=settings.threads,
        inputs=train_digits(model, settings, workspace) / "heldout",
        tolerance=tolerance,
        select=True,
        seed=WEIGHT_SEED,
        progress=lambda line: workspace.progress(f"{model} at {tolerance:g}: {line}"),
        effort=QUICK if settings.quick else FULL,
    )


def _speedup(model: str, selection: BatchSelection, report: BenchReport, settings: Settings) -> Row:
    """How much faster the selected backend is than ONNX Runtime; 1 where that one is selected."""
    chosen, batch = selection.selected, selection.batch
    quantity, goal = f"speedup at {LOOSE:g}", SPEEDUPS.get((model, batch))
    details = _details(selection, report)
    if chosen is None:
        return Row(model, quantity, RATIO, None, batch, goal=goal, reason="no backend was selected", details=details)
    if chosen.backend == BASELINE:
        return Row(model, quantity, RATIO, 1.0, batch, goal=goal, details=details)
    rows = {row.backend: row for row in report.rows if row.batch == batch}
    ours = rows[chosen.backend]
    reason = why_not(ours, rows[BASELINE], QUICK.target_processes if settings.quick else MIN_PROCESSES)
    estimate = ours.ratio.estimate if ours.ratio else None
    return Row(
        model,
        quantity,
        RATIO,
        estimate.value if estimate else None,
        batch,
        ci_low=estimate.ci_low if estimate else None,
        ci_high=estimate.ci_high if estimate else None,
        goal=goal,
        reason=reason,
        unstable=reason.startswith(f"{UNSTABLE}: "),
        details=details,
    )


def _near_best(
    model: str, selection: BatchSelection, report: BenchReport, other: BenchReport, settings: Settings
) -> Row:
    """How fast the selected backend is to the fastest of all within the tolerance, in another run of the same arms.

    In its own run the selected one is near the fastest by the rule it was selected by.
    """
    quantity = f"speed to the best at {TIGHT:g}"
    batch, chosen = selection.batch, selection.selected
    details = _details(selection, report)
    row = Row(model, quantity, RATIO, None, batch, goal=NEAR_BEST, details=details)
    if chosen is None:
        return replace(row, reason="no backend was selected")
    within = {one.backend for one in selection.candidates if one.rms_rel is not None and one.rms_rel <= TIGHT}
    rows = {one.backend: one for one in other.rows if one.batch == batch and one.backend in within}
    if missing := sorted(name for name in within if name != BASELINE and _speed(rows.get(name)) is None):
        return replace(row, reason=f"the other run has no figure for {', '.join(missing)}")
    speeds = {name: 1.0 if name == BASELINE else _speed(one) or 0.0 for name, one in rows.items()}
    best = max(speeds, key=speeds.__getitem__)
    reason = ""
    for name in {best, chosen.backend} - {BASELINE}:
        reason = reason or why_not(
            rows[name], rows[BASELINE], QUICK.target_processes if settings.quick else MIN_PROCESSES
        )
    details["other_run"] = {"speeds": speeds, "best": best}
    unstable = reason.startswith(f"{UNSTABLE}: ")
    return replace(row, value=speeds[chosen.backend] / speeds[best], reason=reason, unstable=unstable)


def _speed(row: BenchRow | None) -> float | None:
    """Over the baseline's."""
    return row.ratio.estimate.value if row and row.ratio and row.ratio.estimate else None


def _details(selection: BatchSelection, report: BenchReport) -> dict[str, Any]:
    """What became of every candidate, and what identical arms differed by."""
    half_range = next((aa.half_range for aa in report.aa if aa.batch == selection.batch), None)
    baseline = next((row for row in report.rows if row.backend == BASELINE and row.batch == selection.batch), None)
    return {
        **selection.to_json(),
        "tolerance": report.selection.tolerance_rms_rel if report.selection else None,
        "baseline_p50_ms": baseline.latency.p50_ms if baseline and baseline.latency else None,
        "speedups": {
            row.backend: row.ratio.to_json()
            for row in report.rows
            if row.batch == selection.batch and row.ratio and row.backend != BASELINE
        },
        "aa_half_range": half_range,
        "duration_s": report.protocol["duration_s"],
        "elapsed_s": report.protocol["elapsed_s"],
    }


def selection_table(result: Mapping[str, Any]) -> str:
    """Markdown: for each model, batch size and tolerance what was selected, how fast it is, and why not the others."""
    lines = [
        "| model | batch | tolerance | selected | error | p50 | against FP32 in ONNX Runtime | goal | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        details = row["details"]
        chosen = next((one for one in details["candidates"] if one["verdict"] == SELECTED), None)
        others = [_other(one, details) for one in details["candidates"] if one is not chosen]
        name = "none" if chosen is None else f"`{chosen['backend']}` in {chosen['precision']}"
        cells = (
            row["subject"],
            str(row["batch"]),
            f"{details['tolerance']:g}",
            name,
            "-" if chosen is None else f"{chosen['rms_rel']:.1e}",
            "-" if chosen is None else f"{chosen['p50_ms']:.3g} ms",
            _against_baseline(chosen, details),
            _goal(row),
            "; ".join(others),
        )
        lines.append(f"| {' | '.join(cells)} |")
    quick = " Measured with --quick: the figures mean nothing." if result["protocol"]["quick"] else ""
    return "\n".join([*lines, "", f"{result['machine']['cpu']}; {result['date'][:10]}.{quick}"])


def _against_baseline(chosen: Mapping[str, Any] | None, details: Mapping[str, Any]) -> str:
    if chosen is None:
        return "-"
    return "it is that" if chosen["backend"] == BASELINE else _ratio(chosen["backend"], details) or "-"


def _other(one: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Why it was not selected; of one that only its error keeps out, how fast it would have been."""
    ratio = _ratio(one["backend"], details) if one["verdict"] == OVER_TOLERANCE else ""
    return f"{one['backend']}: {one['reason']}" + (f" (would be {ratio})" if ratio else "")


def _ratio(backend: str, details: Mapping[str, Any]) -> str:
    """Its speed over the baseline's, "" where that was not measured."""
    ratio = details["speedups"].get(backend)
    if ratio is None or ratio["value"] is None:
        return ""
    unstable = f", {UNSTABLE}" if ratio["verdict"] == UNSTABLE else ""
    return f"{ratio['value']:.2f}x, {ratio['ci_low']:.2f} to {ratio['ci_high']:.2f}{unstable}"


def _goal(row: Mapping[str, Any]) -> str:
    goal = row["goal"]
    if goal is None:
        return "-"
    what = "of the best's speed " if goal == NEAR_BEST.to_json() else ""
    return f"{what}{goal['relation']} {goal['limit']:g}x: {'reached' if row['reached'] else '**not reached**'}"
