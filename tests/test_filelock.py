from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evit_deploy.bundle.filelock import AlreadyLockedError, FileLock

# Adds one to a number in a file, so often that two holders at once would lose some.
COUNT = """
import sys
from pathlib import Path
from evit_deploy.bundle.filelock import AlreadyLockedError, FileLock
lock, counter = FileLock(Path(sys.argv[1])), Path(sys.argv[2])
for _ in range(int(sys.argv[3])):
    while True:
        try:
            lock.acquire()
            break
        except AlreadyLockedError:
            pass
    counter.write_text(str(int(counter.read_text()) + 1))
    lock.release()
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_held_lock_is_refused_with_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path), pytest.raises(AlreadyLockedError) as caught:
        FileLock(path).acquire()
    assert caught.value.holder_pid == os.getpid()


def test_release_leaves_no_file(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_stale_file_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = start(
        "import sys, time; from pathlib import Path; from evit_deploy.bundle.filelock import FileLock\n"
        "FileLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)",
        str(path),
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(AlreadyLockedError):
        FileLock(path).acquire()
    holder.kill()
    holder.communicate()
    assert path.exists()
    with FileLock(path):
        pass
    assert not path.exists()


def test_release_spares_the_file_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path)
    first.acquire()
    path.unlink()
    second.acquire()
    first.release()
    assert path.exists()
    with pytest.raises(AlreadyLockedError):
        FileLock(path).acquire()
    second.release()


def test_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FileLock(tmp_path / "lock").acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_processes_never_hold_it_together(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNT, str(tmp_path / "lock"), str(counter), "150") for _ in range(3)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 3
    assert counter.read_text() == "450"
    assert not (tmp_path / "lock").exists()
