"""Weights that make a plain FP16 attention overflow: published architectures, random weights, some made larger.

Larger are queries and keys of the attention. Each of them stays within FP16, but not what is summed from them: scores,
and in `mit`, whose LiteMLA adds over the tokens of large images, numerators and denominators.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.result import COUNT, Goal, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from evit_deploy.bundle import Bundle
    from evit_deploy.parity.report import VerifyRow
    from evit_deploy.specs import ModelSpec

IMAGES = 2  # random, for the headroom report: it judges no distribution here, only that the weights do break


@dataclass(frozen=True)
class Breaking:
    """One model.

    Attributes:
        model: FAMILY-VARIANT.
        image_size: pixels.
        pattern: matches the names of the tensors to multiply.
        rows: of every `period` of their rows so many, the queries and keys, are multiplied; the others are values.
        factor: what they are multiplied by.
    """

    model: str
    image_size: int
    pattern: str
    rows: int
    period: int
    factor: float

    @property
    def subject(self) -> str:
        return f"{self.model}, breaking weights, {self.image_size} px"


_MIT = r"context_module\.main\.qkv\.conv\.weight$"
_MSA = r"stages\.2\.blocks\.1\.attn\.(small|medium|large)\.(weight|bias)$"
_MSRA = r"stages\.0\.blocks\.0\.mixer\.m\.attn\.qkvs\.\d+\.bn\.(weight|bias)$"
CASES = (
    Breaking("mit-b1", 512, _MIT, 32, 48, 20.0),
    Breaking("mit-b1", 1024, _MIT, 32, 48, 20.0),
    Breaking("msa-m3", 224, _MSA, 224, 336, 300.0),
    Breaking("msra-m3", 224, _MSRA, 32, 64, 300.0),
)
QUICK_CASES = (Breaking("msra-m0", 64, _MSRA, 32, 48, 1000.0),)
NO_NAN = Goal("<=", 0)
SOME = Goal(">=", 1)


def breaking_rows(settings: Settings, workspace: Workspace, backends: tuple[str, ...]) -> Iterator[Row]:
    """Of every case how many inner values a plain conversion loses, and how many outputs of ours are not finite."""
    from evit_deploy import api

    for case in QUICK_CASES if settings.quick else CASES:
        checkpoint = _checkpoint(case, workspace)
        for precision in ("fp16", "bf16"):
            workspace.progress(f"{case.subject}: export --precision {precision}")
            target = workspace.folder / f"{checkpoint.stem}-{precision}.evit"
            bundle = api.export(
                checkpoint, target, image_size=case.image_size, precision=precision, verify=False
            ).bundle
            if precision == "fp16":
                yield _plain_conversion(case, bundle, workspace)
            for backend in backends:
                workspace.progress(f"{case.subject}: {precision} in {backend}")
                report = api.verify(bundle, batches=(1,), backend=backend, threads=settings.threads)
                value = _not_finite(report.rows)
                details = {
                    "computed_in": report.executed_precision,
                    "rms_rel": [row.rms_rel for row in report.rows],
                    "notes": list(report.notes),
                }
                yield Row(
                    case.subject,
                    f"NaN or Inf of the {precision.upper()} graph in {backend}",
                    COUNT,
                    value,
                    goal=NO_NAN,
                    reason=report.summary() if value is None else "",
                    details=details,
                )


def _not_finite(rows: Sequence[VerifyRow]) -> int | None:
    """NaN and infinite outputs of all comparisons; None as soon as one compared nothing."""
    wrong = [row.nan + row.inf for row in rows]
    is_known = [row.rms_rel is not None or count > 0 for row, count in zip(rows, wrong, strict=True)]
    return sum(wrong) if wrong and all(is_known) else None


def _checkpoint(case: Breaking, workspace: Workspace) -> Path:
    import torch

    from evit_deploy.specs import ModelSpec

    path = workspace.folder / f"{case.model}-{case.image_size}-breaking.pt"
    torch.save({"state_dict": breaking_weights(case, ModelSpec.published(case.model))}, path)
    return path


def breaking_weights(case: Breaking, spec: ModelSpec) -> dict[str, Tensor]:
    """Random weights, some made larger."""
    import torch

    from evit_deploy.models.random_weights import random_state_dict

    state_dict = random_state_dict(replace(spec, image_size=case.image_size), WEIGHT_SEED)
    found = [tensor for name, tensor in state_dict.items() if re.search(case.pattern, name)]
    assert found, case.pattern
    for tensor in found:
        tensor[torch.arange(len(tensor)) % case.period < case.rows] *= case.factor
    return state_dict


def _plain_conversion(case: Breaking, bundle: Bundle, workspace: Workspace) -> Row:
    """How many of the attention's inner values leave FP16, by the headroom report: what a plain FP16 loses."""
    import numpy as np

    from evit_deploy import api

    path = workspace.folder / f"{bundle.path.stem}.npy"
    size = case.image_size
    np.save(path, np.random.default_rng(WEIGHT_SEED).integers(0, 256, (IMAGES, size, size, 3), np.uint8))
    workspace.progress(f"{case.subject}: headroom")
    naive = api.headroom(bundle, path).naive
    worst = naive.overflows[0] if naive.overflows else None
    details = {
        "divides_by_zero": len(naive.divides_by_zero),
        "worst": worst.name if worst else None,
    }
    return Row(
        case.subject,
        "inner values that overflow in a plain FP16",
        COUNT,
        len(naive.overflows),
        goal=SOME,
        details=details,
    )
