"""What a build would do: flavor, targets, profiles, plugin and the key, all decided before TensorRT works."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evit_deploy.bundle import Bundle
from evit_deploy.environment import Gpu, find_gpus
from evit_deploy.errors import BundleError, EngineError, EvitDeployError, MissingDependencyError, UsageError
from evit_deploy.trt.flavors import AOT, JIT, RTX, TENSORRT, Flavor, choose_flavor, load_flavor, require_gpu_for
from evit_deploy.trt.profiles import BatchProfile, profiles_for
from evit_deploy.trt.range_check import range_doubt
from evit_deploy.trt.record import ENGINES_FOLDER, EngineRecord, engine_key, engine_name, open_engine
from evit_deploy.trt.targets import arch_of, parse_targets, target_of

if TYPE_CHECKING:
    from evit_deploy.trt.operators import PluginLayer

AUTO, OFF = "auto", "off"
PLUGIN_CHOICES = (AUTO, AOT, JIT, OFF)

# How the attention of an engine computes, beside the forms that a graph's functions have.
PLUGIN, SCALED = "plugin", "scaled"
# GPUs for which TensorRT for RTX has no matrix product in FP32.
NO_FP32_PRODUCT = frozenset({"sm75"})

# What the bindings of TensorRT for RTX 1.7.1 have names for, and what came of it when it was tried.
_NOT_RTX = {
    "version_compatible": "it asks for a lean runtime that its packages lack",
    "hardware_compatible": "its engines run on every GPU that they are for; --targets names them",
    "refit": "its builder asks for a GPU then",
    "strip_weights": "its builder asks for a GPU then",
}


@dataclass(frozen=True)
class BuildOptions:
    """What to build; see `evit_deploy.api.build_trt` for each."""

    flavor: str = "auto"
    profiles: tuple[BatchProfile, ...] = ()
    targets: tuple[str, ...] = ()
    plugin: str = AUTO
    require_plugin: bool = False
    require_headroom: bool = False
    force: bool = False
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: bool = True
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False
    trt_progress: bool = False

    def to_json(self) -> dict[str, Any]:
        """Those that change the engine."""
        names = ("workspace_bytes", "optimization_level", *_NOT_RTX)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PluginPlan:
    """Whether the attention layers become plugins.

    Attributes:
        form: AOT or JIT; None where they do not.
        reason: why not; "" where they do.
        layers: of the graph, that would be plugins.
        arches: compute capabilities times ten of the GPUs that the engine is for.
        kernel_hash: of these kernels; "" without.
    """

    form: str | None
    reason: str
    layers: tuple[PluginLayer, ...] = ()
    arches: tuple[int, ...] = ()
    kernel_hash: str = ""

    @property
    def op_types(self) -> dict[str, int]:
        return dict(sorted(Counter(layer.op_type for layer in self.layers).items()))

    @property
    def compiled_arches(self) -> tuple[int, ...]:
        """What a build compiles: an engine that holds no kernels needs the fewest that run on all of its GPUs."""
        if self.form != JIT:
            return self.arches
        from evit_kernels.aot import least

        return least(self.arches)

    def key_parts(self) -> dict[str, Any] | None:
        if self.form is None:
            return None
        return {"form": self.form, "op_types": self.op_types, "kernel_hash": self.kernel_hash}

    def to_json(self) -> dict[str, Any]:
        """`plugin` of an engine's JSON, as planned."""
        used = self.form is not None
        return {
            "used": used,
            "layers": len(self.layers) if used else 0,
            "form": self.form,
            "kernel_hash": self.kernel_hash if used else None,
            "reason": self.reason,
            "op_types": self.op_types if used else {},
            "arches": list(self.arches) if used else [],
        }

    def kernels(self) -> dict[str, int]:
        """How many of the kernels that a build compiles are in the cache, and how many are not."""
        if self.form is None:
            return {"cached": 0, "absent": 0}
        from evit_kernels import cache
        from evit_kernels.aot import kernel_key

        from evit_deploy.kernels.compiling import cache_folder

        folder = cache_folder()
        arches = self.compiled_arches
        needed = {(kernel_key(layer.launch, arch), arch): layer.launch for layer in self.layers for arch in arches}
        cached = sum(cache.find(launch, arch, folder) is not None for (_, arch), launch in needed.items())
        return {"cached": cached, "absent": len(needed) - cached}


@dataclass(frozen=True)
class BuildPlan:
    """Everything about an engine that is known before it is built.

    Attributes:
        flavor: imported.
        flavor_reason: why this one.
        targets: ("sm89", ...); () for the flavor's own choice.
        targets_note: what the targets mean; "" where the list says it.
        gpu: whose engine it is, None for flavor rtx.
        profiles: at least one.
        plugin: whether the attention layers become plugins.
    """

    bundle: Bundle
    options: BuildOptions
    flavor: Flavor
    flavor_reason: str
    targets: tuple[str, ...]
    targets_note: str
    gpu: str | None
    profiles: tuple[BatchProfile, ...]
    plugin: PluginPlan

    @property
    def precision(self) -> str:
        precision: str = self.bundle.manifest["onnx"]["precision"]
        return precision

    @property
    def lacks_fp32_product(self) -> bool:
        return self.flavor.name == RTX and not NO_FP32_PRODUCT.isdisjoint(self.targets)

    @property
    def attention(self) -> str:
        """PLUGIN, SCALED, or the form that the functions in the graph have."""
        if self.plugin.form is not None:
            return PLUGIN
        facts = self.bundle.manifest["onnx"]
        stored: str = facts.get("attention", "fp32")
        in_half = self.precision == "fp16" and stored == "fp32-accumulation"
        if self.lacks_fp32_product and in_half and facts["operators"]:
            return SCALED
        return stored

    @cached_property
    def key_parts(self) -> dict[str, Any]:
        return {
            "onnx_sha256": self.bundle.onnx_sha256,
            "flavor": self.flavor.name,
            "tensorrt_version": self.flavor.version,
            "precision": self.precision,
            "attention": self.attention,
            "profiles": [profile.to_json() for profile in self.profiles],
            "targets": list(self.targets),
            "gpu": self.gpu,
            "plugin": self.plugin.key_parts(),
            "options": self.options.to_json(),
        }

    @property
    def key(self) -> str:
        return engine_key(self.key_parts)

    @property
    def name(self) -> str:
        return engine_name(self.key_parts)

    def find(self) -> tuple[EngineRecord | None, str]:
        """The whole engine with this key in the bundle, or None and, where one is damaged, the reason."""
        path = self.bundle.path / ENGINES_FOLDER / f"{self.name}.json"
        if not path.exists():
            return None, ""
        try:
            record = open_engine(path, bundle=self.bundle)
        except BundleError as error:
            return None, error.summary
        return (record, "") if record.key == self.key else (None, "")

    def without_plugin(self, reason: str) -> BuildPlan:
        """The same engine without the plugin.

        Raises:
            EngineError: the plugin is required.
        """
        if self.options.require_plugin:
            raise EngineError(
                f"the plugin cannot be used, {reason}",
                hint="leave --require-plugin out to build with TensorRT's own layers",
            )
        return replace(self, plugin=PluginPlan(None, reason))

    def to_json(self) -> dict[str, Any]:
        """`plan` of the command's JSON."""
        record, damaged = self.find()
        return {
            "flavor": self.flavor.name,
            "flavor_reason": self.flavor_reason,
            "tensorrt_version": self.flavor.version,
            "targets": list(self.targets),
            "targets_note": self.targets_note,
            "gpu": self.gpu,
            "precision": self.precision,
            "attention": self.attention,
            "profiles": [profile.to_json() for profile in self.profiles],
            "plugin": self.plugin.to_json(),
            "kernels": self.plugin.kernels(),
            "options": self.options.to_json(),
            "name": self.name,
            "key": self.key,
            "exists": record is not None,
            "damaged": damaged,
        }


def plan_build(bundle: Bundle, options: BuildOptions) -> BuildPlan:
    """Decide everything about an engine; nothing is compiled, built or written.

    Raises:
        UsageError: options that contradict each other, the flavor or the model.
        MissingDependencyError: TensorRT is not installed or too old, or there is no GPU for flavor tensorrt.
        InputDataError: the bundle's graph is no ONNX model.
        EngineError: the plugin is required and cannot be used, or the headroom is and is unknown or too small.
    """
    _check_options(options)
    doubt = range_doubt(bundle) if options.require_headroom else ""
    if doubt:
        raise EngineError(
            f"no engine of {bundle.path}, {doubt}", hint="leave --require-headroom out to build it anyway"
        )
    profiles = profiles_for(bundle, options.profiles)
    name, reason = choose_flavor(options.flavor)
    require_gpu_for(name)
    flavor = load_flavor(name)
    _check_flavor_options(flavor, options)
    targets, note, gpu = _targets(flavor, options)
    plan = BuildPlan(bundle, options, flavor, reason, targets, note, gpu, profiles, PluginPlan(None, ""))
    plugin = _plugin(plan)
    return replace(plan, plugin=plugin) if plugin.form is not None else plan.without_plugin(plugin.reason)


def _check_options(options: BuildOptions) -> None:
    if options.plugin not in PLUGIN_CHOICES:
        raise UsageError(f"unknown form of plugin {options.plugin!r}", hint=f"known: {', '.join(PLUGIN_CHOICES)}")
    if options.plugin == OFF and options.require_plugin:
        raise UsageError("--no-plugin and --require-plugin contradict each other", hint="give one of the two")
    if options.workspace_bytes is not None and options.workspace_bytes < 1:
        raise UsageError(f"a workspace has at least one byte, got {options.workspace_bytes}")
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(f"optimization levels go from 0 to 5, got {options.optimization_level}")


def _check_flavor_options(flavor: Flavor, options: BuildOptions) -> None:
    if options.plugin in (AOT, JIT) and options.plugin not in flavor.plugin_forms:
        raise UsageError(
            f"{flavor.title} has no plugins of the form {options.plugin}: it cannot put a kernel into the engine",
            hint=f"use --plugin {flavor.plugin_form}",
        )
    if flavor.name != RTX:
        return
    for name, reason in _NOT_RTX.items():
        if getattr(options, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is not for {flavor.title}: {reason}", hint=f"leave {option} out")


def _targets(flavor: Flavor, options: BuildOptions) -> tuple[tuple[str, ...], str, str | None]:
    targets = parse_targets(options.targets, flavor)
    if flavor.name == TENSORRT:
        gpu = gpu_of_build(find_gpus(), os.environ)
        if gpu.compute_capability is None:
            raise MissingDependencyError(
                f"the compute capability of {gpu.name} is not known here",
                hint="install nvidia-smi, it comes with the driver",
            )
        note = "and every later GPU" if options.hardware_compatible else ""
        return (target_of(gpu.compute_capability),), note, gpu.name
    if targets:
        return targets, "", None
    return (), f"default of {flavor.title}, which documents it as sm80, sm86, sm89, sm120 and later", None


def gpu_of_build(gpus: tuple[Gpu, ...], environment: Mapping[str, str]) -> Gpu:
    """The GPU that CUDA takes first: the first of CUDA_VISIBLE_DEVICES, else the first that the driver lists."""
    first = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    index = int(first) if first.isdigit() else 0
    return gpus[index] if index < len(gpus) else gpus[0]


def _plugin(plan: BuildPlan) -> PluginPlan:
    options, flavor = plan.options, plan.flavor
    if options.plugin == OFF:
        return PluginPlan(None, "--no-plugin")
    if options.hardware_compatible:
        return PluginPlan(None, "a hardware-compatible engine runs on other GPUs than the plugin's kernels are for")
    if options.version_compatible:
        return PluginPlan(None, "a version-compatible engine with the plugin was never tried")
    from evit_kernels.aot import ARCHES

    from evit_deploy.errors import InputDataError
    from evit_deploy.trt.operators import plugin_layers
    from evit_deploy.trt.plugin_kernels import kernel_hash

    try:
        layers = tuple(plugin_layers(plan.bundle.read_onnx()))
    except (InputDataError, BundleError):
        raise
    except EvitDeployError as error:
        return PluginPlan(None, error.summary)
    if not layers:
        return PluginPlan(None, "the graph has no fused operators")
    wanted = plan.targets or tuple(target for target in flavor.known_targets if arch_of(target) in ARCHES)
    arches = tuple(arch_of(target) for target in wanted)
    unknown = [arch for arch in arches if arch not in ARCHES]
    if unknown:
        known = ", ".join(f"sm{arch}" for arch in ARCHES)
        return PluginPlan(None, f"there is no kernel for sm{unknown[0]}, only for {known}")
    form = flavor.plugin_form if options.plugin == AUTO else options.plugin
    return PluginPlan(form, "", layers, arches, kernel_hash(layers, arches))


def options_document(plan: BuildPlan, timing_cache: bool) -> dict[str, Any]:
    """`options` of an engine's JSON."""
    document = asdict(plan.options)
    return {**{name: document[name] for name in plan.options.to_json()}, "timing_cache": timing_cache}
