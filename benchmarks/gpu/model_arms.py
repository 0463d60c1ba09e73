"""The ways to run a whole model that are compared, each checked against the FP32 reference before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.budget import OutOfTimeError, time_limit
from benchmarks.gpu.device import Device
from benchmarks.gpu.sizes import PRECISIONS
from benchmarks.gpu.timing import AA_SUFFIX
from evit_deploy.bench.assemble import compare_outputs
from evit_deploy.constants import OUTPUT_NAME
from evit_deploy.models.fold import fold_batchnorm
from evit_deploy.models.fused import fused_model
from evit_deploy.parity.gate import TOLERANCES
from evit_deploy.runners.precision import converted
from evit_deploy.specs import ModelSpec

OURS, EAGER = "torch-fused", "torch-eager"
MODES = {
    "compile-max-autotune-no-graph": "max-autotune-no-cudagraphs",
    "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
}
COMPILE_LIMIT_S = 150.0


@dataclass
class Arm:
    """One way to run the model: a call from images on the device to logits there; or why there is none."""

    name: str
    call: Callable[[Tensor], Tensor] | None = None
    parity: dict[str, Any] | None = None
    ready_s: float | None = None
    reason: str = ""


def makers_of(
    device: Device, reference: nn.Module, spec: ModelSpec, precision: str, modes: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """How each arm is made; the compiled ones get batch normalisation folded, as ours has."""
    place, dtype = device.torch_device, PRECISIONS[precision]

    def ours() -> Callable[[Tensor], Tensor]:
        module = converted(fused_model(reference, spec), precision, place)
        return graphed(device, module)

    def compiled(mode: str) -> Callable[[], Callable[[Tensor], Tensor]]:
        def make() -> Callable[[Tensor], Tensor]:
            module = moved(fold_batchnorm(copy.deepcopy(reference)), place, dtype)
            module(
                torch.zeros(1, *spec.input_shape, device=place, dtype=dtype)
            )  # fills timm's caches outside of graphs
            torch.compiler.reset()
            function = torch.compile(module, mode=mode, dynamic=False)

            def call(images: Tensor) -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                result: Tensor = function(images)
                return result

            return call

        return make

    makers: dict[str, Callable[[], Any]] = {
        OURS: ours,
        OURS + AA_SUFFIX: ours,
        EAGER: lambda: moved(copy.deepcopy(reference), place, dtype),
    }
    return {**makers, **{mode: compiled(MODES[mode]) for mode in modes}}


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms, for every arm alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def graphed(device: Device, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module whose forward pass is captured for the first input's shape; a copy into its buffer is part of a call."""
    if device.stream is None:
        return module
    from evit_deploy.runners.cuda_graph import Captured, capture

    stream = device.stream
    state: dict[str, Any] = {}

    def call(images: Tensor) -> Tensor:
        if not state:
            state["input"] = images.clone(memory_format=torch.channels_last)
            state["graph"] = capture(lambda: module(state["input"]), stream)
        captured: Captured[Tensor] = state["graph"]
        with torch.cuda.stream(stream):
            state["input"].copy_(images)
            return captured.replay()

    return call


def ready(
    device: Device, name: str, maker: Callable[[], Any], images: Tensor, expected: np.ndarray, precision: str
) -> Arm:
    """Make an arm, run it, and compare every row; what goes wrong is the reason why it does not take part."""
    arm = Arm(name)
    try:
        with time_limit(COMPILE_LIMIT_S):
            call = maker()
            arm.ready_s = device.wall_s(lambda: call(images))
            for _ in range(2):  # CUDA graphs of torch.compile are recorded by the second call
                logits = call(images)
            device.synchronize()
            outputs = {OUTPUT_NAME: logits.float().cpu().numpy()}
    except OutOfTimeError:
        arm.reason = f"was not ready after {COMPILE_LIMIT_S:.0f} s"
        return arm
    except Exception as error:  # noqa: BLE001 - whatever an arm raises is why it does not take part
        arm.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        device.release_memory()
        return arm
    parity = compare_outputs({OUTPUT_NAME: expected}, [outputs], TOLERANCES[precision])
    arm.parity = parity.to_json()
    if parity.passed:
        arm.call = call
    else:
        arm.reason = f"failed parity: {parity.reason}"
    return arm


def moved(module: nn.Module, place: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module itself on a device in a type, in channels_last."""
    for part in module.modules():
        if hasattr(part, "attention_bias_cache"):  # timm keeps biases of the type it had before
            part.attention_bias_cache = {}  # type: ignore[assignment]
    module = module.eval().requires_grad_(False).to(device=place, dtype=dtype)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
