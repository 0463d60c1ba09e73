"""The GPU that is measured, or a CPU that stands in for it in tests: facts, waiting, timing."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evit_deploy.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import torch

_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")
_SMI_TIMEOUT_S = 20


class Device:
    """Where tensors live and how time is taken; a CPU means nothing but that the program works.

    Attributes:
        kind: "cuda" or "cpu".
        l2_bytes: size of the last-level cache that inputs must not come from.
    """

    def __init__(self, kind: str) -> None:
        import torch

        self.kind = kind
        self.torch_device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        self.stream = torch.cuda.Stream(self.torch_device) if kind == "cuda" else None
        properties = torch.cuda.get_device_properties(self.torch_device) if kind == "cuda" else None
        self.l2_bytes: int = properties.L2_cache_size if properties is not None else 0

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        """Wait for all work."""
        import torch

        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)

    def elapsed_s(self, enqueue: Callable[[], object]) -> float:
        """Seconds from the start to the end of work, by events on the device's own stream."""
        import torch

        if self.stream is None:
            started = time.perf_counter()
            enqueue()
            return time.perf_counter() - started
        with torch.cuda.stream(self.stream):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            enqueue()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wall_s(self, call: Callable[[], object]) -> float:
        """Seconds of one call as the host sees it, waiting included."""
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    def release_memory(self) -> None:
        """Give back what nobody holds, so that one case's memory is not what the next one lacks."""
        import gc

        import torch

        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()

    def arch(self) -> int:
        """The architecture to compile for: the newest known one that this GPU runs."""
        import torch
        from evit_kernels.aot import ARCHES

        major, minor = torch.cuda.get_device_capability(self.torch_device)
        fitting = [arch for arch in ARCHES if arch // 10 == major and arch <= 10 * major + minor]
        if not fitting:
            raise MissingDependencyError(
                f"no kernels are compiled for compute capability {major}.{minor}",
                hint=f"known: {', '.join(map(str, ARCHES))}",
            )
        return max(fitting)

    def facts(self) -> dict[str, Any]:
        """Name, driver, sizes and, at this moment, clocks; no serial numbers."""
        import torch

        if not self.is_gpu:
            return {"name": "none: a CPU stands in for it, the figures mean nothing"}
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_from_smi(),
        }


def find_device(kind: str) -> Device:
    """The device to measure.

    Raises:
        MissingDependencyError: PyTorch is not there, or it finds no CUDA GPU.
        UsageError: neither "cuda" nor "cpu".
    """
    if kind not in ("cuda", "cpu"):
        raise UsageError(f"no such device: {kind!r}", hint="cuda or cpu")
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"PyTorch cannot be imported ({error})", hint="name its Python") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"PyTorch {torch.__version__} finds no CUDA GPU: nothing was measured",
            hint="run this where there is one, with a PyTorch that has CUDA: make gpu PYTHON=python3",
        )
    return Device(kind)


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _from_smi() -> dict[str, str | None]:
    """What nvidia-smi says; None where it does not."""
    program = shutil.which("nvidia-smi")
    command = [program or "", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    answer: list[str] = []
    if program is not None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
            answer = [cell.strip() for cell in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired, IndexError):
            answer = []
    cells = answer if len(answer) == len(_SMI_FIELDS) else [None] * len(_SMI_FIELDS)
    return {field.replace(".", "_"): cell for field, cell in zip(_SMI_FIELDS, cells, strict=True)}
