"""An engine's two files as a build leaves them, for tests that do not build."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from evit_deploy.bundle import Bundle
from evit_deploy.trt.record import EngineRecord, engine_key, engine_name, open_engine
from tests.fake_trt import PLAN, VERSION
from tests.tiny_bundle import TINY_SPEC

IO = [
    {"name": "input", "mode": "input", "dtype": "float32", "shape": [None, 3, 4, 4]},
    {"name": "logits", "mode": "output", "dtype": "float32", "shape": [None, 5]},
]
NO_PLUGIN = {
    "used": False,
    "layers": 0,
    "form": None,
    "kernel_hash": None,
    "reason": "--no-plugin",
    "op_types": {},
    "arches": [],
}


def write_engine(folder: Path, *, bundle: Bundle | None = None, plan: bytes = PLAN, **changes: Any) -> EngineRecord:
    """Write NAME.engine and NAME.json into a folder.

    Args:
        folder: made where it is not there.
        bundle: whose engine it is.
        plan: the engine's bytes.
        changes: fields of the record.
    """
    facts: dict[str, Any] = {
        "onnx_sha256": bundle.onnx_sha256 if bundle is not None else "0" * 64,
        "flavor": "rtx",
        "tensorrt_version": VERSION,
        "precision": "fp32",
        "attention": "fp32",
        "profiles": [{"min": 1, "opt": 4, "max": 8}],
        "targets": ["sm89"],
        "gpu": None,
        **changes,
    }
    plugin = facts.get("plugin", NO_PLUGIN)
    parts = {
        **{
            name: facts[name]
            for name in ("onnx_sha256", "flavor", "tensorrt_version", "precision", "attention", "profiles")
        },
        "targets": facts["targets"],
        "gpu": facts["gpu"],
        "plugin": {name: plugin[name] for name in ("form", "op_types", "kernel_hash")} if plugin["used"] else None,
        "options": facts.get("options", {}),
    }
    name = engine_name(parts)
    folder.mkdir(parents=True, exist_ok=True)
    record = EngineRecord(
        path=folder / f"{name}.json",
        **{
            "name": name,
            "key": engine_key(parts),
            "key_parts": parts,
            "model": TINY_SPEC.to_json(),
            "engine_sha256": hashlib.sha256(plan).hexdigest(),
            "size_bytes": len(plan),
            "targets_note": "",
            "io": IO,
            "plugin": NO_PLUGIN,
            "options": {},
            "layers": None,
            "layers_note": "not readable without a GPU",
            "build_seconds": 1.5,
            "peak_memory_bytes": None,
            "warnings": [],
            "created": "2026-01-01T00:00:00+00:00",
            "tool_version": "0.1.0",
            "versions": {},
            **facts,
        },
    )
    (folder / f"{name}.engine").write_bytes(plan)
    record.path.write_bytes(record.encode())
    return open_engine(record.path)
