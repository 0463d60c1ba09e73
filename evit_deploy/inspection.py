"""What a path is: a checkpoint, an ONNX file, a bundle or an engine, and the facts that matter before it is used.

Every answer is a JSON document with the same four first keys: schema, schema_version, kind, path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_deploy.bundle import Bundle
from evit_deploy.cost import Cost, count_cost, published_costs
from evit_deploy.errors import CheckpointError, EvitDeployError, InputDataError
from evit_deploy.specs import FAMILY_TITLES, ModelSpec, split_name

if TYPE_CHECKING:
    from torch import Tensor

INSPECT_SCHEMA = "evit-deploy/inspect"
INSPECT_SCHEMA_VERSION = 1

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar")


def inspect_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what a file or folder is.

    Args:
        path: a bundle, an ONNX file, a checkpoint, or an engine (its file, its JSON, or its name in `engines/`); a
            file's kind is decided by its suffix, then by its content.

    Returns:
        {"schema", "schema_version", "kind": "bundle" | "onnx" | "checkpoint" | "engine", "path", ...its facts}.

    Raises:
        EvitDeployError: there is nothing, it is damaged, or it is none of the four; the message names the path.
    """
    place = Path(path)
    if _is_engine(place):
        from evit_deploy.inspection_engines import engine_facts

        kind, facts = "engine", engine_facts(place)
    elif place.is_dir() or not place.exists():
        if not place.exists() and place.suffix in (".onnx", *_CHECKPOINT_SUFFIXES):
            raise InputDataError(f"{place} does not exist", hint=_sibling_hint(place))
        kind, facts = "bundle", _bundle_facts(Bundle.open(place))
    elif not place.is_file():
        raise InputDataError(
            f"{place} is neither a file nor a folder", hint="name a checkpoint, an ONNX file, a bundle or an engine"
        )
    elif _is_onnx(place):
        from evit_deploy.onnx_facts import onnx_facts

        kind, facts = "onnx", onnx_facts(place)
    else:
        kind, facts = "checkpoint", _checkpoint_facts(place)
    return {
        "schema": INSPECT_SCHEMA,
        "schema_version": INSPECT_SCHEMA_VERSION,
        "kind": kind,
        "path": os.fspath(path),
        **facts,
    }


def list_models() -> list[dict[str, Any]]:
    """Every published model: name, family, variant, title, image_size, num_classes, parameters, multiply_adds.

    Read from a table shipped with the package (`evit_deploy.cost`); neither PyTorch nor timm is imported.
    """
    rows = []
    for name, cost in published_costs().items():
        family, variant = split_name(name)
        spec = ModelSpec.published(name)
        rows.append(
            {
                "name": name,
                "family": family,
                "variant": variant,
                "title": FAMILY_TITLES[family],
                "image_size": spec.image_size,
                "num_classes": spec.num_classes,
                **asdict(cost),
            }
        )
    return rows


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    from evit_deploy.inspection_engines import engines_in
    from evit_deploy.onnx_facts import onnx_facts

    manifest = bundle.manifest
    return {
        **_model_facts(bundle.spec, None),
        "preprocessing": bundle.preprocessing.to_json(),
        "class_names": bundle.class_names,
        "random_weights": bundle.has_random_weights,
        "origin": manifest["origin"],
        "created": manifest.get("created"),
        "tool_version": manifest.get("tool_version"),
        "verification": manifest.get("verification"),
        "calibration": manifest.get("calibration"),
        "export": manifest["onnx"],
        "onnx": onnx_facts(bundle.onnx_path),
        "hashes_checked": True,
        "files": manifest["files"],
        "engines": engines_in(bundle),
        "reports": _names_in(bundle.path / "reports"),
        "versions": manifest.get("versions", {}),
    }


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    from evit_deploy.exporting import timed_checkpoint

    checkpoint, _ = timed_checkpoint(path)
    return {
        **_model_facts(checkpoint.spec, checkpoint.state_dict),
        "random_weights": bool(checkpoint.origin.get("random_weights", False)),
        "origin": checkpoint.origin,
        "sha256": checkpoint.origin.get("sha256"),
        "size_bytes": path.stat().st_size,
    }


def _model_facts(spec: ModelSpec, state_dict: dict[str, Tensor] | None) -> dict[str, Any]:
    cost = _cost(spec)
    facts: dict[str, Any] = {
        "model": spec.to_json(),
        "name": spec.name,
        "title": FAMILY_TITLES[spec.family],
        "parameters": None if cost is None else cost.parameters,
        "multiply_adds": None if cost is None else cost.multiply_adds,
    }
    if state_dict is not None:
        facts["tensors"] = len(state_dict)
        facts["dtypes"] = _count(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
    return facts


def _cost(spec: ModelSpec) -> Cost | None:
    """The cost, or None where the family's module cannot be built here; that must not hide the other facts."""
    if spec.variant != "custom":
        name = spec.name
        published = published_costs().get(name)
        if published is not None and spec == ModelSpec.published(name):
            return published
    try:
        return count_cost(spec)
    except EvitDeployError:
        return None


def _is_engine(path: Path) -> bool:
    if path.suffix in (".engine", ".json"):
        return True
    return path.parent.name == "engines" and not path.exists() and path.with_name(path.name + ".json").exists()


def _is_onnx(path: Path) -> bool:
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES:
        return False
    if path.suffix.lower() == ".onnx":
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # An ONNX file begins with its IR version: field 1, a number that has one byte (protobuf's tag 0x08).
    return len(start) == 2 and start[0] == 0x08 and 3 <= start[1] <= 64


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items()))


def _sibling_hint(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"the folder {path.parent} does not exist"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {path.parent / close[0]}?" if close else f"look into {path.parent}"
