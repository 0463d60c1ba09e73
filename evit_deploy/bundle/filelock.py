"""A lock between processes that a killed holder cannot leave locked, and that leaves no file behind when released.

The lock is the kernel's `flock` on a small file, so it ends with its holder, whatever ended the holder. The file is
removed on release while the lock is still held. Whoever opened it just before then holds a lock on a file without a
name, which guards nothing; so every acquisition checks afterwards that the path still names the file it locked.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class AlreadyLockedError(Exception):
    """Another holder has the lock.

    Attributes:
        holder_pid: the process that wrote itself into the lock file, None when it is not readable.
    """

    def __init__(self, path: Path, holder_pid: int | None) -> None:
        super().__init__(f"{path} is locked by process {holder_pid}")
        self.holder_pid = holder_pid


class FileLock:
    """An exclusive lock named by a path; never waits.

    Args:
        path: the lock file; its folder must exist and be writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            AlreadyLockedError: somebody holds it, in this process or another.
            OSError: the file cannot be made.
        """
        if self._descriptor is not None:
            raise ValueError(f"{self.path} is already locked by this object")
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if not try_flock(descriptor):
                    raise AlreadyLockedError(self.path, _read_pid(descriptor))
                if _is_named(self.path, descriptor):
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        with suppress(OSError):  # the number only serves the other side's message; a full disk must not stop us here
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Remove the file and give the lock back; harmless when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            if _is_named(self.path, descriptor):
                with suppress(OSError):
                    os.unlink(self.path)
        finally:
            os.close(descriptor)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def try_flock(descriptor: int) -> bool:
    """Take an exclusive flock without waiting: True when it is ours, False when somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() else None
