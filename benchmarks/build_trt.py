"""What an engine costs to build with TensorRT for RTX, without a GPU, and how soon its JSON is read and checked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.footprint import POLL_S, Footprint, measure_command
from benchmarks.program import evit_deploy_command
from benchmarks.result import BYTES, SECONDS, Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.workspace import Workspace

NAME = "build-trt"
TITLE = "`evit-deploy build-trt --flavor rtx`, with the plugin and without it, on a machine without a GPU"
GOAL = (
    "under 30 s (60 s for msa-m3) and 3 GiB; msa-m3 from cold in a third of the 35 s that it took, with a kernel pack "
    "in under 15 s; an engine's JSON is loaded and checked in under 100 ms"
)
MODELS = ("msra-m3", "mit-b1", "msa-m3")
QUICK_MODELS = ("msra-m0",)
QUICK_TARGETS = ("--targets", "sm89")
SLOW = ("msa-m3",)
MAX_WALL, MAX_WALL_SLOW = Goal("<", 30.0), Goal("<", 60.0)
# With the kernels of every target compiled, msa-m3 took 34.9 and 37.8 s from cold on two idle cores of an EPYC.
MAX_COLD, MAX_UNPACKED = {"msa-m3": Goal("<=", 34.9 / 3)}, Goal("<", 15.0)
MAX_MEMORY = Goal("<", 3 * 1024**3)
MAX_LOAD = Goal("<", 0.1)
LOADS = 21

PLUGIN, NO_PLUGIN = "with the plugin", "without the plugin"
COLD, UNPACKED = f"{PLUGIN}, kernels compiled first", f"{PLUGIN}, kernels from a pack"
_OPTIONS = {PLUGIN: ["--require-plugin"], NO_PLUGIN: ["--no-plugin"]}


def run(settings: Settings, workspace: Workspace) -> Result:
    """Build each engine in a process of its own, the plugin's kernels from the cache; then read its JSON."""
    models = settings.models or (QUICK_MODELS if settings.quick else MODELS)
    rows = [row for model in models for row in _measure(model, settings, workspace)]
    _, typed = evit_deploy_command()
    protocol = {
        "started_as": f"{typed} build-trt BUNDLE --flavor rtx --force --json, --require-plugin or --no-plugin",
        "image_size_px": settings.image_size,
        "weights": f"random, seed {WEIGHT_SEED}",
        "targets": "sm89" if settings.quick else "the flavor's default",
        "kernels": "in the cache, but where the quantity says that they are compiled, or unpacked, which is counted",
        "peak_memory": "resident; the larger of the process's own peak and of the sampled sum over its process tree",
        "sampling_interval_s": POLL_S,
        "runs": 1,
        "loads": f"median of {LOADS} in one process, everything imported",
        "quick": settings.quick,
    }
    return Result(NAME, TITLE, GOAL, settings.command(NAME), protocol, rows)


def _measure(model: str, settings: Settings, workspace: Workspace) -> list[Row]:
    bundle = workspace.bundle(model, settings.image_size)
    wall_goals = {
        COLD: MAX_COLD.get(model),
        UNPACKED: MAX_UNPACKED,
        PLUGIN: MAX_WALL_SLOW if model in SLOW else MAX_WALL,
        NO_PLUGIN: MAX_WALL_SLOW if model in SLOW else MAX_WALL,
    }
    targets = list(QUICK_TARGETS) if settings.quick else []
    cold, unpacked = (workspace.folder / f"{NAME}-{kind}-kernels-{model}" for kind in ("cold", "unpacked"))
    rows = []
    for quantity, goal in wall_goals.items():
        workspace.progress(f"{model}: build-trt {quantity}")
        unpack_s = 0.0
        if quantity == UNPACKED:
            pack = workspace.folder / f"{model}.zip"
            only = ["--arch", "80", "--dtype", "fp32"]
            _run(["kernels", "pack", str(bundle.path), *only, "--output", str(pack)], cold, workspace.folder)
            unpack_s = _run(["kernels", "unpack", str(pack)], unpacked, workspace.folder).wall_s
        cache = unpacked if quantity == UNPACKED else cold
        options = [*_OPTIONS[NO_PLUGIN if quantity == NO_PLUGIN else PLUGIN], *targets]
        words = ["build-trt", str(bundle.path), "--flavor", "rtx", "--force", "--json", *options]
        footprint = _run(words, cache, workspace.folder)
        document: dict[str, Any] = json.loads(footprint.stdout)
        details = {**_details(document), "unpack_s": unpack_s}
        wall_s, peak_bytes = footprint.wall_s + unpack_s, float(footprint.peak_bytes)
        rows.append(Row(model, f"wall time, {quantity}", SECONDS, wall_s, goal=goal, details=details))
        rows.append(Row(model, f"peak memory, {quantity}", BYTES, peak_bytes, goal=MAX_MEMORY, details=details))
        if quantity in _OPTIONS:
            rows += _load_rows(model, quantity, Path(document["engine_path"]), bundle.path)
    return rows


def _run(arguments: list[str], cache: Path, folder: Path) -> Footprint:
    """evit-deploy with a kernel cache of its own, and one of Triton's."""
    words, _ = evit_deploy_command()
    caches = [f"EVIT_DEPLOY_KERNEL_CACHE={cache}", f"TRITON_CACHE_DIR={cache}-triton"]
    return measure_command(["env", *caches, *words, *arguments], cwd=folder)


def _details(document: dict[str, Any]) -> dict[str, Any]:
    engine = document["engine"]
    return {
        "build_seconds": engine["build_seconds"],
        "child_peak_memory_bytes": engine["peak_memory_bytes"],
        "size_bytes": engine["size_bytes"],
        "plugin": {name: engine["plugin"][name] for name in ("used", "layers", "form", "arches")},
        "profiles": engine["profiles"],
        "tensorrt_version": engine["tensorrt_version"],
        "onnx_sha256": engine["onnx_sha256"],
    }


def _load_rows(model: str, quantity: str, engine: Path, bundle_path: Path) -> list[Row]:
    """Seconds to read and check the JSON beside the engine's size, and the same with the engine's hash."""
    from evit_deploy.bundle import Bundle
    from evit_deploy.trt.record import open_engine

    bundle = Bundle.open(bundle_path, check_hashes=False)
    rows = []
    for what, check_hash, goal in (("", False, MAX_LOAD), (" and engine hashed", True, None)):
        seconds = []
        for _ in range(LOADS):
            started = time.perf_counter()
            open_engine(engine, bundle=bundle, check_hash=check_hash)
            seconds.append(time.perf_counter() - started)
        details = {"min_s": min(seconds), "max_s": max(seconds), "size_bytes": engine.stat().st_size}
        title = f"JSON loaded and checked{what}, {quantity}"
        rows.append(Row(model, title, SECONDS, median(seconds), goal=goal, details=details))
    return rows
