"""Reads what an untrusted checkpoint file holds, and runs none of it.

Every file is looked at before torch sees it: size, kind, and what a zip archive claims to unpack to. Then
`torch.load(weights_only=True)` memory-maps it, so that nothing but the tensors that are used is ever read.
"""

from __future__ import annotations

import argparse
import json
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evit_deploy.constants import MAX_CHECKPOINT_BYTES
from evit_deploy.errors import CheckpointError

_MAX_PICKLE_BYTES = 256 * 1024**2  # the structure without the tensors; real ones stay below a few MiB
_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 1024**2
_RESAVE_HINT = "save the weights alone: torch.save({'state_dict': model.state_dict()}, path)"
_DOWNLOAD_HINT = "copy or download the file again and compare its size"


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds.

    Attributes:
        file_format: "pt" or "safetensors".
        content: what was saved, tensors still memory-mapped where the format allows it.
        metadata: the text metadata of a safetensors file.
    """

    path: Path
    file_format: str
    size_bytes: int
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """The content of a `.pt`, `.pth` or `.safetensors` file, told apart by what is inside.

    Raises:
        CheckpointError: there is no such file, it is none of these, it is damaged or absurdly large, or it holds more
            than plain data.
    """
    size_bytes = _check_is_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        _check_torch_zip(path, size_bytes)
        return CheckpointFile(path, "pt", size_bytes, _load_pickle(path, mmap=True))
    # The length in front of a safetensors header may begin with any byte, also with a pickle's first: it comes first.
    if head[5:9] == b"\0\0\0{" or path.suffix == ".safetensors":
        content, metadata = _load_safetensors(path, head, size_bytes)
        return CheckpointFile(path, "safetensors", size_bytes, content, metadata)
    if re.match(rb"\x80[\x02-\x05]", head):
        return CheckpointFile(path, "pt", size_bytes, _load_pickle(path, mmap=False))
    raise _not_a_checkpoint(path, head)


def _check_is_file(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder, not a checkpoint file", hint="name the file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise CheckpointError(f"{path.name} is empty", hint=_DOWNLOAD_HINT)
    if status.st_size > MAX_CHECKPOINT_BYTES:
        raise _too_large(path, f"has {status.st_size:,} bytes")
    return status.st_size


def _check_torch_zip(path: Path, size_bytes: int) -> None:
    """Refuses, before torch unpacks it, an archive that torch.save did not write or that was changed since."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist(), size_bytes)
            _check_checksums(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size_bytes: int) -> None:
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            f"{path.name} is a TorchScript archive, which carries code", hint="save model.state_dict() of the original"
        )
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if not pickles:
        raise CheckpointError(f"{path.name} is a zip archive that torch.save did not write, first entry {names[:1]}")
    unpacked_bytes = sum(entry.file_size for entry in entries)
    if unpacked_bytes > MAX_CHECKPOINT_BYTES:
        raise _too_large(path, f"claims to unpack to {unpacked_bytes:,} bytes")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise _too_large(path, f"claims a structure of {pickles[0].file_size:,} bytes", _MAX_PICKLE_BYTES)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{path.name} has a compressed entry {entry.filename!r}, which torch.save never writes"
            )
    if unpacked_bytes > size_bytes:
        raise CheckpointError(f"{path.name} is damaged: its entries overlap", hint=_DOWNLOAD_HINT)


def _check_checksums(archive: zipfile.ZipFile) -> None:
    for entry in archive.infolist():
        if entry.CRC == 0:  # torch.serialization.set_crc32_options(False) writes none
            continue
        with archive.open(entry) as file:
            while file.read(_CHUNK_BYTES):  # raises BadZipFile at the end when the checksum differs
                pass


def _load_pickle(path: Path, *, mmap: bool) -> Any:
    import torch

    try:
        # argparse.Namespace is plain data, and the training scripts of timm and of Microsoft save their arguments so.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError as error:
        raise _too_large(path, "claims more memory than there is") from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything; none of it is ours
        raise _pickle_error(path, error) from error


def _pickle_error(path: Path, error: Exception) -> CheckpointError:
    message = str(error)
    unsafe = re.search(r"GLOBAL ([\w.]+)", message)
    if unsafe is not None:
        name = unsafe.group(1)
        if name.startswith(("torch.nn.", "timm.", "torchvision.", "__main__.", "efficientvit.", "model.", "models.")):
            return CheckpointError(f"{path.name} holds the Python object {name}, not only weights", hint=_RESAVE_HINT)
        return CheckpointError(
            f"{path.name} would run code or make objects when loaded: it refers to {name}; nothing of it was run",
            hint=_RESAVE_HINT,
        )
    if "not enough memory" in message or "can't allocate" in message:
        return _too_large(path, "claims more memory than there is")
    if "resize storage" in message or "out of bounds" in message:
        return CheckpointError(
            f"{path.name} is damaged: it declares a tensor larger than the data it stores", hint=_DOWNLOAD_HINT
        )
    if "magic number" in message:
        return CheckpointError(f"{path.name} is a pickle that torch.save did not write", hint=_RESAVE_HINT)
    return _damaged(path, error)


def _load_safetensors(path: Path, head: bytes, size_bytes: int) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":  # a misnamed file
        raise _not_a_checkpoint(path, head)
    if header_bytes > _MAX_SAFETENSORS_HEADER_BYTES:
        raise _too_large(path, f"claims a header of {header_bytes:,} bytes", _MAX_SAFETENSORS_HEADER_BYTES)
    if header_bytes + 8 > size_bytes:
        raise CheckpointError(
            f"{path.name} is truncated: its header has {header_bytes:,} bytes, the file {size_bytes:,}",
            hint=_DOWNLOAD_HINT,
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _not_a_checkpoint(path: Path, head: bytes) -> CheckpointError:
    expected = "expected .pt, .pth or .safetensors"
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path.name} is a Git LFS pointer, not the file itself", hint="run git lfs pull")
    if path.suffix == ".onnx" or re.match(rb"\x08[\x03-\x14](\x12|:|\x1a)", head):
        return CheckpointError(
            f"{path.name} is an ONNX model, not a checkpoint", hint="give the PyTorch checkpoint it was exported from"
        )
    if head.lstrip()[:1] == b"<":
        return CheckpointError(f"{path.name} is a web page, not a checkpoint", hint=_DOWNLOAD_HINT)
    if _is_text(head):
        return CheckpointError(f"{path.name} is a text file, not a checkpoint", hint=expected)
    return CheckpointError(f"{path.name} is no checkpoint: it begins with {head[:8].hex(' ')}", hint=expected)


def _is_text(head: bytes) -> bool:
    return all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)


def _too_large(path: Path, found: str, limit_bytes: int = MAX_CHECKPOINT_BYTES) -> CheckpointError:
    return CheckpointError(
        f"{path.name} {found}; the limit is {limit_bytes:,} bytes", hint="the largest published model has about 1 GB"
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path.name} is truncated or damaged: {_first_line(error)}", hint=_DOWNLOAD_HINT)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def parse_json_metadata(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """The JSON object under a key of a safetensors file's metadata, or None.

    Raises:
        CheckpointError: there is something else under the key.
    """
    if key not in metadata:
        return None
    try:
        data = json.loads(metadata[key])
    except ValueError as error:
        raise CheckpointError(f"{path.name} has metadata {key!r} that is not JSON: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} has metadata {key!r} that is not a JSON object, got {type(data).__name__}")
    return data
