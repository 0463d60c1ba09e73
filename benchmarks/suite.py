"""What the tests cost: wall and processor time of both tiers, of collecting them, and which tests are the slowest."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.program import ROOT
from benchmarks.result import COUNT, SECONDS, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import EvitDeployError

NAME = "suite"
TITLE = "`make test` and `make test-exhaustive`: wall and processor time, and of collecting the tests"
GOAL = "the fast tier takes at most 8 minutes on two idle cores; collecting takes under 5 seconds in each process"
FAST, EXHAUSTIVE = "fast tier", "exhaustive tier"
MARKERS = {FAST: "not exhaustive", EXHAUSTIVE: "exhaustive"}
MAX_FAST_WALL, MAX_COLLECTION = Goal("<=", 480.0), Goal("<", 5.0)
SLOWEST = 20
MAX_WORKERS = 4  # as in the Makefile
QUICK_TESTS = ("tests/test_filelock.py",)
# It asks for the result that is being made.
LEFT_OUT = "tests/test_benchmarks.py::test_every_result_is_published_and_a_full_run"


@dataclass(frozen=True)
class Cost:
    """Of one command: wall and processor seconds, those of its processes included."""

    wall_s: float
    processor_s: float
    output: str


def run(settings: Settings, workspace: Workspace) -> Result:
    """Collect once, then run both tiers, each as `make` does."""
    tests = QUICK_TESTS if settings.quick else ()
    workspace.progress("collecting the tests")
    collected = _pytest(["--collect-only", "-q", *tests], expected=(0,))
    rows = [Row("both tiers", "wall time of collecting", SECONDS, collected.wall_s, goal=MAX_COLLECTION)]
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    for tier, marker in MARKERS.items():
        workspace.progress(f"running the {tier}")
        report = workspace.folder / f"{NAME}.xml"
        words = ["-q", "-m", marker, "--numprocesses", str(workers), "--dist", "worksteal", f"--junitxml={report}"]
        cost = _pytest([*words, *tests], expected=(0, 5) if settings.quick else (0,))
        rows += _rows(tier, cost, report)
    protocol = {
        "started_as": "python -m pytest, with the options of the Makefile",
        "left_out": LEFT_OUT,
        "workers": workers,
        "seconds_of_a_test": "set-up, call and tear-down, while the other workers were busy",
        "runs": 1,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _rows(tier: str, cost: Cost, report: Path) -> list[Row]:
    times = seconds_of_tests(report)
    slowest = sorted(times, key=lambda test: test[1], reverse=True)[:SLOWEST]
    details = {"slowest": [{"test": name, "seconds": seconds} for name, seconds in slowest]}
    goal = MAX_FAST_WALL if tier == FAST else None
    return [
        Row(tier, "wall time", SECONDS, cost.wall_s, goal=goal, details=details),
        Row(tier, "processor time", SECONDS, cost.processor_s),
        Row(tier, "tests", COUNT, float(len(times))),
    ]


def seconds_of_tests(report: Path) -> list[tuple[str, float]]:
    """Name and seconds of each test in a JUnit report of pytest."""
    cases = ElementTree.parse(report).iter("testcase")
    return [(f"{case.get('classname')}::{case.get('name')}", float(case.get("time", "nan"))) for case in cases]


def _pytest(words: Sequence[str], expected: Sequence[int]) -> Cost:
    """Run pytest in the checkout; what it costs.

    Raises:
        EvitDeployError: a test failed, so that the time means nothing.
    """
    before, started = _processor_s(), time.monotonic()
    command: list[Any] = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--deselect={LEFT_OUT}", *words]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    cost = Cost(time.monotonic() - started, _processor_s() - before, done.stdout)
    if done.returncode not in expected:
        last = [line for line in done.stdout.splitlines() if line.strip()][-20:]
        raise EvitDeployError(
            f"pytest {' '.join(words)} ended with {done.returncode}", last, hint="mend the tests first"
        )
    return cost


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
