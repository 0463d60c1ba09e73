"""What quantizing a bundle did, as data, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evit_deploy.onnx.quantize import Layer
from evit_deploy.parity.report import VerifyReport

SCHEMA = "evit-deploy/quantize"
SCHEMA_VERSION = 1
REPORT_FILE = "reports/quantize.json"  # in the bundle


@dataclass(frozen=True)
class LayerResult:
    """One layer that could be quantized.

    Attributes:
        layer: the layer.
        excluded: why it stays in FP32; empty where it is quantized.
        threshold: the magnitude of its activation that becomes 127.
        highest: the largest that the images showed.
        error: RMS-relative error of the output with this layer alone in INT8; None where it is excluded.
    """

    layer: Layer
    excluded: str
    threshold: float
    highest: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.layer.node,
            "op_type": self.layer.op_type,
            "module": self.layer.module,
            "weights": self.layer.weight_elements,
            "quantized": not self.excluded,
            "excluded": self.excluded or None,
            "threshold": self.threshold,
            "highest": self.highest,
            "error": self.error,
        }


@dataclass(frozen=True)
class QuantizeResult:
    """A finished quantization.

    Attributes:
        path: the new bundle.
        model: the model, as the manifest has it.
        source_sha256, onnx_sha256: of the FP32 graph and of the new one.
        source_bytes, onnx_bytes: their sizes.
        calibration: what the manifest has of it.
        layers: every layer that could be quantized: quantized ones first, worst first, then the others in graph order.
        error: RMS-relative error of the output with all of them in INT8, on the images of the sensitivity.
        sensitivity_images: how many those were.
        verification: the report, None with `verify=False`.
        seconds: wall-clock seconds by step.
        notes: what a user should know.
    """

    path: Path
    model: Mapping[str, Any]
    source_sha256: str
    onnx_sha256: str
    source_bytes: int
    onnx_bytes: int
    calibration: Mapping[str, Any]
    layers: tuple[LayerResult, ...]
    error: float
    sensitivity_images: int
    verification: VerifyReport | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> tuple[LayerResult, ...]:
        """The quantized layers, worst first."""
        return tuple(result for result in self.layers if not result.excluded)

    @property
    def kept(self) -> tuple[LayerResult, ...]:
        """The layers that stay in FP32, in graph order."""
        return tuple(result for result in self.layers if result.excluded)

    def to_json(self) -> dict[str, Any]:
        """Data that fits docs/schemas/quantize.schema.json."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "bundle": str(self.path),
            "model": dict(self.model),
            "source_sha256": self.source_sha256,
            "onnx_sha256": self.onnx_sha256,
            "source_bytes": self.source_bytes,
            "onnx_bytes": self.onnx_bytes,
            "calibration": dict(self.calibration),
            "error": self.error,
            "sensitivity_images": self.sensitivity_images,
            "layers": [result.to_json() for result in self.layers],
            "verification": None if self.verification is None else self.verification.to_json(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "notes": list(self.notes),
        }
