"""The artifact, written: everything goes to a hidden folder beside the target, which takes its place in one step.

    with BundleWriter("m3.evit") as writer:
        onnx.save(model, writer.path / "model.onnx")
        writer.save_weights(state_dict)
        staged = writer.stage(manifest)       # a Bundle to verify before anybody else can see it
        writer.commit({**manifest, "verification": result})

Names beside `m3.evit`, of which none outlives the next run:

    .m3.evit.lock               held while a writer lives; removed at its end
    .m3.evit.staging-PID-RANDOM the bundle being written, itself locked; after an exchange, the bundle replaced
    .m3.evit.old-PID-RANDOM     the replaced bundle, only where the file system cannot exchange two folders

Whoever holds the lock is the only writer of the target, so what it finds beside it belongs to the dead. Staleness is
thus decided by the kernel's locks, never by age or by process numbers, which are reused.

A replaced bundle goes as a whole: its `engines/` and `reports/` were made from its own ONNX file and are not carried
over. Where two folders cannot be exchanged (`atomic.exchange`), there is a moment between two renames without any
bundle; a kill right there leaves the old one under its hidden name, and the next run puts it back.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evit_deploy.bundle import atomic
from evit_deploy.bundle.filelock import AlreadyLockedError, FileLock, try_flock
from evit_deploy.bundle.manifest import (
    MANIFEST_SCHEMA,
    MANIFEST_SCHEMA_VERSION,
    REQUIRED_FILES,
    UNLISTED_FOLDERS,
    FileRecord,
    encode_manifest,
)
from evit_deploy.bundle.reader import Bundle, hash_file
from evit_deploy.constants import MANIFEST_FILE, WEIGHTS_FILE
from evit_deploy.environment import tool_version
from evit_deploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# Errors of the place a bundle is written to, whatever library met them.
_STORAGE_ERRORS = {
    errno.ENOSPC: "free some space or choose another place with -o",
    errno.EDQUOT: "free some space or choose another place with -o",
    errno.EFBIG: "a file size limit applies here, see `ulimit -f`",
    errno.EROFS: "choose a writable place with -o",
    errno.EACCES: "choose a writable place with -o",
    errno.EPERM: "choose a writable place with -o",
    errno.EIO: "check the disk, or choose another place with -o",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
    errno.ENOLCK: "this file system cannot lock files, choose a local disk with -o",
}
_ANYWHERE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOLCK)  # these can only come from writing
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors reports I/O errors as text


class BundleWriter:
    """Writes one bundle; a context manager that leaves the whole new bundle or no trace.

    Args:
        target: the bundle's folder; a symbolic link is followed, and stays a link to the bundle.
        force: replace an existing bundle, its engines and reports included.
        progress: called with one line before each step that takes time or changes the disk.

    Raises:
        BundleError: on entry, before any work: the target exists (without `force`), is no bundle, is being written by
            somebody else, or its folder is missing or not writable.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        force: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.force = force
        self._shown = Path(target)
        self._progress = progress or (lambda message: None)
        if not self.target.name:
            raise UsageError(f"{target} cannot be the name of a bundle")
        self._lock = FileLock(self._beside("lock"))
        self._staging: Path | None = None
        self._staging_lock: int | None = None

    @property
    def path(self) -> Path:
        """The folder to write into; not the target."""
        if self._staging is None:
            raise ValueError("BundleWriter.path is known inside its with block only")
        return self._staging

    def __enter__(self) -> BundleWriter:
        try:
            self._begin()
        except BaseException as error:
            self._end()
            reported = self._storage_error(error)
            if reported is not None:
                raise reported from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        reported = None if error is None else self._storage_error(error)
        if reported is not None:
            raise reported from error

    def save_weights(self, state_dict: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write weights.safetensors.

        Args:
            state_dict: tensors under canonical keys; copied to the CPU, so views of one another are welcome.
            metadata: texts for the file's own header.
        """
        from safetensors.torch import save_file

        self._progress(f"writing {WEIGHTS_FILE}")
        # A copy of each: safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
        save_file(tensors, self.path / WEIGHTS_FILE, metadata=None if metadata is None else dict(metadata))

    def stage(self, manifest: Mapping[str, Any]) -> Bundle:
        """Write the manifest beside the files and open the result, still unseen by others.

        Args:
            manifest: the manifest without "schema", "schema_version", "files" and its hash, which are filled in;
                "created" and "tool_version" are filled in where they lack.

        Returns:
            The bundle in the staging folder; it moves with `commit`.

        Raises:
            ValueError: model.onnx or weights.safetensors was not written, or the manifest holds NaN or no JSON.
        """
        document: dict[str, Any] = {
            "schema": MANIFEST_SCHEMA,
            "schema_version": MANIFEST_SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "tool_version": tool_version(),
            **manifest,
            "files": {record.name: record.to_json() for record in self._record_files()},
        }
        self._progress(f"writing {MANIFEST_FILE}")
        (self.path / MANIFEST_FILE).write_bytes(encode_manifest(document))
        return Bundle.open(self.path, check_hashes=False)

    def commit(self, manifest: Mapping[str, Any]) -> Bundle:
        """Write the manifest, flush everything to the disk and move the bundle in place.

        Args:
            manifest: as for `stage`.

        Returns:
            The bundle under its final name.

        Raises:
            BundleError: the target appeared meanwhile and may not be replaced.
        """
        self.stage(manifest)
        self._progress("flushing to disk")
        atomic.sync_tree(self.path)
        self._refuse_occupied_target()
        self._progress(f"moving to {self._shown}")
        if os.path.lexists(self.target):
            self._replace_target()
        else:
            try:
                atomic.rename_to_new(self.path, self.target)
            except FileExistsError as error:
                raise self._exists() from error
        self._progress(f"moved to {self._shown}")
        with suppress(OSError):  # some network file systems refuse to flush a folder; the bundle is in place already
            atomic.sync_path(self.target.parent)
        return Bundle.open(self._shown, check_hashes=False)

    def _begin(self) -> None:
        if not self.target.parent.is_dir():
            raise BundleError(
                f"the folder {self._shown.parent} of {self._shown.name} does not exist", hint="create it first"
            )
        try:
            self._lock.acquire()
        except AlreadyLockedError as error:
            raise self._busy(error.holder_pid) from error
        self._progress("locked")
        self._restore_interrupted()
        for stale in self._leftovers("staging"):
            self._remove_stale(stale)
        self._refuse_occupied_target()
        self._staging = self._beside(f"staging-{os.getpid()}-{secrets.token_hex(4)}")
        os.mkdir(self._staging)
        self._staging_lock = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # NFS locks no folders; the lock file still keeps writers apart there
            try_flock(self._staging_lock)
        self._progress("staging folder made")

    def _end(self) -> None:
        try:
            if self._staging is not None:
                with suppress(OSError):  # the next run tries again; what ended this one is what the user should read
                    self._restore_interrupted()
                shutil.rmtree(self._staging, ignore_errors=True)
        finally:
            if self._staging_lock is not None:
                os.close(self._staging_lock)
                self._staging_lock = None
            self._lock.release()

    def _record_files(self) -> Iterator[FileRecord]:
        for name in REQUIRED_FILES:
            if not (self.path / name).is_file():
                raise ValueError(f"{name} was not written before the manifest")
        for root, folders, files in os.walk(self.path):
            if Path(root) == self.path:
                folders[:] = [name for name in folders if name not in UNLISTED_FOLDERS]
            for name in sorted(files):
                path = Path(root, name)
                relative = path.relative_to(self.path).as_posix()
                if path.is_symlink():
                    raise ValueError(f"{relative} is a symbolic link; a bundle holds plain files")
                if relative != MANIFEST_FILE:
                    self._progress(f"hashing {relative}")
                    yield FileRecord(relative, hash_file(path), path.stat().st_size)

    def _replace_target(self) -> None:
        self._refuse_occupied_target()  # again: what was there at the last look need not be what is there now
        if atomic.exchange(self.path, self.target):
            if _not_replaceable(self.path) is not None:
                atomic.exchange(self.path, self.target)
                self._refuse_occupied_target()
            return
        aside = self._beside(f"old-{os.getpid()}-{secrets.token_hex(4)}")
        os.rename(self.target, aside)
        self._progress("old bundle set aside")
        atomic.rename_to_new(self.path, self.target)
        self._progress("removing the old bundle")
        shutil.rmtree(aside, ignore_errors=True)

    def _restore_interrupted(self) -> None:
        """Finish or undo a replacement that stopped between its two renames."""
        for aside in self._leftovers("old"):
            if os.path.lexists(self.target):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(aside, self.target)

    def _remove_stale(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Locked although the lock file is ours: somebody deleted the lock file of a writer that still lives.
            alive = False
            with suppress(OSError):
                alive = not try_flock(descriptor)
            if alive:
                raise self._busy(None)
            self._progress(f"removing {folder.name}, left by an interrupted run")
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)

    def _leftovers(self, kind: str) -> list[Path]:
        pattern = re.compile(re.escape(self._beside(kind).name) + r"-\d+-[0-9a-f]{8}")
        return sorted(
            Path(entry.path)
            for entry in os.scandir(self.target.parent)
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )

    def _beside(self, kind: str) -> Path:
        return self.target.parent / f".{self.target.name}.{kind}"

    def _refuse_occupied_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        reason = _not_replaceable(self.target)
        if reason is not None:
            raise BundleError(
                f"{self._shown} exists and {reason}; it is not replaced", hint="choose another name with -o"
            )
        if not self.force:
            raise self._exists()

    def _exists(self) -> BundleError:
        return BundleError(f"{self._shown} exists", hint="replace it with --force, or choose another name with -o")

    def _busy(self, pid: int | None) -> BundleError:
        who = f" (process {pid})" if pid is not None else ""
        return BundleError(
            f"another export is writing {self._shown}{who}", hint="wait for it, or choose another name with -o"
        )

    def _storage_error(self, error: BaseException) -> BundleError | None:
        """The one-line error for an exception that came from the disk, wherever in its chain of causes that stands."""
        seen: set[int] = set()
        cause: BaseException | None = error
        while cause is not None and id(cause) not in seen and not isinstance(cause, BundleError):
            seen.add(id(cause))
            code = self._storage_errno(cause)
            if code is not None:
                return BundleError(f"cannot write {self._shown}: {os.strerror(code)}", hint=_STORAGE_ERRORS[code])
            cause = cause.__cause__ or cause.__context__
        return None

    def _storage_errno(self, error: BaseException) -> int | None:
        text = _RUST_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        if text is not None:
            code = int(text.group(1))
            return code if code in _STORAGE_ERRORS else None
        if not isinstance(error, OSError) or error.errno not in _STORAGE_ERRORS:
            return None
        if error.errno in _ANYWHERE:
            return error.errno
        # Anything else may be about a file the caller reads; ours lie in the target's folder.
        names = (name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes)))
        return error.errno if any(self._is_ours(Path(os.fsdecode(name))) for name in names) else None

    def _is_ours(self, path: Path) -> bool:
        if path in (self.target, self.target.parent) or path.name.startswith(f".{self.target.name}."):
            return True
        return self._staging is not None and path.is_relative_to(self._staging)


def _not_replaceable(target: Path) -> str | None:
    """Why something may never be replaced, or None for a bundle with nothing foreign in it and for an empty folder."""
    if not target.is_dir() or target.is_symlink():
        return "is no bundle"
    names = {entry.name for entry in os.scandir(target)}
    if not names:
        return None
    if MANIFEST_FILE not in names:
        return "is no bundle"
    if not os.access(target, os.W_OK):
        return "is write-protected"
    known = {MANIFEST_FILE, *REQUIRED_FILES, *UNLISTED_FOLDERS}
    try:
        manifest = json.loads((target / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        manifest = {"schema": MANIFEST_SCHEMA}  # a damaged bundle may be replaced by a whole one
    if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
        return "is no bundle"
    listed = manifest.get("files")
    if isinstance(listed, dict):
        known.update(name.split("/")[0] for name in listed)
    foreign = sorted(names - known)
    return f"holds {foreign[0]}, which belongs to no bundle" if foreign else None
