"""The compiled kernels of a graph's plugin layers: from the cache, from Triton, or a reason that a user can act on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evit_kernels import cache
from evit_kernels.aot import ARCHES, CompiledKernel, KernelRefusedError, alike, kernel_key, older
from evit_kernels.availability import interpreting
from evit_kernels.launch import KernelLaunch

from evit_deploy.environment import usable_cores
from evit_deploy.errors import EvitDeployError, MissingDependencyError, UsageError
from evit_deploy.trt.operators import PluginLayer

Progress = Callable[[str], None]

log = logging.getLogger(__name__)

_KNOWN_ARCHES = ", ".join(f"sm_{arch}" for arch in ARCHES)
_NO_PLUGIN = "--no-plugin builds with TensorRT's own layers"


def kernel_hash(layers: Sequence[PluginLayer], arches: Iterable[int]) -> str:
    """A hash of all kernels of all layers, "" without layers; the same whether or not Triton is installed.

    Args:
        layers: of a graph.
        arches: compute capabilities times ten, in any order.
    """
    return hash_of_launches([layer.launch for layer in layers], arches)


def hash_of_launches(launches: Iterable[KernelLaunch], arches: Iterable[int]) -> str:
    """The same of launches, in any order."""
    pairs = [(launch, arch) for arch in set(arches) for launch in launches]
    keys = sorted({kernel_key(launch, arch) for launch, arch in pairs})
    return hashlib.sha256("\n".join(keys).encode()).hexdigest() if keys else ""


def compile_for(
    layers: Sequence[PluginLayer], arches: Iterable[int], progress: Progress, folder: Path | None = None
) -> dict[tuple[str, int], CompiledKernel]:
    """The kernel of every layer for every architecture, compiled once and on all cores: (key, architecture) to kernel.

    Args:
        layers: of a graph.
        arches: compute capabilities times ten.
        progress: called with one line per kernel that is not in the cache, from any thread.
        folder: the kernel cache; the usual one by default.

    Raises:
        MissingDependencyError: a kernel is not in the cache and Triton is not installed.
        UsageError: Triton runs as an interpreter in this process, or the environment names no usable cache.
        EvitDeployError: an architecture without kernels, or a kernel that does not compile.
    """
    launches = {
        (kernel_key(layer.launch, arch), arch): layer.launch for arch in sorted(set(arches)) for layer in layers
    }
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="compile") as pool:
        tasks = {
            key: pool.submit(compiled_kernel, launch, key[1], progress, folder) for key, launch in launches.items()
        }
        try:
            return {key: task.result() for key, task in tasks.items()}
        finally:  # after an error, what has not begun does not begin
            pool.shutdown(cancel_futures=True)


def compiled_kernel(
    launch: KernelLaunch, arch: int, progress: Progress = lambda line: None, folder: Path | None = None
) -> CompiledKernel:
    """The kernel of one launch; see `compile_for`.

    Where this architecture's own is not in the cache, one of an older architecture that is there does as well: always
    if its PTX is the same but for the target's name, else where there is no Triton.
    """
    name = f"{launch.operator} in {launch.dtype} for sm_{arch}"
    if arch not in ARCHES:
        raise EvitDeployError(f"there is no kernel for sm_{arch}, only for {_KNOWN_ARCHES}", hint=_NO_PLUGIN)
    try:
        found = cache.find(launch, arch, folder)
    except ValueError as error:
        hint = f"{cache.FOLDER_VARIABLE} is where compiled kernels are kept, for example /var/cache/evit-kernels"
        raise UsageError(str(error), hint=hint) from error
    if found is not None:
        return found
    for other in older(arch):
        found = cache.find(launch, other, folder)
        if found is None:
            continue
        if len(alike((other, arch))) == 1:  # the same PTX under another name
            return found
        if cache.installed_triton() is None:
            log.warning("%s: there is none, the kernel for sm_%d is taken", name, other)
            return found
    if cache.installed_triton() is not None and interpreting():
        hint = "unset TRITON_INTERPRET"
        raise UsageError(f"{name} must be compiled, and Triton interprets kernels in this process", hint=hint)
    try:
        progress(f"compiling {name}")
        return cache.compiled(launch, arch, folder)
    except cache.KernelMissingError as error:
        summary, _, hint = str(error).partition(": ")
        raise MissingDependencyError(summary, hint=f"{hint}; {_NO_PLUGIN}") from error
    except KernelRefusedError as error:
        raise EvitDeployError(f"{name} is refused: {error}", hint=_NO_PLUGIN) from error
    except OSError as error:
        place = folder or cache.cache_folder()
        hint = f"set {cache.FOLDER_VARIABLE} to a folder that can be written"
        raise EvitDeployError(f"{name} cannot be kept in {place}: {error.strerror or error}", hint=hint) from error
    except Exception as error:  # Triton's own errors have no common base
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise EvitDeployError(f"{name} does not compile: {reason}", hint=_NO_PLUGIN) from error
