"""What the device can do at best, measured in the same run: copies, matrix products, exponentials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.settings import CEILINGS
from benchmarks.gpu.sizes import PRECISIONS
from benchmarks.gpu.timing import Effort, estimate, measure, prepare
from benchmarks.result import SECONDS, Row
from evit_deploy.errors import ParityError

NAME = CEILINGS
TITLE = "what the GPU can do at best: copies, matrix products, exponentials"
GOAL = "none: the other results are measured against these"

COPY_BYTES = 2 * 1024**3
EDGES = {"fp16": 8192, "bf16": 8192, "fp32": 4096}  # of square matrices
EXP_PROGRAMS, EXP_BLOCK, EXP_REPEATS, EXP_UNROLL = 132 * 64, 1024, 64, 16
# RMS-relative. FP32 sums thousands of products one after the other, 2e-6 off; TF32 would be at 3e-4.
MAX_ERRORS = {"fp16": 8 * 2**-10, "bf16": 8 * 2**-7, "fp32": 2e-5}
FIXED_POINT = 0.6411857445049859  # of 2^-x
SMOKE_DIVISOR = 2**11


@dataclass(frozen=True)
class Ceilings:
    """Rates per second.

    Attributes:
        bandwidth: bytes read plus bytes written.
        matrix_flops: floating-point operations of dense matrix products, by precision.
        exponentials: of the special function units.
    """

    bandwidth: float
    matrix_flops: dict[str, float]
    exponentials: float


def measure_ceilings(device: Device, effort: Effort) -> tuple[Ceilings, list[Row]]:
    """Measure all of them.

    Raises:
        ParityError: an operation gave a wrong result.
    """
    rows = []
    bandwidth, row = _copy(device, effort)
    rows.append(row)
    matrix_flops = {}
    for precision in EDGES:
        matrix_flops[precision], row = _product(device, effort, precision)
        rows.append(row)
    exponentials, row = _exponentials(device, effort)
    rows.append(row)
    return Ceilings(bandwidth, matrix_flops, exponentials), rows


def _copy(device: Device, effort: Effort) -> tuple[float, Row]:
    count = COPY_BYTES if device.is_gpu else COPY_BYTES // SMOKE_DIVISOR
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    result = _rate(device, effort, lambda: target.copy_(source), 2 * count, "copy", "bytes")
    _require(bool(torch.equal(source, target)), "a copy is no copy")
    return result


def _product(device: Device, effort: Effort, precision: str) -> tuple[float, Row]:
    from evit_deploy.runners.float32 import full_float32

    edge = EDGES[precision] if device.is_gpu else 64
    generator = torch.Generator(device.torch_device).manual_seed(0)
    shape, dtype = (edge, edge), PRECISIONS[precision]
    a, b = (torch.randn(shape, dtype=dtype, device=device.torch_device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    with full_float32():
        result = _rate(device, effort, lambda: torch.mm(a, b, out=out), 2 * edge**3, f"{precision} product", "flop")
    exact = (a[:8].double() @ b.double()).cpu()
    error = float((out[:8].double().cpu() - exact).norm() / exact.norm())
    _require(error <= MAX_ERRORS[precision], f"a {precision} matrix product is off by {error:.1e}")
    return result


def _exponentials(device: Device, effort: Effort) -> tuple[float, Row]:
    if device.is_gpu:
        from benchmarks.gpu.exp_kernel import exp2_kernel

        out = torch.empty(EXP_PROGRAMS * EXP_BLOCK, device=device.torch_device)
        count = out.numel() * EXP_REPEATS * EXP_UNROLL

        def call() -> object:
            return exp2_kernel[(EXP_PROGRAMS,)](out, EXP_REPEATS, EXP_BLOCK, EXP_UNROLL, num_warps=4)
    else:
        out, count = torch.zeros(64), 64 * 64

        def call() -> object:
            out.zero_()
            for _ in range(64):
                torch.exp2(-out, out=out)
            return out

    result = _rate(device, effort, call, count, "exp2", "exponentials")
    _require(bool(((out - FIXED_POINT).abs() < 1e-5).all()), "exp2 is not exp2")
    return result


def _rate(
    device: Device, effort: Effort, call: Callable[[], object], amount: int, what: str, unit: str
) -> tuple[float, Row]:
    """Amount per second, and the row that says so."""
    # Two empty argument lists: the call goes on over the same tensors, which exceed every cache or are in registers.
    prepared = prepare(device, call, ((), ()), effort.min_graph_s)
    time = estimate(measure(device, {what: prepared}, effort)[what])
    rate = amount / time.value
    details = {unit: amount, f"{unit}_per_s": rate, "calls_per_graph": prepared.calls, "rounds": effort.rounds}
    return rate, Row(what, "median time", SECONDS, time.value, ci_low=time.low, ci_high=time.high, details=details)


def _require(correct: bool, otherwise: str) -> None:
    if not correct:
        raise ParityError(otherwise, hint="nothing can be measured against it")
