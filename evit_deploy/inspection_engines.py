"""What an engine is, from its JSON; where a GPU can load it, its layers also from the engine itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_deploy.errors import BundleError, EvitDeployError
from evit_deploy.trt.record import ENGINE_SUFFIX, ENGINES_FOLDER, RECORD_SUFFIX, EngineRecord, open_engine

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

_KEY_FACTS = ("size_bytes", "flavor", "tensorrt_version", "precision", "profiles", "targets", "targets_note", "gpu")
_NOT_FACTS = ("schema", "schema_version", "record_sha256")


def engine_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of an engine's JSON, checked against the engine's hash, and whether it can run here.

    Args:
        path: the .engine, its .json, or both without suffix.

    Returns:
        The JSON's fields but those about itself, and: engine_path, hash_checked, runs_here, why_not_here.

    Raises:
        BundleError: something is missing or changed.
    """
    from evit_deploy.runners.engines import why_not_here

    record = open_engine(path)
    facts = {name: value for name, value in record.json_dict.items() if name not in _NOT_FACTS}
    reason = why_not_here(record)
    if reason is None and facts["layers"] is None:
        facts["layers"], facts["layers_note"] = _layers_of(record)
    return {
        **facts,
        "engine_path": str(record.engine_path),
        "hash_checked": True,
        "runs_here": reason is None,
        "why_not_here": reason,
    }


def engines_in(bundle: Bundle) -> list[dict[str, Any]]:
    """Key facts of each engine in a bundle's folder; of one that cannot be used, its name and the problem."""
    folder = bundle.path / ENGINES_FOLDER
    if not folder.is_dir():
        return []
    files = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    names = {
        name.removesuffix(suffix)
        for name in files
        for suffix in (ENGINE_SUFFIX, RECORD_SUFFIX)
        if name.endswith(suffix)
    }
    return [_key_facts(bundle, name) for name in sorted(names)]


def _key_facts(bundle: Bundle, name: str) -> dict[str, Any]:
    try:
        record = open_engine(name, bundle=bundle)
    except BundleError as error:
        return {"name": name, "problem": str(error)}
    facts = {field: getattr(record, field) for field in _KEY_FACTS}
    plugin = {field: record.plugin[field] for field in ("used", "layers", "form", "reason")}
    return {"name": name, "problem": None, **facts, "plugin": plugin}


def _layers_of(record: EngineRecord) -> tuple[list[dict[str, Any]] | None, str]:
    """The layers as the engine's inspector gives them, or None and why not. Never run on a GPU yet."""
    import logging

    from evit_deploy.runners.tensorrt_log import TensorRtLog
    from evit_deploy.trt.flavors import JIT, load_flavor
    from evit_deploy.trt.layers import engine_layers

    try:
        flavor = load_flavor(record.flavor)
        messages = TensorRtLog(flavor.trt, logging.getLogger(__name__))
        if record.plugin["used"] and record.plugin["form"] == JIT:
            from evit_deploy.trt.plugin import register_plugins

            names, arches = list(record.plugin["op_types"]), record.plugin["arches"]
            register_plugins(flavor, names, form=JIT, arches=arches, logger=messages.logger)
        plan = Path(record.engine_path).read_bytes()
        return engine_layers(flavor.trt, plan, messages.logger, has_gpu=True)
    except EvitDeployError as error:
        return None, f"not readable: {error.summary}"
