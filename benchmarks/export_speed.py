"""Our ONNX against the plain export of the same module, both in ONNX Runtime FP32."""

from __future__ import annotations

from typing import Any

from benchmarks.arms import PLAIN_ONNX
from benchmarks.comparison import Case, Comparison, compare
from benchmarks.result import Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.backends import BACKENDS
from evit_deploy.specs import split_name

NAME = "export-speed"
TITLE = "our ONNX against the plain dynamo export with onnxsim, both in ONNX Runtime FP32"
GOAL = "mit at least 1.15x, msra at least 0.98x, msa-m3 at least 1.3x, each at batch 1 and 8"
COMPARISON = Comparison("speedup over the plain export", BACKENDS["onnxruntime"], PLAIN_ONNX, (1, 8))
MODELS = ("mit-b1", "msra-m0", "msra-m3", "msra-m5", "msa-m3")

_FAMILY_GOALS = {"mit": Goal(">=", 1.15), "msra": Goal(">=", 0.98)}
_MODEL_GOALS = {"msa-m3": Goal(">=", 1.3)}
_DURATIONS_S = {"msa-m3": 180.0, "msra-m0": 100.0, "msra-m3": 90.0, "msra-m5": 90.0}
_DURATION_S = 65.0


def case_of(model: str) -> Case:
    """What is promised for a model, and how long its measurement takes."""
    family, _ = split_name(model)
    goal = _MODEL_GOALS.get(model, _FAMILY_GOALS.get(family))
    return Case(model, goal, _DURATIONS_S.get(model, _DURATION_S))


def run(settings: Settings, workspace: Workspace) -> Result:
    """Measure every model."""
    rows: list[Row] = []
    protocol: dict[str, Any] = {}
    for model in settings.models or MODELS:
        bundle = workspace.with_plain_export(workspace.bundle(model, settings.image_size))
        measured, protocol = compare(bundle, case_of(model), COMPARISON, settings, workspace.progress)
        rows += measured
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)
