"""How fast `evit-deploy --help` answers, and that it imports nothing heavy."""

from __future__ import annotations

import subprocess
import time
from statistics import median

from benchmarks.program import evit_deploy_command
from benchmarks.result import COUNT, SECONDS, Goal, Result, Row
from benchmarks.settings import Settings
from benchmarks.workspace import Workspace
from evit_deploy.errors import EvitDeployError

NAME = "help-time"
TITLE = "wall time of `evit-deploy --help` in a fresh process"
GOAL = "under 0.5 s, and neither torch nor onnx nor timm is imported"
HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "triton", "tensorrt")
RUNS = 21
QUICK_RUNS = 3


def run(settings: Settings, workspace: Workspace) -> Result:
    """Time it, one run before the first that counts; then look at its imports."""
    words, typed = evit_deploy_command()
    runs = QUICK_RUNS if settings.quick else RUNS
    workspace.progress(f"{typed} --help, {runs} runs")
    _timed([*words, "--help"])
    seconds = sorted(_timed([*words, "--help"]) for _ in range(runs))
    heavy = heavy_imports([words[0], "-X", "importtime", *words[1:], "--help"])
    details = {"min_s": seconds[0], "max_s": seconds[-1], "runs": runs}
    rows = [
        Row("evit-deploy --help", "median wall time", SECONDS, median(seconds), goal=Goal("<", 0.5), details=details),
        Row(
            "evit-deploy --help",
            "heavy modules imported",
            COUNT,
            float(len(heavy)),
            goal=Goal("<=", 0),
            details={"imported": heavy, "looked_for": list(HEAVY)},
        ),
    ]
    protocol = {
        "started_as": f"{typed} --help",
        "runs": runs,
        "before": "one run that does not count",
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def heavy_imports(command: list[str]) -> list[str]:
    """Which of `HEAVY` a command imports that runs Python with `-X importtime`."""
    log = _run(command).stderr
    modules = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in log.splitlines() if line.count("|") == 2}
    if "evit_deploy" not in modules:
        raise EvitDeployError("python -X importtime did not list the imports", hint="use CPython")
    return sorted(modules & set(HEAVY))


def _timed(command: list[str]) -> float:
    started = time.perf_counter()
    _run(command)
    return time.perf_counter() - started


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EvitDeployError(
            f"{command[-1]} ended with exit code {done.returncode}", details=done.stderr.splitlines()[-5:]
        )
    return done
