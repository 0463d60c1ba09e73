"""The artifact, read: a folder `NAME.evit` of model.onnx, weights.safetensors and the manifest that vouches for them.

Every byte the manifest lists is checked against its SHA-256, and the manifest against its own, so that a changed,
truncated or half-copied bundle is refused by the name of the file. The hashes tell damage, not malice: whoever can
rewrite a file can rewrite the manifest. Nothing is read through a symbolic link or from outside the folder.

The folder is opened once and everything is read relative to it, so that a bundle replaced meanwhile
(`export --force`) is read entirely old or entirely new.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from evit_deploy.bundle.manifest import FileRecord, check_manifest, parse_manifest
from evit_deploy.constants import BUNDLE_SUFFIX, MANIFEST_FILE, ONNX_FILE, WEIGHTS_FILE
from evit_deploy.errors import BundleError, UsageError
from evit_deploy.specs import ModelSpec, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

HASH_CHUNK_BYTES = 1024**2
MAX_MANIFEST_BYTES = 16 * 1024**2  # a real one is some ten KiB; class names of the largest data sets stay below
MAX_REPLACED_READS = 20  # a bundle that is replaced more often than this while being opened is not worth waiting for

# What tells one file from its successor under the same name: device, inode, size, time of the last change.
_Identity = tuple[int, int, int, int]


class Bundle:
    """A bundle whose manifest and listed files were checked by `Bundle.open`.

    Attributes:
        path: the folder.
        manifest: the manifest, as parsed JSON.
        spec: the model.
        preprocessing: what an image goes through before the network.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], identities: Mapping[str, _Identity]) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = ModelSpec.from_json(manifest["model"])
        self.preprocessing = Preprocessing.from_json(manifest["preprocessing"])
        self._identities = dict(identities)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_hashes: bool = True) -> Bundle:
        """Open a bundle and check it.

        Args:
            path: the bundle's folder.
            check_hashes: read every listed file and compare its SHA-256; without it only names and sizes are compared.

        Raises:
            BundleError: there is no bundle, or something in it is not what was written; the message names the file.
        """
        folder = Path(path)
        for _ in range(MAX_REPLACED_READS):
            descriptor = _open_folder(folder)
            try:
                try:
                    bundle = cls._read(folder, descriptor, check_hashes)
                except BundleError:
                    if _is_current(folder, descriptor):
                        raise
                else:
                    if _is_current(folder, descriptor):
                        return bundle
            finally:
                os.close(descriptor)
        raise BundleError(f"{folder} was replaced again and again while it was read", hint="wait for the other export")

    @classmethod
    def find(cls, folder: str | os.PathLike[str] = ".", *, check_hashes: bool = True) -> Bundle:
        """The bundle meant when none is named: the folder itself if it is one, else the only `*.evit` in it.

        Raises:
            BundleError: there is none.
            UsageError: there are several; the message lists them.
        """
        place = Path(folder)
        if (place / MANIFEST_FILE).is_file():
            return cls.open(place, check_hashes=check_hashes)
        found = _bundles_in(place)
        where = "the current folder" if place.resolve() == Path.cwd() else str(place)
        if not found:
            raise BundleError(
                f"no {BUNDLE_SUFFIX} bundle in {where}",
                hint="name one, or make one with `evit-deploy export CHECKPOINT`",
            )
        if len(found) > 1:
            raise UsageError(f"{len(found)} bundles in {where}: {', '.join(found)}", hint="name the one you mean")
        return cls.open(place / found[0], check_hashes=check_hashes)

    @property
    def onnx_path(self) -> Path:
        return self.path / ONNX_FILE

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def onnx_sha256(self) -> str:
        digest: str = self.manifest["files"][ONNX_FILE]["sha256"]
        return digest

    @property
    def class_names(self) -> list[str] | None:
        names: list[str] | None = self.manifest.get("class_names")
        return names

    @property
    def max_batch(self) -> int | None:
        """The largest batch the bundle was exported for; None when its manifest names none."""
        batch: int | None = self.manifest["onnx"].get("max_batch")
        return batch

    @property
    def has_random_weights(self) -> bool:
        return bool(self.manifest["origin"].get("random_weights", False))

    def load_state_dict(self) -> dict[str, Tensor]:
        """The reference weights, canonical keys, on the CPU.

        Raises:
            BundleError: the file is not readable, or is another one than when the bundle was opened.
        """
        import safetensors
        from safetensors.torch import load_file

        try:
            state_dict = load_file(self.weights_path, device="cpu")
        except (OSError, safetensors.SafetensorError) as error:
            raise BundleError(f"{self.weights_path} cannot be read: {error}", hint=_RESTORE) from error
        self._require_unchanged(WEIGHTS_FILE)
        return state_dict

    def read_onnx(self) -> bytes:
        """The ONNX file's bytes, which are exactly those that `onnx_sha256` stands for.

        Raises:
            BundleError: the file has another hash.
        """
        descriptor = _open_folder(self.path)
        try:
            with open_inside(descriptor, ONNX_FILE, self.path) as file:
                data = file.read()
        finally:
            os.close(descriptor)
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.onnx_sha256:
            raise _changed(self.onnx_path, digest, self.onnx_sha256)
        return data

    @classmethod
    def _read(cls, path: Path, folder: int, check_hashes: bool) -> Bundle:
        manifest_path = path / MANIFEST_FILE
        try:
            with open_inside(folder, MANIFEST_FILE, path) as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError as error:
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST_FILE}", hint=_siblings_hint(path, inside=True)
            ) from error
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{manifest_path} is larger than {MAX_MANIFEST_BYTES} bytes, no manifest is", hint=_RESTORE
            )
        manifest = parse_manifest(data, manifest_path)
        identities = {
            record.name: _check_file(path, folder, record, check_hashes)
            for record in check_manifest(manifest, manifest_path)
        }
        return cls(path, manifest, identities)

    def _require_unchanged(self, name: str) -> None:
        try:
            now = _identity(os.stat(self.path / name, follow_symlinks=False))
        except OSError:
            now = None
        if now != self._identities[name]:
            raise BundleError(
                f"{self.path / name} was replaced after the bundle was opened", hint="run the command again"
            )


_RESTORE = "export the bundle again, or restore it from a copy"


@contextmanager
def open_inside(folder: int, name: str, shown: Path) -> Iterator[BinaryIO]:
    """A regular file below an open folder, reached without following any symbolic link.

    Args:
        folder: descriptor of the folder.
        name: relative path with forward slashes, without `.` and `..`.
        shown: the folder's path, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        BundleError: a link or something that is no plain file is in the way, or it cannot be read.
    """
    *folders, last = name.split("/")
    parent = os.dup(folder)
    try:
        for part in folders:
            inner = _open_at(parent, part, os.O_DIRECTORY, shown / name)
            os.close(parent)
            parent = inner
        # Without O_NONBLOCK a named pipe would block here for ever.
        descriptor = _open_at(parent, last, os.O_NONBLOCK, shown / name)
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{shown / name} is not a plain file", hint=_RESTORE)
    with open(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise BundleError(f"{shown / name} cannot be read: {error.strerror}", hint=_RESTORE) from error


def _open_at(parent: int, name: str, flags: int, shown: Path) -> int:
    try:
        is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
        if not is_link:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BundleError(f"{shown} cannot be read: {error.strerror}", hint=_RESTORE) from error
    raise BundleError(
        f"{shown} goes through a symbolic link, which could lead out of the bundle",
        hint="copy the file itself into the bundle (cp -L)",
    )


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BundleError(f"{path} does not exist", hint=_siblings_hint(path)) from error
    except NotADirectoryError as error:
        around = path.parent / MANIFEST_FILE
        hint = f"the bundle is the folder around it, {path.parent}" if around.is_file() else _siblings_hint(path)
        raise BundleError(f"{path} is a file, and a bundle is a folder", hint=hint) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path} cannot be opened: {reason}") from error


def _check_file(path: Path, folder: int, record: FileRecord, check_hash: bool) -> _Identity:
    shown = path / record.name
    try:
        with open_inside(folder, record.name, path) as file:
            status = os.fstat(file.fileno())
            if status.st_size < record.size_bytes:
                raise BundleError(f"{shown} is truncated: {status.st_size} of {record.size_bytes} bytes", hint=_RESTORE)
            if status.st_size > record.size_bytes:
                raise BundleError(
                    f"{shown} has changed: {status.st_size} bytes instead of {record.size_bytes}", hint=_RESTORE
                )
            if check_hash:
                digest = hash_stream(file)
                if digest != record.sha256:
                    raise _changed(shown, digest, record.sha256)
    except FileNotFoundError as error:
        raise BundleError(f"{shown} is missing, and the manifest lists it", hint=_RESTORE) from error
    return _identity(status)


def hash_stream(file: BinaryIO) -> str:
    """SHA-256 of the rest of a file, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    while chunk := file.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hash_stream(file)


def _changed(path: Path, found: str, expected: str) -> BundleError:
    return BundleError(
        f"{path} has changed since the bundle was written: sha256 {found[:12]} instead of {expected[:12]}",
        hint=_RESTORE,
    )


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _bundles_in(folder: Path) -> list[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    return sorted(
        e.name for e in entries if e.name.endswith(BUNDLE_SUFFIX) and not e.name.startswith(".") and e.is_dir()
    )


def _siblings_hint(path: Path, *, inside: bool = False) -> str:
    place = path if inside and _bundles_in(path) else path.parent
    names = [name for name in _bundles_in(place) if place / name != path]
    if not names:
        return "make one with `evit-deploy export CHECKPOINT`"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    listed = ", ".join(str(place / name) for name in names[:8])
    return f"did you mean {place / close[0]}?" if close else f"bundles there: {listed}"
