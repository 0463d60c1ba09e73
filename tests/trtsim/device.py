"""A stand-in for `runners.cuda`: notes what it is asked for, in one list with the calls of the simulated TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from evit_deploy.runners.device import CaptureFailedError, DeviceError
from tests.trtsim.machine import ARCH, GPU
from tests.trtsim.objects import Simulation

_FIRST_ADDRESS, _STEP_BYTES = 0x5000_0000, 1 << 24


class StandInDevice:
    """One GPU on which nothing computes; memory is host memory by address.

    Args:
        simulation: whose calls these are noted beside.

    Attributes:
        live: what was made and not given back.
        failing_launches: the next so many kernel launches fail.
        depth: how often the context is current.
    """

    name, arch = GPU, ARCH

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.live: list[str] = []
        self.failing_launches = 0
        self.depth = 0
        self.capturing = False
        self.memory: dict[int, np.ndarray] = {}
        self.launcher = self
        self._clock_ms = 0.0

    def note(self, method: str, *arguments: Any) -> None:
        if self.depth == 0:
            raise DeviceError(f"{method}: no context is current")
        self.simulation.calls.append(("Device", method, arguments, None))

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def make_stream(self) -> Part:
        return Part(self, "stream", 0x100 + len(self.live))

    def make_event(self) -> Part:
        return Part(self, "event", 0)

    def allocate(self, size_bytes: int) -> Part:
        address = _FIRST_ADDRESS + _STEP_BYTES * len(self.memory)
        self.memory[address] = np.zeros(size_bytes, np.uint8)
        return Part(self, "memory", address)

    def allocate_pinned(self, shape: tuple[int, ...], dtype: str) -> Part:
        return Part(self, "pinned", 0, np.full(shape, 77, dtype))

    def copy_in(self, target: Part, source: Part, stream: Part) -> None:
        self.note("copy_in", target.address, stream.handle)
        self.memory[target.address][:] = source.array.view(np.uint8).reshape(-1)

    def copy_out(self, target: Part, source: Part, stream: Part) -> None:
        self.note("copy_out", source.address, stream.handle)
        target.array.view(np.uint8).reshape(-1)[:] = self.memory[source.address]

    def capture(self, work: Callable[[], None], stream: Part) -> Part:
        self.note("begin_capture", stream.handle)
        self.capturing = True
        try:
            work()
        except Exception as error:
            raise CaptureFailedError(f"the work fails in a capture: {error}") from error
        finally:
            self.capturing = False
            self.note("end_capture", stream.handle)
        return Part(self, "graph", 0)

    # The launcher of plugins

    def load(self, kernel: Any) -> Any:
        self.note("load", kernel.entry)
        return kernel

    def launch(self, handle: Any, grid: int, arguments: Sequence[int], stream: int) -> None:
        self.note("launch", handle.entry, grid, tuple(int(argument) for argument in arguments), int(stream))
        if len(arguments) != len(handle.parameters):
            raise DeviceError(f"{len(arguments)} arguments for {len(handle.parameters)} parameters")
        if self.failing_launches:
            self.failing_launches -= 1
            raise DeviceError("a planted launch failure")


class Part:
    """A stream, an event, memory or a graph of the device."""

    def __init__(self, device: StandInDevice, kind: str, number: int, array: Any = None) -> None:
        self._device, self._kind = device, kind
        self.handle = self.address = number
        self.array = array
        self._at_ms = 0.0
        device.live.append(kind)

    def synchronize(self) -> None:
        self._device.note("synchronize", self.handle)

    def record(self, stream: Part) -> None:
        self._device.note("record", stream.handle)
        self._device._clock_ms += 1.5
        self._at_ms = self._device._clock_ms

    def ms_since(self, earlier: Part) -> float:
        return self._at_ms - earlier._at_ms

    def launch(self, stream: Part) -> None:
        self._device.note("graph_launch", stream.handle)

    def free(self) -> None:
        self.close()

    def close(self) -> None:
        self._device.live.remove(self._kind)
