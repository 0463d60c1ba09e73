"""Filling the kernel cache: what is there, what is not, and compiling the rest in a few processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from evit_kernels import cache
from evit_kernels.aot import KernelRefusedError
from evit_kernels.availability import interpreting

from evit_deploy.errors import EvitDeployError, UsageError
from evit_deploy.kernels.needed import NeededKernel, Progress, silent
from evit_deploy.kernels.rows import ABSENT, CACHED, COMPILED, FAILED, REFUSED, KernelRow, needed_row

MAX_JOBS = 4  # processes that compile; each holds PyTorch and Triton, half a gigabyte
MIN_KERNELS_PER_JOB = 5  # for fewer, starting a process takes longer than compiling them

_IGNORE_INTERRUPT = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others

_Task = tuple[NeededKernel, int, Path]
_Map = Callable[[Callable[[_Task], KernelRow], Iterable[_Task]], Iterator[KernelRow]]


def cache_folder() -> Path:
    """Where kernels are kept.

    Raises:
        UsageError: the environment names no usable folder.
    """
    try:
        return cache.cache_folder()
    except ValueError as error:
        hint = f"{cache.FOLDER_VARIABLE} is where compiled kernels are kept, for example /var/cache/evit-kernels"
        raise UsageError(str(error), hint=hint) from error


def list_kernels(needed: Sequence[NeededKernel], arches: Sequence[int], folder: Path | None = None) -> list[KernelRow]:
    """Each kernel for each architecture, CACHED or ABSENT; nothing is compiled.

    Args:
        needed: the kernels.
        arches: compute capabilities times ten.
        folder: the cache; the usual one by default.
    """
    place = folder or cache_folder()
    rows = []
    for kernel in needed:
        for arch in arches:
            found = cache.find(kernel.launch, arch, place)
            rows.append(needed_row(kernel, arch, CACHED if found else ABSENT, found))
    return rows


def compile_kernels(
    needed: Sequence[NeededKernel],
    arches: Sequence[int],
    folder: Path | None = None,
    *,
    jobs: int | None = None,
    progress: Progress = silent,
) -> list[KernelRow]:
    """Compile what is not in the cache and keep it there; rows and their order are those of `list_kernels`.

    A kernel that cannot be had is a row that says so, not an error.

    Args:
        needed: the kernels.
        arches: compute capabilities times ten.
        folder: the cache; the usual one by default.
        jobs: processes that compile; by default one for each core that may be used, up to MAX_JOBS.
        progress: called with one line per kernel.

    Raises:
        UsageError: Triton runs as an interpreter in this process.
        EvitDeployError: a compiling process died.
        OSError: the cache cannot be written.
    """
    if interpreting():
        raise UsageError("Triton interprets kernels where TRITON_INTERPRET is set", hint="unset it to compile them")
    place = folder or cache_folder()
    rows = list_kernels(needed, arches, place)
    if cache.installed_triton() is None:
        return rows
    pairs = [(kernel, arch) for kernel in needed for arch in arches]
    missing = [i for i, row in enumerate(rows) if row.state == ABSENT]
    tasks = [(*pairs[i], place) for i in missing]
    wanted_jobs = min(jobs or min(MAX_JOBS, len(os.sched_getaffinity(0))), len(tasks) // MIN_KERNELS_PER_JOB)
    with _mapping(wanted_jobs) as mapped:
        for done, (i, row) in enumerate(zip(missing, mapped(_compile, tasks), strict=True), 1):
            rows[i] = row
            progress(f"{done} of {len(tasks)}: {row} {row.state}")
    return rows


def _compile(task: _Task) -> KernelRow:
    needed, arch, folder = task
    try:
        return needed_row(needed, arch, COMPILED, cache.compiled(needed.launch, arch, folder))
    except KernelRefusedError as error:
        return needed_row(needed, arch, REFUSED, reason=_one_line(error))
    except OSError:
        raise  # the cache, not the kernel
    except Exception as error:  # noqa: BLE001 - Triton's own errors have no common base, and the other kernels remain
        return needed_row(needed, arch, FAILED, reason=f"{type(error).__name__}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _mapping(jobs: int) -> Iterator[_Map]:
    """`map` over processes; over this one for a single job."""
    if jobs < 2:
        yield map
        return
    # A forked process would inherit PyTorch's threads in an unknown state.
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=signal.signal, initargs=_IGNORE_INTERRUPT)
    try:
        yield executor.map
    except BrokenProcessPool as error:
        hint = "free some memory, or compile fewer models at once; the kernels that are done are kept"
        raise EvitDeployError("a process that compiled kernels died", hint=hint) from error
    finally:
        executor.shutdown(cancel_futures=True)
