from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_deploy.bundle import Bundle, atomic
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import BundleError, UsageError
from tests.tiny_bundle import fill, onnx_bytes, seed_of, tiny_manifest, write_tiny

OLD_SEED, NEW_SEED, NEXT_SEED = 1, 2, 3


def start_writer(target: Path, *options: str, seed: int = NEW_SEED) -> subprocess.Popen[str]:
    """The writer in a process of its own."""
    command = [sys.executable, "-m", "tests.tiny_bundle", str(target), "--seed", str(seed), *options]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def run_writer(target: Path, *options: str, seed: int = NEW_SEED) -> tuple[int, str]:
    """Exit code and stderr of the writer in a process of its own."""
    with start_writer(target, *options, seed=seed) as process:
        _, stderr = process.communicate()
    return process.returncode, stderr


def advance_to(process: subprocess.Popen[str], step: str) -> None:
    """Let a paused writer go on until it is just before a step."""
    assert process.stdin is not None
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != step:
        assert line, f"the writer ended before {step!r}"
        process.stdin.write("\n")
        process.stdin.flush()


def advance(process: subprocess.Popen[str], steps: int) -> None:
    """Let a paused writer do so many steps, and stop before the next."""
    assert process.stdin is not None
    assert process.stdout is not None
    for step in range(steps + 1):
        assert process.stdout.readline(), "the writer ended early"
        if step < steps:
            process.stdin.write("\n")
            process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def steps_of(target: Path, *options: str) -> list[str]:
    """The steps a writer goes through, by running it to the end."""
    with start_writer(target, "--pause", *options) as process:
        stdout, stderr = process.communicate("\n" * 100)
    assert process.returncode == 0, stderr
    return stdout.splitlines()


def write_with(target: Path, body: Callable[[BundleWriter], object], *, force: bool = False, **changes: Any) -> Bundle:
    """Fill a bundle, do something more inside the with block, and commit."""
    with BundleWriter(target, force=force) as writer:
        fill(writer, NEW_SEED)
        body(writer)
        return writer.commit(tiny_manifest(NEW_SEED, **changes))


def raising(error: BaseException | type[BaseException], cause: BaseException | None = None) -> Callable[[object], None]:
    def body(writer: object) -> None:
        raise error from cause

    return body


def nothing(writer: object) -> None:
    pass


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_commit_writes_the_bundle_and_nothing_else(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "m3.evit", seed=7)
    assert names_in(tmp_path) == ["m3.evit"]
    assert names_in(bundle.path) == ["manifest.json", "model.onnx", "weights.safetensors"]
    assert Bundle.open(bundle.path).read_onnx() == onnx_bytes(7)


def test_manifest_is_completed(tmp_path: Path) -> None:
    manifest = write_tiny(tmp_path / "m3.evit").manifest
    assert manifest["schema"] == "evit-deploy/manifest"
    assert manifest["schema_version"] == 1
    assert manifest["tool_version"]
    assert manifest["created"].endswith("+00:00")
    assert sorted(manifest["files"]) == ["model.onnx", "weights.safetensors"]
    assert manifest["files"]["model.onnx"]["size_bytes"] == len(onnx_bytes(0))


def test_save_weights_keeps_values_and_copes_with_views(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state_dict = {"a": base, "b": base.t(), "c": base[1:]}
    with BundleWriter(tmp_path / "m3.evit") as writer:
        (writer.path / "model.onnx").write_bytes(b"onnx")
        writer.save_weights(state_dict)
        loaded = writer.commit(tiny_manifest()).load_state_dict()
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in state_dict)


def test_staged_bundle_can_be_read_before_anybody_sees_it(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "m3.evit") as writer:
        fill(writer, 4)
        staged = writer.stage(tiny_manifest(4))
        assert staged.read_onnx() == onnx_bytes(4)
        assert not (tmp_path / "m3.evit").exists()
        bundle = writer.commit(tiny_manifest(4, verification={"verdict": "pass"}))
    assert Bundle.open(bundle.path).manifest["verification"] == {"verdict": "pass"}


def test_reports_written_before_the_move_are_kept_but_not_vouched_for(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "m3.evit") as writer:
        fill(writer, 0)
        (writer.path / "reports").mkdir()
        (writer.path / "reports" / "verify.json").write_text("{}")
        bundle = writer.commit(tiny_manifest())
    assert "reports/verify.json" not in bundle.manifest["files"]
    (bundle.path / "reports" / "verify.json").write_text("changed")
    Bundle.open(bundle.path)


@pytest.mark.parametrize("has_old", [True, False], ids=["old-bundle", "no-bundle"])
def test_every_file_and_folder_is_flushed_before_the_move(
    tmp_path: Path, has_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is recorded as it is when flushed: after the move it would no longer lie in the staging folder."""
    target = tmp_path / "m3.evit"
    if has_old:
        write_tiny(target, OLD_SEED)
    flushed: list[Path] = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    with BundleWriter(target, force=True) as writer:
        fill(writer, NEW_SEED)
        (writer.path / "reports").mkdir()
        (writer.path / "reports" / "verify.json").write_text("{}")
        staging = writer.path
        writer.commit(tiny_manifest(NEW_SEED))
    *before, last = flushed
    written = [path.relative_to(target) for path in (target, *target.rglob("*"))]
    assert len(written) == 6
    assert set(before) == {staging / path for path in written}
    assert last == tmp_path


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("has_old", [True, False], ids=["old-bundle", "no-bundle"])
def test_any_exit_without_commit_leaves_no_trace(tmp_path: Path, error: type[BaseException], has_old: bool) -> None:
    target = tmp_path / "m3.evit"
    if has_old:
        write_tiny(target, OLD_SEED)
    with pytest.raises(error):
        write_with(target, raising(error), force=True)
    assert names_in(tmp_path) == (["m3.evit"] if has_old else [])
    if has_old:
        assert seed_of(Bundle.open(target)) == OLD_SEED


def test_leaving_without_commit_writes_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "m3.evit") as writer:
        fill(writer, 0)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("missing", ["model.onnx", "weights.safetensors"])
def test_commit_without_a_file_is_a_mistake(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        write_with(tmp_path / "m3.evit", lambda writer: (writer.path / missing).unlink())
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}], ids=["nan", "inf", "set"])
def test_manifest_that_is_no_json_is_a_mistake(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        write_with(tmp_path / "m3.evit", nothing, verification={"psnr_db": value})
    assert names_in(tmp_path) == []


def test_manifest_that_could_not_be_opened_is_not_committed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="class names"):
        write_with(tmp_path / "m3.evit", nothing, class_names=["only one"])
    assert names_in(tmp_path) == []


def test_link_among_the_files_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="symbolic link"):
        write_with(tmp_path / "m3.evit", lambda writer: (writer.path / "labels.txt").symlink_to("/etc/hostname"))


class TestTarget:
    def test_existing_bundle_needs_force(self, tmp_path: Path) -> None:
        write_tiny(tmp_path / "m3.evit", OLD_SEED)
        with pytest.raises(BundleError, match="exists") as caught, BundleWriter(tmp_path / "m3.evit"):
            pytest.fail("work was begun")
        assert "--force" in caught.value.hint
        assert names_in(tmp_path) == ["m3.evit"]

    def test_force_replaces_everything_of_the_old_bundle(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        write_tiny(target, OLD_SEED)
        (target / "engines").mkdir()
        (target / "engines" / "fp16.engine").write_text("of the old model")
        write_tiny(target, NEW_SEED, force=True)
        assert seed_of(Bundle.open(target)) == NEW_SEED
        assert names_in(target) == ["manifest.json", "model.onnx", "weights.safetensors"]
        assert names_in(tmp_path) == ["m3.evit"]

    def test_damaged_bundle_can_be_replaced(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        write_tiny(target, OLD_SEED)
        (target / "manifest.json").write_text("{")
        (target / "model.onnx").unlink()
        write_tiny(target, NEW_SEED, force=True)
        assert seed_of(Bundle.open(target)) == NEW_SEED

    def test_empty_folder_can_be_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "m3.evit").mkdir()
        write_tiny(tmp_path / "m3.evit", force=True)
        assert names_in(tmp_path) == ["m3.evit"]

    @pytest.mark.parametrize("force", [True, False], ids=["force", "no-force"])
    def test_file_is_never_replaced(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "m3.evit").write_text("mine")
        with pytest.raises(BundleError, match="is no bundle; it is not replaced"):
            write_tiny(tmp_path / "m3.evit", force=force)
        assert (tmp_path / "m3.evit").read_text() == "mine"
        assert names_in(tmp_path) == ["m3.evit"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("thesis.txt", "mine"), ("model.onnx", "mine"), ("manifest.json", '{"name": "a web page"}')],
    )
    def test_folder_that_is_no_bundle_is_never_replaced(self, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / "m3.evit").mkdir()
        (tmp_path / "m3.evit" / name).write_text(content)
        with pytest.raises(BundleError, match="is no bundle; it is not replaced"):
            write_tiny(tmp_path / "m3.evit", force=True)
        assert (tmp_path / "m3.evit" / name).read_text() == content

    def test_bundle_with_a_foreign_file_is_never_replaced(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        write_tiny(target, OLD_SEED)
        (target / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match=r"holds notes\.txt, which belongs to no bundle"):
            write_tiny(target, NEW_SEED, force=True)
        assert (target / "notes.txt").read_text() == "mine"

    def test_link_is_followed_and_stays(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        link = tmp_path / "m3.evit"
        link.symlink_to(tmp_path / "disk" / "real.evit")
        write_tiny(link, OLD_SEED)
        write_tiny(link, NEW_SEED, force=True)
        assert link.is_symlink()
        assert names_in(tmp_path / "disk") == ["real.evit"]
        assert seed_of(Bundle.open(link)) == NEW_SEED

    def test_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "m3.evit").symlink_to(tmp_path / "m3.evit")
        with pytest.raises(BundleError, match="is no bundle"):
            write_tiny(tmp_path / "m3.evit", force=True)

    def test_missing_parent(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="does not exist") as caught:
            write_tiny(tmp_path / "nowhere" / "m3.evit")
        assert "nowhere" in caught.value.summary

    def test_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"cannot write .*File name too long"):
            write_tiny(tmp_path / ("a" * 250 + ".evit"))

    def test_root_is_no_target(self) -> None:
        with pytest.raises(UsageError, match="cannot be the name of a bundle"):
            BundleWriter("/")

    @pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
    def test_target_that_appears_meanwhile_is_not_replaced(
        self, tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not exchange:
            monkeypatch.setattr(atomic, "_renameat2", lambda source, target, flags: False)
        target = tmp_path / "m3.evit"
        other = write_tiny(tmp_path / "other.evit", OLD_SEED)
        with pytest.raises(BundleError, match="exists"):
            write_with(target, lambda writer: shutil.copytree(other.path, target))
        assert seed_of(Bundle.open(target)) == OLD_SEED
        assert names_in(tmp_path) == ["m3.evit", "other.evit"]

    @pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
    def test_folder_that_appears_at_the_last_moment_is_not_replaced(
        self, tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the writer's look at the target and its move; an empty folder is what a plain rename replaces."""
        target = tmp_path / "m3.evit"
        renameat2 = atomic._renameat2

        def late(source: Path, destination: Path, flags: int) -> bool:
            target.mkdir()
            return exchange and renameat2(source, destination, flags)

        monkeypatch.setattr(atomic, "_renameat2", late)
        with pytest.raises(BundleError, match=r"m3\.evit exists") as caught:
            write_tiny(target)
        assert "--force" in caught.value.hint
        assert names_in(target) == []
        assert names_in(tmp_path) == ["m3.evit"]

    @pytest.mark.parametrize("force", [False, True], ids=["no-force", "force"])
    @pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
    def test_folder_of_a_user_that_appears_before_the_move_is_kept(
        self, tmp_path: Path, exchange: bool, force: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the last look and the move: even --force replaces bundles only."""
        if not exchange:
            monkeypatch.setattr(atomic, "_renameat2", lambda source, target, flags: False)
        target = tmp_path / "m3.evit"

        def appear(step: str) -> None:
            if step.startswith("moving to"):
                target.mkdir()
                (target / "thesis.txt").write_text("years of work")

        with BundleWriter(target, force=force, progress=appear) as writer:
            fill(writer, NEW_SEED)
            with pytest.raises(BundleError, match="exists"):
                writer.commit(tiny_manifest(NEW_SEED))
        assert (target / "thesis.txt").read_text() == "years of work"
        assert names_in(tmp_path) == ["m3.evit"]

    def test_folder_of_a_user_that_is_exchanged_by_accident_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that lands in the old bundle after the very last look."""
        target = tmp_path / "m3.evit"
        write_tiny(target, OLD_SEED)
        swap = atomic.exchange

        def exchange(first: Path, second: Path) -> bool:
            if not (target / "thesis.txt").exists() and seed_of(Bundle.open(target)) == OLD_SEED:
                (target / "thesis.txt").write_text("years of work")
            return swap(first, second)

        monkeypatch.setattr(atomic, "exchange", exchange)
        with pytest.raises(BundleError, match=r"holds thesis\.txt, which belongs to no bundle"):
            write_tiny(target, NEW_SEED, force=True)
        assert (target / "thesis.txt").read_text() == "years of work"
        assert names_in(tmp_path) == ["m3.evit"]


def kill_points(has_old: bool, has_exchange: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "m3.evit")
        if has_old:
            write_tiny(target, OLD_SEED)
        return steps_of(target, "--force", *([] if has_exchange else ["--no-exchange"]))


class TestKilled:
    @pytest.mark.parametrize(
        ("has_old", "has_exchange"),
        [(False, True), (True, True), (True, False)],
        ids=["no-bundle", "old-bundle", "old-bundle-two-renames"],
    )
    def test_at_every_step(self, tmp_path: Path, has_old: bool, has_exchange: bool) -> None:
        points = kill_points(has_old, has_exchange)
        assert {"locked", "half of model.onnx written", "hashing model.onnx", "flushing to disk"} <= set(points)
        outcomes = set()
        for index in range(len(points)):
            folder = tmp_path / str(index)
            folder.mkdir()
            target = folder / "m3.evit"
            if has_old:
                write_tiny(target, OLD_SEED)
            process = start_writer(target, "--pause", "--force", *([] if has_exchange else ["--no-exchange"]))
            advance(process, index)
            kill(process)
            outcomes.add(self.check_aftermath(target, has_old))
        assert outcomes == {OLD_SEED if has_old else None, NEW_SEED}

    def test_at_random_moments(self, tmp_path: Path) -> None:
        generator = random.Random(0)
        for index in range(8):
            folder = tmp_path / str(index)
            folder.mkdir()
            target = folder / "m3.evit"
            write_tiny(target, OLD_SEED)
            process = start_writer(target, "--force", "--repeat", "200")
            while seed_of(Bundle.open(target)) == OLD_SEED:
                assert process.poll() is None
            time.sleep(generator.uniform(0, 0.03))
            kill(process)
            assert isinstance(seed_of(Bundle.open(target)), int)
            write_tiny(target, NEXT_SEED, force=True)
            assert names_in(folder) == ["m3.evit"]

    @staticmethod
    def check_aftermath(target: Path, has_old: bool) -> int | None:
        """A whole bundle or none now; and after the next run, that run's bundle and no trace of the killed one."""
        if target.exists():
            outcome = seed_of(Bundle.open(target))
            assert outcome in ((OLD_SEED, NEW_SEED) if has_old else (NEW_SEED,))
            with pytest.raises(BundleError, match="exists"):
                write_tiny(target, NEXT_SEED)
        elif has_old:  # between the two renames: the refused run puts the old bundle back
            with pytest.raises(BundleError, match="exists"):
                write_tiny(target, NEXT_SEED)
            outcome = seed_of(Bundle.open(target))
            assert outcome == OLD_SEED
        else:
            outcome = None
        if outcome is not None:
            assert names_in(target.parent) == [target.name]
        write_tiny(target, NEXT_SEED, force=True)
        assert names_in(target.parent) == [target.name]
        assert seed_of(Bundle.open(target)) == NEXT_SEED
        return outcome

    def test_leftovers_of_other_targets_are_left_alone(self, tmp_path: Path) -> None:
        theirs = [".m3.evit.staging-7-0123abcd.evit.staging-1-0123abcd", ".m2.evit.staging-7-0123abcd", ".m3.evit.mine"]
        for name in theirs:
            (tmp_path / name).mkdir()
        write_tiny(tmp_path / "m3.evit")
        assert names_in(tmp_path) == sorted([*theirs, "m3.evit"])


class TestFullDisk:
    @pytest.mark.parametrize("limit_bytes", [0, 1000, 200_001, 400_001])
    def test_one_line_and_nothing_left(self, tmp_path: Path, limit_bytes: int) -> None:
        target = tmp_path / "m3.evit"
        code, stderr = run_writer(target, "--fsize", str(limit_bytes))
        assert code == 1
        assert stderr.startswith(f"cannot write {target}: File too large: ")
        assert len(stderr.splitlines()) == 1
        assert names_in(tmp_path) == []

    def test_old_bundle_stays(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        write_tiny(target, OLD_SEED)
        code, stderr = run_writer(target, "--force", "--fsize", "1000")
        assert code == 1
        assert "File too large" in stderr
        assert names_in(tmp_path) == ["m3.evit"]
        assert seed_of(Bundle.open(target)) == OLD_SEED

    def test_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        code = (
            "import resource, sys, torch\n"
            "from evit_deploy.bundle.writer import BundleWriter\n"
            "from evit_deploy.errors import BundleError\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try:\n"
            "    with BundleWriter(sys.argv[1]) as writer:\n"
            "        writer.save_weights({'w': torch.zeros(100_000)})\n"
            "except BundleError as error:\n"
            "    sys.exit(str(error))\n"
        )
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m3.evit")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"cannot write {tmp_path / 'm3.evit'}: File too large")
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_no_space_is_told_with_the_target(self, tmp_path: Path, code: int) -> None:
        wrapped = raising(RuntimeError("the exporter wraps it"), OSError(code, os.strerror(code)))
        with pytest.raises(BundleError, match="cannot write") as caught:
            write_with(tmp_path / "m3.evit", wrapped)
        assert os.strerror(code) in caught.value.summary
        assert "free some space" in caught.value.hint

    def test_errors_about_other_files_pass_through(self, tmp_path: Path) -> None:
        with pytest.raises(PermissionError), BundleWriter(tmp_path / "m3.evit"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint.pt"))
        with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "m3.evit"):
            raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "checkpoint.pt"))


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that everybody can read and nobody but root can write; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "old.evit", OLD_SEED)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


class TestReadOnly:
    @pytest.mark.parametrize("name", ["new.evit", "old.evit"])
    def test_folder_of_the_target(self, read_only_folder: Path, name: str) -> None:
        target = read_only_folder / name
        code, stderr = run_writer(target, "--force", "--unprivileged")
        assert code == 1
        assert stderr == f"cannot write {target}: Permission denied: choose a writable place with -o\n"
        assert names_in(read_only_folder) == ["old.evit"]
        assert seed_of(Bundle.open(read_only_folder / "old.evit")) == OLD_SEED

    def test_write_protected_bundle(self, read_only_folder: Path) -> None:
        read_only_folder.chmod(0o777)
        (read_only_folder / "old.evit").chmod(0o555)
        code, stderr = run_writer(read_only_folder / "old.evit", "--force", "--unprivileged")
        assert code == 1
        assert "old.evit exists and is write-protected" in stderr
        assert names_in(read_only_folder) == ["old.evit"]
        (read_only_folder / "old.evit").chmod(0o755)


class TestTwoWriters:
    def test_second_is_refused_at_once(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        first = start_writer(target, "--pause")
        advance_to(first, "half of model.onnx written")
        with pytest.raises(BundleError, match="another export is writing") as caught:
            write_tiny(target, NEXT_SEED, force=True)
        assert f"process {first.pid}" in caught.value.summary
        _, stderr = first.communicate("\n" * 100)
        assert first.returncode == 0, stderr
        assert seed_of(Bundle.open(target)) == NEW_SEED
        assert names_in(tmp_path) == ["m3.evit"]

    def test_second_is_refused_through_a_link_too(self, tmp_path: Path) -> None:
        (tmp_path / "link.evit").symlink_to(tmp_path / "m3.evit")
        with BundleWriter(tmp_path / "m3.evit"), pytest.raises(BundleError, match="another export is writing"):
            write_tiny(tmp_path / "link.evit")

    def test_live_staging_folder_is_spared_when_its_lock_file_was_deleted(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        with BundleWriter(target) as writer:
            (tmp_path / ".m3.evit.lock").unlink()
            with pytest.raises(BundleError, match="another export is writing"):
                write_tiny(target, NEXT_SEED)
            fill(writer, NEW_SEED)
            writer.commit(tiny_manifest(NEW_SEED))
        assert seed_of(Bundle.open(target)) == NEW_SEED
        assert names_in(tmp_path) == ["m3.evit"]

    def test_other_targets_are_free(self, tmp_path: Path) -> None:
        with BundleWriter(tmp_path / "m3.evit"):
            write_tiny(tmp_path / "m2.evit")

    def test_of_many_at_once_one_wins(self, tmp_path: Path) -> None:
        target = tmp_path / "m3.evit"
        writers = [start_writer(target, seed=seed) for seed in range(6)]
        ends = [(writer.communicate()[1], writer.returncode) for writer in writers]
        losses = [stderr for stderr, code in ends if code != 0]
        assert len(losses) == 5
        assert all("exists" in stderr or "another export is writing" in stderr for stderr in losses)
        assert ends[seed_of(Bundle.open(target))][1] == 0
        assert names_in(tmp_path) == ["m3.evit"]


def test_reader_sees_the_old_or_the_new_bundle_never_less(tmp_path: Path) -> None:
    target = tmp_path / "m3.evit"
    write_tiny(target, 0)
    seen = set()
    with start_writer(target, "--force", "--repeat", "60", seed=1) as writer:
        while writer.poll() is None:
            seen.add(seed_of(Bundle.open(target)))
        assert writer.returncode == 0
    assert seed_of(Bundle.open(target)) == 60
    assert len(seen) > 3


def test_manifest_is_text_for_people(tmp_path: Path) -> None:
    text = (write_tiny(tmp_path / "m3.evit").path / "manifest.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["model"]["family"] == "msa"
    assert "\n  " in text
