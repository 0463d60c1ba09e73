"""The report: rows, the verdict that follows from them, and the JSON that an export reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evit_deploy.headroom.limits import BF16, FP16, FloatType
from evit_deploy.headroom.rows import IN_FP32, STORED, TensorRow
from evit_deploy.specs import ModelSpec

SCHEMA = "evit-deploy/headroom"
SCHEMA_VERSION = 1
HASH_FIELD = "report_sha256"

SAFE, KEEP = "fp16", "keep"
DENOMINATOR = "denominator"  # what an attention divides by; its row has the eps in it


@dataclass(frozen=True)
class MeasuredImages:
    """What was measured on.

    Attributes:
        source: the file's or folder's name.
        count: images.
        sha256: of the preprocessed images, float32 [3, S, S] each, one after the other.
    """

    source: str
    count: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "count": self.count, "sha256": self.sha256}


@dataclass(frozen=True)
class NaiveHalf:
    """What FP16 for the inner sums too would do: a conversion that keeps nothing in FP32.

    Attributes:
        overflows: inner tensors whose values or sums exceed FP16's limit, worst first.
        divides_by_zero: denominators that become zero in FP16.
    """

    overflows: tuple[TensorRow, ...]
    divides_by_zero: tuple[TensorRow, ...]

    @property
    def breaks(self) -> bool:
        return bool(self.overflows or self.divides_by_zero)

    def to_json(self) -> dict[str, Any]:
        def names(rows: tuple[TensorRow, ...]) -> list[dict[str, str]]:
            return [{"block": row.block, "tensor": row.tensor} for row in rows]

        return {
            "breaks": self.breaks,
            "overflows": names(self.overflows),
            "divides_by_zero": names(self.divides_by_zero),
        }


@dataclass(frozen=True)
class HeadroomReport:
    """How far every tensor of a model stays from the limits of FP16 and BF16.

    Attributes:
        bundle: what was measured, as the user named it.
        model: the spec as JSON; its image size is the size that was measured at.
        weights_sha256: `weights_digest` of the reference weights.
        images: what was measured on.
        margin_bits: the margin that a stored tensor must keep to both limits.
        blocks: every block's name in the order of execution, "head" last.
        rows: one per tensor, worst FP16 margin first.
        notes: what a reader must know, one line each.
        created: when, UTC, as ISO 8601.
        versions: of this tool and what it measured with.
    """

    bundle: str
    model: Mapping[str, Any]
    weights_sha256: str
    images: MeasuredImages
    margin_bits: float
    blocks: tuple[str, ...]
    rows: tuple[TensorRow, ...]
    notes: tuple[str, ...]
    created: str
    versions: Mapping[str, str]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_json(self.model)

    @property
    def verdict(self) -> str:
        """ "fp16" where every stored tensor keeps the margin in FP16, otherwise "keep"."""
        return KEEP if self.keep_fp32 else SAFE

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """The blocks that must stay in FP32 in an FP16 model, in the order of execution."""
        failing = {row.block for row in self.failing(FP16)}
        return tuple(block for block in self.blocks if block in failing)

    @property
    def bf16_safe(self) -> bool:
        """Whether every stored tensor keeps the margin in BF16."""
        return not self.failing(BF16)

    @property
    def naive(self) -> NaiveHalf:
        inner = [row for row in self.rows if row.storage == IN_FP32]
        return NaiveHalf(
            overflows=tuple(row for row in inner if (row.overflow_bits(FP16) or 0.0) < 0),
            divides_by_zero=tuple(
                row for row in inner if row.tensor.endswith(DENOMINATOR) and row.zeroed_share[FP16.name] > 0
            ),
        )

    def failing(self, kind: FloatType) -> tuple[TensorRow, ...]:
        """The stored tensors that do not keep the margin in a type, worst first."""
        below = [row for row in self.rows if row.storage == STORED and row.margin_bits(kind) < self.margin_bits]
        return tuple(sorted(below, key=lambda row: row.margin_bits(kind)))

    def mismatch(self, spec: ModelSpec, weights_sha256: str) -> str:
        """Why the report says nothing of a model, or "" where it does.

        Args:
            spec: the model at the image size it is exported at.
            weights_sha256: `weights_digest` of its reference weights.
        """
        measured = self.spec
        if measured.image_size != spec.image_size:
            return f"it was measured at {measured.image_size} px, not {spec.image_size} px"
        if weights_sha256 != self.weights_sha256:
            return f"it was measured on other weights ({self.weights_sha256[:12]} instead of {weights_sha256[:12]})"
        if measured.to_json() != spec.to_json():
            return f"it was measured on another configuration of {measured.name}"
        return ""

    def matches(self, spec: ModelSpec, weights_sha256: str) -> bool:
        """Whether the report was measured on this model with these weights at this image size."""
        return not self.mismatch(spec, weights_sha256)

    def summary(self) -> dict[str, Any]:
        """What a manifest keeps of the report."""
        return {
            "verdict": self.verdict,
            "images": self.images.count,
            "keep_fp32": list(self.keep_fp32),
            "report_sha256": report_hash(self._content()),
        }

    def to_json(self) -> dict[str, Any]:
        """The document of docs/schemas/headroom.schema.json."""
        content = self._content()
        return {**content, HASH_FIELD: report_hash(content)}

    def _content(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "bundle": self.bundle,
            "model": dict(self.model),
            "weights_sha256": self.weights_sha256,
            "images": self.images.to_json(),
            "margin_bits": self.margin_bits,
            "verdict": self.verdict,
            "keep_fp32": list(self.keep_fp32),
            "bf16_safe": self.bf16_safe,
            "naive_half": self.naive.to_json(),
            "blocks": list(self.blocks),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
            "created": self.created,
            "versions": dict(self.versions),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> HeadroomReport:
        return HeadroomReport(
            bundle=data["bundle"],
            model=data["model"],
            weights_sha256=data["weights_sha256"],
            images=MeasuredImages(**data["images"]),
            margin_bits=data["margin_bits"],
            blocks=tuple(data["blocks"]),
            rows=tuple(TensorRow.from_json(row) for row in data["rows"]),
            notes=tuple(data["notes"]),
            created=data["created"],
            versions=data["versions"],
        )


def report_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
