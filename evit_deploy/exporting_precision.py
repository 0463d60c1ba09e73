"""What an export in another precision needs to know before it begins: opset, types, and which blocks stay in FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_deploy.constants import DEFAULT_OPSET, MANIFEST_FILE
from evit_deploy.errors import UsageError, unknown_name_hint
from evit_deploy.headroom.digest import weights_digest
from evit_deploy.headroom.report import SAFE, HeadroomReport
from evit_deploy.headroom.storage import REPORT_FILE, REPORTS_FOLDER, load_report
from evit_deploy.specs import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

EXPORT_PRECISIONS = ("fp32", "fp16", "bf16")
IO_TYPES = ("fp32", "fp16")
AUTO = "auto"
BF16_OPSET = 22  # first opset whose convolutions take BF16


@dataclass(frozen=True)
class PrecisionOptions:
    """What was asked for; see `evit_deploy.api.export` for each."""

    precision: str = "fp32"
    io: str = "fp32"
    keep_fp32: tuple[str, ...] = ()
    headroom: Path | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, EXPORT_PRECISIONS),
            ("type of input and output", self.io, IO_TYPES),
        ):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}", hint=unknown_name_hint(value, known))
        if self.precision == "fp32":
            surplus = [
                option for option, value in (("--keep-fp32", self.keep_fp32), ("--headroom", self.headroom)) if value
            ]
            if surplus:
                raise UsageError(f"{surplus[0]} has no meaning in an FP32 export", hint="give --precision fp16 or bf16")
        if self.io == "fp16" and self.precision != "fp16":
            raise UsageError(
                f"FP16 input and output would cost an {self.precision} graph its range", hint="leave --io out"
            )
        if AUTO in self.keep_fp32 and len(self.keep_fp32) > 1:
            raise UsageError("--keep-fp32 auto stands alone", hint="give auto, or the blocks' names")


@dataclass(frozen=True)
class PrecisionPlan:
    """What will be done.

    Attributes:
        keep_fp32: blocks that stay in FP32.
        headroom: the summary of the report that speaks of this model, None without one.
        notes: what a user should read.
    """

    keep_fp32: tuple[str, ...] = ()
    headroom: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())


def opset_for(opset: int | None, precision: str) -> int:
    """The operator set of a graph, chosen or the default of its precision.

    Raises:
        UsageError: an operator set without BF16 convolutions for a BF16 graph.
    """
    if opset is None:
        return BF16_OPSET if precision == "bf16" else DEFAULT_OPSET
    if precision == "bf16" and opset < BF16_OPSET:
        raise UsageError(
            f"opset {opset} has no BF16 convolutions", hint=f"leave --opset out, or give {BF16_OPSET} or later"
        )
    return opset


def plan_precision(
    options: PrecisionOptions, spec: ModelSpec, state_dict: Mapping[str, Tensor], source: Path | None
) -> PrecisionPlan:
    """Which blocks stay in FP32, and what the model's headroom report says, where there is one.

    Args:
        options: what was asked for.
        spec: the model, at the image size of the export.
        state_dict: its reference weights.
        source: the checkpoint or bundle that is exported; a bundle's own report counts.

    Raises:
        UsageError: "auto" without a report, or a given report of another model, other weights or another size.
        InputDataError: a report that cannot be read.
    """
    if options.precision == "fp32":
        return PrecisionPlan()
    report, mismatch = _find_report(options, spec, state_dict, source)
    automatic = AUTO in options.keep_fp32
    if report is None:
        if automatic:
            reason = f": that of {source} does not count, {mismatch}" if mismatch else ""
            raise UsageError(
                f"--keep-fp32 auto needs a headroom report of this model{reason}",
                hint="measure it with evit-deploy headroom BUNDLE --images FOLDER, then export that bundle, "
                "or name it with --headroom",
            )
        return PrecisionPlan(options.keep_fp32)
    keep = options.keep_fp32
    if automatic:
        keep = report.keep_fp32 if options.precision == "fp16" else ()
    return PrecisionPlan(keep, report.summary(), tuple(_notes(options.precision, keep, report)))


def _find_report(
    options: PrecisionOptions, spec: ModelSpec, state_dict: Mapping[str, Tensor], source: Path | None
) -> tuple[HeadroomReport | None, str]:
    """The given report, which must fit; else the source bundle's own, if it has one that fits, or why it does not."""
    if options.headroom is not None:
        report = load_report(options.headroom)
        mismatch = report.mismatch(spec, weights_digest(state_dict))
        if mismatch:
            raise UsageError(
                f"the headroom report of {options.headroom} is not about this model: {mismatch}",
                hint="measure this one: evit-deploy headroom BUNDLE --images FOLDER",
            )
        return report, ""
    if source is None or not is_bundle(source) or not (source / REPORTS_FOLDER / REPORT_FILE).is_file():
        return None, ""
    report = load_report(source)
    mismatch = report.mismatch(spec, weights_digest(state_dict))
    return (None, mismatch) if mismatch else (report, "")


def _notes(precision: str, keep: tuple[str, ...], report: HeadroomReport) -> list[str]:
    images = f"{report.images.count} images"
    if precision == "bf16":
        return [] if report.bf16_safe else [f"the headroom measured on {images} is too small even for BF16"]
    missing = [block for block in report.keep_fp32 if block not in keep]
    if report.verdict == SAFE or not missing:
        return []
    return [f"the headroom measured on {images} asks for FP32 in {', '.join(missing)}: --keep-fp32 auto keeps it there"]


def is_bundle(path: Path) -> bool:
    """Whether a path is a bundle's folder; it may be a damaged one."""
    return path.is_dir() and (path / MANIFEST_FILE).is_file()
