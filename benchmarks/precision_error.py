"""How far FP16 and BF16 graphs are from PyTorch FP32: worst row of `evit-deploy verify`, per family and runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.digits_precision import train_digits
from benchmarks.result import ERROR, Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

NAME = "precision-error"
TITLE = "RMS-relative error of FP16 and BF16 graphs against PyTorch FP32, worst row"
GOAL = "at most 2e-3 in FP16 and 2e-2 in BF16, in ONNX Runtime and OpenVINO"
MODELS = ("msra-m3", "mit-b1", "msa-m3")
QUICK_MODELS = ("msra-m0",)
DIGITS = "digits"
GOALS = {"fp16": Goal("<=", 2e-3), "bf16": Goal("<=", 2e-2)}
BACKENDS = ("onnxruntime", "openvino", "torch-half")
PROMISED = ("onnxruntime", "openvino")
BATCHES = (1, 3)


def run(settings: Settings, workspace: Workspace) -> Result:
    """Export and compare: published models with random weights on random images, the digits on held-out ones."""
    models = settings.models or (QUICK_MODELS if settings.quick else (*MODELS, DIGITS))
    rows = [row for model in models for precision in GOALS for row in _measure(model, precision, settings, workspace)]
    protocol = {
        "weights": f"random, seed {WEIGHT_SEED}; of {DIGITS}: examples/digits/train.py",
        "images": "the random ones of `verify`; of digits also the 48 held-out pictures",
        "image_size_px": settings.image_size,
        "batches": list(BATCHES),
        "threads": settings.threads,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _measure(model: str, precision: str, settings: Settings, workspace: Workspace) -> list[Row]:
    from evit_deploy import api

    bundle, images = _export(model, precision, settings, workspace)
    rows = []
    for backend in BACKENDS:
        workspace.progress(f"{model} {precision}: verify in {backend}")
        report = api.verify(bundle, batches=BATCHES, inputs=images, backend=backend, threads=settings.threads)
        errors = [row.rms_rel for row in report.rows if row.rms_rel is not None]
        details: dict[str, Any] = {
            "verdict": report.verdict,
            "computed_in": report.executed_precision,
            "nan": sum(row.nan for row in report.rows),
            "notes": list(report.notes),
        }
        rows.append(
            Row(
                model,
                f"{precision.upper()} graph in {backend}",
                ERROR,
                max(errors, default=None),
                goal=GOALS[precision] if backend in PROMISED else None,
                reason="" if len(errors) == len(report.rows) else report.summary(),
                details=details,
            )
        )
    return rows


def _export(model: str, precision: str, settings: Settings, workspace: Workspace) -> tuple[Bundle, Path | None]:
    from evit_deploy import api

    target = workspace.folder / f"{model}-{precision}-error.evit"
    workspace.progress(f"{model}: export --precision {precision}")
    if model == DIGITS:
        folder = train_digits(settings, workspace)
        exported = api.export(folder / "digits.pt", target, precision=precision, verify=False)
        return exported.bundle, folder / "heldout"
    exported = api.export(
        None,
        target,
        random_weights=model,
        seed=WEIGHT_SEED,
        image_size=settings.image_size,
        precision=precision,
        verify=False,
    )
    return exported.bundle, None
