"""The same kernel launched by Triton, and ahead of time compiled by the CUDA driver: what TensorRT would launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from evit_kernels.registry import OPERATORS
from torch import Tensor

from benchmarks.gpu import settings
from benchmarks.gpu.budget import Task
from benchmarks.gpu.kernels import Bench, Case
from benchmarks.gpu.sizes import Size, meta_arguments, random_arguments, work_of
from benchmarks.gpu.timing import (
    AA_SUFFIX,
    copies_needed,
    estimate,
    half_range,
    instability,
    measure,
    prepare,
    speedup,
)
from benchmarks.result import RATIO, SECONDS, Goal, Row

NAME = settings.PTX
TITLE = "a kernel's PTX launched by the CUDA driver, against Triton's own launch of the same kernel"
GOAL = "in a CUDA graph at most 1.02x the time of Triton's launch"
MAX_RATIO = Goal("<=", 1.02)

LAUNCHES = 200  # of a host timing
TRITON, PTX = "triton", "ptx"


def tasks(bench: Bench, sizes: Sequence[Size], batches: Sequence[int]) -> list[Task]:
    """One task per operator and batch, at the first size of each operator, in FP16."""
    first = {size.operator: size for size in reversed(sizes)}
    cases = [Case(size, batch, "fp16") for batch in batches for size in first.values()]
    if not bench.device.is_gpu:
        return [Task(NAME, "every operator", 0.0, lambda: [_needs_gpu()])]
    return [
        Task(NAME, f"{case.subject}, batch {case.batch}", 8.0, lambda case=case: run_case(bench, case))  # type: ignore[misc]
        for case in cases
    ]


def run_case(bench: Bench, case: Case) -> list[Row]:
    """Compile, load, compare the results bit for bit, then measure both in graphs and from the host.

    Raises:
        RuntimeError: the kernel is refused, or its two launches differ.
    """
    from evit_kernels.aot import compile_kernel
    from evit_kernels.driver import LoadedKernel

    device, operator = bench.device, case.size.operator
    meta = meta_arguments(case.size, case.batch, case.precision)
    launch = OPERATORS[operator].launch_of(*meta)
    copies = copies_needed(work_of(case.size, case.batch, case.precision).bytes, device.l2_bytes)
    inputs = []
    for seed in range(copies):
        arguments = random_arguments(meta, operator, device.torch_device, seed)
        tensors = dict(zip(launch.inputs, (a for a in arguments if isinstance(a, Tensor)), strict=True))
        out = torch.full_like(OPERATORS[operator].fused(*arguments), float("nan"))
        inputs.append(({**tensors, launch.outputs[0]: out},))
    started = time.perf_counter()
    compiled = compile_kernel(launch, device.arch())
    compile_s = time.perf_counter() - started
    started = time.perf_counter()
    with LoadedKernel(compiled, device.torch_device.index) as kernel:
        load_s = time.perf_counter() - started

        def by_driver(tensors: dict[str, Tensor]) -> None:
            kernel.launch(launch, tensors, case.batch)

        def by_triton(tensors: dict[str, Tensor]) -> None:
            launch.run(tensors, case.batch)

        _require_equal(by_triton, by_driver, inputs[0][0], launch.outputs[0], device.synchronize)
        arms = {TRITON: by_triton, PTX: by_driver, TRITON + AA_SUFFIX: by_triton}
        prepared = {name: prepare(device, call, inputs, bench.effort.min_graph_s) for name, call in arms.items()}
        seconds = measure(device, prepared, bench.effort)
        host_s = {name: host_launch_s(device.synchronize, call, inputs) for name, call in arms.items()}
    ratio = speedup(seconds[PTX], seconds[TRITON])
    aa = half_range(seconds[TRITON], seconds[TRITON + AA_SUFFIX])
    details = {
        "arms": {name: estimate(values).to_json() for name, values in seconds.items()},
        "aa_half_range": aa,
        "compile_s": compile_s,
        "load_s": load_s,
        "target": compiled.target,
        "registers": compiled.registers,
        "shared_bytes": compiled.shared_bytes,
        "results": "equal bit for bit",
    }
    rows = [
        Row(
            case.subject,
            "time of the driver's launch over Triton's, in a CUDA graph",
            RATIO,
            1 / ratio.value,
            case.batch,
            1 / ratio.high,
            1 / ratio.low,
            goal=MAX_RATIO,
            reason=instability(aa),
            details=details,
        )
    ]
    for name in (TRITON, PTX):
        quantity = f"host time of a launch by {name}"
        rows.append(Row(case.subject, quantity, SECONDS, host_s[name], case.batch, details={"median_of": LAUNCHES}))
    rows.append(Row(case.subject, "loading the PTX into the driver", SECONDS, load_s, case.batch))
    return rows


def host_launch_s(
    synchronize: Callable[[], None], call: Callable[..., None], inputs: Sequence[tuple[Any, ...]]
) -> float:
    """Median seconds that the host spends in one launch, of LAUNCHES; waited for now and then, or the queue is full."""
    seconds = []
    for index in range(LAUNCHES):
        if index % 32 == 0:
            synchronize()
        started = time.perf_counter()
        call(*inputs[index % len(inputs)])
        seconds.append(time.perf_counter() - started)
    synchronize()
    return estimate(seconds).value


def _require_equal(
    first: Callable[..., None],
    second: Callable[..., None],
    tensors: dict[str, Tensor],
    output: str,
    synchronize: Callable[[], None],
) -> None:
    results = []
    for call in (first, second):
        tensors[output].fill_(float("nan"))
        call(tensors)
        synchronize()
        results.append(tensors[output].clone())
    if not torch.equal(*results) or not bool(results[0].isfinite().all()):
        raise RuntimeError("withheld: the two launches of one kernel gave different results")


def _needs_gpu() -> Row:
    return Row("every operator", "time of the driver's launch over Triton's", RATIO, None, reason="needs a GPU")
