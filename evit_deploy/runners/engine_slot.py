"""What one batch size of an engine needs: its profile, an execution context, and buffers at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from evit_deploy.errors import RunnerError
from evit_deploy.runners.base import FeedDict, TensorSpec
from evit_deploy.runners.device import Device, DeviceMemory, Graph, PinnedArray, Stream
from evit_deploy.runners.feeds import describe
from evit_deploy.trt.profiles import BatchProfile


def profile_index(profiles: Sequence[BatchProfile], batch: int) -> int | None:
    """The profile to run a batch with: of those that take it, the one tuned nearest to it; None where none does."""
    fitting = [index for index, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    return min(
        fitting,
        key=lambda index: (abs(profiles[index].opt - batch), profiles[index].max - profiles[index].min),
        default=None,
    )


def describe_profiles(profiles: Sequence[BatchProfile]) -> str:
    """ "1:8:64, 65:128:128": MIN:OPT:MAX of each."""
    return ", ".join(str(profile) for profile in profiles)


class EngineSlot:
    """Context, buffers and graph of one batch size; made by `make_slot`, given back by `close`.

    Attributes:
        context: TensorRT's execution context; its shapes and addresses never change.
        graph: None while executions are not captured.
    """

    def __init__(self) -> None:
        self.context: Any = None
        self.graph: Graph | None = None
        self._inputs: dict[str, tuple[PinnedArray, DeviceMemory]] = {}
        self._outputs: dict[str, tuple[PinnedArray, DeviceMemory]] = {}
        self._on_close = ExitStack()
        self._on_close.callback(self._forget_context)

    def add_input(self, device: Device, spec: TensorSpec, shape: tuple[int, ...]) -> DeviceMemory:
        """Buffers for an input; returns the one that TensorRT reads."""
        self._inputs[spec.name] = self._allocate(device, spec, shape)
        return self._inputs[spec.name][1]

    def add_output(self, device: Device, spec: TensorSpec, shape: tuple[int, ...]) -> DeviceMemory:
        """Buffers for an output; returns the one that TensorRT writes."""
        self._outputs[spec.name] = self._allocate(device, spec, shape)
        return self._outputs[spec.name][1]

    def fill(self, feed: FeedDict) -> None:
        """Copy the arrays of a feed to where the GPU takes them from."""
        for name, (pinned, _) in self._inputs.items():
            np.copyto(pinned.array, feed[name])

    def copy_in(self, device: Device, stream: Stream) -> None:
        for pinned, memory in self._inputs.values():
            device.copy_in(memory, pinned, stream)

    def copy_out(self, device: Device, stream: Stream) -> None:
        for pinned, memory in self._outputs.values():
            device.copy_out(pinned, memory, stream)

    def results(self) -> dict[str, np.ndarray]:
        """Copies of the outputs, whose buffers are filled again by the next inference."""
        return {name: pinned.array.copy() for name, (pinned, _) in self._outputs.items()}

    def close(self) -> None:
        """Give everything back, the graph first; harmless when done already."""
        graph, self.graph = self.graph, None
        with self._on_close:
            if graph is not None:
                graph.close()

    def _allocate(self, device: Device, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[PinnedArray, DeviceMemory]:
        pinned = device.allocate_pinned(shape, spec.dtype)
        self._on_close.callback(pinned.free)
        memory = device.allocate(pinned.array.nbytes)
        self._on_close.callback(memory.free)
        return pinned, memory

    def _forget_context(self) -> None:
        self.context = None


def make_slot(
    slot: EngineSlot,
    engine: Any,
    device: Device,
    stream: Stream,
    profile: int,
    batch: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Fill an empty slot; what was made before a failure is in it, to be closed.

    Args:
        slot: new.
        engine: TensorRT's engine.
        device, stream: where it will run.
        profile: index of the optimization profile.
        batch: images.
        inputs, outputs: of the engine, the batch None.

    Raises:
        RunnerError: TensorRT refuses a shape or an address, or infers another output than expected.
        DeviceError: out of memory.
    """
    slot.context = engine.create_execution_context()
    if slot.context is None:
        raise RunnerError(f"TensorRT gives no execution context for batch {batch}: out of GPU memory?")
    _require(slot.context.set_optimization_profile_async(profile, stream.handle), f"optimization profile {profile}")
    stream.synchronize()
    for spec in inputs:
        shape = _with_batch(spec, batch)
        _require(slot.context.set_input_shape(spec.name, shape), f"{describe(spec)} of shape {list(shape)}")
        memory = slot.add_input(device, spec, shape)
        _require(slot.context.set_tensor_address(spec.name, memory.address), f"the address of {spec.name}")
    missing = slot.context.infer_shapes()
    if missing:
        raise RunnerError(f"TensorRT cannot tell the shapes that follow: {', '.join(missing)} is not specified enough")
    for spec in outputs:
        shape = tuple(slot.context.get_tensor_shape(spec.name))
        if shape != _with_batch(spec, batch):
            raise RunnerError(
                f"the engine's output has shape {list(shape)} for batch {batch}, expected {describe(spec)}",
                hint="build it again: evit-deploy build-trt --force",
            )
        memory = slot.add_output(device, spec, shape)
        _require(slot.context.set_tensor_address(spec.name, memory.address), f"the address of {spec.name}")


def _with_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if dim is None else dim for dim in spec.shape)


def _require(accepted: bool, what: str) -> None:
    if not accepted:
        raise RunnerError(f"TensorRT refuses {what}")
