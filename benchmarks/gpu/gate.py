"""The tests that need a GPU, run before anything is measured."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.program import ROOT

TESTS = ("tests/test_fused_kernels.py", "tests/test_driver_launch.py", "tests/test_torch_fused.py")
WORKERS = 8  # processes that compile kernels side by side, where pytest-xdist is installed


@dataclass(frozen=True)
class Checks:
    """What the tests said.

    Attributes:
        command: what was run.
        passed, failed, skipped: numbers of tests; an error counts as a failure.
        seconds: wall time.
        last_line: of what was printed.
    """

    command: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    last_line: str

    @property
    def green(self) -> bool:
        """Something was tested, nothing failed, nothing was skipped."""
        return self.passed > 0 and self.failed == 0 and self.skipped == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_checks(
    tests: Sequence[str | Path] = TESTS, marker: str = "gpu", timeout_s: float | None = None, workers: int = WORKERS
) -> Checks:
    """Run tests in a process of its own.

    Args:
        tests: files, relative to the root of the checkout.
        marker: only tests with this mark.
        timeout_s: after which they count as failed.
        workers: processes side by side, where pytest-xdist is installed; 0 for none beside pytest's own.
    """
    words = ["pytest", "-q", "-m", marker, "-p", "no:cacheprovider", *map(str, tests)]
    if workers and importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(workers), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "checks.xml")
        command = [sys.executable, "-m", *words, f"--junitxml={report}"]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )
            printed, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired:
            printed, code = f"not done after {timeout_s:.0f} s", 1
        seconds = time.perf_counter() - started
        counts = _counts(report)
    if code not in (0, 5) and counts["failed"] == 0:  # 5: no test was selected
        counts["failed"] = 1  # pytest itself failed
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = " ".join(["python -m", *words])
    return Checks(named, **counts, seconds=seconds, last_line=lines[-1] if lines else "")


def _counts(report: Path) -> dict[str, int]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            outcomes = {child.tag for child in case}
            failed = bool(outcomes & {"failure", "error"})
            counts["failed" if failed else "skipped" if "skipped" in outcomes else "passed"] += 1
    return counts
