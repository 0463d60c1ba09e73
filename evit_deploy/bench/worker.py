"""The process of one arm: `python -m evit_deploy.bench.worker`.

The parent writes one JSON object per line to standard input and reads one JSON object per line from what was standard
output. Libraries that print cannot disturb the protocol: file descriptor 1 is moved to standard error before any of
them is imported. Between commands the process blocks on reading and burns no CPU.

Commands: prepare (first call of a batch size, its output written to a file), check (outputs of more images), measure
(one arm-round), quit.
Replies: ready, prepared, checked, measured, bye, error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from evit_deploy.backends import BackendContext
from evit_deploy.backends.registry import make_runner
from evit_deploy.bundle import Bundle
from evit_deploy.errors import EvitDeployError, MissingDependencyError
from evit_deploy.runners.base import FeedDict, Runner

_REPORTED_MODULES = ("torch", "timm", "onnxruntime", "openvino", "numpy", "tensorrt", "tensorrt_rtx_bindings")
_ESTIMATE_S = 1.5  # no further one after so many seconds
_OUT_OF_MEMORY_PREFERENCE = "500"  # of 1000: the kernel ends a worker before it ends the parent


class Worker:
    """One activated runner and the inputs of the batch size it is at.

    Args:
        runner: active.
        output_prefix: outputs of batch B are written to "PREFIX-batchB.npz", those of `check` to "PREFIX-checkB.npz".
    """

    def __init__(self, runner: Runner, output_prefix: str) -> None:
        self._runner = runner
        self._output_prefix = output_prefix
        self._feeds: list[FeedDict] = []
        self._calls = 0

    def prepare(
        self, batch: int, images: str, buffers: int, pixels: str | None = None, estimate_calls: int = 1
    ) -> dict[str, Any]:
        """Load the inputs, make the first call and a few more, and store the first output.

        The first call includes what a runtime does once per shape (compilation, allocation).

        Args:
            batch: names the output file.
            images: .npy of float32 [B, 3, H, W].
            buffers: number of distinct inputs, the same images in other orders.
            pixels: .npy of the same images as uint8 [B, H, W, 3], for graphs that preprocess by themselves.
            estimate_calls: after the first one, to learn what a call costs.
        """
        self._feeds = []  # before the next batch size takes its memory
        name, array = self._load(images, pixels)
        self._feeds = [{name: np.roll(array, index, axis=0)} for index in range(buffers)]
        started = time.perf_counter()
        outputs = self._runner.infer(self._feeds[0])
        first_call_s = time.perf_counter() - started
        written = self._write(f"batch{batch}", [outputs])
        call_s = self._call_s(estimate_calls)
        return {"event": "prepared", "first_call_s": first_call_s, "call_s": call_s, "outputs": written}

    def check(self, batch: int, calls: int, images: str, pixels: str | None = None) -> dict[str, Any]:
        """Store the outputs of the first `calls` batches of an array.

        Args:
            batch: rows of a call.
            calls: so many.
            images, pixels: see `prepare`; of at least `batch` times `calls` rows.
        """
        outputs = []
        for index in range(calls):  # each mapped anew, or all of them would count as the runtime's memory
            name, array = self._load(images, pixels, slice(index * batch, (index + 1) * batch))
            outputs.append(self._runner.infer({name: array}))
        return {"event": "checked", "rows": batch * calls, "outputs": self._write(f"check{batch}", outputs)}

    def _load(self, images: str, pixels: str | None, rows: slice | None = None) -> tuple[str, np.ndarray]:
        """The input's name, and the images, or some rows of them, as it takes them."""
        spec = self._runner.inputs[0]
        path = images if pixels is None or spec.dtype != "uint8" else pixels
        array = np.load(path) if rows is None else np.array(np.load(path, mmap_mode="r")[rows])
        return spec.name, array.astype(spec.dtype, copy=False)

    def _write(self, label: str, outputs: Sequence[FeedDict]) -> str:
        """The outputs of calls one after the other in one file; returns its path."""
        path = f"{self._output_prefix}-{label}.npz"
        arrays: dict[str, Any] = {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}
        np.savez(path, **arrays)
        return path

    def _call_s(self, calls: int) -> float:
        """Seconds of one call, the least of a few: a slow spell of the machine must not decide what fits a budget."""
        calls_s: list[float] = []
        while not calls_s or (len(calls_s) < calls and sum(calls_s) < _ESTIMATE_S):
            started = time.perf_counter()
            self._runner.infer(self._feeds[(len(calls_s) + 1) % len(self._feeds)])
            calls_s.append(time.perf_counter() - started)
        return min(calls_s)

    def measure(self, warmup_calls: int, warmup_s: float, min_calls: int, min_s: float, max_s: float) -> dict[str, Any]:
        """One arm-round: warm-up, then at least `min_calls` calls and `min_s` seconds; no new call after `max_s`."""
        started = time.perf_counter()
        self._warm_up(warmup_calls, warmup_s)
        gc.collect()
        gc.disable()
        try:
            latencies_s = self._timed_calls(min_calls, min_s, started + max_s)
        finally:
            gc.enable()
        return {"event": "measured", "latencies_s": latencies_s, "peak_memory_bytes": peak_memory_bytes()}

    def _next_feed(self) -> FeedDict:
        self._calls += 1
        return self._feeds[self._calls % len(self._feeds)]

    def _warm_up(self, min_calls: int, min_s: float) -> None:
        started = time.perf_counter()
        calls = 0
        while calls < min_calls or time.perf_counter() - started < min_s:
            self._runner.infer(self._next_feed())
            calls += 1

    def _timed_calls(self, min_calls: int, min_s: float, end: float) -> list[float]:
        infer = self._runner.infer
        latencies_s: list[float] = []
        started = now = time.perf_counter()
        while (len(latencies_s) < min_calls or now - started < min_s) and now < end:
            feed = self._next_feed()
            before = time.perf_counter()
            infer(feed)
            now = time.perf_counter()
            latencies_s.append(now - before)
        return latencies_s


def peak_memory_bytes() -> int | None:
    """Peak resident set size of this process since it began executing this program.

    On Linux from VmHWM: ru_maxrss would start with the parent's memory, which survives fork and exec.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(runner: Runner, worker: Worker, commands: IO[str], reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer commands until `quit` or the end of the stream.

    Each reply carries how long the process had waited for the command and the CPU time it burned meanwhile.
    """
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": worker.prepare,
        "check": worker.check,
        "measure": worker.measure,
    }
    idle_since, cpu_since = time.perf_counter(), time.process_time()
    for line in commands:
        idle = {"idle_s": time.perf_counter() - idle_since, "idle_cpu_s": time.process_time() - cpu_since}
        command = json.loads(line)
        name = command.pop("command")
        if name == "quit":
            break
        reply({**handlers[name](**command), **idle})
        idle_since, cpu_since = time.perf_counter(), time.process_time()
    runner.deactivate()
    reply({"event": "bye"})


def loaded_versions() -> dict[str, str]:
    """Versions of the runtimes this process has imported."""
    versions = {}
    for name in _REPORTED_MODULES:
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", None) or metadata.version(name))
    return versions


def describe_error(error: BaseException) -> dict[str, Any]:
    """The reply for an exception: one line, and whether something is not installed."""
    if isinstance(error, EvitDeployError):
        reason = str(error)
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return {"event": "error", "reason": reason, "missing": isinstance(error, (ImportError, MissingDependencyError))}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one arm; returns 0, or 1 after an error, which was replied where anybody was left to read it."""
    commands, replies = _private_streams()
    _prefer_for_out_of_memory()
    parser = argparse.ArgumentParser(prog="python -m evit_deploy.bench.worker", description=__doc__)
    parser.add_argument("--factory", required=True, metavar="MODULE:FUNCTION", help="makes the runner")
    parser.add_argument("--bundle", required=True, type=Path, help="path of the bundle")
    parser.add_argument("--threads", required=True, type=int, help="threads of the runtime")
    parser.add_argument("--engine", help="path of the engine, for arms of engines")
    parser.add_argument("--output-prefix", required=True, help="where outputs are written")
    options = parser.parse_args(argv)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        started = time.perf_counter()
        bundle = Bundle.open(options.bundle, check_hashes=False)
        context = BackendContext(bundle, options.threads, options.engine, measured=True)
        runner = make_runner(options.factory, context)
        runner.activate()
        reply(
            {
                "event": "ready",
                "load_s": time.perf_counter() - started,
                "precision": runner.precision,
                "graph_precision": getattr(runner, "graph_precision", runner.precision),
                "notes": list(runner.notes),
                "versions": loaded_versions(),
            }
        )
        serve(runner, Worker(runner, options.output_prefix), commands, reply)
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises becomes the reason in the arm's row
        traceback.print_exc()
        reply(describe_error(error))
        return 1
    return 0


def _private_streams() -> tuple[IO[str], IO[str]]:
    """The protocol's two streams; afterwards descriptor 0 is empty and 1 is standard error."""
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return commands, replies


def _prefer_for_out_of_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_PREFERENCE, encoding="ascii")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Skips the interpreter's shutdown: some runtimes crash or hang there, after everything has been answered.
    os._exit(code)
