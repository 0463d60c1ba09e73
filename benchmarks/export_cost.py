"""Wall time and peak memory of `evit-deploy export`, verification included, from a checkpoint to the bundle."""

from __future__ import annotations

import json
import shutil

from benchmarks.footprint import POLL_S, measure_command
from benchmarks.program import evit_deploy_command
from benchmarks.result import BYTES, SECONDS, Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.workspace import Workspace
from evit_deploy.constants import BUNDLE_SUFFIX
from evit_deploy.errors import EvitDeployError
from evit_deploy.specs import split_name

NAME = "export-cost"
TITLE = "`evit-deploy export CKPT` of an M3 (of B3 for mit), verification included"
GOAL = "under 90 s and under 3 GiB"
MODELS = ("msa-m3", "msra-m3", "mit-b3")
MAX_WALL = Goal("<", 90.0)
MAX_MEMORY = Goal("<", 3 * 1024**3)


def run(settings: Settings, workspace: Workspace) -> Result:
    """Export every model in a process of its own."""
    rows = [row for model in settings.models or MODELS for row in _measure(model, settings, workspace)]
    _, typed = evit_deploy_command()
    protocol = {
        "started_as": f"{typed} export CKPT --output BUNDLE --family FAMILY --image-size {settings.image_size} --json",
        "image_size_px": settings.image_size,
        "weights": f"random, seed {WEIGHT_SEED}",
        "threads": "the runtimes' own choice",
        "peak_memory": "resident; the larger of the process's own peak and of the sampled sum over its process tree",
        "sampling_interval_s": POLL_S,
        "runs": 1,
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _measure(model: str, settings: Settings, workspace: Workspace) -> list[Row]:
    checkpoint = workspace.checkpoint(model, settings.image_size)
    folder = workspace.folder / f"{NAME}-{model}"
    folder.mkdir()
    words, _ = evit_deploy_command()
    family, _ = split_name(model)
    target = folder / f"{model}{BUNDLE_SUFFIX}"
    workspace.progress(f"{model}: evit-deploy export")
    command = [*words, "export", str(checkpoint), "--output", str(target), "--json"]
    command += ["--family", family, "--image-size", str(settings.image_size)]
    try:
        footprint = measure_command(command, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    document = json.loads(footprint.stdout)
    verdict = document["verification"]["verdict"]
    if verdict != "pass":
        raise EvitDeployError(f"the export of {model} was not verified, got {verdict=}")
    details = {
        "seconds": document["seconds"],
        "verdict": verdict,
        "comparisons": len(document["verification"]["rows"]),
        "processes": footprint.max_processes,
        "onnx_sha256": document["onnx_sha256"],
    }
    wall = Row(model, "wall time of export", SECONDS, footprint.wall_s, goal=MAX_WALL, details=details)
    peak = Row(model, "peak memory of export", BYTES, float(footprint.peak_bytes), goal=MAX_MEMORY, details=details)
    return [wall, peak]
