"""Compiling kernels ahead of time, for any GPU and without one: from a launch to PTX that anybody can launch."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evit_kernels.launch import MAX_SHARED_BYTES, KernelLaunch
from evit_kernels.ptx import assemble, entry_parameters, ptx_target, strip_scratch_parameters, with_all_registers

# Compute capabilities, times ten: A100; RTX 30; Jetson Orin; RTX 40 and L4; H100 and H200; B200; RTX 50.
ARCHES = (80, 86, 87, 89, 90, 100, 120)
THREADS_PER_WARP = 32
_POINTER_ALIGNMENT_BYTES = 16  # what every allocator of GPU memory gives, and more


class KernelRefusedError(RuntimeError):
    """A kernel compiled, and breaks a limit that every kernel here keeps."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as PTX. Its entry takes the launch's inputs, int32 extras and outputs, in that order.

    Attributes:
        key: `kernel_key` of the launch and architecture.
        operator: name of the operator.
        entry: name of the PTX entry.
        ptx: the text.
        target: the target it names, for example "sm_90a".
        arch: compute capability times ten.
        dtype: "fp32", "fp16" or "bf16".
        parameters: names of the entry's parameters.
        threads: threads of a program (a CUDA block).
        shared_bytes: dynamic shared memory of a program.
        registers: registers of a thread, as ptxas reports them.
        spill_bytes: spilled bytes of a thread, stored and loaded.
        triton_version: Triton that compiled it.
    """

    key: str
    operator: str
    entry: str
    ptx: str
    target: str
    arch: int
    dtype: str
    parameters: tuple[str, ...]
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    triton_version: str

    def broken_limits(self) -> list[str]:
        """Each limit of every kernel here that this one breaks, as a sentence."""
        broken = []
        if self.spill_bytes:
            broken.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > MAX_SHARED_BYTES:
            broken.append(f"needs {self.shared_bytes} bytes of shared memory, allowed {MAX_SHARED_BYTES}")
        return broken


def kernel_key(launch: KernelLaunch, arch: int) -> str:
    """A hash of all that the PTX depends on, but for Triton's version: sources, arguments, architecture.

    The same on a machine without Triton, so that a kernel pack can be read there. Sizes that are passed at run time
    (extras, the grid) do not change it.
    """
    parts = {
        "source": [_source_hash(module) for module in _kernel_modules(launch.kernel.partition(":")[0])],
        "compiler": [_source_hash(module) for module in ("evit_kernels.aot", "evit_kernels.ptx")],
        "kernel": launch.kernel,
        "parameters": (*launch.inputs, *launch.extras, *launch.outputs),
        "constants": sorted(launch.constants.items()),
        "dtype": launch.dtype,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "arch": arch,
    }
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_kernel(launch: KernelLaunch, arch: int) -> CompiledKernel:
    """Compile for an architecture; no GPU is needed or looked for.

    Args:
        launch: what is launched.
        arch: compute capability times ten, one of ARCHES.

    Raises:
        ImportError: Triton is not installed.
        ValueError: an architecture that is not in ARCHES.
        KernelRefusedError: the kernel takes its parameters in another order, uses Triton's scratch memory, spills, or
            needs more than 48 KiB of shared memory.
        RuntimeError: Triton runs as an interpreter in this process.
    """
    if arch not in ARCHES:
        raise ValueError(f"unknown architecture {arch}, known: {', '.join(map(str, ARCHES))}")
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.load_kernel()
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError("Triton interprets kernels in this process (TRITON_INTERPRET is set): nothing is compiled")
    types = {
        **dict.fromkeys((*launch.inputs, *launch.outputs), f"*{launch.dtype}"),
        **dict.fromkeys(launch.extras, "i32"),
        **dict.fromkeys(launch.constants, "constexpr"),
    }
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", _POINTER_ALIGNMENT_BYTES]]
    attributes = {(i,): aligned for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
    parameters = tuple(name for name, kind in signature.items() if kind != "constexpr")
    if parameters != (*launch.inputs, *launch.extras, *launch.outputs):
        found = ", ".join(parameters)
        raise KernelRefusedError(f"{launch.operator}: takes {found}, not inputs, extras and outputs in this order")
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it is paths of this machine: PTX is the same wherever it is made
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=dict(launch.constants), attrs=attributes),
            target=GPUTarget("cuda", arch, THREADS_PER_WARP),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
    try:
        ptx = strip_scratch_parameters(compiled.asm["ptx"], len(parameters))
    except ValueError as error:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch}: {error}") from error
    scratch_bytes = getattr(compiled.metadata, "global_scratch_size", 0)
    if scratch_bytes:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch}: asks for {scratch_bytes} bytes of scratch memory")
    assembled = assemble(ptx, _ptxas(arch))
    if assembled.spill_bytes:  # often a few bytes, spilled for one more program on each multiprocessor
        ptx = with_all_registers(ptx)
        assembled = assemble(ptx, _ptxas(arch))
    result = CompiledKernel(
        key=kernel_key(launch, arch),
        operator=launch.operator,
        entry=entry_parameters(ptx)[0],
        ptx=ptx,
        target=ptx_target(ptx),
        arch=arch,
        dtype=launch.dtype,
        parameters=parameters,
        threads=launch.num_warps * THREADS_PER_WARP,
        shared_bytes=compiled.metadata.shared,
        registers=assembled.registers,
        spill_bytes=assembled.spill_bytes,
        triton_version=triton.__version__,
    )
    broken = result.broken_limits()
    if broken:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch} in {launch.dtype}: {', '.join(broken)}")
    return result


def _ptxas(arch: int) -> str:
    """The assembler that Triton itself would use."""
    from triton import knobs

    tool: Any = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    return str(tool.path)


def _kernel_modules(module: str) -> list[str]:
    """A kernel's module and those of its package's siblings that it imports from, theirs included; none is imported."""
    found = [module]
    for name in found:
        for node in ast.walk(ast.parse(_source(name))):
            origins = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            origins += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            top = module.partition(".")[0]
            found += [o for o in origins if o and o.partition(".")[0] == top and o not in found]
    return found


@cache
def _source_hash(module: str) -> str:
    return hashlib.sha256(_source(module)).hexdigest()


def _source(module: str) -> bytes:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the source of {module} is not installed")
    return Path(spec.origin).read_bytes()
