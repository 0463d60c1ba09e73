"""How far FP16 and BF16 graphs are from PyTorch FP32: the worst image of `evit-deploy verify`, per family and runtime.

Judged are trained weights on images they were trained for. Random weights are measured beside them, with what rounding
the weights alone costs, everything computed in FP32: no graph with weights of that type can do better. Last come
weights that make a plain FP16 attention overflow: there NaN and infinity are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.breaking import breaking_rows
from benchmarks.result import ERROR, Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.trained import PROTOCOL, train_digits, trained_models
from benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle
    from evit_deploy.parity.report import VerifyReport, VerifyRow

NAME = "precision-error"
TITLE = "RMS-relative error of FP16 and BF16 graphs against PyTorch FP32, worst image, and NaN where plain FP16 breaks"
GOAL = "at most 2e-3 in FP16 and 2e-2 in BF16 with trained weights, in ONNX Runtime and OpenVINO; never NaN"
RANDOM = ("msra-m3", "mit-b1", "msa-m3")
QUICK_RANDOM = ("msra-m0",)
GOALS = {"fp16": Goal("<=", 2e-3), "bf16": Goal("<=", 2e-2)}
BACKENDS = ("onnxruntime", "openvino", "torch-half")
PROMISED = ("onnxruntime", "openvino")
BATCHES = (1, 3)


def run(settings: Settings, workspace: Workspace) -> Result:
    """Export and compare: trained models on held-out pictures, published ones with random and with breaking weights."""
    random = settings.models or (QUICK_RANDOM if settings.quick else RANDOM)
    rows = [
        row
        for measure, models in ((_trained, trained_models(settings)), (_random, random))
        for model in models
        for precision in GOALS
        for row in measure(model, precision, settings, workspace)
    ]
    if settings.models is None:
        rows += breaking_rows(settings, workspace, BACKENDS)
    protocol = {
        "trained weights": PROTOCOL,
        "images of trained weights": "the 48 held-out pictures; on the random ones of `verify` in the details",
        "random weights": f"seed {WEIGHT_SEED}, at {settings.image_size} px, on the random images of `verify`",
        "batches": list(BATCHES),
        "threads": settings.threads,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _trained(model: str, precision: str, settings: Settings, workspace: Workspace) -> Iterator[Row]:
    from evit_deploy import api

    folder = train_digits(model, settings, workspace)
    workspace.progress(f"{model}: export --precision {precision}")
    target = workspace.folder / f"{model}-{precision}-trained.evit"
    bundle = api.export(folder / "digits.pt", target, precision=precision, verify=False).bundle
    for backend, report in _reports(bundle, folder / "heldout", settings, workspace):
        pictures = [row for row in report.rows if row.input == "heldout/"]
        others = [row for row in report.rows if row.input != "heldout/"]
        goal = GOALS[precision] if backend in PROMISED else None
        yield _row(f"{model}, trained", precision, backend, report, pictures, goal, {"random_images": _worst(others)})


def _random(model: str, precision: str, settings: Settings, workspace: Workspace) -> Iterator[Row]:
    from evit_deploy import api

    target = workspace.folder / f"{model}-{precision}-random.evit"
    workspace.progress(f"{model}: export --precision {precision}")
    bundle = api.export(
        None,
        target,
        random_weights=model,
        seed=WEIGHT_SEED,
        image_size=settings.image_size,
        precision=precision,
        verify=False,
    ).bundle
    subject = f"{model}, random weights"
    for backend, report in _reports(bundle, None, settings, workspace):
        yield _row(subject, precision, backend, report, list(report.rows), None, {})
    what = f"weights in {precision.upper()}, the rest FP32"
    yield Row(subject, what, ERROR, _rounding_alone(bundle, precision), details={"backend": "PyTorch"})


def _reports(
    bundle: Bundle, images: Path | None, settings: Settings, workspace: Workspace
) -> Iterator[tuple[str, VerifyReport]]:
    from evit_deploy import api

    for backend in BACKENDS:
        workspace.progress(f"{bundle.path.name}: verify in {backend}")
        yield (
            backend,
            api.verify(bundle, batches=BATCHES, inputs=images, backend=backend, threads=settings.threads),
        )


def _row(
    subject: str,
    precision: str,
    backend: str,
    report: VerifyReport,
    rows: list[VerifyRow],
    goal: Goal | None,
    more: dict[str, Any],
) -> Row:
    worst = _worst(rows)
    details: dict[str, Any] = {
        "verdict": report.verdict,
        "computed_in": report.executed_precision,
        "nan_or_inf": sum(row.nan + row.inf for row in rows),
        "images": max((row.images for row in rows), default=0),
        "notes": list(report.notes),
        **more,
    }
    reason = report.summary() if worst is None else ""
    return Row(
        subject, f"{precision.upper()} graph in {backend}", ERROR, worst, goal=goal, reason=reason, details=details
    )


def _worst(rows: list[VerifyRow]) -> float | None:
    """None as soon as one row has no error: NaN, or nothing compared."""
    errors = [row.rms_rel for row in rows]
    return None if not errors or None in errors else max(error for error in errors if error is not None)


def _rounding_alone(bundle: Bundle, precision: str) -> float:
    """The worst image's error of the model whose weights were rounded, computed in FP32."""
    import torch

    from evit_deploy.images.sources import RandomInputs
    from evit_deploy.models import load_model
    from evit_deploy.models.fused import fused_model
    from evit_deploy.models.precision import DTYPES
    from evit_deploy.parity.metrics import compare_rows

    reference = load_model(bundle.spec, bundle.load_state_dict()).eval()
    rounded = fused_model(reference, bundle.spec)
    for tensor in (*rounded.parameters(), *rounded.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(DTYPES[precision]).float()
    worst = 0.0
    source = RandomInputs(bundle.spec.image_size, bundle.preprocessing)
    for size in BATCHES:
        for batch in source.batches(size):
            images = torch.from_numpy(batch.images)
            with torch.inference_mode():
                metrics = compare_rows(reference(images).numpy(), rounded(images).numpy())
            worst = max(worst, float(metrics.rms_rel.max()))
    return worst
