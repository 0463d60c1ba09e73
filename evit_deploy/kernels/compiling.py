"""Filling the kernel cache: what is there, what is not, and compiling the rest on all cores.

Threads compile, not processes: Triton and ptxas leave Python's lock alone while they work, and a process would first
have to load PyTorch and Triton, which takes as long as compiling two kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import TracebackType

from evit_kernels import cache
from evit_kernels.aot import KernelRefusedError, alike
from evit_kernels.availability import interpreting

from evit_deploy.environment import usable_cores
from evit_deploy.errors import UsageError
from evit_deploy.kernels.needed import NeededKernel, Progress, silent
from evit_deploy.kernels.rows import ABSENT, CACHED, COMPILED, FAILED, REFUSED, KernelRow, needed_row


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

    A kernel that cannot be had is a row that says so, not an error. See `Compilation` for the arguments and errors.
    """
    with Compilation(needed, arches, folder, jobs=jobs, progress=progress) as compilation:
        return compilation.rows()


class Compilation:
    """Kernels being compiled in threads, while the caller does something else or waits in `rows`.

    Left with `with`, it forgets what has not begun; what is being compiled ends first, in a second or two.

    Args:
        needed: the kernels.
        arches: compute capabilities times ten.
        folder: the cache; the usual one by default.
        jobs: kernels compiled at once; by default as many as there are cores.
        progress: called with one line per kernel, from any thread.

    Raises:
        UsageError: Triton runs as an interpreter in this process.
    """

    def __init__(
        self,
        needed: Sequence[NeededKernel],
        arches: Sequence[int],
        folder: Path | None = None,
        *,
        jobs: int | None = None,
        progress: Progress = silent,
    ) -> None:
        if interpreting():
            raise UsageError("Triton interprets kernels where TRITON_INTERPRET is set", hint="unset it to compile them")
        self._folder = folder or cache_folder()
        self._rows = list_kernels(needed, arches, self._folder)
        self._progress = progress
        self._tasks: list[Future[None]] = []
        self._done = count(1)
        self._pool = ThreadPoolExecutor(jobs or usable_cores(), thread_name_prefix="compile")
        missing = [i for i, row in enumerate(self._rows) if row.state == ABSENT]
        self._missing = len(missing)
        if cache.installed_triton() is None:
            return
        for i, kernel in enumerate(needed):
            for group in alike(arches):
                places = {arch: i * len(arches) + arches.index(arch) for arch in group}
                wanted = [arch for arch in group if self._rows[places[arch]].state == ABSENT]
                if wanted:
                    self._tasks.append(self._pool.submit(self._compile, kernel, wanted, places))

    def rows(self) -> list[KernelRow]:
        """Wait; a row for each kernel and architecture.

        Raises:
            OSError: the cache cannot be written.
        """
        for task in self._tasks:
            task.result()
        return list(self._rows)

    def __enter__(self) -> Compilation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, needed: NeededKernel, arches: Sequence[int], places: dict[int, int]) -> None:
        """One kernel for architectures that Triton compiles alike."""
        kernels = cache.compiled_alike(needed.launch, arches, self._folder)
        for arch, kernel in zip(arches, kernels, strict=True):
            if isinstance(kernel, OSError):  # the cache, not the kernel
                raise kernel
            if isinstance(kernel, KernelRefusedError):
                row = needed_row(needed, arch, REFUSED, reason=_one_line(kernel))
            elif isinstance(kernel, Exception):  # Triton's own errors have no common base, and other kernels remain
                row = needed_row(needed, arch, FAILED, reason=f"{type(kernel).__name__}: {_one_line(kernel)}")
            else:
                row = needed_row(needed, arch, COMPILED, kernel)
            self._rows[places[arch]] = row
            self._progress(f"{next(self._done)} of {self._missing}: {row} {row.state}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
