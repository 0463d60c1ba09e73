"""Our ONNX in ONNX Runtime against PyTorch eager: timm's own modules, and plain PyTorch for `msa`."""

from __future__ import annotations

from typing import Any

from benchmarks.comparison import Case, Comparison, compare
from benchmarks.result import Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.backends import BACKENDS

NAME = "against-eager"
TITLE = "our ONNX in ONNX Runtime FP32 against the reference module in PyTorch eager"
GOAL = "at least 3x for msra-m3, 2.7x for mit-b1, 2x for msa-m3, at batch 1"
COMPARISON = Comparison("speedup over PyTorch eager", BACKENDS["onnxruntime"], BACKENDS["torch-eager"], (1,))
GOALS = {"msra-m3": Goal(">=", 3.0), "mit-b1": Goal(">=", 2.7), "msa-m3": Goal(">=", 2.0)}

_DURATION_S = 100.0


def case_of(model: str) -> Case:
    """What is promised for a model, and how long its measurement takes."""
    return Case(model, GOALS.get(model), _DURATION_S)


def run(settings: Settings, workspace: Workspace) -> Result:
    """Measure every model."""
    rows: list[Row] = []
    protocol: dict[str, Any] = {}
    for model in settings.models or GOALS:
        bundle = workspace.bundle(model, settings.image_size)
        measured, protocol = compare(bundle, case_of(model), COMPARISON, settings, workspace.progress)
        rows += measured
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)
