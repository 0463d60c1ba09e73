"""One engine from a bundle: reused if it is there, else built in a process of its own and moved into the bundle."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evit_deploy.bundle import Bundle, hash_file
from evit_deploy.environment import find_gpus, package_versions, tool_version
from evit_deploy.errors import BundleError, EngineError, EvitDeployError, UsageError
from evit_deploy.trt.child import COMMAND, ChildResult, StorageError, run_child
from evit_deploy.trt.flavors import JIT, RTX, TENSORRT
from evit_deploy.trt.network import PluginUnusedError
from evit_deploy.trt.plan import OFF, SCALED, BuildOptions, BuildPlan, options_document, plan_build
from evit_deploy.trt.range_check import range_doubt
from evit_deploy.trt.record import ENGINE_SUFFIX, EngineRecord
from evit_deploy.trt.request import BuildRequest
from evit_deploy.trt.staging import EngineWriter, storage_error

__all__ = ["BuildOptions", "BuildPlan", "BuildResult", "build_engine", "plan_build"]

Progress = Callable[[str], None]
ScaledGraph = Callable[[Bundle], bytes]

SCALED_GRAPH_FILE = "scaled.onnx"  # beside the engine while it is built
# What TensorRT for RTX says of a graph that sm75 cannot run, and what that means.
_SM75_LACKS = {"FP32 GEMM is not supported": "FP32 matrix products", "HW-specific datatypes: b16": "BF16"}


@dataclass(frozen=True)
class BuildResult:
    """What a build gave.

    Attributes:
        record: of the engine in the bundle.
        plan: what was decided, as it was carried out.
        reused: the engine was there already.
        notes: what a user should read.
    """

    record: EngineRecord
    plan: BuildPlan
    reused: bool
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Data that fits docs/schemas/build_trt.schema.json."""
        return build_document(self.plan, self.record, self.reused, self.notes)


def build_document(plan: BuildPlan, record: EngineRecord | None, reused: bool, notes: Sequence[str]) -> dict[str, Any]:
    """The JSON document of `evit-deploy build-trt`; without a record, that of --dry-run."""
    return {
        "schema": "evit-deploy/build_trt",
        "schema_version": 1,
        "bundle": str(plan.bundle.path),
        "dry_run": record is None,
        "plan": plan.to_json(),
        "reused": reused,
        "engine": None if record is None else record.json_dict,
        "engine_path": None if record is None else str(record.engine_path),
        "notes": list(notes),
    }


def build_engine(
    bundle: Bundle,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    scaled_graph: ScaledGraph | None = None,
    command: Sequence[str] = COMMAND,
) -> BuildResult:
    """Build an engine into a bundle, or find it there.

    Args:
        bundle: open; its hashes are those of the engine's key.
        options: what to build.
        progress: called with one line per step.
        scaled_graph: gives the ONNX file for a plan whose attention is SCALED, see `evit_deploy.building`.
        command: the program that builds; the tests have others.

    Raises:
        ValueError: such a plan without `scaled_graph`.
        UsageError, MissingDependencyError, InputDataError: see `plan_build`.
        EngineError: TensorRT refused the graph, failed, crashed or was killed; the bundle is as it was.
        BundleError: somebody else builds there, it was replaced meanwhile, or it cannot be written.
    """
    report = progress or (lambda line: None)
    report("looking what is there and what is needed")
    plan = plan_build(bundle, options)
    notes: list[str] = []
    if plan.plugin.form is None and options.plugin != OFF:
        report(f"without the plugin: {plan.plugin.reason}")
    while True:
        found, damaged = (None, "") if options.force else plan.find()
        if found is not None:
            return BuildResult(found, plan, True, (*notes, *plan_notes(plan), *_not_run_note()))
        if damaged:
            notes.append(f"the engine that was there is replaced: {damaged}")
        try:
            record = _build_once(plan, report, scaled_graph, command)
        except _FallBack as fall_back:
            plan = plan.without_plugin(fall_back.reason)
            report(f"without the plugin: {fall_back.reason}")
        else:
            return BuildResult(record, plan, False, (*notes, *plan_notes(plan), *_not_run_note()))


def plan_notes(plan: BuildPlan) -> list[str]:
    """What a user should know of this engine, beside what is in it."""
    notes = []
    doubt = range_doubt(plan.bundle)
    if doubt:
        notes.append(f"FP16: {doubt}")
    if plan.options.plugin != OFF and plan.plugin.form is None:
        notes.append(f"built without the plugin: {plan.plugin.reason}")
    if plan.attention == SCALED:
        notes.append(
            "there are no FP32 matrix products for sm75: the attention's are in FP16, scaled to stay in its range"
        )
    if plan.plugin.form == JIT:
        compiled, arches = plan.plugin.compiled_arches, plan.plugin.arches
        run_on = "" if compiled == arches else f", which run on {_names(arches)}"
        notes.append(
            f"the plugin has kernels for {_names(compiled)}{run_on}; "
            "where the engine runs, evit-deploy must register it"
        )
    return notes


def _names(arches: Sequence[int]) -> str:
    return ", ".join(f"sm{arch}" for arch in arches)


def _not_run_note() -> list[str]:
    return [] if find_gpus() else ["built, not run: no GPU on this machine"]


class _FallBack(Exception):
    """The plugin cannot be used; a build without it may follow."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _build_once(
    plan: BuildPlan, progress: Progress, scaled_graph: ScaledGraph | None, command: Sequence[str]
) -> EngineRecord:
    """Build what the plan says.

    Raises:
        _FallBack: not with this plugin.
    """
    with _kernels_of(plan, progress) as wait_for_kernels, EngineWriter(plan.bundle) as writer:
        record, _ = (None, "") if plan.options.force else plan.find()
        if record is not None:  # another build finished it while this one waited for nothing
            return record
        request = _request(plan, writer.path)
        if plan.attention == SCALED:
            request = _with_scaled_graph(plan, request, writer.path, scaled_graph)
        if plan.plugin.form != JIT:  # the engine will hold the kernels
            wait_for_kernels()
        try:
            result = run_child(request, writer.path, progress, command)
        except PluginUnusedError as error:
            writer.check_current()
            raise _FallBack(error.summary) from error
        except (EngineError, StorageError) as error:
            writer.check_current()
            if isinstance(error, StorageError):
                raise storage_error(plan.bundle, error.errno) from error
            raise _for_sm75(plan, error) from error
        if plan.plugin.form == JIT:
            wait_for_kernels()
        progress("moving the engine into the bundle")
        return writer.commit(_record(plan, result, request, Path(request.plan_path)))


def _with_scaled_graph(
    plan: BuildPlan, request: BuildRequest, folder: Path, scaled_graph: ScaledGraph | None
) -> BuildRequest:
    if scaled_graph is None:
        raise ValueError(f"an engine for {plan.targets} needs scaled_graph, got {scaled_graph=}")
    data = scaled_graph(plan.bundle)
    path = folder / SCALED_GRAPH_FILE
    path.write_bytes(data)
    return replace(request, onnx_path=os.path.abspath(path), onnx_sha256=hashlib.sha256(data).hexdigest())


def _for_sm75(plan: BuildPlan, error: EngineError) -> EngineError:
    """What TensorRT's refusal means where sm75 is a target; else the error as it is."""
    lacking = [what for words, what in _SM75_LACKS.items() if any(words in line for line in error.details)]
    if not plan.lacks_fp32_product or not lacking:
        return error
    facts = plan.bundle.manifest["onnx"]
    kept = f" with {', '.join(facts['keep_fp32'])} in FP32" if facts.get("keep_fp32") else ""
    return EngineError(
        f"{plan.flavor.title} has no {lacking[0]} for sm75, and this graph is {plan.precision}{kept}",
        error.details,
        hint="export --precision fp16 without --keep-fp32 builds for it; or leave sm75 out of --targets",
    )


@contextmanager
def _kernels_of(plan: BuildPlan, progress: Progress) -> Iterator[Callable[[], None]]:
    """Compile the plugin's kernels into the cache, beside what is done inside; what it gives waits for them.

    Raises:
        _FallBack: from that function; a kernel cannot be had.
        UsageError: of the environment: nothing that a build should hide.
    """
    plugin, spec = plan.plugin, plan.bundle.spec
    if plugin.form is None:
        yield lambda: None
        return
    from evit_kernels.aot import kernel_key

    from evit_deploy.kernels import Compilation, NeededKernel
    from evit_deploy.trt.plugin_kernels import compile_for

    arches = plugin.compiled_arches
    needed: dict[str, NeededKernel] = {}
    for layer in plugin.layers:
        size = "x".join(map(str, layer.input_shapes[0][1:]))
        kernel = NeededKernel(layer.launch, spec.name, spec.image_size, size, False)
        needed.setdefault(kernel_key(layer.launch, arches[0]), kernel)
    with ExitStack() as stack:
        absent = plugin.kernels()["absent"]
        compilation = (
            stack.enter_context(Compilation(list(needed.values()), arches, progress=progress)) if absent else None
        )

        def wait() -> None:
            try:
                if compilation is not None:
                    compilation.rows()
                compile_for(plugin.layers, arches, progress)  # one that could not be had says why
            except UsageError:
                raise
            except EvitDeployError as error:
                raise _FallBack(str(error)) from error

        yield wait


def _request(plan: BuildPlan, folder: Path) -> BuildRequest:
    options, plugin = plan.options, plan.plugin
    return BuildRequest(
        flavor=plan.flavor.name,
        onnx_path=os.path.abspath(plan.bundle.onnx_path),
        onnx_sha256=plan.bundle.onnx_sha256,
        plan_path=str(folder / (plan.name + ENGINE_SUFFIX)),
        profiles=tuple((profile.min, profile.opt, profile.max) for profile in plan.profiles),
        targets=plan.targets if plan.flavor.name == RTX else (),
        plugin_form=plugin.form,
        op_types=tuple(plugin.op_types) if plugin.form else (),
        arches=plugin.arches,
        expected_plugins=len(plugin.layers) if plugin.form else 0,
        workspace_bytes=options.workspace_bytes,
        optimization_level=options.optimization_level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        refit=options.refit,
        strip_weights=options.strip_weights,
        timing_cache_path=timing_cache_path(plan),
        has_gpu=bool(find_gpus()),
        trt_progress=options.trt_progress,
        parent_pid=os.getpid(),
    )


def timing_cache_path(plan: BuildPlan) -> str | None:
    """Where the timings of this flavor, version, GPU and kernels are kept; None where a build has no use for any."""
    if not plan.options.timing_cache or plan.flavor.name != TENSORRT or plan.gpu is None:
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~"), ".cache")
    gpu = re.sub(r"[^a-z0-9]+", "-", plan.gpu.lower()).strip("-")
    kernels = plan.plugin.kernel_hash[:16] or "no-plugin"
    name = f"{plan.flavor.name}-{plan.flavor.version}-{gpu}-{plan.targets[0]}-{kernels}.cache"
    return str(base / "evit-deploy" / "timings" / name) if base.is_absolute() else None


def _record(plan: BuildPlan, result: ChildResult, request: BuildRequest, engine: Path) -> EngineRecord:
    facts = result.facts
    if facts["tensorrt_version"] != plan.flavor.version:
        raise EngineError(
            f"TensorRT was replaced while the engine was built: {facts['tensorrt_version']} instead of "
            f"{plan.flavor.version}",
            hint="run the same command again",
        )
    plugin = {**plan.plugin.to_json(), "layers": len(facts["plugin_layers"])}
    if plugin["layers"] and not plugin["used"]:
        raise EngineError(f"{plugin['layers']} layers are plugins, and none was asked for")
    size_bytes = engine.stat().st_size
    if size_bytes == 0:
        raise BundleError(f"the engine {engine.name} is empty", hint="run the same command again")
    warnings = list(result.warnings)
    if plan.plugin.form is None and plan.options.plugin != OFF:
        warnings.insert(0, f"without the plugin: {plan.plugin.reason}")
    return EngineRecord(
        path=engine.with_suffix(".json"),
        name=plan.name,
        key=plan.key,
        key_parts=plan.key_parts,
        model=plan.bundle.spec.to_json(),
        onnx_sha256=plan.bundle.onnx_sha256,
        engine_sha256=hash_file(engine),
        size_bytes=size_bytes,
        flavor=plan.flavor.name,
        tensorrt_version=plan.flavor.version,
        targets=list(plan.targets),
        targets_note=plan.targets_note,
        gpu=plan.gpu,
        precision=plan.precision,
        attention=plan.attention,
        profiles=[profile.to_json() for profile in plan.profiles],
        io=facts["io"],
        plugin=plugin,
        options=options_document(plan, request.timing_cache_path is not None),
        layers=facts["layers"],
        layers_note=facts["layers_note"],
        build_seconds=round(facts["build_seconds"], 3),
        peak_memory_bytes=facts["peak_memory_bytes"],
        warnings=warnings,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tool_version=tool_version(),
        versions={name: version for name, version in package_versions().items() if version is not None},
    )
