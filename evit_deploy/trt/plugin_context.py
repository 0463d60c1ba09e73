"""What the plugins of one process share: architectures, the launcher, and the errors that TensorRT would swallow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from evit_kernels.aot import CompiledKernel

MAX_ERRORS = 20  # kept; an inference that fails may fail thousands of times

_log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Loads and launches compiled kernels on the current GPU; a machine that only builds has none."""

    @property
    def arch(self) -> int:
        """Compute capability of the current GPU, times ten."""

    def load(self, kernel: CompiledKernel) -> Any:
        """A handle of the kernel on this GPU; may allocate."""

    def launch(self, handle: Any, grid: int, arguments: Sequence[int], stream: int) -> None:
        """Launch on a stream, without allocating on the GPU and without waiting.

        Args:
            handle: from `load`.
            grid: programs.
            arguments: pointers of inputs, int32 extras, pointers of outputs: the kernel's order.
            stream: the CUDA stream's handle.
        """


@dataclass
class PluginContext:
    """Shared by every plugin of one flavor and form in this process.

    Attributes:
        arches: compute capabilities times ten that are built for.
        launcher: None where engines are only built.
        log: called with one line per error; TensorRT's logger, where there is one.
        errors: what went wrong inside plugins, oldest first; `take_errors` empties it.
    """

    arches: tuple[int, ...] = ()
    launcher: Launcher | None = None
    log: Callable[[str], None] = _log.error
    errors: list[Exception] = field(default_factory=list)
    _handles: dict[str, Any] = field(default_factory=dict)

    def renew(self, arches: tuple[int, ...], launcher: Launcher | None, log: Callable[[str], None]) -> None:
        """Take what a later registration says; kernels loaded by another launcher are forgotten."""
        if launcher is not self.launcher:
            self._handles.clear()
        self.arches, self.launcher, self.log = arches, launcher, log

    @contextmanager
    def reporting(self, where: str) -> Iterator[None]:
        """Remember and log what is raised inside; TensorRT's bindings, which it reaches next, print it and go on.

        Args:
            where: the plugin and its method, for the log.
        """
        try:
            yield
        except Exception as error:
            self.report(where, error)
            raise

    def report(self, where: str, error: Exception) -> None:
        """Remember and log one error."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)
        self.log(f"{where}: {error}")

    def take_errors(self) -> list[Exception]:
        """What went wrong since the last call, oldest first."""
        taken, self.errors[:] = list(self.errors), []
        return taken

    def handle(self, kernel: CompiledKernel) -> Any:
        """The launcher's handle of a kernel, loaded once."""
        assert self.launcher is not None
        if kernel.key not in self._handles:
            self._handles[kernel.key] = self.launcher.load(kernel)
        return self._handles[kernel.key]
