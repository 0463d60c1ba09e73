"""An engine gets into its bundle whole or not at all: killed at every step, out of space, raced, replaced, shut out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.filelock import FileLock
from evit_deploy.errors import BundleError, EngineError
from evit_deploy.trt import engines_of, open_engine
from evit_deploy.trt.profiles import BatchProfile
from tests.conftest import process_environment
from tests.fake_trt_child import ENGINE
from tests.tiny_bundle import write_tiny
from tests.trt_builds import fake_build, names_in


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A bundle in a folder that holds nothing else."""
    (tmp_path / "bundles").mkdir()
    path = tmp_path / "bundles" / "tiny.evit"
    write_tiny(path)
    return path


def builder(target: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trt_builds", str(target), *options],
        env=process_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_at_each_step(target: Path, *options: str) -> Iterator[str]:
    """Run the build again and again, killed one step later each time, until it finishes; yields the steps."""
    step = 0
    while True:
        process = builder(target, "--pause", *options)
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(step):
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        name = process.stdout.readline().strip()
        process.kill()
        _, errors = process.communicate()
        if not name:
            assert errors == ""
            return
        assert process.returncode == -signal.SIGKILL
        yield name
        step += 1


def check_whole(target: Path) -> list[str]:
    """Every engine that the bundle says it has is whole; returns their names."""
    bundle = Bundle.open(target)
    for record in engines_of(bundle):
        open_engine(record.path, bundle=bundle)
    return [record.name for record in engines_of(bundle)]


def test_an_engine_and_its_json_are_all_that_a_build_leaves(target: Path) -> None:
    before = names_in(target)
    result = fake_build(target)
    assert not result.reused
    assert result.record.engine_path.read_bytes() == ENGINE
    assert names_in(target / "engines") == [f"{result.record.name}.engine", f"{result.record.name}.json"]
    assert names_in(target) == sorted([*before, "engines"])
    assert names_in(target.parent) == [target.name]
    assert fake_build(target).reused
    assert fake_build(target, force=True).reused is False


def test_killed_at_every_step(target: Path) -> None:
    steps, finished = [], 0
    for step in killed_at_each_step(target):
        steps.append(step)
        assert check_whole(target) == [], f"killed {step}: an engine whose build did not end"
        other = fake_build(target).record.name  # of another batch: what was left is finished or removed
        names = check_whole(target)
        assert names[1:] == [other] or names == [other]
        finished += len(names) == 2
        files = sorted(f"{name}{suffix}" for name in names for suffix in (".engine", ".json"))
        assert names_in(target / "engines") == files, f"killed {step}: something stays"
        shutil.rmtree(target / "engines")
    assert finished == 2, "killed before each of the last two moves"
    assert steps.count("before replace") == 2, "the engine and its JSON"
    assert "writing the engine" in steps
    assert len(steps) >= 9


def test_a_rebuild_killed_at_every_step_keeps_the_old_engine_or_gives_the_new_one(target: Path) -> None:
    old = fake_build(target, profiles=(BatchProfile(1, 4, 4),)).record
    finished = 0
    for step in killed_at_each_step(target, "--force"):
        names = check_whole(target)
        assert names in ([old.name], []), step
        finished += names == []
        fake_build(target, profiles=(BatchProfile(1, 4, 4),))
        assert check_whole(target) == [old.name], f"killed {step}: an engine was lost"
    assert finished >= 1, "the kill between the two moves never came"


def test_what_a_kill_left_complete_is_finished_by_the_next_build(target: Path) -> None:
    """The JSON is the last to move: a build of anything else puts it in place."""
    process = builder(target, "--pause")
    assert process.stdin is not None
    assert process.stdout is not None
    replaced = 0
    while replaced < 2:
        replaced += process.stdout.readline().strip() == "before replace"
        if replaced < 2:
            process.stdin.write("\n")
            process.stdin.flush()
    process.kill()
    process.communicate()
    assert check_whole(target) == []
    (engine,) = (target / "engines").glob("*.engine")
    with pytest.raises(BundleError, match="its build was interrupted"):
        open_engine(engine)
    other = fake_build(target).record
    assert check_whole(target) == sorted([engine.stem, other.name])


def test_an_engine_of_unknown_name_is_nobody_s_to_remove(target: Path) -> None:
    (target / "engines").mkdir()
    (target / "engines" / "mine.engine").write_bytes(b"of another tool")
    (target / "engines" / "rtx-fp32-b1-2-2-00000000.engine").write_bytes(b"left by a kill")
    name = fake_build(target).record.name
    assert names_in(target / "engines") == ["mine.engine", f"{name}.engine", f"{name}.json"]


@pytest.mark.parametrize("mode", ["abort", "refused", "exit"])
def test_a_failed_build_leaves_the_bundle_as_it_was(mode: str, target: Path) -> None:
    before = names_in(target)
    with pytest.raises(EngineError):
        fake_build(target, mode)
    assert names_in(target) == before
    kept = fake_build(target).record
    with pytest.raises(EngineError):
        fake_build(target, mode, force=True)
    assert check_whole(target) == [kept.name]
    assert names_in(target / "engines") == [f"{kept.name}.engine", f"{kept.name}.json"]


@pytest.mark.parametrize("limit", [100, 3000], ids=["request", "engine"])
def test_a_full_disk(limit: int, target: Path) -> None:
    """A limit on the size of files stands for it."""
    assert limit < len(ENGINE)
    process = builder(target, "--fsize", str(limit))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith(f"cannot write {target}/engines: "), errors
    assert len(errors.splitlines()) == 1
    assert names_in(target) == ["manifest.json", "model.onnx", "weights.safetensors"]


def test_the_child_s_full_disk_is_the_same_error(target: Path) -> None:
    with pytest.raises(BundleError, match="engines: No space left on device: free some space"):
        fake_build(target, "full")


def test_two_builds_at_once(target: Path) -> None:
    with FileLock(_engines(target) / ".lock"), pytest.raises(BundleError, match="another build-trt is building in"):
        fake_build(target)
    processes = [builder(target) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes in ([0, 0], [0, 1])
    assert all("another build-trt is building in" in error for error in errors if error)
    assert len(check_whole(target)) == 1
    assert len(names_in(target / "engines")) == 2


def _engines(target: Path) -> Path:
    (target / "engines").mkdir(exist_ok=True)
    return target / "engines"


def test_an_export_that_holds_the_bundle_when_the_engine_is_done(target: Path) -> None:
    lock = FileLock(target.parent / f".{target.name}.lock")
    with lock, pytest.raises(BundleError, match="an export is replacing") as raised:
        fake_build(target)
    assert f"(process {os.getpid()})" in raised.value.summary
    assert names_in(target) == ["manifest.json", "model.onnx", "weights.safetensors"]


@pytest.mark.parametrize("mode", ["quiet", "refused"])
def test_a_bundle_that_is_replaced_while_its_engine_is_built(mode: str, target: Path) -> None:
    """Whatever the build says then, its engine is of another graph."""

    def replace(line: str) -> None:
        if line == "parsing the graph":
            write_tiny(target, 9, force=True)

    with pytest.raises(BundleError, match=r"was replaced while its engine was built|cannot write"):
        fake_build(target, mode, replace)
    assert names_in(target.parent) == [target.name]
    assert names_in(target) == ["manifest.json", "model.onnx", "weights.safetensors"]


def test_an_engines_folder_that_is_a_link(target: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (target / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is no folder of the bundle's own"):
        fake_build(target)


def test_a_read_only_bundle() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "tiny.evit")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            process = builder(folder / "tiny.evit", "--unprivileged")
            _, errors = process.communicate()
            assert process.returncode == 1
            assert errors.startswith(f"cannot write {folder}/tiny.evit/engines: Permission denied: copy the bundle")
            assert names_in(folder / "tiny.evit") == ["manifest.json", "model.onnx", "weights.safetensors"]
        finally:
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_folder_around_the_bundle_that_cannot_be_written(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cannot write beside the bundle cannot replace it: its lock is not needed."""
    acquire = FileLock.acquire

    def refusing(lock: FileLock) -> None:
        if lock.path.parent == target.parent:
            raise PermissionError(13, "Permission denied", str(lock.path))
        acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", refusing)
    name = fake_build(target).record.name
    assert check_whole(target) == [name]
