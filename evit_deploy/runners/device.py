"""What the TensorRT runner needs of a GPU, so that a test can stand in for one; `runners.cuda` is the real one.

Times are milliseconds, sizes bytes, addresses and handles plain integers. Whatever is called below `Device` is called
inside `Device.current`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from evit_deploy.trt.plugin_context import Launcher


class DeviceError(RuntimeError):
    """The driver refused a call.

    Attributes:
        out_of_memory: for lack of memory.
    """

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class CaptureFailedError(RuntimeError):
    """The work cannot be captured in a CUDA graph; the capture was ended, and the work can be run without."""


class Stream(Protocol):
    """A stream that is not the default one."""

    @property
    def handle(self) -> int: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class Event(Protocol):
    """A point in a stream, with its time."""

    def record(self, stream: Stream) -> None: ...

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds from another event to this one; both have happened."""

    def close(self) -> None: ...


class DeviceMemory(Protocol):
    """A block of GPU memory."""

    @property
    def address(self) -> int: ...

    def free(self) -> None: ...


class PinnedArray(Protocol):
    """An array in host memory that the GPU copies to and from directly; it must not be used after `free`."""

    @property
    def array(self) -> np.ndarray: ...

    def free(self) -> None: ...


class Graph(Protocol):
    """Captured work."""

    def launch(self, stream: Stream) -> None: ...

    def close(self) -> None: ...


class Device(Protocol):
    """One GPU, in the context that everybody in this process shares."""

    @property
    def name(self) -> str: ...

    @property
    def arch(self) -> int:
        """Compute capability times ten."""

    @property
    def launcher(self) -> Launcher:
        """Launches compiled kernels on the streams made here."""

    def current(self) -> AbstractContextManager[None]:
        """The context current in this thread; whichever was before is afterwards."""

    def make_stream(self) -> Stream: ...

    def make_event(self) -> Event: ...

    def allocate(self, size_bytes: int) -> DeviceMemory: ...

    def allocate_pinned(self, shape: tuple[int, ...], dtype: str) -> PinnedArray: ...

    def copy_in(self, target: DeviceMemory, source: PinnedArray, stream: Stream) -> None:
        """Host to device, without waiting."""

    def copy_out(self, target: PinnedArray, source: DeviceMemory, stream: Stream) -> None:
        """Device to host, without waiting."""

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        """What `work` puts into the stream, as a graph; it is not executed meanwhile.

        Raises:
            CaptureFailedError: it cannot be captured; nothing is left of the attempt.
        """
