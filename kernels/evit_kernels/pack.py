"""A kernel pack: one ZIP file of cache entries, for a machine that has no Triton to compile them.

Reading one is safe whoever made it: only members whose names follow from valid keys are looked at, each up to a limit,
no name from the archive becomes a path, and every entry is checked as one in the cache is.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evit_kernels.aot import CompiledKernel
from evit_kernels.entry import MAX_ENTRY_BYTES, entry_bytes, file_name, is_key, kernel_from_entry

FORMAT = "evit-deploy/kernel-pack"
VERSION = 1
DEFAULT_NAME = "evit-kernels.zip"
INDEX = "index.json"
MAX_INDEX_BYTES = 16 * 1024**2
MAX_TOTAL_BYTES = 512 * 1024**2  # of all entries, unpacked; every published model, everywhere, takes a third of it

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a ZIP file can say: the same kernels give the same bytes
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What the standard library raises for archives that are none, cut short, encrypted or made up.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, OSError, RuntimeError, ValueError)


class PackError(ValueError):
    """A file is no kernel pack, or a damaged one."""


@dataclass(frozen=True)
class PackIndex:
    """What a pack says it holds.

    Attributes:
        tool_version: evit-deploy that made it; its kernels have other keys in a version whose sources differ.
        keys: of its kernels, sorted.
    """

    tool_version: str
    keys: tuple[str, ...]


def write_pack(path: Path, kernels: Iterable[CompiledKernel], tool_version: str) -> PackIndex:
    """Write a pack, whole or not at all, in place of whatever is there.

    Raises:
        ValueError: there is no kernel to pack.
        OSError: the file cannot be written.
    """
    keys = []
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
            for kernel in kernels:
                keys.append(kernel.key)
                _add(archive, file_name(kernel.key), entry_bytes(kernel))
            if not keys:
                raise ValueError("there is no kernel to pack")
            index = {"format": FORMAT, "version": VERSION, "tool_version": tool_version, "keys": sorted(keys)}
            _add(archive, INDEX, json.dumps(index, indent=1).encode())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return PackIndex(tool_version, tuple(sorted(keys)))


def read_index(path: Path) -> PackIndex:
    """What a pack says it holds.

    Raises:
        PackError: it is no pack; the message names the file.
        OSError: it cannot be read.
    """
    with _archive(path) as archive:
        return _index(archive)


def read_pack(path: Path) -> list[CompiledKernel]:
    """Every kernel of a pack, in the order of the index.

    Raises:
        PackError: it is no pack, or something in it is damaged; the message names the file.
        OSError: it cannot be read.
    """
    kernels = []
    with _archive(path) as archive:
        total_bytes = 0
        for key in _index(archive).keys:
            data = _read(archive, file_name(key), MAX_ENTRY_BYTES)
            total_bytes += len(data)
            if total_bytes > MAX_TOTAL_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_TOTAL_BYTES} bytes")
            try:
                kernels.append(kernel_from_entry(data, key))
            except ValueError as error:
                raise ValueError(f"{file_name(key)}: {error}") from error
    return kernels


def read_kernel(path: Path, key: str) -> CompiledKernel:
    """One kernel of a pack by its key.

    Raises:
        PackError: it is no pack, or has no such kernel or a damaged one; the message names the file.
        OSError: it cannot be read.
    """
    with _archive(path) as archive:
        return kernel_from_entry(_read(archive, file_name(key), MAX_ENTRY_BYTES), key)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A pack opened for reading; whatever goes wrong with it inside becomes a PackError that names the file."""
    with open(path, "rb") as file:
        try:
            if os.fstat(file.fileno()).st_size > MAX_TOTAL_BYTES:
                raise ValueError(f"it has more than {MAX_TOTAL_BYTES} bytes")
            with zipfile.ZipFile(file) as archive:
                yield archive
        except _DAMAGE as error:
            raise PackError(f"{path} is no kernel pack, or a damaged one: {_reason(error)}") from error


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.compress_type = zipfile.ZIP_DEFLATED
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)


def _index(archive: zipfile.ZipFile) -> PackIndex:
    document: Any = json.loads(_read(archive, INDEX, MAX_INDEX_BYTES))
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{INDEX} is not that of a {FORMAT} of version {VERSION}")
    keys, tool_version = document.get("keys"), document.get("tool_version")
    if not isinstance(tool_version, str):
        raise ValueError(f"{INDEX} has no tool_version")
    if not isinstance(keys, list) or not keys or not all(map(is_key, keys)) or len(set(keys)) < len(keys):
        raise ValueError(f"{INDEX} has no list of different keys")
    return PackIndex(tool_version, tuple(keys))


def _read(archive: zipfile.ZipFile, name: str, limit_bytes: int) -> bytes:
    """A member by its name, refused beyond a limit whatever the archive says of its size."""
    if archive.getinfo(name).compress_type not in _COMPRESSIONS:
        raise ValueError(f"{name} is compressed as no pack is")
    with archive.open(name) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"{name} has more than {limit_bytes} bytes")
    return data


def _reason(error: BaseException) -> str:
    """One line; KeyError's text comes in quotes of its own."""
    return " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
