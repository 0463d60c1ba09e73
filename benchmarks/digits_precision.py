"""Accuracy of one trained model in every precision: the digits example, exported, quantized and evaluated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.program import ROOT
from benchmarks.result import PERCENT, POINTS, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import EvitDeployError

NAME = "digits-precision"
TITLE = "top-1 of the digits example on its 360 held-out images, in every precision"
GOAL = "INT8 loses at most 0.5 points of top-1 against PyTorch FP32"
MAX_INT8_DROP = Goal("<=", 0.5)
QUICK_EPOCHS, QUICK_LIMIT = 8, 20
HALF = ("fp16", "bf16")


def run(settings: Settings, workspace: Workspace) -> Result:
    """Train, export in three precisions, quantize, evaluate each.

    Raises:
        EvitDeployError: training failed.
    """
    from evit_deploy import api
    from evit_deploy.bundle import Bundle

    folder = train_digits(settings, workspace)
    source = api.export(folder / "digits.pt", folder / "digits.evit").bundle
    bundles = {"fp32": source}
    for precision in HALF:
        workspace.progress(f"digits: export --precision {precision}")
        target = folder / f"digits-{precision}.evit"
        bundles[precision] = api.export(source.path, target, precision=precision).bundle
    workspace.progress("digits: quantize")
    bundles["int8"] = Bundle.open(api.quantize(source, folder / "calibration.npy", folder / "digits-int8.evit").path)
    rows = []
    for precision, bundle in bundles.items():
        backends = ("onnxruntime", "openvino", *(("torch-half",) if precision in HALF else ()))
        workspace.progress(f"digits: evaluate {precision} in {', '.join(backends)}")
        limit = QUICK_LIMIT if settings.quick else None
        report = api.evaluate(
            bundle, folder / "heldout.npz", backends=backends, limit=limit, batch=60, threads=settings.threads
        )
        rows += _rows(precision, report, bundle.onnx_path)
    protocol = {
        "checkpoint": "examples/digits/train.py" + (f" --epochs {QUICK_EPOCHS}" if settings.quick else ""),
        "data": "heldout.npz, which training has not seen",
        "calibration": "calibration.npy, 256 training images",
        "threads": settings.threads,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def train_digits(settings: Settings, workspace: Workspace) -> Path:
    """The folder that examples/digits/train.py writes, once per workspace."""
    folder = workspace.folder / "digits"
    if folder.exists():
        return folder
    workspace.progress("digits: training")
    command = [sys.executable, str(ROOT / "examples/digits/train.py"), "--output", str(folder)]
    if settings.quick:
        command += ["--epochs", str(QUICK_EPOCHS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EvitDeployError("training the digits failed", details=done.stderr.splitlines()[-5:])
    return folder


def _rows(precision: str, report: Any, graph: Path) -> list[Row]:
    """Top-1, and the points lost against the reference, of each backend; the reference once, with FP32."""
    rows = []
    for row in report.rows:
        is_reference = row.agreement is None
        if is_reference and precision != "fp32":
            continue
        details = {
            "backend": row.backend,
            "computed_in": row.precision,
            "images": report.data.read,
            "correct": row.correct,
            "agreement": row.agreement,
            "no_answer": row.no_answer,
            "graph_bytes": graph.stat().st_size,
            "notes": list(row.notes),
        }
        subject = "checkpoint" if is_reference else precision
        backend = "PyTorch FP32" if is_reference else row.backend
        rows.append(Row(subject, f"top-1, {backend}", PERCENT, 100 * row.correct / report.data.read, details=details))
        if not is_reference:
            goal = MAX_INT8_DROP if precision == "int8" else None
            rows.append(
                Row(subject, f"top-1 drop, {backend}", POINTS, row.top1_drop_points, goal=goal, details=details)
            )
    return rows


def accuracy_table(result: dict[str, Any]) -> str:
    """Markdown: a row per precision and backend."""
    lines = [
        "| graph | runs in | computes in | top-1 | drop, points | same answer as PyTorch FP32 | model.onnx |",
        "|---|---|---|---|---|---|---|",
    ]
    drops = {
        (row["subject"], row["details"]["backend"]): row["value"] for row in result["rows"] if row["unit"] == POINTS
    }
    for row in result["rows"]:
        if row["unit"] != PERCENT:
            continue
        details = row["details"]
        drop = drops.get((row["subject"], details["backend"]))
        cells = (
            row["subject"],
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
