"""Wall time and peak memory of a command and everything it starts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from evit_deploy.errors import EvitDeployError

POLL_S = 0.02


@dataclass(frozen=True)
class Footprint:
    """What a command needed.

    Attributes:
        wall_s: from its start to its end.
        peak_bytes: resident memory; the larger of the command's own peak, which the kernel keeps, and of the sum over
            its processes, which is sampled.
        max_processes: the most that were alive together, the command's own among them.
        stdout: what it printed.
    """

    wall_s: float
    peak_bytes: int
    max_processes: int
    stdout: str


def measure_command(command: Sequence[str], *, cwd: Path) -> Footprint:
    """Run a command to its end.

    `ru_maxrss` would do for one process, but it begins with the memory of the process that starts it.

    Raises:
        EvitDeployError: it did not end with exit code 0.
    """
    output, errors = cwd / "stdout.txt", cwd / "stderr.txt"
    started = time.perf_counter()
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    peak_bytes, max_processes = 0, 0
    try:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            total_bytes, count = _resident_bytes(tree)
            peak_bytes = max(peak_bytes, total_bytes, _own_peak_bytes(process.pid))
            max_processes = max(max_processes, count)
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    finally:
        process.kill()
        process.wait()
    wall_s = time.perf_counter() - started
    if process.returncode != 0:
        tail = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise EvitDeployError(f"{' '.join(command)} ended with exit code {process.returncode}", details=tail)
    return Footprint(wall_s, peak_bytes, max_processes, output.read_text(encoding="utf-8"))


def _resident_bytes(root: psutil.Process) -> tuple[int, int]:
    """The memory of a process and its descendants together, and how many they are."""
    total_bytes, count = 0, 0
    with suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total_bytes += process.memory_info().rss
                count += 1
    return total_bytes, count


def _own_peak_bytes(pid: int) -> int:
    """VmHWM; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
