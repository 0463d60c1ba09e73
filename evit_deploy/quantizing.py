"""The way from an FP32 bundle to a verified INT8 one: calibrate, insert, measure, write, verify, move in place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.constants import BUNDLE_SUFFIX, DEFAULT_MAX_BATCH, ONNX_FILE, WEIGHTS_FILE
from evit_deploy.environment import package_versions
from evit_deploy.errors import MissingDependencyError, ParityError, UsageError, unknown_name_hint
from evit_deploy.images.sources import FirstInputs, InputSource, RepeatedInputs, open_inputs
from evit_deploy.onnx.precision import precision_counts
from evit_deploy.onnx.quantize import Layer, excluded_layers, find_layers, quantize_graph
from evit_deploy.parity.gate import tolerance_for
from evit_deploy.parity.report import NOT_VERIFIED, VerifyReport
from evit_deploy.parity.verify import verify_runner
from evit_deploy.quantization.calibration import Calibration, calibrate
from evit_deploy.quantization.report import REPORT_FILE, LayerResult, QuantizeResult
from evit_deploy.quantization.sensitivity import layer_errors, output_error
from evit_deploy.quantization.thresholds import METHODS, threshold
from evit_deploy.runners.ort import OnnxRuntimeRunner
from evit_deploy.runners.reference import reference_runner

DEFAULT_METHOD = "percentile"  # the least error on the digits example; docs/quantize.md
PRECISION = "int8"
VERIFIED_IMAGES = 256  # calibration images compared with PyTorch; of ten thousand, more would only take time
UNLIKELY_FACTOR = 1.5  # beyond black and white by so much, values are no pixels
AT_EDGE = "first or last layer"
ALWAYS_ZERO = "its input was always zero"
_REWRITTEN = ("schema", "schema_version", "created", "tool_version", "files", "manifest_sha256")


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantize and how; see `evit_deploy.api.quantize` for each."""

    method: str = DEFAULT_METHOD
    exclude: tuple[str, ...] = ()
    include_first_last: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"unknown calibration method {self.method!r}", hint=unknown_name_hint(self.method, METHODS)
            )


def default_output(bundle: Path) -> Path:
    """`NAME-int8.evit` in the current folder."""
    return Path(bundle.resolve().name.removesuffix(BUNDLE_SUFFIX) + f"-{PRECISION}{BUNDLE_SUFFIX}")


def quantize_bundle(
    bundle: Bundle,
    images: Path,
    output: Path,
    options: QuantizeOptions,
    *,
    verify: bool,
    seed: int,
    force: bool,
    threads: int | None,
    progress: Callable[[str], None],
) -> QuantizeResult:
    """Write one INT8 bundle; nothing is left behind when a step fails.

    Raises:
        UsageError, InputDataError, ExportError, BundleError, ParityError: see `evit_deploy.api.quantize`.
    """
    facts = bundle.manifest["onnx"]
    if facts["precision"] != "fp32":
        raise UsageError(
            f"{bundle.path} is {facts['precision']}, and only an FP32 bundle can be quantized",
            hint="give the FP32 bundle that it was made from, or export one",
        )
    if output.resolve() == bundle.path.resolve():
        raise UsageError(
            f"{output} is the bundle to quantize, and stays the only FP32 one", hint="choose another name with -o"
        )
    source = open_inputs(images, bundle.spec.image_size, bundle.preprocessing)
    data = bundle.read_onnx()
    model = onnx.load_model_from_string(data)
    layers = find_layers(model)
    excluded = {layer.node: AT_EDGE for layer in layers if layer.at_edge and not options.include_first_last}
    excluded |= {node: f"--exclude {name}" for node, name in excluded_layers(layers, options.exclude).items()}
    _require_some(layers, excluded)
    seconds: dict[str, float] = {}
    with BundleWriter(output, force=force) as writer:
        with _timed(seconds, "calibrate"):
            calibration = calibrate(model, layers, source, progress, threads)
            thresholds = {
                name: threshold(histogram, options.method) for name, histogram in calibration.histograms.items()
            }
        excluded |= {
            layer.node: ALWAYS_ZERO
            for layer in layers
            if layer.node not in excluded and thresholds[layer.activation] == 0
        }
        chosen = _require_some(layers, excluded)
        with _timed(seconds, "quantize"):
            progress(f"quantizing {len(chosen)} of {len(layers)} layers")
            quantized = quantize_graph(model, chosen, thresholds)
            onnx.checker.check_model(quantized, full_check=True)
            error = output_error(model, quantized, calibration.kept, threads)
        with _timed(seconds, "sensitivity"):
            errors = layer_errors(model, chosen, thresholds, calibration.kept, progress, threads)
        rows = _rows(
            layers, excluded, dict(zip([layer.node for layer in chosen], errors, strict=True)), calibration, thresholds
        )
        about = _about(bundle, calibration, options, rows)
        with _timed(seconds, "write"):
            progress("writing the bundle")
            onnx.save(quantized, writer.path / ONNX_FILE)
            shutil.copyfile(bundle.weights_path, writer.path / WEIGHTS_FILE)
            manifest = _manifest(bundle, quantized, about)
            staged = writer.stage(manifest)
        report = None
        if verify:
            with _timed(seconds, "verify"):
                report = _verify(staged, source, seed, threads, progress, subject=str(output))
            _require_pass(report, rows)
        result = QuantizeResult(
            path=output,
            model=bundle.manifest["model"],
            source_sha256=bundle.onnx_sha256,
            onnx_sha256=staged.onnx_sha256,
            source_bytes=len(data),
            onnx_bytes=(staged.path / ONNX_FILE).stat().st_size,
            calibration=about,
            layers=rows,
            error=error,
            sensitivity_images=min(calibration.images, sum(map(len, calibration.kept))),
            verification=report,
            seconds=seconds,
            notes=(*calibration.notes, *_range_notes(bundle, calibration), *bundle.manifest["origin"].get("notes", ())),
        )
        place = writer.path / REPORT_FILE
        place.parent.mkdir()
        place.write_text(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        writer.commit({**manifest, "verification": NOT_VERIFIED if report is None else report.manifest_entry()})
    return result


def _require_some(layers: Sequence[Layer], excluded: Mapping[str, str]) -> list[Layer]:
    """The layers that are not excluded."""
    chosen = [layer for layer in layers if layer.node not in excluded]
    if not chosen:
        raise UsageError("every layer is excluded, nothing would be quantized", hint="leave out some --exclude")
    return chosen


def _rows(
    layers: Sequence[Layer],
    excluded: Mapping[str, str],
    errors: Mapping[str, float],
    calibration: Calibration,
    thresholds: Mapping[str, float],
) -> tuple[LayerResult, ...]:
    rows = [
        LayerResult(
            layer,
            excluded.get(layer.node, ""),
            thresholds[layer.activation],
            calibration.histograms[layer.activation].highest,
            errors.get(layer.node),
        )
        for layer in layers
    ]
    return tuple(sorted(rows, key=lambda row: (bool(row.excluded), -(row.error or 0.0))))


def _about(
    bundle: Bundle, calibration: Calibration, options: QuantizeOptions, rows: Sequence[LayerResult]
) -> dict[str, Any]:
    """What the manifest says of the calibration."""
    return {
        "method": options.method,
        "source": calibration.source,
        "images": calibration.images,
        "digest": calibration.digest,
        "source_onnx_sha256": bundle.onnx_sha256,
        "quantized": sum(not row.excluded for row in rows),
        "excluded": {row.layer.node: row.excluded for row in rows if row.excluded},
    }


def _range_notes(bundle: Bundle, calibration: Calibration) -> list[str]:
    """A word where a float32 array cannot have been normalised as the bundle's preprocessing says."""
    if bundle.manifest["onnx"]["with_preprocess"]:
        return []
    means, deviations = bundle.preprocessing.mean, bundle.preprocessing.std
    white = max(max(mean, 1 - mean) / deviation for mean, deviation in zip(means, deviations, strict=True))
    if calibration.highest <= UNLIKELY_FACTOR * white:
        return []
    return [
        f"calibration values reach {calibration.highest:.3g}, and normalised pixels of this model end at {white:.3g}: "
        "a float32 array is taken as preprocessed"
    ]


def _manifest(bundle: Bundle, graph: onnx.ModelProto, about: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in bundle.manifest.items() if key not in _REWRITTEN}
    counts = precision_counts(graph)
    return {
        **kept,
        "onnx": {
            **bundle.manifest["onnx"],
            "precision": PRECISION,
            "ir_version": graph.ir_version,
            "nodes_by_type": counts.nodes_by_type,
            "casts": counts.casts,
        },
        "calibration": dict(about),
        "verification": NOT_VERIFIED,
        "versions": {name: version for name, version in package_versions().items() if version is not None},
    }


def _verify(
    staged: Bundle,
    source: InputSource,
    seed: int,
    threads: int | None,
    progress: Callable[[str], None],
    subject: str,
) -> VerifyReport:
    facts = staged.manifest["onnx"]
    return verify_runner(
        reference_runner(staged, softmax=facts["with_softmax"], threads=threads),
        OnnxRuntimeRunner(staged.read_onnx(), threads=threads, memory_pattern=False),
        inputs=[RepeatedInputs(source), FirstInputs(source, VERIFIED_IMAGES)],
        max_batch=staged.max_batch or DEFAULT_MAX_BATCH,
        precision=PRECISION,
        tolerance=tolerance_for(PRECISION),
        seed=seed,
        subject={"bundle": subject, "onnx_sha256": staged.onnx_sha256},
        progress=progress,
    )


def _require_pass(report: VerifyReport, rows: Sequence[LayerResult]) -> None:
    if report.verdict == "unverified":
        raise MissingDependencyError(
            f"the quantized graph could not be verified, {report.summary().removeprefix('unverified: ')}",
            hint="no bundle was written; evit-deploy doctor says what is missing, --no-verify writes it unverified",
        )
    if report.verdict != "pass":
        worst = ", ".join([row.layer.node for row in rows if not row.excluded][:3])
        raise ParityError(
            f"the quantized graph is too far from PyTorch, {report.summary().removeprefix('fail: ')}",
            hint=f"no bundle was written; --exclude the worst layers ({worst}), give more images, or look closer with "
            "--no-verify",
        )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started
