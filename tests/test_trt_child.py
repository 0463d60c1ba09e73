"""The process that builds an engine: every way it can end, what it says before, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evit_deploy.errors import EngineError
from evit_deploy.trt.child import BuildMessages, ChildResult, StorageError, run_child
from evit_deploy.trt.child_main import describe_error
from evit_deploy.trt.network import PluginUnusedError
from evit_deploy.trt.request import BuildRequest
from tests.conftest import process_environment
from tests.fake_trt_child import ENGINE, FACTS, command


def request_in(folder: Path, **changes: object) -> BuildRequest:
    fields: dict[str, object] = {
        "flavor": "rtx",
        "onnx_path": str(folder / "model.onnx"),
        "onnx_sha256": "0" * 64,
        "plan_path": str(folder / "name.engine"),
        "profiles": ((1, 8, 64),),
        "parent_pid": os.getpid(),
    }
    return BuildRequest(**{**fields, **changes})  # type: ignore[arg-type]


def run(mode: str, folder: Path, **changes: object) -> tuple[ChildResult, list[str]]:
    steps: list[str] = []
    result = run_child(request_in(folder, **changes), folder, steps.append, command(mode))
    return result, steps


def test_a_request_comes_back_from_its_file(tmp_path: Path) -> None:
    request = request_in(tmp_path, targets=("sm89",), op_types=("EvitLiteMLA",), arches=(89,), plugin_form="jit")
    request.write(tmp_path / "request.json")
    assert BuildRequest.read(tmp_path / "request.json") == request


def test_a_build_reports_steps_facts_and_warnings(tmp_path: Path) -> None:
    result, steps = run("quiet", tmp_path)
    assert steps == ["parsing the graph", "writing the engine", "the engine is written"]
    assert result.facts == FACTS
    assert result.warnings == ["node_of_conv1 already exists (and 2 more like it)"]
    assert (tmp_path / "name.engine").read_bytes() == ENGINE


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        pytest.param("abort", "was ended by SIGABRT", id="abort"),
        pytest.param("segfault", "was ended by SIGSEGV", id="crash"),
        pytest.param("killed", "was ended by SIGKILL, most likely because memory ran out", id="out-of-memory-kill"),
        pytest.param("exit", "ended with exit code 3", id="exit-code"),
        pytest.param("silent-end", "ended without a report", id="no-report"),
    ],
)
def test_a_death_is_one_error_with_the_last_messages(mode: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as raised:
        run(mode, tmp_path)
    assert raised.value.summary.endswith(said)
    assert raised.value.details[0] == "node /stages.1/attention: no kernel"
    if mode == "abort":
        assert "terminate called without an active exception" in raised.value.details
    assert raised.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("core")) == []


def test_a_refusal_keeps_node_and_hint(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as raised:
        run("refused", tmp_path)
    assert raised.value.summary == "TensorRT cannot parse the ONNX file"
    assert raised.value.details == ("node /conv: no", "node /stages.1/attention: no kernel")
    assert raised.value.hint == "mend it"


def test_an_unused_plugin_and_a_full_disk_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PluginUnusedError, match="took 0 of 2"):
        run("plugin", tmp_path, plugin_form="aot")
    with pytest.raises(StorageError) as raised:
        run("full", tmp_path)
    assert raised.value.errno == 28


def is_gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; a zombie has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def pid_in(path: Path) -> int:
    """The number in a file that another process writes."""
    for _ in range(400):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_an_interrupt_of_the_parent_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("FAKE_CHILD_PID_FILE", str(pid_file))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        pid_in(pid_file)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run("sleep", tmp_path)
    finally:
        thread.join()
    assert is_gone(pid_in(pid_file))


PARENT = """
import sys
from pathlib import Path
from tests.test_trt_child import run
run("die-with-parent", Path(sys.argv[1]))
"""


def test_the_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    environment = process_environment({"FAKE_CHILD_PID_FILE": str(pid_file)})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    child = pid_in(pid_file)
    parent.kill()
    parent.wait()
    assert is_gone(child)


def test_the_child_does_not_start_for_a_parent_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ended with exit code 1"):
        run("die-with-parent", tmp_path, parent_pid=1)


def test_alike_warnings_are_counted_and_many_are_cut() -> None:
    messages = BuildMessages()
    for index in range(30):
        messages.add("WARNING", f"kind {chr(97 + index)} of warning")
    messages.add("WARNING", "weight /stem/conv.weight is\nlarge")
    messages.add("WARNING", "weight /head/fc.weight is large")
    assert len(messages.warnings) == 21
    assert messages.warnings[-1] == "and 11 more"
    assert messages.last() == messages.warnings[-8:]
    messages.add("INTERNAL_ERROR", "assertion failed")
    assert messages.last() == ["assertion failed"]


@pytest.mark.parametrize(
    ("error", "kind", "summary"),
    [
        pytest.param(EngineError("no", ["why"]), "other", "no", id="engine-error"),
        pytest.param(PluginUnusedError("not taken"), "plugin", "not taken", id="plugin"),
        pytest.param(OSError(28, "No space left on device"), "storage", "No space left on device", id="full-disk"),
        pytest.param(MemoryError(), "other", "the build ran out of memory", id="memory"),
        pytest.param(RuntimeError("a\nb"), "other", "the build failed, RuntimeError: a b", id="anything-else"),
    ],
)
def test_every_exception_becomes_a_message(error: Exception, kind: str, summary: str) -> None:
    message = describe_error(error)
    assert (message["event"], message["kind"], message["summary"]) == ("error", kind, summary)
