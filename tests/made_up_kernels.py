"""Compiled kernels that nobody compiled, for the tests of cache and packs; made of the least PTX that is consistent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from evit_kernels import cache
from evit_kernels.aot import CompiledKernel, kernel_key
from evit_kernels.launch import KernelLaunch

TRITON = "3.7.1"


def launch_of(size: int = 64, **changes: Any) -> KernelLaunch:
    """A launch of a planted kernel; another size, another key."""
    fields: dict[str, Any] = {
        "operator": "planted",
        "kernel": "tests.planted_kernels:good_kernel",
        "inputs": ("p_x",),
        "extras": {"n_rows": 3},
        "outputs": ("p_out",),
        "constants": {"SIZE": size},
        "dtype": "fp16",
        "programs_per_image": 1,
    }
    return KernelLaunch(**{**fields, **changes})


def ptx_for(launch: KernelLaunch, arch: int, entry: str = "good_kernel") -> str:
    kinds = [".u64"] * len(launch.inputs) + [".u32"] * len(launch.extras) + [".u64"] * len(launch.outputs)
    parameters = ", ".join(f".param {kind} {entry}_param_{i}" for i, kind in enumerate(kinds))
    return f".version 8.7\n.target sm_{arch}\n.visible .entry {entry}({parameters})\n{{\n\tret;\n}}\n"


def kernel_of(launch: KernelLaunch, arch: int = 80, **changes: Any) -> CompiledKernel:
    """What `compile_kernel` might return."""
    fields: dict[str, Any] = {
        "key": kernel_key(launch, arch),
        "operator": launch.operator,
        "entry": "good_kernel",
        "ptx": ptx_for(launch, arch),
        "target": f"sm_{arch}",
        "arch": arch,
        "dtype": launch.dtype,
        "parameters": (*launch.inputs, *launch.extras, *launch.outputs),
        "threads": 128,
        "shared_bytes": 4096,
        "registers": 40,
        "spill_bytes": 0,
        "triton_version": TRITON,
    }
    return CompiledKernel(**{**fields, **changes})


def replace_compiler(monkeypatch: pytest.MonkeyPatch, compile_kernel: Callable[[KernelLaunch, int], Any]) -> None:
    """Let the cache compile with a stand-in for Triton and ptxas."""
    monkeypatch.setattr(cache, "compile_ptx", lambda launch, arch: "made up")
    monkeypatch.setattr(cache, "assemble_kernel", lambda launch, made, arch: compile_kernel(launch, arch))
