"""An engine's JSON: what was built, from what and for what; read with checks before TensorRT sees the engine.

    engines/NAME.engine   what TensorRT loads
    engines/NAME.json     {"schema": "evit-deploy/engine", "key": ..., "engine_sha256": ..., ...}

The JSON makes the engine one: it is written last, carries the engine's hash and its own, and names by its key all that
the engine depends on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.reader import hash_stream
from evit_deploy.errors import BundleError
from evit_deploy.trt.flavors import JIT, TENSORRT
from evit_deploy.trt.profiles import BatchProfile

ENGINE_SCHEMA = "evit-deploy/engine"
ENGINE_SCHEMA_VERSION = 1
ENGINES_FOLDER = "engines"
ENGINE_SUFFIX, RECORD_SUFFIX = ".engine", ".json"
HASH_FIELD = "record_sha256"
MAX_RECORD_BYTES = 64 * 1024**2  # layers of the largest model with all that the inspector says of them stay below 1 MiB
AMPERE = 80  # the oldest GPU of engines for no GPU in particular

_BUILD_AGAIN = "build it again: evit-deploy build-trt --force"
_COPY_AGAIN = "copy it again, or build it again: evit-deploy build-trt --force"


@dataclass(frozen=True)
class EngineRecord:
    """What the JSON of an engine says; see docs/schemas/engine.schema.json for each field.

    Attributes:
        path: the JSON.
    """

    path: Path
    name: str
    key: str
    key_parts: dict[str, Any]
    model: dict[str, Any]
    onnx_sha256: str
    engine_sha256: str
    size_bytes: int
    flavor: str
    tensorrt_version: str
    targets: list[str]
    targets_note: str
    gpu: str | None
    precision: str
    attention: str
    profiles: list[dict[str, int]]
    io: list[dict[str, Any]]
    plugin: dict[str, Any]
    options: dict[str, Any]
    layers: list[dict[str, Any]] | None
    layers_note: str
    build_seconds: float
    peak_memory_bytes: int | None
    warnings: list[str]
    created: str
    tool_version: str
    versions: dict[str, str]

    @property
    def engine_path(self) -> Path:
        return self.path.with_suffix(ENGINE_SUFFIX)

    @property
    def batch_profiles(self) -> tuple[BatchProfile, ...]:
        return tuple(BatchProfile(**profile) for profile in self.profiles)

    @property
    def json_dict(self) -> dict[str, Any]:
        """The document, its own hash included."""
        document = {"schema": ENGINE_SCHEMA, "schema_version": ENGINE_SCHEMA_VERSION}
        document |= {name: getattr(self, name) for name in _TYPES}
        return {**document, HASH_FIELD: _digest(document)}

    def encode(self) -> bytes:
        """The bytes of the JSON file."""
        return (json.dumps(self.json_dict, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


# Each field of the file and the types it may have.
_TYPES: dict[str, tuple[type, ...]] = {
    **{field.name: (str,) for field in fields(EngineRecord) if field.name != "path"},
    **dict.fromkeys(("key_parts", "model", "plugin", "options", "versions"), (dict,)),
    **dict.fromkeys(("targets", "profiles", "io", "warnings"), (list,)),
    "size_bytes": (int,),
    "gpu": (str, type(None)),
    "layers": (list, type(None)),
    "build_seconds": (int, float),
    "peak_memory_bytes": (int, type(None)),
}


def engine_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all that an engine depends on."""
    return _digest(parts)


def engine_name(parts: Mapping[str, Any]) -> str:
    """NAME of the engine with these key parts: "rtx-fp32-b1-8-64-no-plugin-0a1b2c3d"."""
    batches = "".join(f"_b{p['min']}-{p['opt']}-{p['max']}" for p in parts["profiles"]).removeprefix("_")
    without = "" if parts["plugin"] else "-no-plugin"
    return f"{parts['flavor']}-{parts['precision']}-{batches}{without}-{engine_key(parts)[:8]}"


def open_engine(path: str | os.PathLike[str], *, bundle: Bundle | None = None, check_hash: bool = True) -> EngineRecord:
    """Read an engine's JSON, and check it, the engine's file and that both belong to the bundle.

    Args:
        path: the .engine file, its .json, or NAME inside the bundle.
        bundle: what it must have been built from.
        check_hash: read the whole engine and compare its hash; without it only its size is compared.

    Raises:
        BundleError: something is missing, changed, cut short, or belongs to another model; one line that names the fix.
    """
    json_path = _record_path(Path(path), bundle)
    record = _read_record(json_path)
    if bundle is not None and record.onnx_sha256 != bundle.onnx_sha256:
        raise BundleError(
            f"{record.engine_path} was built from another ONNX file than {bundle.path} holds "
            f"({record.onnx_sha256[:12]} instead of {bundle.onnx_sha256[:12]})",
            hint="build the engine of this bundle: evit-deploy build-trt",
        )
    _check_engine_file(record, check_hash)
    return record


def check_runnable(
    record: EngineRecord, flavor_name: str, version: str, arch: int | None, kernel_hash: str | None
) -> None:
    """Refuse an engine that this TensorRT and GPU cannot run, before TensorRT sees it.

    Args:
        record: the engine's.
        flavor_name, version: of the TensorRT that would load it.
        arch: compute capability of the GPU times ten; None where it is not known, which refuses nothing.
        kernel_hash: of the kernels that would be registered here, for a plugin that is not inside the engine; None
            where there are none.

    Raises:
        BundleError: one line that names what differs and the fix.
    """
    engine = record.engine_path
    if record.flavor != flavor_name:
        raise BundleError(
            f"{engine} was built with flavor {record.flavor}, and {flavor_name} would load it",
            hint=f"build it for this one: evit-deploy build-trt --flavor {flavor_name}",
        )
    same_major = record.tensorrt_version.split(".")[0] == version.split(".")[0]
    compatible = bool(record.options.get("version_compatible")) and same_major
    if record.tensorrt_version != version and not compatible:
        raise BundleError(
            f"{engine} was built with TensorRT {record.tensorrt_version}, and {version} is installed here",
            hint="install that version, or build it again with this one: evit-deploy build-trt",
        )
    if arch is not None:
        _check_arch(record, arch)
    if record.plugin["used"] and record.plugin["form"] == JIT and record.plugin["kernel_hash"] != kernel_hash:
        found = "none are registered here" if kernel_hash is None else f"those here are {kernel_hash[:12]}"
        raise BundleError(
            f"{engine} needs the plugin's kernels {record.plugin['kernel_hash'][:12]}, and {found}",
            hint="build it again with this version of evit-deploy: evit-deploy build-trt",
        )


def engine_names(bundle: Bundle) -> list[str]:
    """NAME of each engine of a bundle, in order; those without a JSON are none."""
    try:
        files = os.listdir(bundle.path / ENGINES_FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        name.removesuffix(RECORD_SUFFIX) for name in files if name.endswith(RECORD_SUFFIX) and not name.startswith(".")
    )


def engines_of(bundle: Bundle) -> list[EngineRecord]:
    """The records of a bundle's engines; the engines' sizes are checked, their hashes are not.

    Raises:
        BundleError: one of them is damaged or of another model.
    """
    return [open_engine(name, bundle=bundle, check_hash=False) for name in engine_names(bundle)]


def _record_path(path: Path, bundle: Bundle | None) -> Path:
    name = path.name
    for suffix in (ENGINE_SUFFIX, RECORD_SUFFIX):
        name = name.removesuffix(suffix)
    beside = path.with_name(name + RECORD_SUFFIX)
    if bundle is not None and not os.path.lexists(beside) and len(path.parts) == 1:
        beside = bundle.path / ENGINES_FOLDER / beside.name
    if os.path.lexists(beside):
        return beside
    engine = beside.with_suffix(ENGINE_SUFFIX)
    if os.path.lexists(engine):
        raise BundleError(
            f"{engine} has no {beside.name} beside it: its build was interrupted, or only one of the two was copied",
            hint="copy both files, or run evit-deploy build-trt",
        )
    there = f"; there: {', '.join(engine_names(bundle)) or 'none'}" if bundle is not None else ""
    raise BundleError(f"{engine} does not exist{there}", hint="build it: evit-deploy build-trt")


def _read_record(path: Path) -> EngineRecord:
    with _plain_file(path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise BundleError(f"{path} is larger than {MAX_RECORD_BYTES} bytes, no engine's JSON is", hint=_BUILD_AGAIN)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable as JSON: {error}", hint=_COPY_AGAIN) from error
    if not isinstance(document, dict) or document.get("schema") != ENGINE_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise BundleError(
            f"{path} is not an engine's JSON: its schema is {found!r}, not {ENGINE_SCHEMA!r}", hint=_BUILD_AGAIN
        )
    version = document.get("schema_version")
    if version != ENGINE_SCHEMA_VERSION:
        newer = type(version) is int and version > ENGINE_SCHEMA_VERSION
        hint = "upgrade evit-deploy, or build it again with this version" if newer else _BUILD_AGAIN
        raise BundleError(f"{path} has schema version {version!r}, this evit-deploy reads 1", hint=hint)
    try:
        unchanged = _digest({key: value for key, value in document.items() if key != HASH_FIELD}) == document.get(
            HASH_FIELD
        )
    except ValueError as error:
        raise BundleError(f"{path} holds a value that is no JSON: {error}", hint=_COPY_AGAIN) from error
    if not unchanged:
        raise BundleError(
            f"{path} has changed since the engine was built: its content does not match its {HASH_FIELD}",
            hint=_COPY_AGAIN,
        )
    return _record_from(document, path)


def _record_from(document: Mapping[str, Any], path: Path) -> EngineRecord:
    wrong = [name for name, types in _TYPES.items() if type(document.get(name)) not in types]
    if wrong:
        raise BundleError(f"{path}: {wrong[0]!r} is missing or malformed", hint=_BUILD_AGAIN)
    record = EngineRecord(path=path, **{name: document[name] for name in _TYPES})
    parts = record.key_parts
    same = ("onnx_sha256", "flavor", "tensorrt_version", "precision", "attention", "profiles", "targets", "gpu")
    if record.key != engine_key(parts) or any(parts.get(name) != getattr(record, name) for name in same):
        raise BundleError(f"{path}: the key is not that of what the engine was built from", hint=_BUILD_AGAIN)
    if record.name != path.stem:
        raise BundleError(
            f"{path} is the JSON of {record.name}{ENGINE_SUFFIX}",
            hint=f"an engine keeps its name: rename both files back to {record.name}",
        )
    return record


def _check_engine_file(record: EngineRecord, check_hash: bool) -> None:
    engine = record.engine_path
    if not os.path.lexists(engine):
        raise BundleError(f"{engine} is missing, and {record.path.name} is there", hint=_COPY_AGAIN)
    with _plain_file(engine) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes < record.size_bytes:
            raise BundleError(f"{engine} is truncated: {size_bytes} of {record.size_bytes} bytes", hint=_COPY_AGAIN)
        if size_bytes > record.size_bytes:
            raise BundleError(
                f"{engine} has changed: {size_bytes} bytes instead of {record.size_bytes}", hint=_COPY_AGAIN
            )
        if check_hash and (digest := hash_stream(file)) != record.engine_sha256:
            raise BundleError(
                f"{engine} has changed since it was built: sha256 {digest[:12]} instead of {record.engine_sha256[:12]}",
                hint=_COPY_AGAIN,
            )


def _check_arch(record: EngineRecord, arch: int) -> None:
    if record.plugin["used"] and record.plugin["form"] == JIT:
        arches = list(record.plugin["arches"])
        what = "its plugin has kernels for " + ", ".join(f"sm{known}" for known in arches)
        runs = arch in arches
    elif record.options.get("hardware_compatible") or not record.targets:
        what, runs = f"it was built for sm{AMPERE} and later", arch >= AMPERE
    else:
        what = f"it was built for {', '.join(record.targets)}"
        runs = f"sm{arch}" in record.targets
    if not runs:
        choice = "" if record.flavor == TENSORRT else f" --targets sm{arch}"
        raise BundleError(
            f"{record.engine_path} does not run on the GPU here, which is sm{arch}: {what}",
            hint=f"build it for this GPU: evit-deploy build-trt{choice}",
        )


@contextmanager
def _plain_file(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading; links, folders and pipes are refused."""
    try:
        # Without O_NONBLOCK a named pipe would block here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BundleError(f"{path} is not a plain file", hint=_COPY_AGAIN)
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise BundleError(f"{path} cannot be read: {reason}", hint=_COPY_AGAIN) from error


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
