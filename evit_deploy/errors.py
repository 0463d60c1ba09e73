"""Errors a user can cause, each with one line that says what happened, a hint that says what to do, and an exit code.

Internal mistakes are plain Python exceptions (`assert`, `ValueError`); nothing here stands for them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PARITY = 3
EXIT_MISSING = 4
EXIT_LIMIT = 5


class EvitDeployError(Exception):
    """Base of every error the tool reports in one line.

    Args:
        summary: what failed and what was found, one sentence without a final full stop.
        details: further findings, one line each, printed below the summary.
        hint: what the user can do about it.
    """

    exit_code: int = EXIT_FAILED

    def __init__(self, summary: str, details: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(summary)
        self.summary = summary
        self.details = tuple(details)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.summary}: {self.hint}" if self.hint else self.summary


class UsageError(EvitDeployError):
    """Arguments that contradict each other or name something unknown."""

    exit_code = EXIT_USAGE


class CheckpointError(EvitDeployError):
    """A checkpoint that cannot be read, recognised or loaded."""


class BundleError(EvitDeployError):
    """A bundle that is missing, changed, locked, or cannot be written."""


class ExportError(EvitDeployError):
    """The step from model to ONNX graph failed."""


class InputDataError(EvitDeployError):
    """Images or arrays given by the user that do not fit the model."""


class EngineError(EvitDeployError):
    """TensorRT refused a graph, or its build failed or died."""


class RunnerError(EvitDeployError):
    """A runtime refused the graph or an inference."""


class ParityError(EvitDeployError):
    """Two implementations of one model disagree, or the comparison compared nothing."""

    exit_code = EXIT_PARITY


class MissingDependencyError(EvitDeployError):
    """Something needed is not installed or not on this machine."""

    exit_code = EXIT_MISSING


class LimitError(EvitDeployError):
    """A measurement was unstable, or a time, memory or size limit was exceeded."""

    exit_code = EXIT_LIMIT


def unknown_name_hint(name: str, known: Iterable[str]) -> str:
    """A "did you mean" for a name that is not among the known ones, with the whole list behind it."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]!r}? known: {listed}" if close else f"known: {listed}"
