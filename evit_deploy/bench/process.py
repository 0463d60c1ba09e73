"""The parent's end of a worker: start it, ask it, and be sure that it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evit_deploy.backends import Backend

_POLL_S = 0.25  # how often a silent worker is checked for being alive
_MAX_REASON_CHARS = 400


class WorkerError(Exception):
    """A worker that replied an error, died, or did not answer in time.

    Attributes:
        reason: one line for the arm's row.
        missing: something the arm needs is not installed.
        timed_out: it was still busy when its time was over.
    """

    def __init__(self, reason: str, *, missing: bool = False, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.missing = missing
        self.timed_out = timed_out


class WorkerHandle(Protocol):
    """What the scheduler needs of a worker."""

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next reply; raises WorkerError."""

    def request(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a command and wait for its reply; raises WorkerError."""

    def close(self) -> None:
        """End the worker and everything it started."""


@dataclass(frozen=True)
class WorkerSettings:
    """What is the same for every worker of one benchmark.

    Attributes:
        bundle_path: absolute path of the bundle.
        workdir: existing folder for outputs and logs; also the workers' current directory.
        threads: of each runtime.
    """

    bundle_path: Path
    workdir: Path
    threads: int


class WorkerProcess:
    """One child process in a process group of its own."""

    def __init__(self, arm: Backend, settings: WorkerSettings, label: str) -> None:
        """Start the process; returns before it is ready.

        Args:
            arm: what it runs.
            settings: of the benchmark.
            label: unique among the workers of the benchmark, a valid file name.
        """
        self._log = settings.workdir / f"{label}.log"
        command = [sys.executable, "-m", "evit_deploy.bench.worker", "--factory", arm.factory]
        command += ["--bundle", str(settings.bundle_path), "--threads", str(settings.threads)]
        command += ["--output-prefix", str(settings.workdir / label)]
        if arm.engine is not None:
            command += ["--engine", arm.engine]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=settings.workdir,  # "-m" puts the current directory first on sys.path: an empty one shadows nothing
                env=worker_environment(arm, settings.threads),
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends the whole group
            )
        self._pending = b""

    def receive(self, timeout_s: float) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise WorkerError("did not answer in time", timed_out=True)
            readable, _, _ = select.select([stream], [], [], min(left_s, _POLL_S))
            chunk = os.read(stream, 1 << 16) if readable else b""
            self._pending += chunk
            # A worker's children may hold its end of the pipe open, so end-of-file alone does not tell its death.
            if not chunk and (readable or self._process.poll() is not None):
                raise WorkerError(self._death())
        line, self._pending = self._pending.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        if reply["event"] == "error":
            raise WorkerError(reply["reason"][:_MAX_REASON_CHARS], missing=reply["missing"])
        return reply

    def request(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._death()) from None
        return self.receive(timeout_s)

    def close(self) -> None:
        """End the worker and everything it started, at once."""
        # The group may be empty already; macOS says "not permitted" for zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed its end of the connection"
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {_signal_name(-code)}"
        if code == -signal.SIGKILL:
            how += " (out of memory?)"
        last_line = last_log_line(self._log)
        return f"the process {how}: {last_line}"[:_MAX_REASON_CHARS] if last_line else f"the process {how}"


def worker_environment(arm: Backend, threads: int) -> dict[str, str]:
    """The environment of an arm's process.

    The parent's import path goes along, so that a checkout that is not installed works. Thread pools that are sized at
    import get the same number as the runtimes. KMP_BLOCKTIME: Intel's OpenMP spins 200 ms after a parallel region by
    default, which would disturb the arm measured next; GNU's spins for a few milliseconds, within the next warm-up.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    environment.setdefault("KMP_BLOCKTIME", "10")
    environment.update(arm.environment)
    return environment


def last_log_line(path: Path) -> str:
    """The last line with text in a worker's log, "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
