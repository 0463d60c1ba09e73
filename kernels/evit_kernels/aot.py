"""Compiling kernels ahead of time, for any GPU and without one: from a launch to PTX that anybody can launch.

Triton turns a kernel into PTX, which is most of the work; ptxas then assembles the text, to say how many registers it
takes. Architectures that Triton compiles alike share the first step. Threads may compile at once: neither step holds
Python's lock for long.
"""

from __future__ import annotations

import ast
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evit_kernels.launch import MAX_SHARED_BYTES, KernelLaunch
from evit_kernels.ptx import (
    assemble,
    entry_parameters,
    ptx_target,
    strip_scratch_parameters,
    with_all_registers,
    with_target,
)

# Compute capabilities, times ten: A100; RTX 30; Jetson Orin; RTX 40 and L4; H100 and H200; B200; RTX 50.
ARCHES = (80, 86, 87, 89, 90, 100, 120)
THREADS_PER_WARP = 32
# Architectures for which Triton writes the same PTX but for the name of the target, and the one it is made for.
_SAME_PTX_AS = {86: 80, 87: 80, 89: 80}
# Those whose PTX every later GPU takes too; that of sm_90a, sm_100a and sm_120a is for these alone.
_LATER_GPUS_TAKE = (89, 87, 86, 80)
_POINTER_ALIGNMENT_BYTES = 16  # what every allocator of GPU memory gives, and more
_PARSING = threading.RLock()  # Python 3.11 counts its depth of recursion wrong when two threads build syntax trees


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
    return assemble_kernel(launch, compile_ptx(launch, arch), arch)


def alike(arches: Iterable[int]) -> list[tuple[int, ...]]:
    """Architectures grouped by the PTX they share; `compile_ptx` for one of a group serves the others."""
    groups: dict[int, list[int]] = {}
    for arch in arches:
        groups.setdefault(_SAME_PTX_AS.get(arch, arch), []).append(arch)
    return [tuple(group) for group in groups.values()]


def older(arch: int) -> tuple[int, ...]:
    """Architectures before `arch` whose kernels run on its GPUs as well, the latest first."""
    return tuple(other for other in _LATER_GPUS_TAKE if other < arch)


def least(arches: Sequence[int]) -> tuple[int, ...]:
    """The fewest architectures whose kernels run on the GPUs of all these: one, where later GPUs take its kernels."""
    first = min(arches)
    return (_SAME_PTX_AS.get(first, first),) if first in _LATER_GPUS_TAKE else tuple(arches)


@dataclass(frozen=True)
class KernelPtx:
    """What Triton makes of a launch.

    Attributes:
        ptx: the text, its entry cut down to the launch's own parameters; names the target it was made for.
        shared_bytes: dynamic shared memory of a program.
        triton_version: Triton that wrote it.
    """

    ptx: str
    shared_bytes: int
    triton_version: str


def compile_ptx(launch: KernelLaunch, arch: int) -> KernelPtx:
    """Triton's part of `compile_kernel`, which documents what it raises."""
    import triton
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
    if parameters != _parameters(launch):
        found = ", ".join(parameters)
        raise KernelRefusedError(f"{launch.operator}: takes {found}, not inputs, extras and outputs in this order")

    class Source(ASTSource):
        """Parsed by one thread at a time."""

        def hash(self) -> Any:
            with _PARSING:
                return super().hash()

        def make_ir(self, *arguments: Any, **keywords: Any) -> Any:
            with _PARSING:
                return super().make_ir(*arguments, **keywords)

    with _up_to_ptx():
        compiled = triton.compile(
            Source(fn=kernel, signature=signature, constexprs=dict(launch.constants), attrs=attributes),
            target=GPUTarget("cuda", _SAME_PTX_AS.get(arch, arch), THREADS_PER_WARP),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
    try:
        ptx = strip_scratch_parameters(compiled.asm["ptx"], len(parameters))
    except ValueError as error:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch}: {error}") from error
    scratch_bytes = getattr(compiled.metadata, "global_scratch_size", 0)
    if scratch_bytes:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch}: asks for {scratch_bytes} bytes of scratch memory")
    return KernelPtx(ptx, compiled.metadata.shared, triton.__version__)


def assemble_kernel(launch: KernelLaunch, made: KernelPtx, arch: int) -> CompiledKernel:
    """The kernel for an architecture, from the PTX of that one or of one alike; see `compile_kernel`."""
    ptx = made.ptx if arch not in _SAME_PTX_AS else with_target(made.ptx, f"sm_{arch}")
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
        parameters=_parameters(launch),
        threads=launch.num_warps * THREADS_PER_WARP,
        shared_bytes=made.shared_bytes,
        registers=assembled.registers,
        spill_bytes=assembled.spill_bytes,
        triton_version=made.triton_version,
    )
    broken = result.broken_limits()
    if broken:
        raise KernelRefusedError(f"{launch.operator} for sm_{arch} in {launch.dtype}: {', '.join(broken)}")
    return result


def _parameters(launch: KernelLaunch) -> tuple[str, ...]:
    return (*launch.inputs, *launch.extras, *launch.outputs)


class _Settings(threading.local):
    """Of Triton, while a thread compiles ahead of time."""

    up_to_ptx = False


_settings = _Settings()
_settings_lock = threading.Lock()
_users = 0
_line_info_before = False


@contextmanager
def _up_to_ptx() -> Iterator[None]:
    """Let Triton stop at PTX in this thread, and leave paths of this machine out of it; several threads may be inside.

    The line information is one switch of the whole process, so the first thread turns it off and the last one back.
    """
    global _users, _line_info_before
    from triton import knobs

    with _settings_lock:
        if _users == 0:
            _line_info_before = knobs.compilation.disable_line_info
            knobs.compilation.disable_line_info = True
        if knobs.runtime.add_stages_inspection_hook is None:  # stays there, and does nothing to other threads
            knobs.runtime.add_stages_inspection_hook = _skip_cubin
        _users += 1
    _settings.up_to_ptx = True
    try:
        yield
    finally:
        _settings.up_to_ptx = False
        with _settings_lock:
            _users -= 1
            if _users == 0:
                knobs.compilation.disable_line_info = _line_info_before


def _skip_cubin(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook: called without arguments it adds to the cache's key, else it may change (backend, stages, ...)."""
    if not arguments:
        return ("up-to-ptx",) * 2 if _settings.up_to_ptx else ("", "")
    if _settings.up_to_ptx:
        arguments[1]["cubin"] = lambda ptx, metadata: b""  # ptxas runs later, for each architecture
    return None


def _ptxas(arch: int) -> str:
    """The assembler that Triton itself would use."""
    from triton import knobs

    tool: Any = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    return str(tool.path)


def _kernel_modules(module: str) -> list[str]:
    """A kernel's module and those of its package's siblings that it imports from, theirs included; none is imported."""
    found = [module]
    for name in found:
        found += [sibling for sibling in _siblings(name) if sibling not in found]
    return found


@cache
def _siblings(module: str) -> tuple[str, ...]:
    """Modules of the same package that a module imports from."""
    with _PARSING:
        tree = ast.parse(_source(module))
    names: list[str | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    top = module.partition(".")[0]
    return tuple(dict.fromkeys(name for name in names if name and name.partition(".")[0] == top))


@cache
def _source_hash(module: str) -> str:
    return hashlib.sha256(_source(module)).hexdigest()


def _source(module: str) -> bytes:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"the source of {module} is not installed")
    return Path(spec.origin).read_bytes()
