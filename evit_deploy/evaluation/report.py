"""The report: accuracy per backend and per class, what could not be read, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evit_deploy.errors import EXIT_FAILED, EXIT_OK, EXIT_PARITY
from evit_deploy.specs import ModelSpec

SCHEMA = "evit-deploy/evaluate"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EvaluatedData:
    """What was evaluated on.

    Attributes:
        path: as the user named it.
        kind: "folder" or "npz".
        images: how many were asked for.
        read: how many of them could be read; every share is of these.
        sha256: of the images, their names and labels.
        unreadable: name and reason of each image that could not be read.
    """

    path: str
    kind: str
    images: int
    read: int
    sha256: str
    unreadable: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "images": self.images,
            "read": self.read,
            "sha256": self.sha256,
            "unreadable": [{"image": name, "reason": reason} for name, reason in self.unreadable],
        }


@dataclass(frozen=True)
class ChangedAnswer:
    """An image whose most likely class is another one than the reference's; None stands for no answer."""

    image: str
    label: int
    reference: int | None
    answer: int | None

    def to_json(self) -> dict[str, Any]:
        return {"image": self.image, "label": self.label, "reference": self.reference, "answer": self.answer}


@dataclass(frozen=True)
class EvaluationRow:
    """One runner's figures; shares are of the images that could be read, 0 to 1.

    Attributes:
        backend: its name; "reference" for PyTorch FP32.
        engine: what backend "tensorrt" ran.
        precision: what it computed in, as it says itself.
        correct: images whose most likely class is the label.
        top1, topk: share of images with the label as the most likely class, among the k most likely ones.
        agreement: share of images with the reference's most likely class; None for the reference itself.
        top1_drop_points: percentage points of top-1 below the reference; None for the reference itself.
        no_answer: images whose output had NaN or infinity; they count as wrong.
        changed: images with another answer than the reference's, the first ones.
        failures: why the row fails, one line each.
        notes: what the runner says about how it ran.
    """

    backend: str
    engine: str | None
    precision: str
    correct: int
    top1: float
    topk: float
    agreement: float | None
    top1_drop_points: float | None
    no_answer: int
    changed: tuple[ChangedAnswer, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "engine": self.engine,
            "precision": self.precision,
            "correct": self.correct,
            "top1": self.top1,
            "topk": self.topk,
            "agreement": self.agreement,
            "top1_drop_points": self.top1_drop_points,
            "no_answer": self.no_answer,
            "changed": [change.to_json() for change in self.changed],
            "failures": list(self.failures),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class ClassRow:
    """One class: its images that could be read, and how many of them each runner got right, in the order of the rows.

    Attributes:
        index: the class.
        name: in the bundle; None where it names no classes.
        images: at least one.
        correct: by backend.
    """

    index: int
    name: str | None
    images: int
    correct: Mapping[str, int]

    def top1(self, backend: str) -> float:
        """Share of the class's images that a backend got right."""
        return self.correct[backend] / self.images

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "images": self.images,
            "top1": {backend: self.top1(backend) for backend in self.correct},
        }


@dataclass(frozen=True)
class EvaluationReport:
    """How right a bundle is on labelled images.

    Attributes:
        bundle: as the user named it.
        onnx_sha256: of its graph.
        model: the spec.
        precision: of its graph.
        class_names: of the bundle.
        data: what was evaluated on.
        k: how many most likely classes `topk` looks at.
        max_top1_drop: percentage points allowed below the reference; None without a gate.
        rows: the reference, then each backend.
        classes: those that have images, worst first.
        notes: what a user should know, one line each.
        versions: of the packages.
    """

    bundle: str
    onnx_sha256: str
    model: ModelSpec
    precision: str
    class_names: tuple[str, ...] | None
    data: EvaluatedData
    k: int
    max_top1_drop: float | None
    rows: tuple[EvaluationRow, ...]
    classes: tuple[ClassRow, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the verdict is "fail", one line each."""
        return tuple(f"{row.backend}: {failure}" for row in self.rows for failure in row.failures)

    @property
    def verdict(self) -> str:
        """ "fail" where a row fails, else "incomplete" where an image could not be read, else "pass"."""
        if self.failures:
            return "fail"
        return "incomplete" if self.data.unreadable else "pass"

    @property
    def exit_code(self) -> int:
        """0 for pass, 3 for fail, 1 for incomplete."""
        return {"pass": EXIT_OK, "fail": EXIT_PARITY, "incomplete": EXIT_FAILED}[self.verdict]

    def class_name(self, index: int | None) -> str:
        """What messages call a class."""
        if index is None:
            return "no answer"
        return str(index) if self.class_names is None else self.class_names[index]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "bundle": self.bundle,
            "onnx_sha256": self.onnx_sha256,
            "model": self.model.to_json(),
            "precision": self.precision,
            "data": self.data.to_json(),
            "k": self.k,
            "max_top1_drop": self.max_top1_drop,
            "rows": [row.to_json() for row in self.rows],
            "classes": [row.to_json() for row in self.classes],
            "failures": list(self.failures),
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }
