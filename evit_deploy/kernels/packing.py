"""Kernel packs: the cache's kernels in one file, and back on a machine that cannot compile them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_kernels import cache, pack
from evit_kernels.aot import CompiledKernel

import evit_deploy
from evit_deploy.errors import EvitDeployError, InputDataError
from evit_deploy.kernels.compiling import cache_folder
from evit_deploy.kernels.rows import KernelRow, packed_row


def pack_kernels(rows: Sequence[KernelRow], path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Write the kernels of rows, all of which are in the cache, into a pack.

    Args:
        rows: CACHED or COMPILED, at least one.
        path: the file; replaced if it is there.
        folder: the cache; the usual one by default.

    Returns:
        {"path", "tool_version", "kernels" (their number), "size_bytes", "sha256"}.

    Raises:
        EvitDeployError: a kernel has gone from the cache meanwhile.
        OSError: the pack cannot be written.
    """
    place = folder or cache_folder()
    index = pack.write_pack(path, (_stored(row, place) for row in rows), evit_deploy.__version__)
    return _facts(path, index)


def unpack_kernels(path: Path, folder: Path | None = None) -> tuple[dict[str, Any], list[KernelRow]]:
    """Put every kernel of a pack into the cache; none of a pack that is damaged anywhere.

    Args:
        path: the pack.
        folder: the cache; the usual one by default.

    Returns:
        The facts as `pack_kernels` gives them, and a row per kernel.

    Raises:
        InputDataError: there is no such file, or it is no pack or a damaged one.
        OSError: the cache cannot be written.
    """
    if not path.exists():
        hint = "name the file that evit-deploy kernels pack wrote"
        raise InputDataError(f"{path} does not exist", hint=hint)
    try:
        index = pack.read_index(path)
        kernels = cache.unpack(path, folder or cache_folder())
    except pack.PackError as error:
        raise InputDataError(str(error), hint="copy it again, or make it again: evit-deploy kernels pack") from error
    ordered = sorted(kernels, key=lambda kernel: (kernel.operator, kernel.dtype, kernel.arch, kernel.key))
    return _facts(path, index), [packed_row(kernel) for kernel in ordered]


def _stored(row: KernelRow, folder: Path) -> CompiledKernel:
    kernel = cache.load_any(row.key, folder)
    if kernel is None:
        raise EvitDeployError(f"{row} has gone from {folder}", hint="run the same command again")
    return kernel


def _facts(path: Path, index: pack.PackIndex) -> dict[str, Any]:
    data = path.read_bytes()
    return {
        "path": str(path),
        "tool_version": index.tool_version,
        "kernels": len(index.keys),
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
