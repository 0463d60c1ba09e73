"""`python -m tests.trtsim.running FOLDER FORM`: engines of FOLDER/*.evit built and run on a simulated machine.

The whole of `build-trt` with its child process, then the runner over the simulated runtime with a stand-in for the
device. What came out is FOLDER/FORM.json, name of a bundle to result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.trtsim.machine import simulated_machine

PROFILES = ((1, 2, 4), (5, 8, 8))
BATCHES = (2, 2, 7)


def run_in_child(version: str, form: str, folder: Path, machine: Path, kernel_cache: Path) -> dict[str, Any]:
    """What came out, name of a bundle to result.

    Args:
        version: of TensorRT.
        form: of plugin, "aot" or "jit", or "off".
        folder: with bundles.
        machine: empty, for the machine's programs.
        kernel_cache: of compiled kernels.
    """
    command = [sys.executable, "-m", "tests.trtsim.running", str(folder), form]
    environment = simulated_machine(machine, version, kernel_cache)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / f"{form}.json").read_text(encoding="utf-8"))
    return results


def build_and_run(path: Path, form: str) -> dict[str, Any]:
    """Build the engine, find it again, and run it."""
    from evit_deploy.bundle import Bundle
    from evit_deploy.trt import BuildOptions, build_engine
    from evit_deploy.trt.profiles import BatchProfile

    profiles = tuple(BatchProfile(*batches) for batches in PROFILES)
    bundle = Bundle.open(path)
    options = BuildOptions(flavor="auto", profiles=profiles, plugin=form)
    steps: list[str] = []
    built = build_engine(bundle, options, steps.append)
    again = build_engine(bundle, options)
    result = {
        "record": built.record.json_dict,
        "reused": [built.reused, again.reused],
        "notes": list(built.notes),
        "steps": steps,
    }
    return {**result, **run(bundle, built.record)}


def run(bundle: Any, record: Any) -> dict[str, Any]:
    """Each of BATCHES in turn, a batch outside every profile, and a plugin that fails."""
    from evit_deploy.runners.tensorrt import TensorRtRunner
    from tests.trtsim import core
    from tests.trtsim.device import StandInDevice

    simulation = core.started()
    device = StandInDevice(simulation)
    runner = TensorRtRunner(record, read_onnx=bundle.read_onnx, open_device=lambda: device)
    result: dict[str, Any] = {"inferences": []}
    simulation.calls.clear()
    with runner:
        result["activation"] = _take_calls(simulation)
        for batch in BATCHES:
            answer = runner.infer(_feed(runner, batch))
            shapes = {name: list(array.shape) for name, array in answer.items()}
            facts = {"batch": batch, "shapes": shapes, "captured": runner.captured, "timings": runner.last_timings_ms}
            facts["sums"] = {name: float(array.sum()) for name, array in answer.items()}
            result["inferences"].append({**facts, "calls": _take_calls(simulation)})
        result["outside"] = _error_of(runner, PROFILES[-1][-1] + 1)
        device.failing_launches = 1
        result["failing"] = _error_of(runner, 3)
        result["recovered"] = runner.infer(_feed(runner, 3)) is not None
        device.failing_launches = 0
        simulation.calls.clear()
    result["left"] = device.live
    result["fallback"] = runner.graph_fallback
    result["unknown"], result["faults"] = list(simulation.unknown), list(simulation.faults)
    return result


def _feed(runner: Any, batch: int) -> dict[str, np.ndarray]:
    return {spec.name: np.ones((batch, *spec.shape[1:]), np.float32) for spec in runner.inputs}


def _error_of(runner: Any, batch: int) -> list[str] | None:
    try:
        runner.infer(_feed(runner, batch))
    except Exception as error:  # noqa: BLE001 - which one it is, is what the tests look at
        return [type(error).__name__, str(error)]
    return None


def _take_calls(simulation: Any) -> list[Any]:
    taken = [(owner, method, _plain(arguments)) for owner, method, arguments, _ in simulation.calls]
    simulation.calls.clear()
    return taken


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (int, str)) else type(value).__name__


def main() -> None:
    folder, form = Path(sys.argv[1]), sys.argv[2]
    results = {}
    for path in sorted(folder.glob("*.evit")):
        try:
            results[path.stem] = build_and_run(path, form)
        except Exception as error:  # noqa: BLE001 - the tests show it
            results[path.stem] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    (folder / f"{form}.json").write_text(json.dumps(results, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
