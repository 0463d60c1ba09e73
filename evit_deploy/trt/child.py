"""The parent's end of a build: start the process, pass on what it says, and make one error of every way it can fail."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evit_deploy.errors import EngineError
from evit_deploy.trt.child_main import KIND_PLUGIN, KIND_STORAGE
from evit_deploy.trt.flavors import RTX
from evit_deploy.trt.network import PluginUnusedError
from evit_deploy.trt.request import BuildRequest

COMMAND = (sys.executable, "-m", "evit_deploy.trt.child_main")
MAX_DETAILS = 8
MAX_WARNINGS = 20
MAX_LINE_CHARS = 600
_POLL_S = 0.25  # how often a silent child is checked for being alive
_LOADER_NAME = "libtensorrt_rtx.so"  # the bare name that the parser opens when it adds a plugin; wheels lack it
_LIBRARY_NAME = "libtensorrt_rtx.so.1"
_ERRORS = ("ERROR", "INTERNAL_ERROR")

Progress = Callable[[str], None]


@dataclass
class BuildMessages:
    """What TensorRT's logger said, errors and warnings apart; lines that differ in one name only are counted."""

    errors: list[str] = field(default_factory=list)
    _warnings: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, severity: str, text: str) -> None:
        line = " ".join(text.split())[:MAX_LINE_CHARS]
        if severity in _ERRORS:
            self.errors.append(line)
            return
        alike = " ".join("*" if "_" in word or "/" in word else word for word in line.split())
        first, count = self._warnings.get(alike, (line, 0))
        self._warnings[alike] = (first, count + 1)

    @property
    def warnings(self) -> list[str]:
        lines = [
            first if count == 1 else f"{first} (and {count - 1} more like it)"
            for first, count in self._warnings.values()
        ]
        more = len(lines) - MAX_WARNINGS
        return lines if more <= 0 else [*lines[:MAX_WARNINGS], f"and {more} more"]

    def last(self) -> list[str]:
        """The last lines for an error: TensorRT's errors, or its warnings where there is none."""
        return (list(dict.fromkeys(self.errors)) or self.warnings)[-MAX_DETAILS:]


@dataclass(frozen=True)
class ChildResult:
    """What the child reported, and the warnings of its log."""

    facts: Mapping[str, Any]
    warnings: list[str]


class StorageError(Exception):
    """The child could not write; carries the errno."""

    def __init__(self, errno: int | None, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno
        self.reason = reason


def run_child(request: BuildRequest, folder: Path, progress: Progress, command: Sequence[str] = COMMAND) -> ChildResult:
    """Build in a process of its own, in its own process group.

    Args:
        request: what to build.
        folder: private, on the disk of the engine; holds everything that the child writes.
        progress: called with one line per step.
        command: the program that builds; the tests have others.

    Raises:
        EngineError: TensorRT refused, failed, crashed or was killed; the details are its last messages.
        PluginUnusedError: the plugin was asked for and is not used.
        StorageError: the engine cannot be written.
    """
    request.write(folder / "request.json")
    result_path, log_path = folder / "result.json", folder / "log.txt"
    reader, writer = os.pipe()
    messages = BuildMessages()
    try:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*command, str(folder / "request.json"), str(result_path), str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,  # "-m" puts it first on sys.path, and what a crash leaves goes with it
                env=_environment(request, folder),
                pass_fds=(writer,),
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the whole group
            )
        os.close(writer)
        writer = -1
        try:
            error = _listen(process, reader, messages, progress)
            code = process.wait()
        finally:
            _end(process)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if error is not None:
        raise _reported(error, messages)
    if code != 0:
        raise _death(code, messages, log_path)
    try:
        facts = json.loads(result_path.read_bytes())
    except (OSError, ValueError):
        raise EngineError("the process that built the engine ended without a report", messages.last()) from None
    return ChildResult(facts, messages.warnings)


def _listen(
    process: subprocess.Popen[bytes], reader: int, messages: BuildMessages, progress: Progress
) -> dict[str, Any] | None:
    """Pass messages on until the child is gone; returns its error message, if it sent one."""
    pending, error = b"", None
    while True:
        readable, _, _ = select.select([reader], [], [], _POLL_S)
        chunk = os.read(reader, 1 << 16) if readable else b""
        if not chunk and (readable or process.poll() is not None):
            return error
        pending += chunk
        *lines, pending = pending.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["event"] == "step":
                progress(message["text"])
            elif message["event"] == "log":
                messages.add(message["severity"], message["text"])
            else:
                error = message


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reported(error: Mapping[str, Any], messages: BuildMessages) -> Exception:
    if error["kind"] == KIND_STORAGE:
        return StorageError(error.get("errno"), error["summary"])
    details = list(dict.fromkeys([*error["details"], *messages.last()]))[:MAX_DETAILS]
    kind = PluginUnusedError if error["kind"] == KIND_PLUGIN else EngineError
    failure = kind(error["summary"], details, hint=error["hint"])
    failure.exit_code = error["exit_code"]
    return failure


def _death(code: int, messages: BuildMessages, log_path: Path) -> EngineError:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        how = f"was ended by {name}"
    else:
        how = f"ended with exit code {code}"
    hint = "it is no fault of the bundle, which is as it was; --no-plugin or another --batch may build"
    if code == -signal.SIGKILL:
        how += ", most likely because memory ran out"
        hint = "free some memory, or use a smaller --batch or --workspace-mib"
    tail = _last_lines(log_path)
    details = [*messages.last(), *tail][-MAX_DETAILS:]
    return EngineError(f"the process that built the engine {how}", details, hint=hint)


def _last_lines(path: Path, count: int = 3) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip()[:MAX_LINE_CHARS] for line in text.splitlines() if line.strip()][-count:]


def _environment(request: BuildRequest, folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # The parent's import path goes along, so that a checkout that is not installed works.
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment["TMPDIR"] = str(folder)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which nvidia-smi lists GPUs
    if request.flavor == RTX and request.plugin_form is not None:
        libraries = [_folder_with_bare_name(folder), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in libraries if part)
    return environment


def _folder_with_bare_name(folder: Path) -> str:
    """A folder in which the loader finds libtensorrt_rtx.so by its bare name; "" where the wheel's is not found."""
    spec = find_spec("tensorrt_rtx_libs")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        library = place / _LIBRARY_NAME
        if library.is_file():
            link = folder / "lib" / _LOADER_NAME
            link.parent.mkdir()
            link.symlink_to(library.resolve())
            return str(link.parent)
    return ""
