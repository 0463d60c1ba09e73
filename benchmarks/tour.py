"""The README's tour, run: each command on the digits model, its output and its wall time.

What it prints is what the README shows (`benchmarks.readme`), so the tour cannot say what the tool does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.program import ROOT, evit_deploy_command
from benchmarks.result import SECONDS, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import EXIT_LIMIT, EvitDeployError

NAME = "tour"
TITLE = "wall time of each command of the README's tour, with what it printed"
GOAL = "the pipeline of `make demo` takes at most 5 minutes on two cores"
BENCH_DURATION_S = 180
QUICK_BENCH_DURATION_S = 20
LIMIT_S = 300.0
TRAIN = "python examples/digits/train.py --output demo"


def commands(bench_duration_s: float) -> list[str]:
    """The tour as a person types it, in a folder where `demo/` is made."""
    return [
        TRAIN,
        "evit-deploy export demo/digits.pt --output demo/digits.evit",
        "evit-deploy verify demo/digits.evit --input demo/heldout",
        f"evit-deploy bench demo/digits.evit --batch 1,8,64 --duration {bench_duration_s:g}",
        "evit-deploy build-trt demo/digits.evit",
        "evit-deploy inspect demo/digits.evit",
    ]


def run(settings: Settings, workspace: Workspace) -> Result:
    """Run the tour in a fresh folder.

    Raises:
        EvitDeployError: a command failed; an unstable `bench` (exit code 5) is kept as it is.
    """
    folder = workspace.folder / "tour"
    folder.mkdir()
    duration_s = settings.duration_s or (QUICK_BENCH_DURATION_S if settings.quick else BENCH_DURATION_S)
    rows = [_run(command, folder, workspace) for command in commands(duration_s)]
    total_s = sum(row.value or 0.0 for row in rows)
    rows.append(Row("all of them", "wall time", SECONDS, total_s, goal=Goal("<=", LIMIT_S)))
    protocol = {"quick": settings.quick, "runs": 1, "started_as": evit_deploy_command()[1]}
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _run(command: str, folder: Path, workspace: Workspace) -> Row:
    workspace.progress(command)
    program, *words = command.split()
    if program == "python":
        line = [sys.executable, str(ROOT / words[0]), *words[1:]]
    else:
        line = [*evit_deploy_command()[0], *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    started = time.perf_counter()
    done = subprocess.run(
        line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode not in (0, EXIT_LIMIT):
        raise EvitDeployError(f"{command} ended with {done.returncode}", details=done.stderr.splitlines()[-5:])
    details = {"exit_code": done.returncode, "stdout": done.stdout}
    return Row(command, "wall time", SECONDS, seconds, details=details)
