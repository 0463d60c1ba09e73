"""Each operator's kernel at the sizes of the published models, against everything else that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from evit_kernels.registry import OPERATORS
from torch import Tensor

from benchmarks.gpu.budget import OutOfTimeError, Task, time_limit
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.opponents import opponents_of
from benchmarks.gpu.settings import KERNELS
from benchmarks.gpu.sizes import Size, first_and_last, meta_arguments, random_arguments, work_of
from benchmarks.gpu.timing import (
    AA_SUFFIX,
    Effort,
    Prepared,
    copies_needed,
    estimate,
    half_range,
    instability,
    measure,
    prepare,
    speedup,
    verdict,
)
from benchmarks.result import RATIO, Goal, Row
from evit_deploy.runners.float32 import full_float32

NAME = KERNELS
TITLE = "each attention kernel against SDPA, flex_attention, torch.compile and timm's own code"
GOAL = (
    "proposals, in half precision from batch 64: multi_scale_attention 1.5x the best other and 60 % of its floor, "
    "lite_mla 2x and 70 %; nothing for cascaded_attention"
)
SPEEDUPS = {"multi_scale_attention": Goal(">=", 1.5), "lite_mla": Goal(">=", 2.0)}
SHARES = {"multi_scale_attention": Goal(">=", 0.6), "lite_mla": Goal(">=", 0.7)}
MIN_GOAL_BATCH = 64

OURS = "ours"
SPEEDUP = "speedup over the best other"
COMPILE_LIMIT_S = 45.0  # for one opponent that is compiled
# RMS-relative error against the definition in float64 on the same arguments. An arm above it computes something else:
# eight roundings of the type for the halves, a hundred for FP32, whose sums are longer than its digits.
MAX_ERRORS = {"fp32": 100 * 2**-23, "fp16": 8 * 2**-10, "bf16": 8 * 2**-7}


class WrongResultError(RuntimeError):
    """What is to be measured computes something else: it gets no number."""


@dataclass
class Arm:
    """One implementation at one size.

    Attributes:
        name: in the results.
        prepared: None where it cannot take part.
        error: against the definition in float64; None where it was not reached.
        reason: why it does not take part.
    """

    name: str
    prepared: Prepared | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One size with a batch and a precision.

    Attributes:
        size: the operator and its shapes.
        batch: images.
        precision: "fp32", "fp16" or "bf16".
        compiled: whether opponents that need a compiler take part.
    """

    size: Size
    batch: int
    precision: str
    compiled: bool = True

    @property
    def subject(self) -> str:
        return f"{self.size.label}, {self.precision}"


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    device: Device
    ceilings: Callable[[], Ceilings]
    effort: Effort = field(default_factory=Effort)
    compiled: bool = True


def tasks(bench: Bench, cases: Sequence[Case]) -> list[Task]:
    """One task per case, in the order given."""
    compiling = {
        "multi_scale_attention": 2,
        "projected_multi_scale_attention": 2,
        "lite_mla": 2,
        "cascaded_attention": 1,
    }

    def task(case: Case) -> Task:
        compilers = compiling[case.size.operator] if case.compiled and bench.compiled else 0
        label = f"{case.subject}, batch {case.batch}"
        return Task(NAME, label, 6.0 + 12.0 * compilers, lambda: run_case(bench, case))

    return [task(case) for case in cases]


def run_case(bench: Bench, case: Case) -> list[Row]:
    """Check every arm, then measure those that compute the same.

    Raises:
        RuntimeError: our own kernel cannot run.
    """
    device, operator = bench.device, case.size.operator
    meta = meta_arguments(case.size, case.batch, case.precision)
    work = work_of(case.size, case.batch, case.precision)
    copies = copies_needed(work.bytes, device.l2_bytes)
    inputs = [random_arguments(meta, operator, device.torch_device, seed) for seed in range(copies)]
    with torch.no_grad(), full_float32():
        truth = OPERATORS[operator].definition(*first_and_last(inputs[0], operator, torch.float64))
        ours = OPERATORS[operator].fused if device.is_gpu else OPERATORS[operator].call
        arms = [_ready(bench, case, name, lambda: ours, inputs, truth) for name in (OURS, OURS + AA_SUFFIX)]
        if arms[0].prepared is None:
            withheld = f"withheld: {arms[0].reason}"
            return [Row(case.subject, SPEEDUP, RATIO, None, case.batch, reason=withheld)]
        for name, maker in opponents_of(operator, compiled=case.compiled and bench.compiled).items():
            arms.append(_ready(bench, case, name, maker, inputs, truth))
        prepared = {arm.name: arm.prepared for arm in arms if arm.prepared is not None}
        seconds = measure(device, prepared, bench.effort)
    facts = {
        "model": case.size.model,
        "calls_per_forward_pass": case.size.calls,
        "copies": copies,
        "cold": copies * work.bytes >= 2 * device.l2_bytes,
        "rounds": bench.effort.rounds,
    }
    rows = rows_of(case, arms, seconds, work, bench.ceilings(), facts)
    del inputs, prepared, arms
    device.release_memory()
    return rows


def rows_of(
    case: Case,
    arms: Sequence[Arm],
    seconds: Mapping[str, Sequence[float]],
    work: Any,
    ceilings: Ceilings,
    facts: Mapping[str, Any],
) -> list[Row]:
    """The speedup over the fastest other, and the share of the floor."""
    ours = estimate(seconds[OURS])
    aa = half_range(seconds[OURS], seconds[OURS + AA_SUFFIX]) if OURS + AA_SUFFIX in seconds else None
    others = [name for name in seconds if name not in (OURS, OURS + AA_SUFFIX)]
    best = min(others, key=lambda name: estimate(seconds[name]).value, default=None)
    goals = case.batch >= MIN_GOAL_BATCH and case.precision != "fp32"
    floor = work.floor_s(ceilings.bandwidth, ceilings.matrix_flops[case.precision], ceilings.exponentials)
    details = {
        **facts,
        "ours": {"median_s": ours.value, "p50_ms": 1e3 * ours.value},
        "best": best,
        "aa_half_range": aa,
        "arms": {arm.name: _arm_json(arm, seconds.get(arm.name)) for arm in arms},
        "floor": {"seconds": floor.seconds, "bound": floor.bound},
        "bytes": work.bytes,
        "bytes_per_s": work.bytes / ours.value,
        "matrix_flops": work.matrix_flops,
        "exponentials": work.exponentials,
    }
    speed_goal = SPEEDUPS.get(case.size.operator) if goals else None
    if best is None:
        speed = Row(case.subject, SPEEDUP, RATIO, None, case.batch, goal=speed_goal, reason="no other ran")
    else:
        ratio = speedup(seconds[OURS], seconds[best])
        speed = Row(
            case.subject,
            SPEEDUP,
            RATIO,
            ratio.value,
            case.batch,
            ratio.low,
            ratio.high,
            goal=speed_goal,
            reason=instability(aa),
            details={
                **details,
                "verdict": None if aa is None else verdict(ratio, aa),
                "baseline": {"backend": best, "p50_ms": 1e3 * estimate(seconds[best]).value},
            },
        )
    share = Row(
        case.subject,
        "share of the floor",
        RATIO,
        floor.seconds / ours.value,
        case.batch,
        floor.seconds / ours.high,
        floor.seconds / ours.low,
        goal=SHARES.get(case.size.operator) if goals else None,
        details={"floor": details["floor"], "bytes_per_s": details["bytes_per_s"], "cold": facts["cold"]},
    )
    return [speed, share]


def _ready(
    bench: Bench,
    case: Case,
    name: str,
    maker: Callable[[], Callable[..., Tensor]],
    inputs: Sequence[tuple[Any, ...]],
    truth: Tensor,
) -> Arm:
    """Check an arm's result, then prepare its work; what goes wrong is the reason why it does not take part."""
    arm = Arm(name)
    try:
        with time_limit(COMPILE_LIMIT_S):
            call = maker()
            result = call(*inputs[0])
            arm.error = error_of(result, truth)
            if not arm.error <= MAX_ERRORS[case.precision]:
                raise WrongResultError(f"differs from the definition by {arm.error:.1e}")
            del result
            arm.prepared = prepare(bench.device, call, inputs, bench.effort.min_graph_s)
    except OutOfTimeError:
        arm.reason = f"was not ready after {COMPILE_LIMIT_S:.0f} s"
    except Exception as error:  # whatever an opponent raises is why it does not take part
        if name == OURS and not isinstance(error, WrongResultError):
            raise
        arm.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        bench.device.release_memory()
    return arm


def error_of(result: Tensor, truth: Tensor) -> float:
    """RMS-relative error of the first and the last image; NaN where any image has a number that is not finite."""
    ends = result[[0, -1]].double()
    if ends.shape != truth.shape or not bool(result.isfinite().all()):
        return float("nan")
    return float((ends - truth).norm() / truth.norm())


def _arm_json(arm: Arm, seconds: Sequence[float] | None) -> dict[str, Any]:
    return {
        "median_s": estimate(seconds).to_json() if seconds else None,
        "calls_per_graph": arm.prepared.calls if arm.prepared else None,
        "rms_rel": arm.error if arm.error is not None and arm.error == arm.error else None,
        "reason": arm.reason or None,
    }
