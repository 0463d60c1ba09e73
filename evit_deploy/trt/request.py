"""What the parent asks of the process that builds: plain data, so that it fits a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class BuildRequest:
    """One engine.

    Attributes:
        flavor: which TensorRT.
        onnx_path, onnx_sha256: what is built; another hash is refused.
        plan_path: where the engine goes.
        profiles: (min, opt, max) batch of each profile.
        targets: of flavor rtx, ("sm89", ...); () for its own choice.
        plugin_form: "aot" or "jit"; None without the plugin.
        op_types: the plugins' names.
        arches: compute capabilities times ten that the plugin has kernels for.
        expected_plugins: attention layers in the graph.
        workspace_bytes, optimization_level: None for TensorRT's own.
        timing_cache_path: read and written; None without one.
        has_gpu: a GPU answers here.
        trt_progress: report TensorRT's own steps.
        parent_pid: who asks; the child ends with it.
    """

    flavor: str
    onnx_path: str
    onnx_sha256: str
    plan_path: str
    profiles: tuple[tuple[int, int, int], ...]
    targets: tuple[str, ...] = ()
    plugin_form: str | None = None
    op_types: tuple[str, ...] = ()
    arches: tuple[int, ...] = ()
    expected_plugins: int = 0
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False
    timing_cache_path: str | None = None
    has_gpu: bool = False
    trt_progress: bool = False
    parent_pid: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> BuildRequest:
        document = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: document[field.name] for field in fields(BuildRequest)}
        for name in ("targets", "op_types", "arches"):
            values[name] = tuple(values[name])
        values["profiles"] = tuple(tuple(profile) for profile in values["profiles"])
        return BuildRequest(**values)
