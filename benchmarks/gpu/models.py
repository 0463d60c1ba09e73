"""Whole models: ours in a CUDA graph against PyTorch eager and torch.compile, inputs and outputs on the GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import settings
from benchmarks.gpu.budget import OutOfTimeError, Task, time_limit
from benchmarks.gpu.device import Device
from benchmarks.gpu.floor import layer_floor
from benchmarks.gpu.kernel_count import count_kernels
from benchmarks.gpu.kernels import Bench
from benchmarks.gpu.model_arms import (
    COMPILE_LIMIT_S,
    EAGER,
    OURS,
    Arm,
    fastest_convolutions,
    makers_of,
    moved,
    ready,
)
from benchmarks.gpu.sizes import PRECISIONS, spec_of
from benchmarks.gpu.timing import AA_SUFFIX, estimate, half_range, instability, speedup, verdict
from benchmarks.result import COUNT, RATIO, Goal, Row
from benchmarks.settings import WEIGHT_SEED
from evit_deploy.models import load_model
from evit_deploy.models.fold import fold_batchnorm
from evit_deploy.models.fused import fused_model
from evit_deploy.models.random_weights import random_state_dict, structured_noise
from evit_deploy.runners.float32 import full_float32
from evit_deploy.runners.precision import converted

NAME = settings.MODELS
TITLE = "whole models: ours in a CUDA graph against PyTorch eager and torch.compile"
GOAL = (
    "proposals: from batch 64 at least 1.3x torch.compile max-autotune, at batch 1 at least 1.5x reduce-overhead "
    "with at most 0.6x its kernels"
)
GOALS = {
    "compile-max-autotune": lambda batch: Goal(">=", 1.3) if batch >= 64 else None,
    "compile-max-autotune-no-graph": lambda batch: Goal(">=", 1.3) if batch >= 64 else None,
    "compile-reduce-overhead": lambda batch: Goal(">=", 1.5) if batch == 1 else None,
}
MAX_KERNEL_SHARE = Goal("<=", 0.6)
COMPILE_ESTIMATE_S = 45.0
INPUTS = 4  # distinct inputs, so that no call sees what the one before saw
CHECKED_ROWS = 4  # first and last rows of a batch that the CPU computes as well
MIN_CALLS, MAX_CALLS = 3, 50


@dataclass(frozen=True)
class Case:
    """A model, a batch, a precision, and which modes of torch.compile take part."""

    model: str
    batch: int
    precision: str
    modes: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.model}, {self.precision}, batch {self.batch}: {', '.join((OURS, EAGER, *self.modes))}"


def tasks(bench: Bench, cases: Sequence[Case]) -> list[Task]:
    """One task per case, in the order given."""
    return [
        Task(
            NAME,
            case.label,
            15.0 + COMPILE_ESTIMATE_S * (len(case.modes) + (case.batch == 1 and bool(case.modes))),
            lambda case=case: run_case(bench, case),  # type: ignore[misc]
        )
        for case in cases
    ]


def run_case(bench: Bench, case: Case) -> list[Row]:
    """Parity of every arm first, then interleaved rounds of those that pass."""
    device = bench.device
    spec = spec_of(case.model, smoke=not device.is_gpu)
    reference = load_model(spec, random_state_dict(spec, WEIGHT_SEED))
    generator = torch.Generator().manual_seed(WEIGHT_SEED)
    images = structured_noise(min(case.batch, 2 * CHECKED_ROWS), spec.image_size, generator)
    with torch.no_grad(), full_float32(), fastest_convolutions():
        truth = reference(images).numpy()
        batch = images[torch.arange(case.batch) % len(images)]
        expected = truth[np.arange(case.batch) % len(truth)]
        dtype = PRECISIONS[case.precision]
        inputs = [
            batch.roll(shift, 0).to(device.torch_device, dtype, memory_format=torch.channels_last)
            for shift in range(INPUTS)
        ]
        arms = []
        for name, maker in makers_of(device, reference, spec, case.precision, case.modes).items():
            arms.append(ready(device, name, maker, inputs[0], expected, case.precision))
            if name == OURS and arms[0].call is None:
                return [Row(_subject(case), "speedup", RATIO, None, case.batch, reason=f"withheld: {arms[0].reason}")]
        seconds = _measure(device, {arm.name: arm.call for arm in arms if arm.call is not None}, inputs, bench)
        kernels = _kernel_counts(device, reference, spec, case, inputs[0]) if case.batch == 1 else {}
    floor_s, layers = layer_floor(spec, case.batch, case.precision, bench.ceilings())
    details = {
        "arms": {arm.name: _arm_json(arm, seconds.get(arm.name)) for arm in arms},
        "aa_half_range": half_range(seconds[OURS], seconds[OURS + AA_SUFFIX]) if OURS + AA_SUFFIX in seconds else None,
        "floor_s": floor_s,
        "layers": layers,
        "kernels": kernels,
        "image_size_px": spec.image_size,
        "attention_eps": spec.config.get("attention_eps"),
    }
    rows = _speed_rows(case, seconds, arms, details)
    ours = estimate(seconds[OURS])
    rows.append(
        Row(
            _subject(case),
            "share of the layer floor",
            RATIO,
            floor_s / ours.value,
            case.batch,
            floor_s / ours.high,
            floor_s / ours.low,
            details={"floor_s": floor_s, "layers": layers},
        )
    )
    rows += _kernel_rows(case, kernels)
    device.release_memory()
    return rows


def _speed_rows(case: Case, seconds: dict[str, list[float]], arms: Sequence[Arm], details: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    aa = details["aa_half_range"]
    for arm in arms:
        if arm.name in (OURS, OURS + AA_SUFFIX):
            continue
        quantity, goal = f"speedup over {arm.name}", GOALS.get(arm.name, lambda batch: None)(case.batch)
        if arm.name not in seconds:
            rows.append(Row(_subject(case), quantity, RATIO, None, case.batch, goal=goal, reason=arm.reason))
            continue
        ratio = speedup(seconds[OURS], seconds[arm.name])
        rows.append(
            Row(
                _subject(case),
                quantity,
                RATIO,
                ratio.value,
                case.batch,
                ratio.low,
                ratio.high,
                goal=goal,
                reason=instability(aa),
                details={
                    "verdict": None if aa is None else verdict(ratio, aa),
                    "ours": {"backend": OURS, "p50_ms": 1e3 * estimate(seconds[OURS]).value},
                    "baseline": {"backend": arm.name, "p50_ms": 1e3 * estimate(seconds[arm.name]).value},
                    **({} if rows else details),
                },
            )
        )
    return rows


def _kernel_rows(case: Case, kernels: dict[str, int | None]) -> list[Row]:
    ours, inductor = kernels.get(OURS), kernels.get("compile-default")
    if not ours:
        return []
    rows = [Row(_subject(case), "kernels of a forward pass", COUNT, float(ours), case.batch, details=kernels)]
    if inductor:
        share = ours / inductor
        rows.append(
            Row(
                _subject(case),
                "kernels over Inductor's",
                RATIO,
                share,
                case.batch,
                goal=MAX_KERNEL_SHARE,
                details=kernels,
            )
        )
    return rows


def _measure(
    device: Device, calls: dict[str, Callable[[Tensor], Tensor]], inputs: Sequence[Tensor], bench: Bench
) -> dict[str, list[float]]:
    """Median seconds of a call, waited for, of each arm in each round."""
    shuffler = random.Random(WEIGHT_SEED)
    names = list(calls)
    once = {name: min(device.wall_s(lambda n=name: calls[n](inputs[0])) for _ in range(3)) for name in names}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(bench.effort.rounds + 1):
        shuffler.shuffle(names)
        for name in names:
            count = max(MIN_CALLS, min(MAX_CALLS, int(bench.effort.model_round_s / once[name])))
            taken = [device.wall_s(lambda n=name, i=i: calls[n](inputs[i % INPUTS])) for i in range(count)]  # type: ignore[misc]
            if index:  # the first round warms up
                seconds[name].append(median(taken))
    return seconds


def _kernel_counts(
    device: Device, reference: nn.Module, spec: Any, case: Case, images: Tensor
) -> dict[str, int | None]:
    """Kernels of one forward pass without CUDA graphs: ours, eager, and torch.compile's default mode."""
    place, dtype = device.torch_device, PRECISIONS[case.precision]
    fused = converted(fused_model(reference, spec), case.precision, place)
    counts = {OURS: count_kernels(device, lambda: fused(images))}
    eager = moved(copy.deepcopy(reference), place, dtype)
    counts[EAGER] = count_kernels(device, lambda: eager(images))
    if case.modes:
        try:
            with time_limit(COMPILE_LIMIT_S):
                folded = moved(fold_batchnorm(copy.deepcopy(reference)), place, dtype)
                torch.compiler.reset()
                function = torch.compile(folded, dynamic=False)
                counts["compile-default"] = count_kernels(device, lambda: function(images))
        except (OutOfTimeError, RuntimeError):
            counts["compile-default"] = None
    return counts


def _subject(case: Case) -> str:
    return f"{case.model}, {case.precision}"


def _arm_json(arm: Arm, seconds: list[float] | None) -> dict[str, Any]:
    return {
        "median_s": estimate(seconds).to_json() if seconds else None,
        "ready_s": arm.ready_s,
        "parity": arm.parity,
        "reason": arm.reason or None,
    }
