"""A stand-in for the process that builds an engine: `python -m tests.fake_trt_child MODE REQUEST RESULT DESCRIPTOR`."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = "1.7.1.116"
ENGINE = b"an engine " * 500
FACTS: dict[str, Any] = {
    "tensorrt_version": VERSION,
    "io": [
        {"name": "input", "mode": "input", "dtype": "float32", "shape": [None, 3, 32, 32]},
        {"name": "logits", "mode": "output", "dtype": "float32", "shape": [None, 3]},
    ],
    "plugin_layers": [],
    "layers": None,
    "layers_note": "not readable without a GPU",
    "build_seconds": 0.5,
    "peak_memory_bytes": 1024,
}


def command(mode: str) -> tuple[str, ...]:
    """The words that start it."""
    return (sys.executable, "-m", "tests.fake_trt_child", mode)


def main(argv: Sequence[str]) -> int:
    mode, request_path, result_path, descriptor = argv[0], Path(argv[1]), Path(argv[2]), int(argv[3])
    request = json.loads(request_path.read_text(encoding="utf-8"))

    def emit(**message: Any) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    def fail(kind: str, summary: str, **more: Any) -> int:
        emit(event="error", kind=kind, summary=summary, details=["node /conv: no"], hint="mend it", exit_code=1, **more)
        return 1

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    emit(event="step", text="parsing the graph")
    for name in ("conv1", "conv2", "conv3"):
        emit(event="log", severity="WARNING", text=f"node_of_{name} already exists")
    if mode != "quiet":
        emit(event="log", severity="ERROR", text="node /stages.1/attention: no kernel")
    if mode in ("abort", "segfault", "killed"):
        print("terminate called without an active exception", file=sys.stderr, flush=True)
    if mode == "abort":
        os.abort()
    if mode == "segfault":
        ctypes.string_at(0)
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "exit":
        return 3
    if mode == "refused":
        return fail("other", "TensorRT cannot parse the ONNX file")
    if mode == "plugin" and request["plugin_form"] is not None:
        return fail("plugin", "TensorRT took 0 of 2 attention layers as plugins")
    if mode == "full":
        return fail("storage", "No space left on device", errno=28)
    if mode == "silent-end":
        return 0
    if mode == "sleep":
        Path(os.environ["FAKE_CHILD_PID_FILE"]).write_text(str(os.getpid()))
        time.sleep(600)
    if mode == "die-with-parent":
        from evit_deploy.trt.child_main import _end_with_parent

        _end_with_parent(request["parent_pid"])
        Path(os.environ["FAKE_CHILD_PID_FILE"]).write_text(str(os.getpid()))
        time.sleep(600)
    emit(event="step", text="writing the engine")
    try:
        Path(request["plan_path"]).write_bytes(ENGINE)
    except OSError as error:
        return fail("storage", str(error.strerror), errno=error.errno)
    emit(event="step", text="the engine is written")
    result_path.write_text(json.dumps(FACTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
