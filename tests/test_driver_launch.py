"""Kernels launched through the CUDA driver as TensorRT would: on a GPU, and against a stand-in of libcuda without one.

The stand-in is a shared library that this test compiles; it notes what it is called with.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evit_kernels import driver
from evit_kernels.aot import ARCHES, CompiledKernel, compile_kernel
from evit_kernels.driver import Arguments, DriverError, LoadedKernel, load_driver, pack_arguments
from evit_kernels.launch import KernelLaunch
from evit_kernels.lite_mla.launch import launch_lite_mla
from evit_kernels.registry import OPERATORS
from torch import Tensor

from tests import attention_references as references
from tests.attention_references import cast, rms_relative

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# RMS-relative error against the definition in float64; about twice test_fused_kernels.py's, for a GPU's exponentials
# and divisions are not the interpreter's.
TOLERANCES = dict(zip(DTYPES, (1e-5, 1e-2, 0.11), strict=True))
CASES: dict[str, Any] = {
    "multi_scale_attention": lambda: references.multi_scale_arguments(3, 10, 13, 2, 7),
    "projected_multi_scale_attention": lambda: references.projected_multi_scale_arguments(3, 10, 13, 2, 7),
    "lite_mla": lambda: references.lite_mla_arguments(3, 33, 65, 2, 16),
    "cascaded_attention": lambda: references.cascaded_case(2, 9, 8, 2, 16, 12, 7, (7, 5))[0],
}

STAND_IN = r"""
#include <cstdint>
#include <cstdio>
#include <cstring>
extern "C" {
static int failing = 0;  // the call, counted by the names below, that fails next
static char record[4096];
static int sizes[32], count = 0;
void stand_in_fail(int call) { failing = call; }
void stand_in_sizes(int n, const int* s) { count = n; std::memcpy(sizes, s, n * sizeof(int)); }
const char* stand_in_record() { return record; }
static int result(int call) { int code = failing == call ? 218 : 0; if (code) failing = 0; return code; }
static void note(const char* text) { std::strncat(record, text, sizeof(record) - std::strlen(record) - 1); }
int cuInit(unsigned) { record[0] = 0; return result(1); }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return result(2); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device != 40) return 101;
  *context = (void*)0x7000000000000001; note("retain "); return result(3);
}
int cuDevicePrimaryCtxRelease_v2(int device) { note(device == 40 ? "release " : "wrong "); return 0; }
int cuCtxPushCurrent_v2(void* c) { note((uint64_t)c == 0x7000000000000001 ? "push " : "wrong "); return result(4); }
int cuCtxPopCurrent_v2(void** context) { *context = nullptr; note("pop "); return 0; }
int cuModuleLoadDataEx(void** module, const char* text, unsigned n, int* options, void** values) {
  if (n == 2 && options[0] == 5 && options[1] == 6 && (uint64_t)values[1] > 100)
    std::strcpy((char*)values[0], "line 1:\n  syntax error");
  note(std::strstr(text, ".entry") ? "load " : "nonsense ");
  *module = (void*)0x7000000000000002; return result(5);
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  note((uint64_t)module == 0x7000000000000002 ? name : "wrong"); note(" ");
  *function = (void*)0x7000000000000003; return result(6);
}
int cuModuleUnload(void* module) { note((uint64_t)module == 0x7000000000000002 ? "unload " : "wrong "); return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  char line[256];
  std::snprintf(line, sizeof(line), "launch %d %u,%u,%u %u,%u,%u %u %llu %d ",
                (uint64_t)f == 0x7000000000000003, gx, gy, gz, bx, by, bz, shared,
                (unsigned long long)(uint64_t)stream, extra == nullptr);
  note(line);
  for (int i = 0; i < count; i++) {
    uint64_t value = 0;
    std::memcpy(&value, parameters[i], sizes[i]);
    std::snprintf(line, sizeof(line), "%llu ", (unsigned long long)value);
    note(line);
  }
  return result(7);
}
int cuGetErrorName(int code, const char** name) {
  if (code != 218) return 1;
  *name = "CUDA_ERROR_INVALID_PTX";
  return 0;
}
}
"""
KERNEL = CompiledKernel(
    key="0" * 64,
    operator="lite_mla",
    entry="lite_mla_kernel",
    ptx=".visible .entry lite_mla_kernel()",
    target="sm_90a",
    arch=90,
    dtype="fp16",
    parameters=("p_qkv", "p_aggregated", "n_heads", "n_aggregated_heads", "n_tokens", "p_out"),
    threads=128,
    shared_bytes=4096,
    registers=64,
    spill_bytes=0,
    triton_version="3.6.0",
)


def lite_mla_launch(**changes: Any) -> KernelLaunch:
    return replace(launch_lite_mla(2, 1, 16, 5, 7, 1e-5, "fp16"), **changes)


def tensors_of(dtype: torch.dtype = torch.float16, batch: int = 3) -> dict[str, Tensor]:
    shapes = {"p_qkv": (batch, 96, 5, 7), "p_aggregated": (batch, 48, 5, 7), "p_out": (batch, 48, 5, 7)}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


class TestArguments:
    def test_inputs_then_extras_then_outputs(self) -> None:
        launch, tensors = lite_mla_launch(), tensors_of()
        arguments = pack_arguments(launch, tensors)
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        assert [type(value) for value in arguments.values] == [pointer, pointer, integer, integer, integer, pointer]
        assert [value.value for value in arguments.values] == [
            tensors["p_qkv"].data_ptr(),
            tensors["p_aggregated"].data_ptr(),
            2,
            1,
            35,
            tensors["p_out"].data_ptr(),
        ]
        assert list(arguments.addresses) == [ctypes.addressof(value) for value in arguments.values]

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_the_order_is_that_of_the_compiled_entry(self, operator: str) -> None:
        arguments = cast(CASES[operator](), torch.float16)
        launch = OPERATORS[operator].launch_of(**arguments)
        names = (*launch.inputs, *launch.outputs)
        tensors = {name: torch.zeros(4, dtype=torch.float16) for name in names}
        values = [value.value for value in pack_arguments(launch, tensors).values]
        extras = [*launch.extras.values()]
        pointers = [tensors[name].data_ptr() for name in names]
        assert values == [*pointers[: len(launch.inputs)], *extras, *pointers[len(launch.inputs) :]]

    def test_channels_last_is_taken(self) -> None:
        tensors = {name: x.contiguous(memory_format=torch.channels_last) for name, x in tensors_of().items()}
        assert isinstance(pack_arguments(lite_mla_launch(), tensors), Arguments)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"p_out": None}, "tensors are named p_qkv, p_aggregated, p_out, got p_qkv, p_aggregated$"),
            ({"p_more": torch.zeros(8)}, "got p_qkv, p_aggregated, p_out, p_more"),
            ({"p_qkv": torch.zeros(8)}, "p_qkv must be fp16, got torch.float32"),
            ({"p_out": torch.zeros(8, 2, dtype=torch.float16)[:, 0]}, "p_out must be contiguous or channels_last"),
            ({"p_qkv": torch.zeros(9, dtype=torch.float16)[1:]}, "p_qkv must be aligned to 16 bytes"),
        ],
        ids=["missing", "surplus", "dtype", "scattered", "unaligned"],
    )
    def test_what_a_kernel_would_read_wrongly(self, changes: dict[str, Tensor | None], words: str) -> None:
        tensors = {name: x for name, x in {**tensors_of(), **changes}.items() if x is not None}
        with pytest.raises(ValueError, match=f"lite_mla: .*{words}"):
            pack_arguments(lite_mla_launch(), tensors)


class StandIn:
    """The stand-in as the test sees it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.stand_in_record.restype = ctypes.c_char_p

    @property
    def record(self) -> list[str]:
        text: str = self.library.stand_in_record().decode()
        return text.split()

    def fail(self, call: int) -> None:
        self.library.stand_in_fail(call)

    def expect(self, arguments: Arguments) -> None:
        sizes = [ctypes.sizeof(value) for value in arguments.values]
        self.library.stand_in_sizes(len(sizes), (ctypes.c_int * len(sizes))(*sizes))


@pytest.fixture(scope="module")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "stand_in.cpp").write_text(STAND_IN)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "stand_in.cpp")]
    subprocess.run(command, check=True)
    return folder / "libcuda.so.1"


@pytest.fixture
def stand_in(stand_in_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The CUDA driver is the stand-in."""
    monkeypatch.setattr(driver, "LIBRARY", str(stand_in_library))
    load_driver.cache_clear()
    yield StandIn(stand_in_library)
    load_driver.cache_clear()


class TestTheCallsOfTheDriver:
    def test_a_launch_from_loading_to_unloading(self, stand_in: StandIn) -> None:
        launch = lite_mla_launch(extras={"n_heads": -2, "n_aggregated_heads": 1, "n_tokens": 35})
        tensors = tensors_of()
        arguments = pack_arguments(launch, tensors)
        stand_in.expect(arguments)
        with LoadedKernel(KERNEL) as kernel:
            kernel.launch_packed(launch, arguments, 3, stream=2**40 + 7)
        kernel.close()
        maps = (tensors[name].data_ptr() for name in ("p_qkv", "p_aggregated"))
        parameters = [*maps, 2**32 - 2, 1, 35, tensors["p_out"].data_ptr()]
        assert stand_in.record == [
            *("retain", "push", "load", "lite_mla_kernel", "pop"),
            *("push", "launch", "1", f"{3 * launch.programs_per_image},1,1", "128,1,1", "4096", str(2**40 + 7), "1"),
            *map(str, parameters),
            *("pop", "push", "unload", "pop", "release"),
        ]

    @pytest.mark.parametrize(
        ("call", "words", "left"),
        [
            (2, "finding GPU 0 failed: CUDA_ERROR_INVALID_PTX$", []),
            (3, "taking the primary context failed: CUDA_ERROR_INVALID_PTX$", ["retain"]),
            (4, "entering the context failed", ["retain", "push", "release"]),
            (
                5,
                r"loading lite_mla_kernel for sm_90a failed: CUDA_ERROR_INVALID_PTX: line 1: syntax error$",
                ["retain", "push", "load", "pop", "push", "unload", "pop", "release"],
            ),
            (
                6,
                "finding lite_mla_kernel in its module failed: CUDA_ERROR_INVALID_PTX$",
                ["retain", "push", "load", "lite_mla_kernel", "pop", "push", "unload", "pop", "release"],
            ),
        ],
        ids=["device", "context", "push", "load", "function"],
    )
    def test_a_refused_call_is_named_and_nothing_is_kept(
        self, stand_in: StandIn, call: int, words: str, left: list[str]
    ) -> None:
        load_driver()
        stand_in.fail(call)
        with pytest.raises(DriverError, match=words):
            LoadedKernel(KERNEL)
        assert stand_in.record == left

    def test_a_refused_launch(self, stand_in: StandIn) -> None:
        launch = lite_mla_launch()
        with LoadedKernel(KERNEL) as kernel:
            stand_in.fail(7)
            with pytest.raises(DriverError, match="launching lite_mla_kernel failed: CUDA_ERROR_INVALID_PTX"):
                kernel.launch_packed(launch, pack_arguments(launch, tensors_of()), 3, stream=0)
            assert stand_in.record[-1] == "pop"

    def test_an_unknown_result_has_its_number(self, stand_in: StandIn) -> None:
        with pytest.raises(DriverError, match="CUresult 101"):
            LoadedKernel(KERNEL, device=1)

    def test_a_driver_that_does_not_start(self, stand_in: StandIn) -> None:
        stand_in.fail(1)
        with pytest.raises(DriverError, match="the CUDA driver does not start: CUDA_ERROR_INVALID_PTX"):
            load_driver()

    @pytest.mark.parametrize("batch", [0, -1, 2**31], ids=str)
    def test_an_impossible_grid(self, stand_in: StandIn, batch: int) -> None:
        launch = lite_mla_launch()
        with LoadedKernel(KERNEL) as kernel, pytest.raises(ValueError, match="a grid has 1 to 2147483647 programs"):
            kernel.launch_packed(launch, pack_arguments(launch, tensors_of()), batch, stream=0)

    def test_another_kernel_is_refused(self, stand_in: StandIn) -> None:
        launch = lite_mla_launch(extras={"n_tokens": 35, "n_heads": 2})
        with (
            LoadedKernel(KERNEL) as kernel,
            pytest.raises(ValueError, match="the kernel's parameters are p_qkv, p_agg"),
        ):
            kernel.launch_packed(launch, pack_arguments(launch, tensors_of()), 3, stream=0)

    def test_tensors_elsewhere_are_refused(self, stand_in: StandIn) -> None:
        with LoadedKernel(KERNEL) as kernel, pytest.raises(ValueError, match="p_qkv must be on cuda:0, got cpu"):
            kernel.launch(lite_mla_launch(), tensors_of(), 3)


def test_without_a_driver_importing_works_and_using_says_why(child_environment: dict[str, str]) -> None:
    program = (
        "import json\n"
        "from evit_kernels import driver\n"
        "driver.LIBRARY = 'libcuda-that-is-not-there.so.1'\n"
        "try:\n"
        "    driver.load_driver()\n"
        "except driver.DriverError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment, capture_output=True, text=True, check=True
    )
    assert "there is no CUDA driver on this machine: libcuda-that-is-not-there.so.1" in json.loads(done.stdout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestOnAGpu:
    """The PTX that `compile_kernel` gives, launched without Triton."""

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        dtype: torch.dtype = request.param
        return dtype

    @pytest.fixture(params=OPERATORS)
    def run(self, request: pytest.FixtureRequest, dtype: torch.dtype) -> Iterator[DriverRun]:
        run = DriverRun(request.param, dtype)
        yield run
        run.kernel.close()

    def test_matches_the_definition(self, run: DriverRun, dtype: torch.dtype) -> None:
        expected = OPERATORS[run.operator].definition(**cast(run.on_cpu, torch.float64))
        assert rms_relative(run.launch().cpu().view(expected.shape), expected) <= TOLERANCES[dtype]

    def test_gives_what_triton_launches(self, run: DriverRun) -> None:
        fused = OPERATORS[run.operator].fused(**run.on_gpu)
        assert torch.equal(run.launch().view(fused.shape), fused)

    def test_runs_on_the_stream_it_is_given_and_in_a_graph(self, run: DriverRun) -> None:
        expected = run.launch().clone()
        stream = torch.cuda.Stream()
        run.out.fill_(float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        run.kernel.launch(run.plan, run.tensors, run.batch, stream.cuda_stream)
        stream.synchronize()
        assert torch.equal(run.out, expected)
        run.out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run.kernel.launch(run.plan, run.tensors, run.batch)
        assert run.out.isnan().all(), "the launch ran while it was captured"
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(run.out, expected)

    def test_ptx_for_another_architecture_is_named(self, run: DriverRun) -> None:
        broken = replace(run.kernel.kernel, ptx=run.kernel.kernel.ptx.replace(".target sm_", ".target nonsense_", 1))
        with pytest.raises(DriverError, match=r"loading .* failed: CUDA_ERROR_"):
            LoadedKernel(broken)


class DriverRun:
    """One operator's kernel, loaded, with tensors to launch it on."""

    def __init__(self, operator: str, dtype: torch.dtype) -> None:
        arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in CASES[operator]().items()}
        self.operator = operator
        self.on_cpu = cast(arguments, dtype)
        self.on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in self.on_cpu.items()}
        self.plan = OPERATORS[operator].launch_of(**self.on_gpu)
        arch = gpu_arch()
        self.kernel = LoadedKernel(compile_kernel(self.plan, arch))
        inputs = [value for value in self.on_gpu.values() if isinstance(value, Tensor)]
        shape = OPERATORS[operator].definition(**cast(arguments, torch.float64)).shape
        self.batch = inputs[0].shape[0]
        self.out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        # The arguments of an operator stand in the order of its kernel's inputs.
        self.tensors = {**dict(zip(self.plan.inputs, inputs, strict=True)), self.plan.outputs[0]: self.out}

    def launch(self) -> Tensor:
        """What the kernel makes of an output full of NaN."""
        self.out.fill_(float("nan"))
        self.kernel.launch(self.plan, self.tensors, self.batch)
        torch.cuda.synchronize()
        assert not self.out.isnan().any()
        return self.out


def gpu_arch() -> int:
    """The newest architecture we compile for that this GPU runs."""
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    return max(arch for arch in ARCHES if arch <= capability and arch // 10 == major)
