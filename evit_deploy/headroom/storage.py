"""The report as a file: BUNDLE/reports/headroom.json, written whole or not at all, and read with its hash checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

from evit_deploy.bundle import Bundle
from evit_deploy.bundle.atomic import sync_path
from evit_deploy.errors import BundleError, InputDataError
from evit_deploy.headroom.report import HASH_FIELD, SCHEMA, SCHEMA_VERSION, HeadroomReport, report_hash

REPORTS_FOLDER, REPORT_FILE = "reports", "headroom.json"
MAX_REPORT_BYTES = 64 * 1024**2  # some 600 bytes a tensor, and the largest model has some thousand tensors

_MEASURE = "measure it: evit-deploy headroom BUNDLE --images FOLDER"
_MEASURE_AGAIN = "measure again: evit-deploy headroom BUNDLE --images FOLDER"


def prepare_storage(bundle: Bundle) -> Path:
    """The folder of a bundle's reports, made if need be: what cannot be written shows before the work.

    Raises:
        BundleError: there is no such folder and it cannot be made, it is a link, or nothing can be written there.
    """
    folder = bundle.path / REPORTS_FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _storage_error(folder, error) from error
    if folder.is_symlink():
        raise BundleError(f"{folder} is a symbolic link, which could lead out of the bundle", hint="remove it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BundleError(f"{folder} cannot be written", hint="check its permissions, or copy the bundle")
    return folder


def store_report(report: HeadroomReport, bundle: Bundle) -> Path:
    """Write the report into the bundle; an older one is replaced in one step.

    Raises:
        BundleError: the bundle was replaced or removed since it was opened, or the file cannot be written.
    """
    now = Bundle.open(bundle.path, check_hashes=False)
    if now.manifest != bundle.manifest:
        raise BundleError(f"{bundle.path} was replaced while it was measured", hint="run the command again")
    folder = prepare_storage(bundle)
    target, staging = folder / REPORT_FILE, folder / f".{REPORT_FILE}.{os.getpid()}.tmp"
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    try:
        staging.write_text(text, encoding="ascii")
        sync_path(staging)
        staging.replace(target)
        sync_path(folder)
    except OSError as error:
        raise _storage_error(target, error) from error
    finally:
        staging.unlink(missing_ok=True)
    return target


def load_report(path: str | os.PathLike[str] | Bundle) -> HeadroomReport:
    """The report in a JSON file, or the one of a bundle.

    Args:
        path: the JSON, a bundle's folder, or an opened bundle.

    Raises:
        InputDataError: there is none, or it is damaged, changed, or of another version.
    """
    place = path.path if isinstance(path, Bundle) else Path(path)
    file = place / REPORTS_FOLDER / REPORT_FILE if place.is_dir() else place
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_REPORT_BYTES + 1)
    except FileNotFoundError as error:
        missing = f"{place} has no headroom report" if place.is_dir() else f"{file} does not exist"
        raise InputDataError(missing, hint=_MEASURE) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputDataError(f"{file} cannot be read: {reason}", hint=_MEASURE_AGAIN) from error
    if len(data) > MAX_REPORT_BYTES:
        raise InputDataError(f"{file} is larger than {MAX_REPORT_BYTES} bytes, no headroom report is", hint=_MEASURE)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputDataError(
            f"{file} is no headroom report: it is not readable as JSON", hint=_MEASURE_AGAIN
        ) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputDataError(f"{file} is no headroom report", hint=_MEASURE)
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise InputDataError(
            f"{file} is a headroom report of version {found}, this tool reads {SCHEMA_VERSION}", hint=_MEASURE_AGAIN
        )
    found = document.pop(HASH_FIELD, None)
    if found != report_hash(document):
        raise InputDataError(f"{file} has changed since it was written", hint=_MEASURE_AGAIN)
    return HeadroomReport.from_json(document)


def _storage_error(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path} cannot be written: {error.strerror or error}", hint="free some space, or check its permissions"
    )
