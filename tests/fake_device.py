"""A GPU for tests: memory in NumPy arrays, work done at once, and every call written down.

What a GPU forbids is refused: calls outside of the context, memory that was freed, allocating or waiting in a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from evit_deploy.runners.device import CaptureFailedError, DeviceError

POISON = 0xFF  # as bytes of a float: NaN
FIRST_ADDRESS = 1 << 20
FIRST_STREAM = 0x100


class FakeDevice:
    """One GPU; see `evit_deploy.runners.device.Device`.

    Args:
        arch: compute capability times ten.
        fail_at: the calls that fail, by name; "allocate 2" stands for the second one.
        out_of_memory: what fails, fails for lack of memory.
        no_graphs: why no capture succeeds; "" where they do.

    Attributes:
        calls: in order.
        live: what was taken and not given back.
    """

    name = "Fake GPU"

    def __init__(
        self, *, arch: int = 89, fail_at: Sequence[str] = (), out_of_memory: bool = False, no_graphs: str = ""
    ) -> None:
        self.arch = arch
        self.calls: list[str] = []
        self.live: set[str] = set()
        self.memory: dict[int, np.ndarray] = {}
        self.captured_work: list[Callable[[], None]] | None = None
        self.launcher: Any = FakeLauncher(arch)
        self.depth = 0
        self._fail_at, self._out_of_memory, self._no_graphs = set(fail_at), out_of_memory, no_graphs
        self._counts: dict[str, int] = {}

    def call(self, name: str, detail: str = "") -> None:
        """Write a call down, and fail if it shall."""
        self._counts[name] = self._counts.get(name, 0) + 1
        self.calls.append(f"{name} {detail}".strip())
        assert name in ("push", "pop") or self.depth, f"{name} outside of the context"
        if {name, f"{name} {self._counts[name]}"} & self._fail_at:
            raise DeviceError(f"{name} failed: it was asked to", out_of_memory=self._out_of_memory)

    def take(self, kind: str) -> str:
        thing = f"{kind} {self._counts.get(kind, 0)}"
        self.live.add(thing)
        return thing

    def give(self, thing: str) -> None:
        self.calls.append(f"free {thing}")
        assert self.depth, f"{thing} is freed outside of the context"
        assert thing in self.live, f"{thing} is freed twice"
        self.live.remove(thing)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.call("push")
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            self.call("pop")

    def make_stream(self) -> FakeStream:
        self.call("stream")
        return FakeStream(self)

    def make_event(self) -> FakeEvent:
        self.call("event")
        return FakeEvent(self)

    def allocate(self, size_bytes: int) -> FakeMemory:
        assert self.captured_work is None, "allocating in a capture"
        self.call("allocate", str(size_bytes))
        return FakeMemory(self, size_bytes)

    def allocate_pinned(self, shape: tuple[int, ...], dtype: str) -> FakePinnedArray:
        assert self.captured_work is None, "allocating in a capture"
        self.call("pinned", f"{dtype}{list(shape)}")
        return FakePinnedArray(self, shape, dtype)

    def copy_in(self, target: FakeMemory, source: FakePinnedArray, stream: FakeStream) -> None:
        self.call("copy_in", f"on {stream.handle:#x}")
        self.memory[target.address][:] = source.array.reshape(-1).view(np.uint8)

    def copy_out(self, target: FakePinnedArray, source: FakeMemory, stream: FakeStream) -> None:
        self.call("copy_out", f"on {stream.handle:#x}")
        target.array.reshape(-1).view(np.uint8)[:] = self.memory[source.address]

    def capture(self, work: Callable[[], None], stream: FakeStream) -> FakeGraph:
        self.call("capture", f"on {stream.handle:#x}")
        if self._no_graphs:
            raise CaptureFailedError(self._no_graphs)
        self.captured_work = []
        try:
            work()
            return FakeGraph(self, self.captured_work)
        except Exception as error:
            raise CaptureFailedError(f"the work fails in a capture: {error}") from error
        finally:
            self.captured_work = None

    def do(self, work: Callable[[], None]) -> None:
        """What a kernel does: now, or in every replay of the graph that is being captured."""
        if self.captured_work is None:
            work()
        else:
            self.captured_work.append(work)


class FakeLauncher:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def load(self, kernel: Any) -> Any:
        return kernel

    def launch(self, handle: Any, grid: int, arguments: Sequence[int], stream: int) -> None:
        raise AssertionError("nothing is launched here")


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._thing = device, device.take("stream")
        self.handle = FIRST_STREAM + int(self._thing.split()[1])

    def synchronize(self) -> None:
        assert self._device.captured_work is None, "waiting in a capture"
        self._device.call("synchronize", f"{self.handle:#x}")

    def close(self) -> None:
        self._device.give(self._thing)


class FakeEvent:
    """Its time is the number of calls before it, in milliseconds."""

    def __init__(self, device: FakeDevice) -> None:
        self._device, self._thing = device, device.take("event")
        self.ms = 0.0

    def record(self, stream: FakeStream) -> None:
        self._device.call("record", f"on {stream.handle:#x}")
        self.ms = float(len(self._device.calls))

    def ms_since(self, earlier: FakeEvent) -> float:
        self._device.call("elapsed")
        return self.ms - earlier.ms

    def close(self) -> None:
        self._device.give(self._thing)


class FakeMemory:
    def __init__(self, device: FakeDevice, size_bytes: int) -> None:
        self._device, self._thing = device, device.take("allocate")
        self.address = FIRST_ADDRESS * int(self._thing.split()[1])
        device.memory[self.address] = np.full(size_bytes, POISON, np.uint8)

    def free(self) -> None:
        self._device.give(self._thing)
        del self._device.memory[self.address]


class FakePinnedArray:
    def __init__(self, device: FakeDevice, shape: tuple[int, ...], dtype: str) -> None:
        self._device, self._thing = device, device.take("pinned")
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.array = np.full(count, POISON, np.uint8).view(dtype).reshape(shape)

    def free(self) -> None:
        self._device.give(self._thing)


class FakeGraph:
    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self._device, self._work = device, work
        device.call("graph")
        self._thing = device.take("graph")

    def launch(self, stream: FakeStream) -> None:
        self._device.call("launch", f"on {stream.handle:#x}")
        for work in self._work:
            work()

    def close(self) -> None:
        self._work = []  # it would keep the context alive, which a real graph does not
        self._device.give(self._thing)
