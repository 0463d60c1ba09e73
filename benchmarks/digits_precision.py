"""Accuracy of a trained model of each family in every precision: exported, quantized and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.result import PERCENT, POINTS, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.trained import PROTOCOL, QUICK_EPOCHS, train_digits, trained_models
from benchmarks.workspace import Workspace

NAME = "digits-precision"
TITLE = "top-1 of models trained on the digits on their 360 held-out images, in every precision"
GOAL = "INT8 loses at most 0.5 points of top-1 against PyTorch FP32"
MAX_INT8_DROP = Goal("<=", 0.5)
QUICK_LIMIT = 20
HALF = ("fp16", "bf16")


def run(settings: Settings, workspace: Workspace) -> Result:
    """Train, export in three precisions, quantize, evaluate each.

    Raises:
        EvitDeployError: training failed.
    """
    rows = [row for model in trained_models(settings) for row in _measure(model, settings, workspace)]
    protocol = {
        "checkpoints": PROTOCOL + (f", --epochs {QUICK_EPOCHS}" if settings.quick else ""),
        "data": "heldout.npz, which training has not seen",
        "calibration": "calibration.npy, 256 training images",
        "threads": settings.threads,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _measure(model: str, settings: Settings, workspace: Workspace) -> list[Row]:
    from evit_deploy import api
    from evit_deploy.bundle import Bundle

    folder = train_digits(model, settings, workspace)
    workspace.progress(f"{model}: export")
    source = api.export(folder / "digits.pt", folder / "digits.evit").bundle
    bundles = {"fp32": source}
    for precision in HALF:
        workspace.progress(f"{model}: export --precision {precision}")
        target = folder / f"digits-{precision}.evit"
        bundles[precision] = api.export(source.path, target, precision=precision).bundle
    workspace.progress(f"{model}: quantize")
    # Top-1 judges it, here. Its logits may be further from FP32 than `quantize` lets pass: those of `msra` are.
    quantized = api.quantize(source, folder / "calibration.npy", folder / "digits-int8.evit", verify=False)
    bundles["int8"] = Bundle.open(quantized.path)
    rows = []
    for precision, bundle in bundles.items():
        backends = ("onnxruntime", "openvino", *(("torch-half",) if precision in HALF else ()))
        workspace.progress(f"{model}: evaluate {precision} in {', '.join(backends)}")
        limit = QUICK_LIMIT if settings.quick else None
        report = api.evaluate(
            bundle, folder / "heldout.npz", backends=backends, limit=limit, batch=60, threads=settings.threads
        )
        rows += _rows(model, precision, report, bundle.onnx_path)
    return rows


def _rows(model: str, precision: str, report: Any, graph: Path) -> list[Row]:
    """Top-1, and the points lost against the reference, of each backend; the reference once, with FP32."""
    rows = []
    for row in report.rows:
        is_reference = row.agreement is None
        if is_reference and precision != "fp32":
            continue
        details = {
            "graph": "checkpoint" if is_reference else precision,
            "backend": row.backend,
            "computed_in": row.precision,
            "images": report.data.read,
            "correct": row.correct,
            "agreement": row.agreement,
            "no_answer": row.no_answer,
            "graph_bytes": graph.stat().st_size,
            "notes": list(row.notes),
        }
        what = "checkpoint in PyTorch FP32" if is_reference else f"{precision} in {row.backend}"
        rows.append(Row(model, f"top-1, {what}", PERCENT, 100 * row.correct / report.data.read, details=details))
        if not is_reference:
            goal = MAX_INT8_DROP if precision == "int8" else None
            rows.append(Row(model, f"top-1 drop, {what}", POINTS, row.top1_drop_points, goal=goal, details=details))
    return rows


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Markdown: a row per model, precision and backend."""
    lines = [
        "| model | graph | runs in | computes in | top-1 | drop, points | same answer as PyTorch FP32 | model.onnx |",
        "|---|---|---|---|---|---|---|---|",
    ]
    drops = {_arm(row): row["value"] for row in result["rows"] if row["unit"] == POINTS}
    for row in result["rows"]:
        if row["unit"] != PERCENT:
            continue
        details = row["details"]
        drop = drops.get(_arm(row))
        cells = (
            row["subject"],
            details["graph"],
            "PyTorch" if drop is None else details["backend"],
            details["computed_in"],
            f"{row['value']:.2f} %",
            "-" if drop is None else f"{drop:.2f}",
            "-" if details["agreement"] is None else f"{100 * details['agreement']:.2f} %",
            "-" if drop is None else f"{details['graph_bytes'] / 1024:.0f} KiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    images = result["rows"][0]["details"]["images"]
    quick = " Measured with --quick: the figures mean nothing." if result["protocol"]["quick"] else ""
    return "\n".join([*lines, "", f"{images} images; {result['machine']['cpu']}; {result['date'][:10]}.{quick}"])


def _arm(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["subject"], row["details"]["graph"], row["details"]["backend"]
