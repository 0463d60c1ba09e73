"""Launching compiled kernels through the CUDA driver, with the arguments and the grid that TensorRT would give them.

Only for tests and measurements: it shows that the PTX needs nothing of Triton at run time. Never run on a GPU yet;
importing it needs no driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evit_kernels.aot import CompiledKernel
from evit_kernels.availability import dtype_name
from evit_kernels.launch import DTYPE_NAMES, KernelLaunch

LIBRARY = "libcuda.so.1"
POINTER_ALIGNMENT_BYTES = 16  # what the kernels are compiled for
MAX_GRID = 2**31 - 1  # programs in a grid of one dimension

_LOG_BYTES = 8192
_JIT_ERROR_LOG_BUFFER, _JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6  # CUjit_option
# Names with their versions, as cuda.h maps them; each returns a CUresult.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadDataEx": (POINTER(c_void_p), c_char_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuLaunchKernel": (c_void_p, *([c_uint] * 7), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class DriverError(RuntimeError):
    """There is no CUDA driver, or it refused a call; the message has the name of its CUresult."""


@dataclass(frozen=True)
class Arguments:
    """The parameters of a kernel in host memory, as cuLaunchKernel takes them.

    Attributes:
        values: one ctypes value per parameter, in the entry's order: pointers of inputs, int32 extras, pointers of
            outputs.
        addresses: where each value lies; valid as long as `values` is.
    """

    values: tuple[Any, ...]
    addresses: Any


def pack_arguments(launch: KernelLaunch, tensors: Mapping[str, Tensor]) -> Arguments:
    """The parameters of a launch.

    Args:
        launch: names and order.
        tensors: every input and output by name, laid out as the kernel expects.

    Raises:
        ValueError: a tensor is missing, too many, of another type, scattered, or not aligned as the kernel expects.
    """
    names = (*launch.inputs, *launch.outputs)
    if set(tensors) != set(names):
        raise ValueError(f"{launch.operator}: tensors are named {', '.join(names)}, got {', '.join(tensors)}")
    for name in names:
        _check_tensor(launch, name, tensors[name])
    values = (
        *(c_void_p(tensors[name].data_ptr()) for name in launch.inputs),
        *(ctypes.c_int32(value) for value in launch.extras.values()),
        *(c_void_p(tensors[name].data_ptr()) for name in launch.outputs),
    )
    addresses = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return Arguments(values, addresses)


class LoadedKernel:
    """A compiled kernel in the primary context of a GPU, the one that PyTorch works in.

    Args:
        kernel: compiled for the GPU's architecture or, but for targets that end in "a", an older one.
        device: index of the GPU.

    Raises:
        DriverError: there is no driver, or it does not take the PTX; the message ends with what it says of it.
    """

    def __init__(self, kernel: CompiledKernel, device: int = 0) -> None:
        self.kernel = kernel
        self.device = device
        self._driver = load_driver()
        handle, context, module, function = c_int(), c_void_p(), c_void_p(), c_void_p()
        _check(self._driver.cuDeviceGet(byref(handle), device), f"finding GPU {device}")
        _check(self._driver.cuDevicePrimaryCtxRetain(byref(context), handle), "taking the primary context")
        self._handle, self._context, self._module, self._function = handle, context, module, function
        try:
            with self._current():
                self._load()
        except DriverError:
            self.close()
            raise

    def launch(
        self, launch: KernelLaunch, tensors: Mapping[str, Tensor], batch: int, stream: int | None = None
    ) -> None:
        """Launch on a stream; returns at once.

        Args:
            launch: the launch that the kernel was compiled for, with any extras.
            tensors: every input and output by name, on the kernel's GPU.
            batch: images in the batch.
            stream: a CUstream; None stands for PyTorch's current one.

        Raises:
            ValueError: arguments that the kernel does not take.
            DriverError: the driver refused the launch.
        """
        for name, tensor in tensors.items():
            if tensor.device != torch.device("cuda", self.device):
                raise ValueError(f"{launch.operator}: {name} must be on cuda:{self.device}, got {tensor.device}")
        self.launch_packed(launch, pack_arguments(launch, tensors), batch, stream)

    def launch_packed(self, launch: KernelLaunch, arguments: Arguments, batch: int, stream: int | None = None) -> None:
        """The same with arguments that are packed and checked already."""
        programs = batch * launch.programs_per_image
        if (*launch.inputs, *launch.extras, *launch.outputs) != self.kernel.parameters:
            raise ValueError(f"{launch.operator}: the kernel's parameters are {', '.join(self.kernel.parameters)}")
        if not 0 < programs <= MAX_GRID:
            raise ValueError(f"{launch.operator}: a grid has 1 to {MAX_GRID} programs, got {programs}")
        if stream is None:
            stream = torch.cuda.current_stream(self.device).cuda_stream
        kernel = self.kernel
        with self._current():
            code = self._driver.cuLaunchKernel(
                self._function,
                *(programs, 1, 1),
                *(kernel.threads, 1, 1),
                kernel.shared_bytes,
                stream,
                arguments.addresses,
                None,
            )
        _check(code, f"launching {kernel.entry}")

    def close(self) -> None:
        """Unload the kernel and let go of the context; harmless when done already."""
        if self._module:
            with self._current():
                self._driver.cuModuleUnload(self._module)
            self._module = c_void_p()
        if self._context:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._handle)
            self._context = c_void_p()

    def __enter__(self) -> LoadedKernel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _load(self) -> None:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (c_int * 2)(_JIT_ERROR_LOG_BUFFER, _JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        text = self.kernel.ptx.encode()
        code = self._driver.cuModuleLoadDataEx(byref(self._module), text, len(options), options, values)
        said = " ".join(log.value.decode(errors="replace").split())
        _check(code, f"loading {self.kernel.entry} for {self.kernel.target}", said)
        found = self._driver.cuModuleGetFunction(byref(self._function), self._module, self.kernel.entry.encode())
        _check(found, f"finding {self.kernel.entry} in its module")

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The context current in this thread; whichever was before is afterwards."""
        _check(self._driver.cuCtxPushCurrent_v2(self._context), "entering the context")
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(byref(c_void_p()))


@cache
def load_driver() -> Any:
    """The CUDA driver, initialised.

    Raises:
        DriverError: there is none, or it finds no GPU.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DriverError(f"there is no CUDA driver on this machine: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    code = driver.cuInit(0)
    if code != 0:
        raise DriverError(f"the CUDA driver does not start: {_name(driver, code)}")
    return driver


def _check_tensor(launch: KernelLaunch, name: str, tensor: Tensor) -> None:
    if DTYPE_NAMES.get(dtype_name(tensor)) != launch.dtype:
        raise ValueError(f"{launch.operator}: {name} must be {launch.dtype}, got {tensor.dtype}")
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not (channels_last or tensor.is_contiguous()):
        raise ValueError(f"{launch.operator}: {name} must be contiguous or channels_last, got {tensor.stride()=}")
    if tensor.data_ptr() % POINTER_ALIGNMENT_BYTES:
        raise ValueError(f"{launch.operator}: {name} must be aligned to {POINTER_ALIGNMENT_BYTES} bytes")


def _check(code: int, doing: str, said: str = "") -> None:
    if code != 0:
        text = f"{doing} failed: {_name(load_driver(), code)}"
        raise DriverError(f"{text}: {said}" if said else text)


def _name(driver: Any, code: int) -> str:
    """CUDA_ERROR_..., or the number of a result that the driver does not know."""
    name = c_char_p()
    if driver.cuGetErrorName(code, byref(name)) != 0 or name.value is None:
        return f"CUresult {code}"
    return name.value.decode()
