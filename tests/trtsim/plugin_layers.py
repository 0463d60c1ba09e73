"""What TensorRT does with a plugin while it builds: ask for outputs, formats and tactics, then for each kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from tests.trtsim.expressions import (
    ExpressionBuilder,
    LaunchParameters,
    SymbolicExpressions,
    Tree,
    dims_exprs,
    evaluate,
    trees_of,
)
from tests.trtsim.network import PluginLayer, Tensor
from tests.trtsim.objects import Address, Dims, Foreign, Simulation, Text
from tests.trtsim.structures import (
    BUILD,
    LINEAR,
    RUNTIME,
    DimsExprs,
    DynamicPluginTensorDesc,
    InterfaceInfo,
    PluginTensorDesc,
    read_fields,
)

Int = ctypes.c_int32
Profile = Mapping[str, tuple[tuple[int, ...], ...]]  # of a network input: its least, optimal and largest shape
PLUGIN_V3 = 46  # LayerType
SELECTORS = ("min", "opt", "max")
OFFERED_DTYPES = (0, 1, 7)  # FP32, FP16 and BF16, as a builder would try them


def plugin_layer(
    simulation: Simulation, name: str, inputs: Sequence[Tensor], creator: tuple[str, str, str], plugin: int
) -> PluginLayer:
    """The layer of a plugin, of the kind that its build interface is.

    Args:
        simulation: the simulated TensorRT.
        name: of the layer.
        inputs: its inputs.
        creator: name, version and namespace of the plugin's creator.
        plugin: address of the plugin.
    """
    build = capability(simulation, plugin, BUILD)
    info = Foreign(simulation, build, "IVersionedInterface").call("getInterfaceInfo", InterfaceInfo)
    kinds: dict[str, type[_Layer]] = {"PLUGIN_V3QUICKAOT_BUILD": AotLayer, "PLUGIN_V3ONE_BUILD": JitLayer}
    return kinds[info.kind.decode()](simulation, name, inputs, creator, plugin)


def capability(simulation: Simulation, plugin: int, kind: int) -> int:
    """Address of a plugin's interface of a kind."""
    address = Foreign(simulation, plugin, "IPluginV3").call("getCapabilityInterface", Address, (Int, kind))
    if not address:
        raise RuntimeError(f"the plugin has no capability {kind}")
    return int(address)


class _Layer(PluginLayer):
    build_interface: str
    is_told_ranks: bool

    def __init__(
        self,
        simulation: Simulation,
        name: str,
        inputs: Sequence[Tensor],
        creator: tuple[str, str, str],
        plugin: int,
    ) -> None:
        super().__init__(simulation, name, PLUGIN_V3, inputs, plugin)
        self.creator = creator
        self.build = Foreign(simulation, capability(simulation, plugin, BUILD), self.build_interface)
        self.builder = ExpressionBuilder(simulation)
        self.input_expressions = dims_exprs(simulation, [tensor.trees for tensor in inputs])
        count = self.build.call("getNbOutputs", Int)
        dtypes = self._output_dtypes(count)
        outputs = (DimsExprs * count)()
        self.build.checked(
            "getOutputShapes",
            (Address, ctypes.addressof(self.input_expressions)),
            (Int, len(inputs)),
            (Address, None),
            (Int, 0),
            (Address, ctypes.addressof(outputs)),
            (Int, count),
            (Address, self.builder.address),
        )
        self.outputs = [
            Tensor(simulation, f"{name}_output_{i}", dtypes[i], trees_of(simulation, outputs[i])) for i in range(count)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.outputs]

    def _output_dtypes(self, count: int) -> list[int]:
        inputs, found = (Int * len(self.inputs))(*[tensor.dtype for tensor in self.inputs]), (Int * count)()
        ranks = (Int * len(self.inputs))(*[len(tensor.trees) for tensor in self.inputs])
        arguments = [(Address, ctypes.addressof(found)), (Int, count), (Address, ctypes.addressof(inputs))]
        if self.is_told_ranks:
            arguments.append((Address, ctypes.addressof(ranks)))
        self.build.checked("getOutputDataTypes", *arguments, (Int, len(self.inputs)))
        return list(found)

    def _descriptions(self, profile: Profile) -> Any:
        """A DynamicPluginTensorDesc for every input and output, for a profile."""
        descriptions = (DynamicPluginTensorDesc * len(self.tensors))()
        for description, tensor in zip(descriptions, self.tensors, strict=True):
            description.desc = PluginTensorDesc(Dims.of(tensor.dims), tensor.dtype, LINEAR, 1.0)
            for i, selector in enumerate(SELECTORS):
                shapes = {name: shape[i] for name, shape in profile.items()}
                setattr(description, selector, Dims.of([evaluate(tree, shapes) for tree in tensor.trees]))
        return descriptions

    def _in_out(self, descriptions: Any) -> tuple[tuple[Any, Any], ...]:
        """The arguments (in, inputs, out, outputs) of configurePlugin and others."""
        start = ctypes.addressof(descriptions)
        size = ctypes.sizeof(descriptions) // len(descriptions)
        inputs = len(self.inputs)
        return (Address, start), (Int, inputs), (Address, start + inputs * size), (Int, len(self.outputs))

    def _tactics(self) -> list[int]:
        count = self.build.call("getNbTactics", Int)
        found = (Int * max(1, count))()
        if count:
            self.build.checked("getValidTactics", (Address, ctypes.addressof(found)), (Int, count))
        tactics = list(found)[:count]
        if len(set(tactics)) != count or any(tactic <= 0 for tactic in tactics):
            raise RuntimeError(f"tactics must be unique and above zero, got {tactics}")
        return tactics or [0]

    def _plan(self, form: str, **parts: Any) -> dict[str, Any]:
        def of(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
            return [{"name": tensor.name, "dtype": tensor.dtype, "trees": tensor.trees} for tensor in tensors]

        timing = self.build.call("getTimingCacheID", Text)
        common = {"name": self.name, "creator": self.creator, "form": form, "timing_cache_id": timing}
        return {**common, "inputs": of(self.inputs), "outputs": of(self.outputs), **parts}


class AotLayer(_Layer):
    """A quickly deployable plugin with its kernel in the plan."""

    build_interface = "IPluginV3QuickAOTBuild"
    is_told_ranks = True

    def tune(self, profiles: Sequence[Profile]) -> dict[str, Any]:
        variants = [variant for profile in profiles for variant in self._variants(profile)]
        if not variants:
            raise RuntimeError(f"{self.name}: no combination of types and formats fits")
        return self._plan("aot", variants=variants)

    def _variants(self, profile: Profile) -> list[dict[str, Any]]:
        variants = []
        wanted = [tensor.dtype for tensor in self.tensors]
        for types, formats in self._combinations(profile):
            if types != wanted:  # a strongly typed network has only these
                continue
            descriptions = self._descriptions(profile)
            for description, format_ in zip(descriptions, formats, strict=True):
                description.desc.format = format_
            self.build.checked("configurePlugin", *self._in_out(descriptions))
            for tactic in self._tactics():
                self.build.checked("setTactic", (Int, tactic))
                found = {"types": types, "formats": formats, "tactic": tactic}
                variants.append({**found, **self._launch(descriptions, profile), **self._kernel(descriptions)})
        return variants

    def _combinations(self, profile: Profile) -> list[tuple[list[int], list[int]]]:
        """(types, formats) of every input and output that the plugin takes."""
        descriptions = self._descriptions(profile)
        address, count = ctypes.addressof(descriptions), len(self.tensors)
        sizes = ((Int, len(self.inputs)), (Int, len(self.outputs)))
        number = self.build.call("getNbSupportedFormatCombinations", Int, (Address, address), *sizes)
        found = (PluginTensorDesc * max(1, number * count))()
        target = ((Address, ctypes.addressof(found)), (Int, number))
        self.build.checked("getSupportedFormatCombinations", (Address, address), *sizes, *target)
        rows = [found[i * count : (i + 1) * count] for i in range(number)]
        return [([desc.type for desc in row], [desc.format for desc in row]) for row in rows]

    def _launch(self, descriptions: Any, profile: Profile) -> dict[str, Any]:
        parameters, extras = LaunchParameters(self.simulation), SymbolicExpressions(self.simulation)
        self.build.checked(
            "getLaunchParams",
            (Address, ctypes.addressof(self.input_expressions)),
            (Address, ctypes.addressof(descriptions)),
            (Int, len(self.inputs)),
            (Int, len(self.outputs)),
            (Address, parameters.address),
            (Address, extras.address),
            (Address, self.builder.address),
        )
        launch, arguments = parameters.trees(), extras.trees()
        return {"launch": _at_profile(launch, profile), "extras": _at_profile(dict(enumerate(arguments)), profile)}

    def _kernel(self, descriptions: Any) -> dict[str, Any]:
        inputs = (PluginTensorDesc * len(self.inputs))(*[d.desc for d in descriptions[: len(self.inputs)]])
        outputs = (PluginTensorDesc * len(self.outputs))(*[d.desc for d in descriptions[len(self.inputs) :]])
        name, code, size = Address(), Address(), Int()
        self.build.checked(
            "getKernel",
            (Address, ctypes.addressof(inputs)),
            (Int, len(self.inputs)),
            (Address, ctypes.addressof(outputs)),
            (Int, len(self.outputs)),
            (Address, ctypes.addressof(name)),
            (Address, ctypes.addressof(code)),
            (Address, ctypes.addressof(size)),
        )
        assert name.value is not None
        assert code.value is not None
        text = ctypes.string_at(code.value, size.value).decode("latin1")
        return {"kernel": ctypes.string_at(name.value).decode(), "code": text}


class JitLayer(_Layer):
    """An IPluginV3 that runs in the process that holds the engine; the plan has its creator and its fields."""

    build_interface = "IPluginV3OneBuild"
    is_told_ranks = False

    def tune(self, profiles: Sequence[Profile]) -> dict[str, Any]:
        runtime = Foreign(self.simulation, capability(self.simulation, self.plugin, RUNTIME), "IPluginV3OneRuntime")
        tactics = []
        for profile in profiles:
            descriptions = self._descriptions(profile)
            self._check_formats(descriptions)
            self.build.checked("configurePlugin", *self._in_out(descriptions))
            tactics = self._tactics()
            for tactic in tactics:
                runtime.checked("setTactic", (Int, tactic))
            optimal = (PluginTensorDesc * len(descriptions))(*[description.desc for description in descriptions])
            for description, full in zip(optimal, descriptions, strict=True):
                description.dims = full.opt
            runtime.checked("onShapeChange", *self._in_out(optimal))
        fields = read_fields(runtime.call("getFieldsToSerialize", Address))
        workspace = self.build.call("getWorkspaceSize", ctypes.c_size_t, *self._in_out(descriptions))
        kept = [(name, kind, data.hex()) for name, kind, data in fields]
        return self._plan("jit", fields=kept, tactics=tactics, workspace_bytes=workspace)

    def _check_formats(self, descriptions: Any) -> None:
        """Ask for the network's types, and for one that differs, which a plugin of one type must refuse."""

        def supports(position: int) -> bool:
            arguments = ((Int, position), (Address, ctypes.addressof(descriptions)))
            sizes = ((Int, len(self.inputs)), (Int, len(self.outputs)))
            return bool(self.build.call("supportsFormatCombination", ctypes.c_bool, *arguments, *sizes))

        for position, description in enumerate(descriptions):
            own = description.desc.type
            if not supports(position):
                raise RuntimeError(f"{self.name}: type {own} of tensor {position} is not supported")
            for other in OFFERED_DTYPES:
                description.desc.type = other
                if position > 0 and other != own and supports(position):
                    raise RuntimeError(f"{self.name}: tensor {position} may have type {other} beside {own}")
            description.desc.type = own


def _at_profile(trees: Mapping[Any, Tree], profile: Profile) -> dict[str, dict[Any, int]]:
    """The values of trees at the least, optimal and largest shapes."""
    values = {}
    for i, selector in enumerate(SELECTORS):
        shapes = {name: shape[i] for name, shape in profile.items()}
        values[selector] = {name: evaluate(tree, shapes) for name, tree in trees.items()}
    return values
