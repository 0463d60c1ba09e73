"""The one module that imports PyCUDA and cuda-bindings, with stand-ins for both: calls, arguments, errors, clean-up."""

from __future__ import annotations

import enum
import gc
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evit_kernels.aot import CompiledKernel

from evit_deploy.errors import MissingDependencyError
from evit_deploy.runners.cuda import CudaDevice, argument_formats, capture, open_device
from evit_deploy.runners.device import CaptureFailedError, DeviceError
from tests.conftest import process_environment

POINTER = ".param .u64 .ptr .global .align 1 p_{}"
INT32 = ".param .u32 p_{}"


def kernel(*declarations: str, **changes: Any) -> CompiledKernel:
    """A kernel whose PTX has these parameters."""
    listed = ",\n\t".join(text.format(index) for index, text in enumerate(declarations))
    fields: dict[str, Any] = {
        "key": "k",
        "operator": "lite_mla",
        "entry": "lite_mla_fwd",
        "ptx": f".version 8.7\n.target sm_89\n.visible .entry lite_mla_fwd(\n\t{listed}\n)\n{{ ret; }}\n",
        "target": "sm_89",
        "arch": 89,
        "dtype": "fp32",
        "parameters": tuple(f"p_{index}" for index in range(len(declarations))),
        "threads": 128,
        "shared_bytes": 4096,
        "registers": 40,
        "spill_bytes": 0,
        "triton_version": "3.7.1",
        **changes,
    }
    return CompiledKernel(**fields)


class FakeDriver(ModuleType):
    """pycuda.driver: every call written down; `fail` is raised by the calls named in `failing`."""

    Error = type("Error", (Exception,), {})
    MemoryError = type("MemoryError", (Error,), {})

    def __init__(self, count: int = 1) -> None:
        super().__init__("pycuda.driver")
        self.calls: list[Any] = []
        self.failing: dict[str, Exception] = {}
        self.alive: list[str] = []
        self.contexts: list[Any] = []
        driver = self

        class Context:
            def push(self) -> None:
                driver.did("push")
                driver.contexts.append(self)

            def pop(self) -> None:
                driver.did("pop")
                assert driver.contexts.pop() is self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                return count

            def name(self) -> str:
                return f"GPU {self.index}"

            def compute_capability(self) -> tuple[int, int]:
                return 8, 9

            def retain_primary_context(self) -> Context:
                driver.did("retain", self.index)
                return Context()

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                driver.did("Stream", flags)
                self.handle = 0x500 + len(driver.calls)
                driver.alive.append("stream")

            def synchronize(self) -> None:
                driver.did("synchronize", self.handle)

            def __del__(self) -> None:
                driver.alive.remove("stream")

        class Event:
            ms = 0.0

            def record(self, stream: Stream) -> None:
                driver.did("record", stream.handle)
                self.ms = float(len(driver.calls))

            def time_since(self, other: Event) -> float:
                driver.did("time_since")
                return self.ms - other.ms

        self.Device, self.Stream, self.Event = Device, Stream, Event

    def did(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.failing:
            raise self.failing[name]

    def init(self) -> None:
        self.did("init")

    def mem_alloc(self, size_bytes: int) -> Any:
        self.did("mem_alloc", size_bytes)

        class Allocation:
            def __int__(self) -> int:
                return 0xA000

            def free(allocation) -> None:
                self.did("free")

        return Allocation()

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        self.did("pagelocked_empty", shape, dtype)
        return SimpleNamespace(base=SimpleNamespace(free=lambda: self.did("free pinned")), nbytes=12)

    def memcpy_htod_async(self, target: int, source: Any, stream: Any) -> None:
        self.did("htod", target, source, stream.handle)

    def memcpy_dtoh_async(self, target: Any, source: int, stream: Any) -> None:
        self.did("dtoh", target, source, stream.handle)

    def module_from_buffer(self, text: bytes) -> Any:
        self.did("module", text)

        def call(*arguments: Any, **options: Any) -> None:
            self.did("call", *arguments, options)

        function = SimpleNamespace(prepare=lambda formats: self.did("prepare", formats), prepared_async_call=call)
        return SimpleNamespace(get_function=lambda name: self.did("function", name) or function)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def installed(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The stand-in where `import pycuda.driver` finds it."""
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return driver


class TestOpening:
    def test_the_first_gpu(self, installed: FakeDriver) -> None:
        device = open_device()
        assert (device.name, device.arch, device.launcher.arch) == ("GPU 0", 89, 89)
        assert installed.calls == [("init",), ("retain", 0)]

    def test_the_primary_context_is_taken_once_in_a_process(self, installed: FakeDriver) -> None:
        for _ in range(3):
            open_device()
        assert [call for call in installed.calls if call[0] == "retain"] == [("retain", 0)]

    def test_without_pycuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pycuda", None)
        with pytest.raises(MissingDependencyError, match=r"PyCUDA is not installed \(pycuda.* is missing\)") as raised:
            open_device()
        assert "-m pip install pycuda" in raised.value.hint
        assert "docs/running_engines.md" in raised.value.hint

    def test_pycuda_without_what_it_is_made_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Finder:
            @staticmethod
            def find_spec(name: str, path: Any = None, target: Any = None) -> None:
                if name == "pycuda.driver":
                    text = "libcuda.so.1: cannot open shared object file:\n No such file or directory"
                    raise ImportError(text, name="_driver")

        package = ModuleType("pycuda")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "pycuda", package)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        with pytest.raises(
            MissingDependencyError, match=r"PyCUDA cannot be imported, libcuda\.so\.1: cannot open"
        ) as info:
            open_device()
        assert "\n" not in str(info.value)
        assert "driver" in info.value.hint

    def test_a_driver_that_does_not_start(self, installed: FakeDriver) -> None:
        installed.failing["init"] = installed.Error("cuInit failed: no CUDA-capable device is detected")
        with pytest.raises(MissingDependencyError, match="CUDA does not start, cuInit failed: no CUDA-capable device"):
            open_device()

    def test_a_gpu_that_is_not_there(self, installed: FakeDriver) -> None:
        with pytest.raises(MissingDependencyError, match="there is no GPU 1, CUDA finds 1"):
            open_device(1)


class TestDevice:
    @pytest.fixture
    def device(self, driver: FakeDriver) -> CudaDevice:
        return CudaDevice(driver, 0)

    def test_the_context_is_current_inside_only(self, device: CudaDevice, driver: FakeDriver) -> None:
        with device.current(), device.current():
            assert len(driver.contexts) == 2
        assert driver.contexts == []
        with pytest.raises(KeyError), device.current():
            raise KeyError
        assert driver.contexts == []

    def test_a_context_that_cannot_be_entered_is_not_left(self, device: CudaDevice, driver: FakeDriver) -> None:
        driver.failing["push"] = driver.Error("cuCtxPushCurrent failed")
        with pytest.raises(DeviceError, match="entering the context failed: cuCtxPushCurrent failed"), device.current():
            raise AssertionError
        assert ("pop",) not in driver.calls

    def test_streams_do_not_wait_for_the_default_one(self, device: CudaDevice, driver: FakeDriver) -> None:
        stream = device.make_stream()
        assert ("Stream", 1) in driver.calls
        stream.synchronize()
        assert driver.calls[-1] == ("synchronize", stream.handle)
        assert driver.alive == ["stream"]
        stream.close()
        stream.close()
        gc.collect()
        assert driver.alive == []

    def test_copies_and_events_are_on_the_stream(self, device: CudaDevice, driver: FakeDriver) -> None:
        stream, memory = device.make_stream(), device.allocate(64)
        pinned = device.allocate_pinned((2, 3), "float16")
        assert driver.calls[-2:] == [("mem_alloc", 64), ("pagelocked_empty", (2, 3), np.dtype("float16"))]
        before, after = device.make_event(), device.make_event()
        driver.calls.clear()
        before.record(stream)
        device.copy_in(memory, pinned, stream)
        device.copy_out(pinned, memory, stream)
        after.record(stream)
        handle = stream.handle
        assert driver.calls == [
            ("record", handle),
            ("htod", 0xA000, pinned.array, handle),
            ("dtoh", pinned.array, 0xA000, handle),
            ("record", handle),
        ]
        assert after.ms_since(before) == 3.0

    def test_memory_is_given_back_once(self, device: CudaDevice, driver: FakeDriver) -> None:
        memory, pinned = device.allocate(64), device.allocate_pinned((3,), "float32")
        driver.calls.clear()
        for _ in range(2):
            memory.free()
            pinned.free()
        assert driver.calls == [("free",), ("free pinned",)]

    @pytest.mark.parametrize(
        ("call", "action", "doing"),
        [
            ("mem_alloc", lambda device: device.allocate(64), "allocating 64 bytes of GPU memory"),
            (
                "pagelocked_empty",
                lambda device: device.allocate_pinned((2,), "float32"),
                r"allocating float32\[2\] of pinned host memory",
            ),
            ("Stream", lambda device: device.make_stream(), "making a stream"),
        ],
    )
    @pytest.mark.parametrize("memory", [True, False], ids=["memory", "other"])
    def test_errors_of_the_driver(
        self, driver: FakeDriver, call: str, action: Callable[[CudaDevice], Any], doing: str, memory: bool
    ) -> None:
        device = CudaDevice(driver, 0)
        kind = driver.MemoryError if memory else driver.Error
        driver.failing[call] = kind(f"{call} failed:\n it was asked to")
        with pytest.raises(DeviceError, match=f"{doing} failed: {call} failed: it was asked to") as raised:
            action(device)
        assert raised.value.out_of_memory is memory

    def test_captures_need_cuda_bindings(self, device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):  # a PyTorch with CUDA may have imported them
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(CaptureFailedError, match=r"cuda-bindings cannot be imported.*pip install cuda-bindings"):
            device.capture(lambda: None, device.make_stream())

    def test_captures_are_on_the_handle(self, driver: FakeDriver) -> None:
        runtime = FakeRuntime()
        device = CudaDevice(driver, 0, runtime)
        stream = device.make_stream()
        device.capture(lambda: None, stream).launch(stream)
        assert [call[1] for call in runtime.calls if call[0] == "cudaStreamBeginCapture"] == [stream.handle]
        assert runtime.calls[-1] == ("cudaGraphLaunch", "executable", stream.handle)


class TestLauncher:
    def test_a_kernel_is_loaded_and_prepared(self, driver: FakeDriver) -> None:
        device = CudaDevice(driver, 0)
        made = kernel(POINTER, POINTER, INT32, INT32, POINTER)
        driver.calls.clear()
        device.launcher.load(made)
        assert driver.calls == [
            ("module", made.ptx.encode() + b"\0"),
            ("function", "lite_mla_fwd"),
            ("prepare", "PPiiP"),
        ]

    def test_a_launch_is_one_call_on_the_stream_of_the_handle(self, driver: FakeDriver) -> None:
        device = CudaDevice(driver, 0)
        streams = [device.make_stream() for _ in range(2)]
        loaded = device.launcher.load(kernel(POINTER, INT32, POINTER))
        driver.calls.clear()
        device.launcher.launch(loaded, 12, [0xA000, 7, 0xB000], streams[1].handle)
        (call,) = driver.calls
        name, grid, block, stream, *arguments, options = call
        assert (name, grid, block, arguments) == ("call", (12, 1, 1), (128, 1, 1), [0xA000, 7, 0xB000])
        assert stream.handle == streams[1].handle
        assert options == {"shared_size": 4096}

    def test_a_stream_that_is_not_ours(self, driver: FakeDriver) -> None:
        device = CudaDevice(driver, 0)
        loaded = device.launcher.load(kernel(POINTER, POINTER))
        with pytest.raises(DeviceError, match=r"a stream of its own \(0xdead\)"):
            device.launcher.launch(loaded, 1, [1, 2], 0xDEAD)

    def test_a_kernel_that_does_not_load(self, driver: FakeDriver) -> None:
        device = CudaDevice(driver, 0)
        driver.failing["module"] = driver.Error("cuModuleLoadDataEx failed: no binary for the GPU")
        with pytest.raises(DeviceError, match="loading lite_mla_fwd for sm_89 failed: cuModuleLoadDataEx failed"):
            device.launcher.load(kernel(POINTER))


class TestArgumentFormats:
    @pytest.mark.parametrize(
        ("declarations", "formats"),
        [
            ((POINTER, POINTER, POINTER), "PPP"),
            ((POINTER, INT32, POINTER), "PiP"),
            ((".param .b64 p_{}", ".param .s32 p_{}", ".param .b32 p_{}"), "Pii"),
        ],
    )
    def test_pointers_and_int32(self, declarations: tuple[str, ...], formats: str) -> None:
        assert argument_formats(kernel(*declarations)) == formats

    def test_a_pointer_behind_an_int32_is_aligned_as_in_the_kernel(self) -> None:
        assert struct.Struct(argument_formats(kernel(POINTER, INT32, POINTER))).pack(1, 2, 3)[16:] == struct.pack(
            "q", 3
        )

    def test_another_number_of_parameters(self) -> None:
        with pytest.raises(ValueError, match="lite_mla_fwd has 2 parameters, expected 1"):
            argument_formats(replace(kernel(POINTER, POINTER), parameters=("x",)))

    @pytest.mark.parametrize("declaration", [".param .f32 p_{}", ".param .u16 p_{}"])
    def test_another_kind_of_parameter(self, declaration: str) -> None:
        with pytest.raises(ValueError, match="neither a pointer nor an int32"):
            argument_formats(kernel(POINTER, declaration))


class Code(enum.Enum):
    cudaSuccess = 0
    cudaErrorUnknown = 999


class FakeRuntime:
    """cuda.bindings.runtime: every call written down, some failing."""

    cudaError_t = Code
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")

    def __init__(self, *failing: str, graph: int | None = 7) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.graph = graph
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            code = Code.cudaErrorUnknown if name in self._failing else Code.cudaSuccess
            results = {"cudaStreamEndCapture": (self.graph,), "cudaGraphInstantiate": ("executable",)}
            return (code, *results.get(name, ()))

        return call

    def cudaGetErrorName(self, code: Code) -> tuple[Code, bytes]:
        return Code.cudaSuccess, code.name.encode()

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class TestCapture:
    def test_the_graph_is_made_launched_and_destroyed(self) -> None:
        runtime = FakeRuntime()
        graph = capture(runtime, lambda: runtime.calls.append(("work",)), 5)
        assert runtime.calls == [
            ("cudaStreamBeginCapture", 5, "thread-local"),
            ("work",),
            ("cudaStreamEndCapture", 5),
            ("cudaGraphInstantiate", 7, 0),
            ("cudaGraphDestroy", 7),
        ]
        graph.launch(SimpleNamespace(handle=5))  # type: ignore[arg-type]
        graph.close()
        graph.close()
        assert runtime.calls[5:] == [("cudaGraphLaunch", "executable", 5), ("cudaGraphExecDestroy", "executable")]

    def test_a_capture_that_cannot_begin(self) -> None:
        runtime = FakeRuntime("cudaStreamBeginCapture")
        with pytest.raises(CaptureFailedError, match="a capture cannot begin: cudaErrorUnknown"):
            capture(runtime, lambda: runtime.calls.append(("work",)), 5)
        assert runtime.names == ["cudaStreamBeginCapture", "cudaGetLastError"]

    @pytest.mark.parametrize("graph", [7, 0, None])
    def test_work_that_fails_ends_the_capture(self, graph: int | None) -> None:
        runtime = FakeRuntime("cudaStreamEndCapture", graph=graph)

        def work() -> None:
            raise ValueError("not\n captured")

        with pytest.raises(CaptureFailedError, match="the work fails in a capture: not captured"):
            capture(runtime, work, 5)
        destroyed = ["cudaGraphDestroy"] if graph else []
        assert runtime.names == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError", *destroyed]

    def test_ctrl_c_ends_the_capture_and_goes_on(self) -> None:
        runtime = FakeRuntime()

        def work() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture(runtime, work, 5)
        assert runtime.names[1:] == ["cudaStreamEndCapture", "cudaGetLastError", "cudaGraphDestroy"]

    @pytest.mark.parametrize(
        ("failing", "words"),
        [
            ("cudaStreamEndCapture", "the capture ends with cudaErrorUnknown"),
            ("cudaGraphInstantiate", "the graph cannot be made: cudaErrorUnknown"),
        ],
    )
    def test_a_graph_that_cannot_be_had(self, failing: str, words: str) -> None:
        runtime = FakeRuntime(failing)
        with pytest.raises(CaptureFailedError, match=words):
            capture(runtime, lambda: None, 5)
        assert runtime.names[-2:] == ["cudaGetLastError", "cudaGraphDestroy"]

    def test_a_launch_that_fails(self) -> None:
        graph = capture(FakeRuntime("cudaGraphLaunch"), lambda: None, 5)
        with pytest.raises(DeviceError, match="launching the CUDA graph failed: cudaErrorUnknown"):
            graph.launch(SimpleNamespace(handle=5))  # type: ignore[arg-type]


def test_importing_the_module_needs_neither_library() -> None:
    code = "import sys; sys.modules.update(pycuda=None, cuda=None); import evit_deploy.runners.cuda"
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), check=False)
    assert done.returncode == 0
