"""A CUDA device through PyCUDA, with graphs through cuda-bindings; the one module that imports either.

PyCUDA works in the device's primary context, which PyTorch and TensorRT share; it stays retained until the process
ends. PyCUDA knows no CUDA graphs, so cuda-bindings capture on the handle of its stream. Importing this module needs
neither of them.

Never run on a GPU yet: calls, their order and their arguments are tested with stand-ins for both libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from evit_kernels.ptx import entry_parameters

from evit_deploy.environment import python_command
from evit_deploy.errors import MissingDependencyError
from evit_deploy.runners.device import CaptureFailedError, Device, DeviceError, DeviceMemory, PinnedArray, Stream

if TYPE_CHECKING:
    from evit_kernels.aot import CompiledKernel

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work in the default stream neither waits for it nor breaks its captures
_POINTER, _INT32 = "P", "i"  # formats of Python's struct, whose native alignment is that of a kernel's parameters
_NEEDS_DRIVER = "an NVIDIA GPU with its driver is needed: evit-deploy doctor"


def open_device(index: int = 0) -> Device:
    """The GPU of that number, its primary context retained.

    Raises:
        MissingDependencyError: PyCUDA or the driver is missing, or there is no such GPU.
    """
    driver = _import_driver()
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        raise MissingDependencyError(f"CUDA does not start, {_one_line(error)}", hint=_NEEDS_DRIVER) from error
    if index >= count:
        raise MissingDependencyError(f"there is no GPU {index}, CUDA finds {count}", hint=_NEEDS_DRIVER)
    return CudaDevice(driver, index)


class CudaDevice:
    """One GPU; see `runners.device.Device`.

    Args:
        driver: pycuda.driver, initialised.
        index: the GPU's number.
        runtime: cuda.bindings.runtime; None looks for it at the first capture.
    """

    def __init__(self, driver: Any, index: int, runtime: Any = None) -> None:
        self._driver = driver
        self._runtime = runtime
        with _reporting(driver, "taking the primary context"):
            device = driver.Device(index)
            self._context = _primary_context(driver, index)
            self.name = str(device.name())
            major, minor = device.compute_capability()
        self.arch = 10 * int(major) + int(minor)
        self._streams: dict[int, Any] = {}  # PyCUDA launches on its own streams only, and TensorRT passes handles
        self.launcher = CudaLauncher(driver, self.arch, self._streams)

    @contextmanager
    def current(self) -> Iterator[None]:
        with _reporting(self._driver, "entering the context"):
            self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def make_stream(self) -> CudaStream:
        with _reporting(self._driver, "making a stream"):
            return CudaStream(self._driver, self._streams)

    def make_event(self) -> CudaEvent:
        with _reporting(self._driver, "making an event"):
            return CudaEvent(self._driver, self._streams)

    def allocate(self, size_bytes: int) -> CudaMemory:
        with _reporting(self._driver, f"allocating {size_bytes} bytes of GPU memory"):
            return CudaMemory(self._driver.mem_alloc(size_bytes))

    def allocate_pinned(self, shape: tuple[int, ...], dtype: str) -> CudaPinnedArray:
        with _reporting(self._driver, f"allocating {dtype}{list(shape)} of pinned host memory"):
            return CudaPinnedArray(self._driver.pagelocked_empty(shape, np.dtype(dtype)))

    def copy_in(self, target: DeviceMemory, source: PinnedArray, stream: Stream) -> None:
        with _reporting(self._driver, "copying to the GPU"):
            self._driver.memcpy_htod_async(target.address, source.array, self._streams[stream.handle])

    def copy_out(self, target: PinnedArray, source: DeviceMemory, stream: Stream) -> None:
        with _reporting(self._driver, "copying from the GPU"):
            self._driver.memcpy_dtoh_async(target.array, source.address, self._streams[stream.handle])

    def capture(self, work: Callable[[], None], stream: Stream) -> CudaGraph:
        if self._runtime is None:
            self._runtime = _import_runtime()
        return capture(self._runtime, work, stream.handle)


class CudaLauncher:
    """Loads and launches compiled kernels; the `Launcher` of the plugins.

    Args:
        driver: pycuda.driver.
        arch: of the GPU, compute capability times ten.
        streams: PyCUDA's streams by handle; those that are launched on must be in it.
    """

    def __init__(self, driver: Any, arch: int, streams: dict[int, Any]) -> None:
        self.arch = arch
        self._driver = driver
        self._streams = streams

    def load(self, kernel: CompiledKernel) -> LoadedKernel:
        with _reporting(self._driver, f"loading {kernel.entry} for {kernel.target}"):
            module = self._driver.module_from_buffer(kernel.ptx.encode() + b"\0")
            function = module.get_function(kernel.entry)
            function.prepare(argument_formats(kernel))
        return LoadedKernel(module, function, (kernel.threads, 1, 1), kernel.shared_bytes)

    def launch(self, handle: LoadedKernel, grid: int, arguments: Sequence[int], stream: int) -> None:
        target = self._streams.get(stream)
        if target is None:
            raise DeviceError(f"TensorRT launches on a stream of its own ({stream:#x}), and PyCUDA cannot")
        with _reporting(self._driver, "launching a kernel"):
            handle.function.prepared_async_call(
                (grid, 1, 1), handle.block, target, *arguments, shared_size=handle.shared_bytes
            )


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on the GPU.

    Attributes:
        module: keeps the function alive.
        function: prepared for its arguments.
        block: threads of a program.
        shared_bytes: dynamic shared memory of a program.
    """

    module: Any
    function: Any
    block: tuple[int, int, int]
    shared_bytes: int


class CudaStream:
    """A stream of PyCUDA's, found by its handle in `streams` as long as it is open."""

    def __init__(self, driver: Any, streams: dict[int, Any]) -> None:
        self._driver = driver
        self._streams = streams
        stream = driver.Stream(NON_BLOCKING)
        self.handle = int(stream.handle)
        streams[self.handle] = stream

    def synchronize(self) -> None:
        with _reporting(self._driver, "waiting for the GPU"):
            self._streams[self.handle].synchronize()

    def close(self) -> None:
        self._streams.pop(self.handle, None)  # the last reference destroys it


class CudaEvent:
    """An event that keeps its time."""

    def __init__(self, driver: Any, streams: dict[int, Any]) -> None:
        self._driver = driver
        self._streams = streams
        self._event = driver.Event()

    def record(self, stream: Stream) -> None:
        with _reporting(self._driver, "recording an event"):
            self._event.record(self._streams[stream.handle])

    def ms_since(self, earlier: Any) -> float:
        with _reporting(self._driver, "reading a time"):
            return float(self._event.time_since(earlier._event))

    def close(self) -> None:
        self._event = None


class CudaMemory:
    """GPU memory."""

    def __init__(self, allocation: Any) -> None:
        self._allocation = allocation
        self.address = int(allocation)

    def free(self) -> None:
        if self._allocation is not None:
            self._allocation.free()
            self._allocation = None


class CudaPinnedArray:
    """Page-locked host memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def free(self) -> None:
        allocation, self.array = self.array.base, np.empty(0)
        if allocation is not None:
            allocation.free()  # type: ignore[attr-defined]  # PyCUDA's PagelockedHostAllocation


class CudaGraph:
    """A captured graph, ready to launch."""

    def __init__(self, runtime: Any, executable: Any) -> None:
        self._runtime = runtime
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        (code,) = self._runtime.cudaGraphLaunch(self._executable, stream.handle)
        if code != self._runtime.cudaError_t.cudaSuccess:
            raise DeviceError(f"launching the CUDA graph failed: {_error_name(self._runtime, code)}")

    def close(self) -> None:
        if self._executable is not None:
            self._runtime.cudaGraphExecDestroy(self._executable)
            self._executable = None


def capture(runtime: Any, work: Callable[[], None], handle: int) -> CudaGraph:
    """Capture what `work` puts into a stream.

    Args:
        runtime: cuda.bindings.runtime.
        work: allocates nothing and waits for nothing.
        handle: of a stream that is not the default one, with nothing left to do.

    Raises:
        CaptureFailedError: the capture was ended and its error cleared.
    """
    success = runtime.cudaError_t.cudaSuccess
    # Thread-local: what other threads do with the GPU meanwhile is their business.
    (code,) = runtime.cudaStreamBeginCapture(handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    if code != success:
        runtime.cudaGetLastError()
        raise CaptureFailedError(f"a capture cannot begin: {_error_name(runtime, code)}")
    failure: BaseException | None = None
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - a stream must not be left in a capture, whatever ends it
        failure = error
    ended, graph = runtime.cudaStreamEndCapture(handle)
    try:
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        if failure is not None:
            raise CaptureFailedError(f"the work fails in a capture: {_one_line(failure)}") from failure
        if ended != success:
            raise CaptureFailedError(f"the capture ends with {_error_name(runtime, ended)}")
        instantiated, executable = runtime.cudaGraphInstantiate(graph, 0)
        if instantiated != success:
            raise CaptureFailedError(f"the graph cannot be made: {_error_name(runtime, instantiated)}")
        return CudaGraph(runtime, executable)
    except BaseException:
        runtime.cudaGetLastError()  # reading it clears it, or the next call of anybody would report it
        raise
    finally:
        if graph is not None and int(graph):
            runtime.cudaGraphDestroy(graph)


def argument_formats(kernel: CompiledKernel) -> str:
    """The kernel's parameters in the format of Python's struct, "PPiP" for example.

    Raises:
        ValueError: the PTX has another number of parameters than the kernel, or one that is neither a pointer nor
            an int32.
    """
    _, declarations = entry_parameters(kernel.ptx)
    if len(declarations) != len(kernel.parameters):
        raise ValueError(f"{kernel.entry} has {len(declarations)} parameters, expected {len(kernel.parameters)}")
    return "".join(_argument_format(kernel.entry, declaration) for declaration in declarations)


def _argument_format(entry: str, declaration: str) -> str:
    types = set(declaration.split())
    if types & {".u64", ".b64"}:
        return _POINTER
    if types & {".u32", ".b32", ".s32"}:
        return _INT32
    raise ValueError(f"{entry} has a parameter that is neither a pointer nor an int32: {declaration}")


@cache
def _primary_context(driver: Any, index: int) -> Any:
    return driver.Device(index).retain_primary_context()


def _import_driver() -> Any:
    install = f"{python_command()} pycuda, which needs a CUDA toolkit; docs/running_engines.md"
    try:
        import pycuda.driver
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"PyCUDA is not installed ({error.name} is missing)", hint=install) from error
    except ImportError as error:
        raise MissingDependencyError(f"PyCUDA cannot be imported, {_one_line(error)}", hint=_NEEDS_DRIVER) from error
    return pycuda.driver


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        hint = f"{python_command()} cuda-bindings"
        raise CaptureFailedError(f"cuda-bindings cannot be imported, {_one_line(error)}: {hint}") from error
    return runtime


@contextmanager
def _reporting(driver: Any, doing: str) -> Iterator[None]:
    """PyCUDA's errors as DeviceError."""
    try:
        yield
    except driver.Error as error:
        out_of_memory = isinstance(error, driver.MemoryError)
        raise DeviceError(f"{doing} failed: {_one_line(error)}", out_of_memory=out_of_memory) from error


def _error_name(runtime: Any, code: Any) -> str:
    _, name = runtime.cudaGetErrorName(code)
    return name.decode() if isinstance(name, bytes) else str(code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
