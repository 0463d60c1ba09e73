"""From a request to an engine's file: what runs in the child process, with TensorRT's own objects."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evit_deploy.errors import EngineError
from evit_deploy.trt.flavors import RTX, Flavor
from evit_deploy.trt.layers import count_plugins, engine_layers
from evit_deploy.trt.network import ParsedNetwork, PluginUnusedError, network_from_onnx
from evit_deploy.trt.request import BuildRequest

Emit = Callable[[Mapping[str, Any]], None]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def build(flavor: Flavor, request: BuildRequest, emit: Emit) -> dict[str, Any]:
    """Build one engine and write it.

    Args:
        flavor: the TensorRT, imported in this process.
        request: what to build.
        emit: takes {"event": "step" | "log", ...}, at once.

    Returns:
        tensorrt_version, io, plugin_layers, layers, layers_note, build_seconds, peak_memory_bytes.

    Raises:
        EngineError: TensorRT refused the graph or failed.
        PluginUnusedError: the plugin was asked for and is not used.
        OSError: the engine cannot be written.
    """
    started = time.monotonic()
    trt = flavor.trt
    logger = _logger(trt, emit)
    emit({"event": "step", "text": f"parsing the graph, {flavor.title}"})
    onnx_bytes = _read_onnx(request)
    if request.plugin_form is not None:
        _register(flavor, request, logger)
    builder = trt.Builder(logger)
    if not builder:
        raise EngineError(f"{flavor.title} gives no builder here", hint="evit-deploy doctor says what is missing")
    parsed = network_from_onnx(
        flavor,
        builder,
        logger,
        onnx_bytes,
        plugin_form=request.plugin_form,
        op_types=request.op_types,
        expected_plugins=request.expected_plugins,
    )
    config = _config(flavor, builder, request, emit)
    _add_profiles(builder, config, parsed, request)
    cache = _timing_cache(config, request)
    emit({"event": "step", "text": f"building, {len(parsed.plugin_layers)} plugin layers"})
    plan = builder.build_serialized_network(parsed.network, config)
    failures = _plugin_failures(request)
    if plan is None or failures:
        raise EngineError(
            f"{flavor.title} cannot build the engine", failures, hint="the lines below are its last messages"
        )
    data = memoryview(plan)
    emit({"event": "step", "text": "writing the engine"})
    _write(Path(request.plan_path), data)
    if cache is not None and request.timing_cache_path is not None:
        _store_timing_cache(cache, Path(request.timing_cache_path))
    build_seconds = time.monotonic() - started
    layers, note = engine_layers(trt, bytes(data) if request.has_gpu else b"", logger, has_gpu=request.has_gpu)
    if layers is not None and request.plugin_form is not None and count_plugins(layers) != request.expected_plugins:
        raise PluginUnusedError(
            f"{count_plugins(layers)} of {request.expected_plugins} attention layers are plugins in the engine",
            hint="--no-plugin builds with TensorRT's own layers",
        )
    return {
        "tensorrt_version": flavor.version,
        "io": _io(trt, parsed.network),
        "plugin_layers": list(parsed.plugin_layers),
        "layers": layers,
        "layers_note": note,
        "build_seconds": build_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process since its program began; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _read_onnx(request: BuildRequest) -> bytes:
    data = Path(request.onnx_path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != request.onnx_sha256:
        raise EngineError(
            f"{request.onnx_path} changed while its engine was built: sha256 {digest[:12]} instead of "
            f"{request.onnx_sha256[:12]}",
            hint="export the bundle again, or restore it from a copy",
        )
    return data


def _register(flavor: Flavor, request: BuildRequest, logger: Any) -> None:
    assert request.plugin_form is not None
    from evit_deploy.trt.plugin import register_plugins

    try:
        register_plugins(flavor, request.op_types, form=request.plugin_form, arches=request.arches, logger=logger)
    except Exception as error:
        raise PluginUnusedError(
            f"the plugin cannot be registered, {type(error).__name__}: {' '.join(str(error).split())}",
            hint="--no-plugin builds with TensorRT's own layers",
        ) from error


def _plugin_failures(request: BuildRequest) -> list[str]:
    """What went wrong inside plugins, which TensorRT's bindings only print."""
    if request.plugin_form is None:
        return []
    from evit_deploy.trt.plugin import take_plugin_errors

    return [" ".join(f"{type(error).__name__}: {error}".split()) for error in take_plugin_errors()]


def _logger(trt: Any, emit: Emit) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.Severity.VERBOSE, trt.Logger.Severity.INFO):
                return
            emit({"event": "log", "severity": str(severity).rpartition(".")[2], "text": message})

    return Logger()


def _config(flavor: Flavor, builder: Any, request: BuildRequest, emit: Emit) -> Any:
    trt = flavor.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # set from the start: FP32 products would have 10 bits of mantissa
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if request.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if flavor.name == RTX and request.targets:
        config.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], index)
    if request.trt_progress:
        config.progress_monitor = _progress_monitor(trt, emit)
    return config


def _add_profiles(builder: Any, config: Any, parsed: ParsedNetwork, request: BuildRequest) -> None:
    inputs = [parsed.network.get_input(index) for index in range(parsed.network.num_inputs)]
    for smallest, tuned, largest in request.profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            batch, *rest = tuple(tensor.shape)
            if any(dim < 0 for dim in rest) or (batch >= 0 and batch != largest):
                raise EngineError(
                    f"the profile {smallest}:{tuned}:{largest} contradicts input {tensor.name} of shape "
                    f"{[batch, *rest]}",
                    hint="only the batch may be dynamic, and a fixed one has the profile of that batch alone",
                )
            profile.set_shape(tensor.name, *((size, *rest) for size in (smallest, tuned, largest)))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"TensorRT refuses the profile {smallest}:{tuned}:{largest}", hint="choose other --batch sizes"
            )


def _timing_cache(config: Any, request: BuildRequest) -> Any:
    """The cache that the build reads and extends, or None."""
    if request.timing_cache_path is None:
        return None
    stored = b""
    with suppress(OSError):
        stored = Path(request.timing_cache_path).read_bytes()
    for data in (stored, b""):  # one that TensorRT refuses, as a damaged one, is replaced by an empty one
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _store_timing_cache(cache: Any, path: Path) -> None:
    """Keep the cache for later builds, whole or not at all; that it cannot be kept is no failure of the build."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(memoryview(cache.serialize()))
            os.replace(staged, path)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _progress_monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            emit({"event": "step", "text": f"TensorRT: {phase_name}, {num_steps} steps"})

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name, 0)
            if steps and (step + 1) % max(1, steps // 10) == 0:  # a tenth each: a log has room for ten lines a phase
                emit({"event": "step", "text": f"TensorRT: {phase_name}, {step + 1} of {steps}"})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _io(trt: Any, network: Any) -> list[dict[str, Any]]:
    tensors = [("input", network.get_input(index)) for index in range(network.num_inputs)]
    tensors += [("output", network.get_output(index)) for index in range(network.num_outputs)]
    return [
        {
            "name": str(tensor.name),
            "mode": mode,
            "dtype": _DTYPES.get(_enum_name(tensor.dtype), _enum_name(tensor.dtype).lower()),
            "shape": [None if dim < 0 else int(dim) for dim in tensor.shape],
        }
        for mode, tensor in tensors
    ]


def _enum_name(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _write(path: Path, data: memoryview) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
