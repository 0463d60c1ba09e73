"""The temporary folder of one benchmark, and the end of those whose benchmark was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evit_deploy.bundle.filelock import try_flock

PREFIX = "evit-deploy-bench-"
MIN_AGE_S = 60.0  # a younger folder may be between its creation and its lock


@contextmanager
def working_folder() -> Iterator[Path]:
    """A new folder that is removed at the end; a kernel lock on it tells other benchmarks that it is in use."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try_flock(descriptor)
            yield Path(name).resolve()
        finally:
            os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove our own old folders that nobody holds the lock of."""
    with suppress(OSError):
        for path in place.glob(f"{PREFIX}*"):
            status = path.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > MIN_AGE_S:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_flock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
