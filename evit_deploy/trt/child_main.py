"""The process that builds: `python -m evit_deploy.trt.child_main REQUEST RESULT DESCRIPTOR`.

Reads a `BuildRequest`, writes the engine and a JSON of what was built, and one JSON object per line to the descriptor
while it works. Ends with the process that started it, whatever ended that one.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evit_deploy.errors import EvitDeployError
from evit_deploy.trt.request import BuildRequest

_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY_PREFERENCE = "500"  # of 1000: the kernel ends this process before the one that started it

EXIT_REPORTED = 1  # after an "error" message
KIND_PLUGIN, KIND_STORAGE, KIND_OTHER = "plugin", "storage", "other"


def main(argv: Sequence[str]) -> int:
    """Build one engine; 0, or 1 after an error message."""
    request_path, result_path, descriptor = Path(argv[0]), Path(argv[1]), int(argv[2])
    request = BuildRequest.read(request_path)
    _end_with_parent(request.parent_pid)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort inside TensorRT must not leave a core file
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_PREFERENCE, encoding="ascii")

    def emit(message: Mapping[str, Any]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    try:
        from evit_deploy.trt.builder import build
        from evit_deploy.trt.flavors import load_flavor

        result = build(load_flavor(request.flavor), request, emit)
        result_path.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    except BrokenPipeError:
        return EXIT_REPORTED
    except Exception as error:  # noqa: BLE001 - whatever TensorRT raises becomes one message
        traceback.print_exc()
        emit(describe_error(error))
        return EXIT_REPORTED
    return 0


def describe_error(error: BaseException) -> dict[str, Any]:
    """The message for an exception."""
    from evit_deploy.trt.network import PluginUnusedError

    if isinstance(error, EvitDeployError):
        kind = KIND_PLUGIN if isinstance(error, PluginUnusedError) else KIND_OTHER
        return _message(kind, error.summary, error.details, error.hint, error.exit_code)
    if isinstance(error, OSError):
        return {**_message(KIND_STORAGE, error.strerror or str(error), (), ""), "errno": error.errno}
    if isinstance(error, MemoryError):
        return _message(KIND_OTHER, "the build ran out of memory", (), "use a smaller --batch or --workspace-mib")
    text = " ".join(str(error).split())
    return _message(KIND_OTHER, f"the build failed, {type(error).__name__}: {text}", (), "")


def _message(kind: str, summary: str, details: Sequence[str], hint: str, exit_code: int = 1) -> dict[str, Any]:
    return {
        "event": "error",
        "kind": kind,
        "summary": summary,
        "details": list(details),
        "hint": hint,
        "exit_code": exit_code,
    }


def _end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that started it dies."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(EXIT_REPORTED)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skips the interpreter's shutdown, in which some versions of TensorRT crash; all is written
