"""Compiled kernels kept on disk by the hash of all that they depend on, one JSON file each.

A file is written whole or not at all, and what is damaged counts as absent and is replaced, so several processes may
share a folder and any file in it may be removed at any time. Behind the folder stands the pack that a release carries.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from evit_kernels import pack
from evit_kernels.aot import ARCHES, CompiledKernel, KernelPtx, assemble_kernel, compile_ptx, kernel_key
from evit_kernels.entry import MAX_ENTRY_BYTES, entry_bytes, file_name, kernel_from_entry
from evit_kernels.launch import KernelLaunch

FOLDER_VARIABLE = "EVIT_DEPLOY_KERNEL_CACHE"
SHIPPED_PACK = Path(__file__).with_name("published.zip")  # of the published models; a checkout has none

_log = logging.getLogger(__name__)


class KernelMissingError(RuntimeError):
    """A kernel is neither in the cache nor can it be compiled here."""


def cache_folder() -> Path:
    """$EVIT_DEPLOY_KERNEL_CACHE, else $XDG_CACHE_HOME/evit-deploy/kernels, else ~/.cache/evit-deploy/kernels.

    Raises:
        ValueError: the first is a relative path, or the last is needed and there is no home.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    if named:
        folder = Path(os.path.expanduser(named))
        if not folder.is_absolute():
            raise ValueError(f"{FOLDER_VARIABLE} must be an absolute path, got {named!r}")
        return folder
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # unset; or relative, which the XDG specification says to ignore
        base = Path(os.path.expanduser("~"), ".cache")
    if not base.is_absolute():
        raise ValueError(f"there is no home folder to keep kernels in: set {FOLDER_VARIABLE}")
    return base / "evit-deploy" / "kernels"


def load(key: str, folder: Path | None = None) -> CompiledKernel | None:
    """The kernel stored under a key; None where there is none, or only something damaged."""
    path = (folder or cache_folder()) / file_name(key)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_ENTRY_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    if len(data) > MAX_ENTRY_BYTES:
        return None
    try:
        return kernel_from_entry(data, key)
    except ValueError:
        return None


def load_any(key: str, folder: Path | None = None) -> CompiledKernel | None:
    """The same, or that of the pack that this release carries."""
    return load(key, folder) or _shipped(key)


def store(kernel: CompiledKernel, folder: Path | None = None) -> Path:
    """Keep a kernel under its key, in place of whatever is there; returns the file.

    Raises:
        OSError: the folder cannot be made or written.
    """
    place = folder or cache_folder()
    place.mkdir(parents=True, exist_ok=True)
    path = place / file_name(kernel.key)
    staged = place / f".{kernel.key}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        staged.write_bytes(entry_bytes(kernel))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def find(launch: KernelLaunch, arch: int, folder: Path | None = None) -> CompiledKernel | None:
    """The stored kernel of a launch, or None where there is none that is good here.

    One that another version of Triton compiled is good only where Triton is absent, or if the release carries it.
    """
    key = kernel_key(launch, arch)
    kernel = load(key, folder)
    if kernel is None or installed_triton() not in (None, kernel.triton_version):
        kernel = _shipped(key)
    if kernel is None:
        return None
    found = (kernel.operator, kernel.dtype, kernel.arch, kernel.parameters)
    wanted = (launch.operator, launch.dtype, arch, (*launch.inputs, *launch.extras, *launch.outputs))
    return kernel if found == wanted else None


def _shipped(key: str) -> CompiledKernel | None:
    """The kernel in the pack that this release carries, if it carries one with it."""
    if key not in _shipped_keys(SHIPPED_PACK):
        return None
    try:
        return pack.read_kernel(SHIPPED_PACK, key)
    except (pack.PackError, OSError) as error:
        _log.warning("the kernel pack of this release is not used: %s", error)
        return None


@lru_cache(maxsize=1)
def _shipped_keys(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(pack.read_index(path).keys)
    except (pack.PackError, OSError) as error:
        _log.warning("the kernel pack of this release is not used: %s", error)
        return frozenset()


def unpack(path: Path, folder: Path | None = None) -> list[CompiledKernel]:
    """Put every kernel of a pack into the cache; nothing of a pack that is damaged anywhere.

    Args:
        path: the pack.
        folder: the cache; `cache_folder()` by default.

    Returns:
        The kernels, in the order of the index.

    Raises:
        PackError: it is no pack, or something in it is damaged; the message names the file.
        OSError: it cannot be read, or the cache not written.
    """
    kernels = pack.read_pack(path)
    for kernel in kernels:
        store(kernel, folder)
    return kernels


def compiled(launch: KernelLaunch, arch: int, folder: Path | None = None) -> CompiledKernel:
    """The kernel of a launch: from the cache, else compiled and kept there.

    Args:
        launch: what is launched.
        arch: compute capability times ten, one of `evit_kernels.aot.ARCHES`.
        folder: the cache; `cache_folder()` by default.

    Raises:
        ValueError: an architecture that is not in ARCHES.
        KernelMissingError: it is not in the cache, and Triton is not installed.
        KernelRefusedError: it breaks a limit that every kernel here keeps.
        OSError: it cannot be kept.
    """
    if arch not in ARCHES:
        raise ValueError(f"unknown architecture {arch}, known: {', '.join(map(str, ARCHES))}")
    kernel = find(launch, arch, folder)
    if kernel is not None:
        return kernel
    if installed_triton() is None:
        raise KernelMissingError(
            f"{launch.operator} in {launch.dtype} for sm_{arch} is not in {folder or cache_folder()} and Triton is not "
            f"installed: run `evit-deploy kernels pack --arch {arch} --dtype {launch.dtype}` where it is, and "
            "`evit-deploy kernels unpack evit-kernels.zip` here"
        )
    (result,) = compiled_alike(launch, (arch,), folder)
    if isinstance(result, Exception):
        raise result
    return result


def compiled_alike(
    launch: KernelLaunch, arches: Sequence[int], folder: Path | None = None
) -> Iterator[CompiledKernel | Exception]:
    """The kernel of a launch for architectures that Triton compiles alike (`evit_kernels.aot.alike`), in their order.

    Each is taken from the cache, else compiled and kept there; where one cannot be had, the error stands in its place.
    """
    made: KernelPtx | None = None
    for arch in arches:
        try:
            kernel = find(launch, arch, folder)
            if kernel is None:
                made = made or compile_ptx(launch, arch)
                kernel = assemble_kernel(launch, made, arch)
                store(kernel, folder)
        except Exception as error:  # noqa: BLE001 - the caller tells them apart
            yield error
        else:
            yield kernel


def installed_triton() -> str | None:
    """The version of Triton, or None where it cannot be imported."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
