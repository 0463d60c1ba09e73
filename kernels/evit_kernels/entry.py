"""A compiled kernel as one JSON text, and back: what the cache and the packs hold.

Nothing in a text is believed before it was checked; what is not exactly an entry is a ValueError. The hash tells
damage, not malice: PTX is code, so take packs from people you would take programs from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from evit_kernels.aot import CompiledKernel
from evit_kernels.launch import ELEMENT_BYTES
from evit_kernels.ptx import entry_parameters, ptx_target

FORMAT = "evit-deploy/compiled-kernel"
VERSION = 1
MAX_ENTRY_BYTES = 16 * 1024**2  # some thirty times the largest that any published model needs

_KEY = re.compile(r"[0-9a-f]{64}")
_TEXTS = ("key", "operator", "entry", "ptx", "target", "dtype", "triton_version")
_COUNTS = ("arch", "threads", "shared_bytes", "registers", "spill_bytes")


def is_key(text: object) -> bool:
    """Whether this is a key as `evit_kernels.aot.kernel_key` makes them, and so a harmless file name."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def file_name(key: str) -> str:
    """Name of the file that holds an entry."""
    if not is_key(key):
        raise ValueError(f"not a kernel's key, got {key!r}")
    return f"{key}.json"


def entry_bytes(kernel: CompiledKernel) -> bytes:
    """The JSON text of a kernel, UTF-8; the same kernel gives the same bytes."""
    head = {"format": FORMAT, "version": VERSION, "ptx_sha256": _sha256(kernel.ptx)}
    return json.dumps({**head, **asdict(kernel)}, indent=1, sort_keys=True).encode()


def kernel_from_entry(data: bytes, key: str) -> CompiledKernel:
    """The kernel in a text that nobody vouches for.

    Args:
        data: the text.
        key: the key it was stored under.

    Raises:
        ValueError: it is damaged, of another version or another key, its PTX is not what the rest says, or the kernel
            breaks a limit that every kernel here keeps.
    """
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"no {FORMAT} of version {VERSION}")
    kernel = _kernel(document)
    if kernel.key != key:
        raise ValueError(f"it is the entry of key {kernel.key[:16]}")
    if document.get("ptx_sha256") != _sha256(kernel.ptx):
        raise ValueError("the PTX does not have its SHA-256")
    _check_ptx(kernel)
    broken = kernel.broken_limits()
    if broken:
        raise ValueError(", ".join(broken))
    return kernel


def _kernel(document: Mapping[str, Any]) -> CompiledKernel:
    for name in _TEXTS:
        if not isinstance(document.get(name), str):
            raise ValueError(f"{name} is no text")
    for name in _COUNTS:
        if type(document.get(name)) is not int or document[name] < 0:
            raise ValueError(f"{name} is no count")
    parameters = document.get("parameters")
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise ValueError("parameters is no list of names")
    values = {name: document[name] for name in (*_TEXTS, *_COUNTS)}
    return CompiledKernel(**values, parameters=tuple(parameters))


def _check_ptx(kernel: CompiledKernel) -> None:
    """The facts beside the PTX that the text itself can confirm."""
    name, parameters = entry_parameters(kernel.ptx)
    if name != kernel.entry or len(parameters) != len(kernel.parameters):
        raise ValueError(f"the PTX has the entry {name!r} with {len(parameters)} parameters")
    if ptx_target(kernel.ptx) != kernel.target or re.sub(r"\D", "", kernel.target) != str(kernel.arch):
        raise ValueError(f"the PTX is for {ptx_target(kernel.ptx)}")
    if kernel.dtype not in ELEMENT_BYTES:
        raise ValueError(f"unknown dtype {kernel.dtype!r}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
