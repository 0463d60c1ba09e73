"""The real `evit-deploy export` process, killed, out of space, raced and shut out: the old bundle or none, no litter.

`test_bundle_writer.py` stops the writer at its every step with a bundle of a few bytes; here the whole command runs.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import evit_deploy
from evit_deploy.bundle import Bundle
from tests.tiers import tiered
from tests.tiny_bundle import NOBODY_UID

# The first words of a progress line: the process is killed when they appear.
MOMENTS = ("loading", "exporting", "simplifying", "writing the bundle", "random, seed 0: batch 1")
NEW = ("--max-batch", "7")  # how a new bundle is told from the old one
FILE_SIZE_LIMIT_BYTES = 300_000  # below the size of model.onnx, above that of everything written before it


class Exporter:
    """`evit-deploy export digits.pt -o TARGET` as a process, with a folder for temporary files of its own."""

    def __init__(
        self,
        checkpoint: Path,
        target: Path,
        *options: str,
        environment: dict[str, str],
        file_size_limit_bytes: int | None = None,
    ) -> None:
        self.scratch = Path(tempfile.mkdtemp(dir=target.parent.parent, prefix="scratch-"))

        def limit() -> None:
            if file_size_limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit_bytes, file_size_limit_bytes))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "evit_deploy", "export", checkpoint, "-o", target, *options],
            env={**environment, "TMPDIR": str(self.scratch), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def kill_at(self, moment: str) -> None:
        """kill -9 as soon as the progress line that begins so is there."""
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            if line.partition("] ")[2].startswith(moment):
                break
        else:
            pytest.fail(f"{moment!r} never came:\n{''.join(seen)}")
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def finish(self) -> tuple[int, str]:
        """Exit code, and the error's line where there is one; nothing else may stand on stderr but progress."""
        stdout, stderr = self.process.communicate()
        others = [line for line in stderr.splitlines() if not line.startswith("[")]
        assert names_in(self.scratch) == [], "temporary files outside the target's folder"
        if self.process.returncode == 0:
            assert others == []
            return 0, ""
        assert stdout == ""
        assert len(others) == 1, stderr
        assert others[0].startswith("evit-deploy: error: ")
        return self.process.returncode, others[0]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the bundle goes, in a folder that holds nothing else."""
    (tmp_path / "bundles").mkdir()
    return tmp_path / "bundles" / "digits.evit"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_new(bundle: Bundle) -> bool:
    return bundle.max_batch == 7


def put_old(bundle: Bundle, target: Path) -> None:
    assert not is_new(bundle)
    shutil.copytree(bundle.path, target)


def check_next_run_succeeds(checkpoint: Path, target: Path) -> None:
    """The same command again writes its bundle, and nothing of the one before it stays."""
    result = evit_deploy.export(checkpoint, target, max_batch=7, force=True)
    assert result.verification is not None
    assert is_new(Bundle.open(target))
    assert names_in(target.parent) == [target.name]


@pytest.mark.parametrize("moment", tiered(MOMENTS, "writing the bundle".__eq__))
def test_killed_with_an_old_bundle_there(
    moment: str, target: Path, digits_bundle: Bundle, digits_checkpoint: Path, child_environment: dict[str, str]
) -> None:
    put_old(digits_bundle, target)
    Exporter(digits_checkpoint, target, "--force", *NEW, environment=child_environment).kill_at(moment)
    assert Bundle.open(target).manifest == digits_bundle.manifest
    strays = [name for name in names_in(target.parent) if name != target.name]
    assert all(name.startswith(f".{target.name}.") for name in strays), "only hidden names, that say whose they are"
    assert Bundle.find(target.parent).path == target, "what a kill leaves is not taken for a bundle"
    check_next_run_succeeds(digits_checkpoint, target)


@pytest.mark.exhaustive
def test_killed_with_no_bundle_there(target: Path, digits_checkpoint: Path, child_environment: dict[str, str]) -> None:
    Exporter(digits_checkpoint, target, *NEW, environment=child_environment).kill_at("writing the bundle")
    assert not target.exists()
    assert names_in(target.parent) != [], "the kill came too early to show anything"
    check_next_run_succeeds(digits_checkpoint, target)


@pytest.mark.exhaustive
@pytest.mark.parametrize("has_old", [True, False], ids=["old-bundle", "no-bundle"])
def test_a_full_disk(
    has_old: bool,
    target: Path,
    digits_bundle: Bundle,
    digits_checkpoint: Path,
    child_environment: dict[str, str],
) -> None:
    """A limit on the size of files stands for it: model.onnx does not fit."""
    assert digits_bundle.onnx_path.stat().st_size > FILE_SIZE_LIMIT_BYTES
    if has_old:
        put_old(digits_bundle, target)
    options = ("--force", *NEW)
    process = Exporter(
        digits_checkpoint,
        target,
        *options,
        environment=child_environment,
        file_size_limit_bytes=FILE_SIZE_LIMIT_BYTES,
    )
    code, error = process.finish()
    assert code == 1
    assert f"cannot write {target}: File too large" in error
    assert names_in(target.parent) == ([target.name] if has_old else [])
    if has_old:
        assert Bundle.open(target).manifest == digits_bundle.manifest


@pytest.mark.exhaustive
def test_two_at_once(target: Path, digits_checkpoint: Path, child_environment: dict[str, str]) -> None:
    both = [Exporter(digits_checkpoint, target, *NEW, environment=child_environment) for _ in range(2)]
    ends = sorted(process.finish() for process in both)
    assert [code for code, _ in ends] == [0, 1]
    assert "another export is writing" in ends[1][1] or "exists: replace it with --force" in ends[1][1]
    assert is_new(Bundle.open(target))
    assert names_in(target.parent) == [target.name]


# As another user, once everything is imported: a Python under /root is closed to that user. Two rehearsals import it,
# the first of the command line, the second of the loader.
AS_NOBODY = f"""
import contextlib, io, os, sys
from evit_deploy import api, cli
from evit_deploy.checkpoint import load_checkpoint
with contextlib.redirect_stderr(io.StringIO()):
    assert cli.main(["export", "no such checkpoint.pt", *sys.argv[3:]]) == 1
load_checkpoint(sys.argv[2])
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY_UID})
    os.setuid({NOBODY_UID})
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def read_only(digits_bundle: Bundle, digits_checkpoint: Path) -> Iterator[Path]:
    """A folder with the checkpoint and an old bundle, that everybody can read and nobody but root can write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(digits_bundle.path, folder / "digits.evit")
        shutil.copy(digits_checkpoint, folder / "digits.pt")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("name", tiered(["new.evit", "digits.evit"], "digits.evit".__eq__))
def test_a_read_only_folder(
    name: str, read_only: Path, digits_bundle: Bundle, child_environment: dict[str, str]
) -> None:
    arguments = ["export", read_only / "digits.pt", "-o", read_only / name, "--force"]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *arguments],
        env={**child_environment, "HOME": os.sep},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    expected = f"cannot write {read_only / name}: Permission denied: choose a writable place with -o"
    assert lines == [f"evit-deploy: error: {expected}"]
    assert names_in(read_only) == ["digits.evit", "digits.pt"]
    assert Bundle.open(read_only / "digits.evit").manifest == digits_bundle.manifest
