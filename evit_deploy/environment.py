"""What this machine is and what is installed on it, as JSON, without importing any of it.

Versions come from the packages' metadata, CPU and memory from /proc, GPUs from the driver's own tools: collecting all
of it takes milliseconds and cannot fail because a library is broken.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import evit_deploy

# Import name -> the distributions that may provide it, the usual one first.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxsim": ("onnxsim", "onnx-simplifier"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    "openvino": ("openvino",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu13", "tensorrt_cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "pycuda": ("pycuda",),
    "cuda.bindings": ("cuda-bindings",),
}
RTX_LIBRARIES = ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu12-libs")  # what the bindings of TensorRT for RTX load

# What the runtimes choose their kernels by -> the names of the flag in /proc/cpuinfo (x86, then arm64).
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni", "asimddp"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "asimdhp"),
    "amx": ("amx_tile",),
}

_NVIDIA_SMI_TIMEOUT_S = 20  # a driver that is being reset can take ten seconds to answer
_GPU_FIELDS = "name,driver_version,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it; None where only /proc could be read."""

    name: str
    driver_version: str | None
    memory_bytes: int | None
    compute_capability: str | None


def tool_version() -> str:
    """The version of evit-deploy."""
    return evit_deploy.__version__


def package_version(name: str) -> str | None:
    """The installed version of a package by its import name, or None; nothing is imported."""
    return first_version(DISTRIBUTIONS.get(name, (name,)))


def first_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed, or None."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def package_versions() -> dict[str, str | None]:
    """Import name to installed version, None where it is not installed."""
    return {name: package_version(name) for name in DISTRIBUTIONS}


def cpu_flags(cpuinfo: str) -> dict[str, bool]:
    """Which of `ISA_FLAGS` the text of /proc/cpuinfo names."""
    found: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            found = set(value.split())
            break
    return {name: any(flag in found for flag in flags) for name, flags in ISA_FLAGS.items()}


def cpu_isa() -> dict[str, bool]:
    """Which of `ISA_FLAGS` this machine's CPU has."""
    return cpu_flags(_read("/proc/cpuinfo"))


def cpu_model(cpuinfo: str) -> str:
    """The CPU's name in the text of /proc/cpuinfo, or what Python calls the machine."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on: its affinity, cut by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, cut by the container's limit."""
    total = None
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        return int(limit) if total is None else min(total, int(limit))
    return total


@lru_cache(maxsize=1)
def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver shows, through nvidia-smi, else through /proc/driver/nvidia."""
    return _gpus_from_smi() or _gpus_from_proc(Path("/proc/driver/nvidia/gpus"))


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    for gpu in find_gpus():
        if gpu.driver_version is not None:
            return gpu.driver_version
    return driver_in(_read("/proc/driver/nvidia/version"))


def driver_in(text: str) -> str | None:
    """The version in the text of /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def collect_environment() -> dict[str, Any]:
    """Everything above in one JSON object: it goes into manifests and benchmark reports."""
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "evit_deploy": tool_version(),
        "python": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": {
            "model": cpu_model(cpuinfo),
            "logical_cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "isa": cpu_flags(cpuinfo),
        },
        "memory_bytes": memory_bytes(),
        "gpus": [asdict(gpu) for gpu in find_gpus()],
        "versions": package_versions(),
    }


def _gpus_from_smi() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode != 0:
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(_gpu_from_row(row) for row in rows if len(row) == len(_GPU_FIELDS.split(",")))


def _gpu_from_row(row: list[str]) -> Gpu:
    name, driver, memory_mib, capability = (None if cell.startswith("[") else cell for cell in row)
    memory = int(memory_mib) * 1024**2 if memory_mib is not None and memory_mib.isdigit() else None
    return Gpu(name or "unknown", driver, memory, capability)


def _gpus_from_proc(folder: Path) -> tuple[Gpu, ...]:
    gpus = []
    for information in sorted(folder.glob("*/information")):
        for line in _read(str(information)).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                gpus.append(Gpu(value.strip(), None, None, None))
    return tuple(gpus)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def python_command() -> str:
    """How this interpreter's pip is called, for advice to the user."""
    return f"{sys.executable} -m pip install"
