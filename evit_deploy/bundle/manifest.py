"""The manifest of a bundle as a document: its schema, its own hash, and the checks that its form passes.

{"schema": "evit-deploy/manifest", "schema_version": 1, "model": {...}, "files": {"model.onnx": {...}},
 ..., "manifest_sha256": "hash of the canonical JSON of everything else"}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evit_deploy.constants import MANIFEST_FILE, ONNX_FILE, WEIGHTS_FILE
from evit_deploy.errors import BundleError
from evit_deploy.specs import FAMILIES, ModelSpec, Preprocessing

MANIFEST_SCHEMA = "evit-deploy/manifest"
MANIFEST_SCHEMA_VERSION = 1
HASH_FIELD = "manifest_sha256"
REQUIRED_FILES = (ONNX_FILE, WEIGHTS_FILE)
UNLISTED_FOLDERS = ("engines", "reports")  # filled after the export; an engine carries its own JSON with its hashes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESTORE = "export the bundle again, or restore it from a copy"


@dataclass(frozen=True)
class FileRecord:
    """One file that the manifest vouches for; name is relative, with forward slashes."""

    name: str
    sha256: str
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size_bytes": self.size_bytes}


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces, ASCII) of the manifest without its own hash."""
    rest = {key: value for key, value in manifest.items() if key != HASH_FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json, with the hash filled in.

    Raises:
        ValueError: a value has no place in JSON; NaN and infinity are among them.
    """
    plain = json.loads(json.dumps(manifest, allow_nan=False))
    plain[HASH_FIELD] = manifest_hash(plain)
    return (json.dumps(plain, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def parse_manifest(data: bytes, path: Path) -> dict[str, Any]:
    """The manifest in `data`, of a schema version this code knows, and unchanged.

    Args:
        data: content of manifest.json.
        path: where it was read, for messages.

    Raises:
        BundleError: it is no JSON, no manifest, newer than this code, or changed.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable as JSON: {error}", hint=_RESTORE) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(f"{path} is not a bundle's manifest: its schema is {found!r}, not {MANIFEST_SCHEMA!r}")
    version = manifest.get("schema_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path} has no valid schema_version: {version!r}", hint=_RESTORE)
    if version > MANIFEST_SCHEMA_VERSION:
        raise BundleError(
            f"{path} was written by a newer evit-deploy: schema version {version}, this one reads up to "
            f"{MANIFEST_SCHEMA_VERSION}",
            hint="upgrade evit-deploy, or export the bundle again with this version",
        )
    try:
        digest = manifest_hash(manifest)
    except ValueError as error:
        raise BundleError(f"{path} holds a value that is no JSON: {error}", hint=_RESTORE) from error
    if digest != manifest.get(HASH_FIELD):
        raise BundleError(
            f"{path} has changed since the bundle was written: its content does not match its {HASH_FIELD}",
            hint=_RESTORE,
        )
    return manifest


def check_manifest(manifest: Mapping[str, Any], path: Path) -> list[FileRecord]:
    """The files a manifest lists, after a check of everything that the rest of the tool takes for granted.

    Raises:
        BundleError: a field is missing or malformed, or a file name leads out of the bundle.
    """
    _require_model(manifest, path)
    for field in ("onnx", "origin", "files"):
        if not isinstance(manifest.get(field), dict):
            raise BundleError(f"{path}: {field!r} is missing or not an object", hint=_RESTORE)
    max_batch = manifest["onnx"].get("max_batch")
    if max_batch is not None and (type(max_batch) is not int or max_batch < 1):
        raise BundleError(f"{path}: 'onnx.max_batch' is {max_batch!r}, not a positive number", hint=_RESTORE)
    _require_class_names(manifest, path)
    records = [_file_record(name, value, path) for name, value in manifest["files"].items()]
    for name in REQUIRED_FILES:
        if name not in manifest["files"]:
            raise BundleError(f"{path} does not list {name}", hint=_RESTORE)
    return records


def _require_model(manifest: Mapping[str, Any], path: Path) -> None:
    try:
        spec = ModelSpec.from_json(manifest["model"])
        Preprocessing.from_json(manifest["preprocessing"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: 'model' or 'preprocessing' is malformed: {error!r}", hint=_RESTORE) from error
    sizes = (spec.num_classes, spec.image_size)
    if spec.family not in FAMILIES or any(type(size) is not int or size < 1 for size in sizes):
        raise BundleError(
            f"{path}: 'model' is malformed: family {spec.family!r}, num_classes {spec.num_classes!r}, "
            f"image_size {spec.image_size!r}",
            hint=_RESTORE,
        )


def _require_class_names(manifest: Mapping[str, Any], path: Path) -> None:
    names = manifest.get("class_names")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BundleError(f"{path}: 'class_names' is not a list of names", hint=_RESTORE)
    if len(names) != manifest["model"]["num_classes"]:
        raise BundleError(
            f"{path}: {len(names)} class names for {manifest['model']['num_classes']} classes", hint=_RESTORE
        )


def _file_record(name: str, value: Any, path: Path) -> FileRecord:
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"{path} lists {name!r}, which leads out of the bundle", hint="do not use this bundle")
    if name == MANIFEST_FILE or parts[0] in UNLISTED_FOLDERS:
        raise BundleError(f"{path} lists {name!r}, which a manifest cannot vouch for", hint=_RESTORE)
    sha256 = value.get("sha256") if isinstance(value, dict) else None
    size_bytes = value.get("size_bytes") if isinstance(value, dict) else None
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or type(size_bytes) is not int or size_bytes < 0:
        raise BundleError(f"{path}: the entry of {name!r} has no valid sha256 and size_bytes", hint=_RESTORE)
    return FileRecord(name, sha256, size_bytes)
