"""The way from a checkpoint to a verified bundle: load, fuse, export, simplify, write, verify, move in place."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
from safetensors import SafetensorError, safe_open
from torch import nn

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.checkpoint import CONFIG_KEY, SPEC_METADATA_KEY, Checkpoint, load_checkpoint
from evit_deploy.constants import BUNDLE_SUFFIX, MAX_IMAGE_SIZE_PX, ONNX_FILE
from evit_deploy.environment import package_versions, tool_version
from evit_deploy.errors import MissingDependencyError, ParityError, UsageError
from evit_deploy.exporting_precision import PrecisionOptions, PrecisionPlan, is_bundle, plan_precision
from evit_deploy.models import load_model
from evit_deploy.models.fused import fused_model
from evit_deploy.models.precision import in_precision
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.onnx.blocks import marked_block_names
from evit_deploy.onnx.export import export_graph, fused_operator_types, inline_operators
from evit_deploy.onnx.precision import precision_counts
from evit_deploy.onnx.simplify import Simplification, simplify_graph
from evit_deploy.parity.report import NOT_VERIFIED, VerifyReport
from evit_deploy.specs import ModelSpec, Preprocessing, default_preprocessing
from evit_deploy.verifying import verify_bundle

MANIFEST_METADATA_PREFIX = "evit_deploy."
_RANDOM_WEIGHTS_KEY = MANIFEST_METADATA_PREFIX + "random_weights"  # in model.onnx and in weights.safetensors
_RANDOM_WEIGHTS_NOTE = "random weights: the logits mean nothing"


@dataclass(frozen=True)
class ExportOptions:
    """What the graph is to be; see `evit_deploy.api.export` for each."""

    batch: int | None
    max_batch: int
    opset: int
    fused_operators: bool
    simplify: bool
    with_preprocess: bool
    with_softmax: bool
    precision: PrecisionOptions = field(default=PrecisionOptions())

    @property
    def check_batches(self) -> tuple[int, ...]:
        """The two batch sizes at which simplifying is compared; the one of a fixed graph."""
        if self.batch is not None:
            return (self.batch,)
        return tuple(sorted({1, min(3, self.max_batch)}))


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        bundle: the bundle under its final name.
        seconds: wall-clock seconds by step.
        simplification: what onnxsim did, None with `simplify=False`.
        verification: the report, None with `verify=False`.
    """

    bundle: Bundle
    seconds: dict[str, float]
    simplification: Simplification | None
    verification: VerifyReport | None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Data that fits docs/schemas/export.schema.json."""
        return {
            "schema": "evit-deploy/export",
            "schema_version": 1,
            "bundle": str(self.bundle.path),
            "model": self.bundle.spec.to_json(),
            "onnx_sha256": self.bundle.onnx_sha256,
            "onnx": self.bundle.manifest["onnx"],
            "origin": self.bundle.manifest["origin"],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "verification": None if self.verification is None else self.verification.to_json(),
            "notes": list(self.notes),
        }


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    *,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
    verify: bool,
    seed: int,
    force: bool,
    progress: Callable[[str], None],
    load_seconds: float = 0.0,
    source: Path | None = None,
) -> ExportResult:
    """Write one bundle; nothing is left behind when a step fails.

    Args:
        source: the checkpoint's file or the bundle it comes from, whose headroom report counts.
        See `evit_deploy.api.export` for the others.

    Raises:
        ExportError, BundleError, ParityError: see `evit_deploy.api.export`.
    """
    spec = checkpoint.spec
    preprocessing = preprocessing or checkpoint.preprocessing or default_preprocessing(spec)
    names = list(class_names) if class_names is not None else None
    if names is None and checkpoint.class_names is not None:
        names = list(checkpoint.class_names)
    if names is not None and len(names) != spec.num_classes:
        raise UsageError(
            f"{len(names)} class names were given, the model has {spec.num_classes} classes",
            hint="give one name per class",
        )
    precision = plan_precision(options.precision, spec, checkpoint.state_dict, source)
    seconds: dict[str, float] = {"load": load_seconds}
    with BundleWriter(output, force=force, progress=lambda text: None) as writer:
        model = load_model(spec, checkpoint.state_dict)
        with _timed(seconds, "export"):
            progress(f"exporting {spec.name} at {spec.image_size} px")
            graph = _export(model, spec, options, precision.keep_fp32, preprocessing, checkpoint.origin)
        simplification = None
        if options.simplify:
            with _timed(seconds, "simplify"):
                progress(f"simplifying, compared at batch {' and '.join(map(str, options.check_batches))}")
                graph, simplification = simplify_graph(graph, options.check_batches)
                if not simplification.applied:
                    progress(f"the unsimplified graph is kept: {simplification.reason}")
        with _timed(seconds, "write"):
            progress("writing the bundle")
            onnx.save(graph, writer.path / ONNX_FILE)
            is_random = bool(checkpoint.origin.get("random_weights", False))
            metadata = _weights_metadata(spec, preprocessing, names, is_random)
            writer.save_weights(checkpoint.state_dict, metadata=metadata)
            manifest = _manifest(checkpoint, options, precision, graph, preprocessing, names, simplification)
            staged = writer.stage(manifest)
        del model, graph  # verifying at the largest batch needs their memory
        report = None
        if verify:
            with _timed(seconds, "verify"):
                report = verify_bundle(staged, seed=seed, progress=progress, subject=str(output))
            _require_pass(report, spec)
        with _timed(seconds, "commit"):
            bundle = writer.commit(
                {**manifest, "verification": NOT_VERIFIED if report is None else report.manifest_entry()}
            )
    notes = [*checkpoint.origin.get("notes", ()), *precision.notes]
    if simplification is not None and not simplification.applied:
        notes.append(f"not simplified: {simplification.reason}")
    return ExportResult(bundle, seconds, simplification, report, tuple(notes))


def default_output(checkpoint: Path | None, spec: ModelSpec, precision: str = "fp32") -> Path:
    """`NAME.evit` or `NAME-fp16.evit` in the current folder, after the checkpoint or, without one, after the model."""
    stem = checkpoint.stem if checkpoint is not None else f"{spec.name}-random"
    return Path(stem + ("" if precision == "fp32" else f"-{precision}") + BUNDLE_SUFFIX)


def timed_checkpoint(path: Path, **arguments: Any) -> tuple[Checkpoint, float]:
    """`load_checkpoint`, and the seconds it took; weights of a bundle with random weights stay known as such.

    Args:
        path: a checkpoint's file, or a bundle, whose weights are taken after their hash is checked.
        arguments: those of `load_checkpoint`.
    """
    started = time.perf_counter()
    if is_bundle(path):
        path = Bundle.open(path).weights_path
    checkpoint = load_checkpoint(path, **arguments)
    if is_marked_random(path):
        notes = [*checkpoint.origin.get("notes", ()), _RANDOM_WEIGHTS_NOTE]
        checkpoint = replace(checkpoint, origin={**checkpoint.origin, "random_weights": True, "notes": notes})
    return checkpoint, time.perf_counter() - started


def is_marked_random(path: Path) -> bool:
    """Whether a readable checkpoint is the weights.safetensors of a bundle that was exported from random weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_RANDOM_WEIGHTS_KEY) == "true"
    except SafetensorError:  # a .pt file
        return False


def random_checkpoint(name: str, seed: int, image_size: int | None) -> Checkpoint:
    """A published model with seeded random weights; its origin says so, and the bundle will for ever.

    Raises:
        UsageError: an unknown name, or an image size out of range.
    """
    size = 224 if image_size is None else image_size
    if not 32 <= size <= MAX_IMAGE_SIZE_PX:
        raise UsageError(f"image size {size} px is out of range", hint=f"choose 32 to {MAX_IMAGE_SIZE_PX}")
    spec = ModelSpec.published(name, image_size=size)
    origin = {"random_weights": True, "seed": seed, "notes": [_RANDOM_WEIGHTS_NOTE]}
    return Checkpoint(spec, random_state_dict(spec, seed), origin)


def _export(
    model: nn.Module,
    spec: ModelSpec,
    options: ExportOptions,
    keep_fp32: tuple[str, ...],
    preprocessing: Preprocessing,
    origin: dict[str, Any],
) -> onnx.ModelProto:
    precision = options.precision.precision
    fused = fused_model(model, spec)
    metadata = {
        "tool_version": tool_version(),
        "model": json.dumps(spec.to_json(), sort_keys=True),
        "preprocessing": json.dumps(preprocessing.to_json(), sort_keys=True),
        "random_weights": json.dumps(bool(origin.get("random_weights", False))),
        "checkpoint_sha256": origin.get("sha256", ""),
    }
    graph = export_graph(
        fused if precision == "fp32" else in_precision(fused, precision, keep_fp32),
        spec,
        opset=options.opset,
        batch=options.batch,
        max_batch=options.max_batch,
        preprocessing=preprocessing if options.with_preprocess else None,
        softmax=options.with_softmax,
        precision=precision,
        io=options.precision.io,
        metadata={MANIFEST_METADATA_PREFIX + key: value for key, value in metadata.items()},
    )
    return graph if options.fused_operators else inline_operators(graph)


def _manifest(
    checkpoint: Checkpoint,
    options: ExportOptions,
    precision: PrecisionPlan,
    graph: onnx.ModelProto,
    preprocessing: Preprocessing,
    class_names: list[str] | None,
    simplification: Simplification | None,
) -> dict[str, Any]:
    counts = precision_counts(graph)
    fixed = options.batch if options.batch is not None else (1 if options.max_batch == 1 else None)
    return {
        "model": checkpoint.spec.to_json(),
        "preprocessing": preprocessing.to_json(),
        "class_names": class_names,
        "origin": checkpoint.origin,
        "headroom": precision.headroom,
        "onnx": {
            "opset": options.opset,
            "ir_version": graph.ir_version,
            "precision": options.precision.precision,
            "io": options.precision.io,
            "keep_fp32": list(precision.keep_fp32),
            "attention": "fp32" if options.precision.precision == "fp32" else "fp32-accumulation",
            "nodes_by_type": counts.nodes_by_type,
            "casts": counts.casts,
            "inputs": [_describe(value) for value in graph.graph.input],
            "outputs": [_describe(value) for value in graph.graph.output],
            "dynamic_batch": fixed is None,
            "batch": fixed,
            "max_batch": options.max_batch if fixed is None else fixed,
            "fused_operators": options.fused_operators,
            "operators": dict(Counter(fused_operator_types(graph))),
            "blocks": marked_block_names(graph.graph),
            "with_preprocess": options.with_preprocess,
            "with_softmax": options.with_softmax,
            "simplified": None if simplification is None else simplification.to_json(),
        },
        "verification": NOT_VERIFIED,
        "versions": {name: version for name, version in package_versions().items() if version is not None},
    }


def _weights_metadata(
    spec: ModelSpec, preprocessing: Preprocessing, class_names: list[str] | None, is_random: bool
) -> dict[str, str]:
    """What makes a bundle's weights a checkpoint of their own: the spec, and what no weight shows."""
    config = {"family": spec.family, **preprocessing.to_json()}
    if class_names is not None:
        config["class_names"] = class_names
    return {
        SPEC_METADATA_KEY: json.dumps(spec.to_json(), sort_keys=True),
        CONFIG_KEY: json.dumps(config, sort_keys=True),
        **({_RANDOM_WEIGHTS_KEY: "true"} if is_random else {}),
    }


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }


def _require_pass(report: VerifyReport, spec: ModelSpec) -> None:
    if report.verdict == "unverified":
        raise MissingDependencyError(
            f"the exported graph of {spec.name} could not be verified, {report.summary().removeprefix('unverified: ')}",
            hint="no bundle was written; evit-deploy doctor says what is missing, --no-verify writes it unverified",
        )
    if report.verdict != "pass":
        raise ParityError(
            f"the exported graph of {spec.name} does not match PyTorch, {report.summary().removeprefix('fail: ')}",
            details=[f"first bad block: {report.first_bad_block}"] if report.first_bad_block else [],
            hint="no bundle was written; --no-verify writes it for a closer look",
        )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started
