"""Where an engine is built and how it gets into its bundle: whole, or not at all.

Names in `engines/`, of which none outlives the next build:

    .lock                 held while somebody builds; ends with its holder
    .staging-PID-RANDOM   everything of the build that runs: request, log, engine, JSON

The engine is moved in place first and its JSON last, with the bundle's own lock held, so that no export replaces the
bundle meanwhile. What a kill leaves is finished by the next build if the engine and its JSON were complete, and removed
otherwise.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from evit_deploy.bundle import Bundle, atomic
from evit_deploy.bundle.filelock import AlreadyLockedError, FileLock
from evit_deploy.errors import BundleError
from evit_deploy.trt.record import ENGINE_SUFFIX, ENGINES_FOLDER, RECORD_SUFFIX, EngineRecord, open_engine

_NAME = re.compile(r"(tensorrt|rtx)-[a-z0-9]+-b[0-9b_-]+(-no-plugin)?-[0-9a-f]{8}")
_STAGING = re.compile(r"\.staging-\d+-[0-9a-f]{8}")
_STORAGE_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "a file size limit applies here, see `ulimit -f`",
    errno.EROFS: "copy the bundle to a writable place",
    errno.EACCES: "copy the bundle to a writable place",
    errno.EPERM: "copy the bundle to a writable place",
    errno.EIO: "check the disk",
    errno.ENOLCK: "this file system cannot lock files: copy the bundle to a local disk",
}


class EngineWriter:
    """A private folder inside a bundle's `engines/`, and the move from there; a context manager.

    Args:
        bundle: open.

    Raises:
        BundleError: on entry: somebody else builds in this bundle, or it cannot be written.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._root = Path(os.path.realpath(bundle.path))
        self._engines = self._root / ENGINES_FOLDER
        self._lock = FileLock(self._engines / ".lock")
        self._staging: Path | None = None
        self._root_descriptor: int | None = None

    @property
    def path(self) -> Path:
        """The private folder."""
        if self._staging is None:
            raise ValueError("EngineWriter.path is known inside its with block only")
        return self._staging

    def __enter__(self) -> EngineWriter:
        try:
            self._begin()
        except BaseException as error:
            self._end()
            raise self._reported(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if error is not None:
            reported = self._reported(error)
            if reported is not error:
                raise reported from error

    def check_current(self) -> None:
        """Refuse to go on when the bundle is not the one that was opened.

        Raises:
            BundleError: it was replaced or removed.
        """
        try:
            assert self._root_descriptor is not None
            same = os.path.samestat(os.stat(self._root), os.fstat(self._root_descriptor))
            same = same and Bundle.open(self._root, check_hashes=False).onnx_sha256 == self.bundle.onnx_sha256
        except (OSError, BundleError):
            same = False
        if not same:
            raise BundleError(
                f"{self.bundle.path} was replaced while its engine was built; the engine was not kept",
                hint="run the same command again",
            )

    def commit(self, record: EngineRecord) -> EngineRecord:
        """Move the finished engine and its JSON in place.

        Args:
            record: of NAME.engine in the private folder.

        Returns:
            The record under its final path.

        Raises:
            BundleError: the bundle was replaced meanwhile, or an export holds it.
        """
        staged = self.path / (record.name + RECORD_SUFFIX)
        partial = staged.with_suffix(".partial")
        partial.write_bytes(record.encode())
        atomic.sync_path(partial)
        os.rename(partial, staged)  # from here on a kill loses nothing: the next build finishes this
        with self._bundle_held():
            self.check_current()
            self._move(staged)
        with suppress(OSError):  # some network file systems refuse to flush a folder
            atomic.sync_path(self._engines)
        return open_engine(self.bundle.path / ENGINES_FOLDER / staged.name, check_hash=False)

    def _begin(self) -> None:
        self._root_descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.check_current()
        with suppress(FileExistsError):
            os.mkdir(self._engines)
        if self._engines.is_symlink() or not self._engines.is_dir():
            raise BundleError(f"{self._engines} is no folder of the bundle's own", hint="remove it")
        try:
            self._lock.acquire()
        except AlreadyLockedError as error:
            raise self._busy("another build-trt is building in", error.holder_pid) from error
        self._clean_up()
        self._staging = self._engines / f".staging-{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(self._staging, 0o700)

    def _end(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        self._lock.release()
        with suppress(OSError):  # not empty: there are engines
            os.rmdir(self._engines)
        if self._root_descriptor is not None:
            os.close(self._root_descriptor)
            self._root_descriptor = None

    def _clean_up(self) -> None:
        """Finish or remove what killed builds left."""
        for entry in sorted(os.scandir(self._engines), key=lambda entry: entry.name):
            if _STAGING.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                self._finish_or_remove(Path(entry.path))
        for path in sorted(self._engines.glob(f"*{ENGINE_SUFFIX}")):
            if _NAME.fullmatch(path.stem) and not path.with_suffix(RECORD_SUFFIX).exists():
                path.unlink()

    def _finish_or_remove(self, staging: Path) -> None:
        for staged in staging.glob(f"*{RECORD_SUFFIX}"):
            if not _NAME.fullmatch(staged.stem):
                continue
            engine = self._engines / f"{staged.stem}{ENGINE_SUFFIX}"
            if engine.exists() and not staged.with_suffix(ENGINE_SUFFIX).exists():
                os.rename(engine, staged.with_suffix(ENGINE_SUFFIX))  # it had been moved already: back to its JSON
            with suppress(BundleError), self._bundle_held():
                open_engine(staged, bundle=self.bundle)
                self._move(staged)
        shutil.rmtree(staging, ignore_errors=True)

    def _move(self, staged: Path) -> None:
        target = self._engines / staged.name
        target.unlink(missing_ok=True)  # between the two files of an engine there is none, rather than a wrong one
        os.replace(staged.with_suffix(ENGINE_SUFFIX), target.with_suffix(ENGINE_SUFFIX))
        os.replace(staged, target)

    @contextmanager
    def _bundle_held(self) -> Iterator[None]:
        """Keep an export from replacing the bundle."""
        lock = FileLock(self._root.parent / f".{self._root.name}.lock")
        try:
            lock.acquire()
        except AlreadyLockedError as error:
            raise self._busy("an export is replacing", error.holder_pid) from error
        except OSError as error:  # whoever cannot write beside the bundle cannot replace it either
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        try:
            yield
        finally:
            lock.release()

    def _busy(self, what: str, pid: int | None) -> BundleError:
        who = f" (process {pid})" if pid is not None else ""
        return BundleError(f"{what} {self.bundle.path}{who}", hint="wait for it, then run the same command again")

    def _reported(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError) and error.errno in _STORAGE_HINTS:
            return storage_error(self.bundle, error.errno)
        return error


def storage_error(bundle: Bundle, code: int | None) -> BundleError:
    """The one-line error for a disk that does not take an engine."""
    reason = "the disk refused it" if code is None else os.strerror(code)
    return BundleError(
        f"cannot write {bundle.path / ENGINES_FOLDER}: {reason}", hint=_STORAGE_HINTS.get(code or 0, "check the disk")
    )
