"""Signs of life on stderr while a command works, and nothing of that work on stdout.

On a terminal: one line with a spinner and the elapsed time, drawn by its own thread, so that a long step in native
code still ticks. Elsewhere (a CI log): one plain line per step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

SPINNER = "|/-\\"
TICK_S = 0.1
ERASE_LINE = "\r\x1b[K"


class _Spinner:
    """Draws "| 12 s  exporting" on a terminal until it is stopped."""

    def __init__(self) -> None:
        self._message = ""
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evit-deploy-spinner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def report(self, message: str) -> None:
        self._message = " ".join(message.split())

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        sys.stderr.write(ERASE_LINE)
        sys.stderr.flush()

    def _run(self) -> None:
        frame = 0
        while not self._stopped.wait(TICK_S):
            seconds = time.monotonic() - self._started
            line = f"{SPINNER[frame % len(SPINNER)]} {seconds:3.0f} s  {self._message}"
            sys.stderr.write(ERASE_LINE + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
            frame += 1


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print to stdout, from Python or from native code, to stderr instead."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # started with stdout closed: nothing to keep clean
        yield
        return
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what native code still has buffered belongs to stderr too
        os.dup2(saved, 1)
        os.close(saved)


def debugging() -> bool:
    """Whether the user asked for tracebacks and warnings with EVIT_DEPLOY_DEBUG=1."""
    return os.environ.get("EVIT_DEPLOY_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Around the work of a command: yields the `progress` function that the library calls with each step.

    Warnings of the libraries underneath are for their users, not for ours; EVIT_DEPLOY_DEBUG=1 shows them.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if not debugging():
            warnings.simplefilter("ignore")
        if sys.stderr.isatty():
            spinner = _Spinner()
            spinner.start()
            stack.callback(spinner.stop)
            report: Callable[[str], None] = spinner.report
        else:
            started = time.monotonic()

            def report(message: str) -> None:
                sys.stderr.write(f"[{time.monotonic() - started:6.1f} s] {' '.join(message.split())}\n")
                sys.stderr.flush()

        stack.enter_context(_stdout_to_stderr())
        yield report
