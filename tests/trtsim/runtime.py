"""The runtime: an engine from a plan, execution contexts, and the calls that reach plugins while one runs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.trtsim.builder import log, read_plan
from tests.trtsim.expressions import evaluate
from tests.trtsim.objects import Address, Dims, Foreign, Handle, Simulated, Simulation, Text, virtual
from tests.trtsim.plugin_layers import capability
from tests.trtsim.registry import QUICK_ANY, create_plugin, find_creator
from tests.trtsim.structures import INPUT, LINEAR, MAX, MIN, OUTPUT, RUNTIME, RUNTIME_PHASE, PluginTensorDesc

Int = ctypes.c_int32
SCRATCH_ADDRESS = 0x7000_0000_0000  # of what lies between layers; nothing reads there
SCRATCH_STEP_BYTES = 1 << 20
DEVICE_MEMORY_BYTES = 4096
AUX_STREAMS = 2  # that the simulated engines want


class EngineInspector(Simulated):
    interfaces = ("VEngineInspector",)

    def __init__(self, simulation: Simulation, plan: Mapping[str, Any]) -> None:
        super().__init__(simulation)
        self.plan = plan

    @virtual(Text, Int)
    def getEngineInformation(self, kind: int) -> str:
        plugins = {plugin["name"] for plugin in self.plan["plugins"]}
        layers = [
            {"Name": layer["name"], "LayerType": "PluginV3" if layer["name"] in plugins else "NoOp"}
            for layer in self.plan["layers"]
        ]
        return json.dumps({"Layers": layers, "Bindings": [tensor["name"] for tensor in self.plan["io"]]})


class Engine(Simulated):
    interfaces = ("VCudaEngine",)

    def __init__(self, simulation: Simulation, plan: Mapping[str, Any], logger: int) -> None:
        super().__init__(simulation)
        self.plan, self.logger = plan, logger
        self.tensors = {tensor["name"]: tensor for tensor in plan["io"]}
        self.plugins = [(self._restored(plugin), plugin) for plugin in plan["plugins"] if plugin["form"] == "jit"]

    def _restored(self, plugin: Mapping[str, Any]) -> int:
        name, version, namespace = plugin["creator"]
        creator = find_creator(self.simulation, (name, version, namespace))
        if creator is None:
            raise RuntimeError(f"cannot find the plugin {namespace}::{name} of version {version}")
        fields = [(field, kind, bytes.fromhex(data)) for field, kind, data in plugin["fields"]]
        return create_plugin(self.simulation, creator, plugin["name"], fields, RUNTIME_PHASE, QUICK_ANY)

    def dims(self, name: str) -> tuple[int, ...]:
        return tuple(tree if isinstance(tree, int) else -1 for tree in self.tensors[name]["trees"])

    @virtual(Handle, Int)
    def createExecutionContext(self, strategy: int) -> ExecutionContext:
        return ExecutionContext(self.simulation, self)

    @virtual(Handle)
    def createEngineInspector(self) -> EngineInspector:
        return EngineInspector(self.simulation, self.plan)

    @virtual(Int)
    def getNbOptimizationProfiles(self) -> int:
        return len(self.plan["profiles"])

    @virtual(Int)
    def getNbLayers(self) -> int:
        return len(self.plan["layers"])

    @virtual(Dims, Text)
    def getTensorShape(self, name: str) -> tuple[int, ...]:
        return self.dims(name)

    @virtual(Int, Text)
    def getTensorDataType(self, name: str) -> int:
        return int(self.tensors[name]["dtype"])

    @virtual(Int, Text)
    def getTensorIOMode(self, name: str) -> int:
        modes = {"input": INPUT, "output": OUTPUT}
        return modes[self.tensors[name]["mode"]] if name in self.tensors else 0

    @virtual(Dims, Text, Int, Int)
    def getProfileShape(self, name: str, profile: int, selector: int) -> tuple[int, ...]:
        return tuple(self.plan["profiles"][profile][name][selector])

    @virtual(Int)
    def getNbIOTensors(self) -> int:
        return len(self.tensors)

    @virtual(Text, Int)
    def getIOTensorName(self, index: int) -> str | None:
        names = list(self.tensors)
        return names[index] if 0 <= index < len(names) else None

    @virtual(Int)
    def getNbAuxStreams(self) -> int:
        return AUX_STREAMS

    @virtual(ctypes.c_int64)
    def getDeviceMemorySizeV2(self) -> int:
        return DEVICE_MEMORY_BYTES


class ExecutionContext(Simulated):
    """Each plugin gets a copy attached to the context, as TensorRT makes it."""

    interfaces = ("VExecutionContext",)
    recorded = True

    def __init__(self, simulation: Simulation, engine: Engine) -> None:
        super().__init__(simulation)
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: dict[str, int] = {}
        self.aux_streams: list[int] = []
        self.plugins = []
        for plugin, plan in engine.plugins:
            runtime = Foreign(simulation, capability(simulation, plugin, RUNTIME), "IPluginV3OneRuntime")
            attached = runtime.call("attachToContext", Address, (Address, None))
            if not attached:
                raise RuntimeError(f"{plan['name']} cannot be attached to a context")
            runtime = Foreign(simulation, capability(simulation, attached, RUNTIME), "IPluginV3OneRuntime")
            runtime.checked("setTactic", (Int, plan["tactics"][0]))
            self.plugins.append((runtime, plan))

    @virtual(Handle)
    def getEngine(self) -> Engine:
        return self.engine

    @virtual(ctypes.c_bool)
    def allInputDimensionsSpecified(self) -> bool:
        return not self._missing_shapes()

    @virtual(ctypes.c_bool, Int, Address)
    def setOptimizationProfileAsync(self, profile: int, stream: int | None) -> bool:
        if not 0 <= profile < len(self.engine.plan["profiles"]):
            return False
        self.profile = profile
        self.shapes.clear()
        return True

    @virtual(Int)
    def getOptimizationProfile(self) -> int:
        return self.profile

    @virtual(ctypes.c_bool, Text, Dims)
    def setInputShape(self, name: str, dims: tuple[int, ...]) -> bool:
        low, high = (self.engine.plan["profiles"][self.profile][name][i] for i in (MIN, MAX))
        fits = len(dims) == len(low) and all(a <= size <= b for a, size, b in zip(low, dims, high, strict=True))
        if fits:
            self.shapes[name] = dims
        else:
            log(self.simulation, self.engine.logger, f"[context] {name} {dims} is outside {low} to {high}")
        return fits

    @virtual(Dims, Text)
    def getTensorShape(self, name: str) -> tuple[int, ...]:
        if self._missing_shapes():
            return self.engine.dims(name)
        return tuple(evaluate(tree, self.shapes) for tree in self.engine.tensors[name]["trees"])

    @virtual(ctypes.c_bool, Text, Address)
    def setTensorAddress(self, name: str, address: int | None) -> bool:
        if name not in self.engine.tensors:
            return False
        self.addresses[name] = address or 0
        return True

    @virtual(Address, Text)
    def getTensorAddress(self, name: str) -> int | None:
        return self.addresses.get(name)

    @virtual(Int, Int, Address)
    def inferShapes(self, capacity: int, names: int | None) -> int:
        return len(self._missing_shapes())

    @virtual(None, Address, Int)
    def setAuxStreams(self, streams: int, count: int) -> None:
        self.aux_streams = list((Address * count).from_address(streams))

    @virtual(ctypes.c_bool, Address)
    def enqueueV3(self, stream: int | None) -> bool:
        missing = [name for name in self.engine.tensors if not self.addresses.get(name)]
        if missing or self._missing_shapes():
            log(self.simulation, self.engine.logger, f"[context] no address or shape of {missing}")
            return False
        try:
            for runtime, plan in self.plugins:
                self._enqueue(runtime, plan, stream)
        except RuntimeError as error:
            log(self.simulation, self.engine.logger, f"[context] {error}")
            return False
        return True

    def _enqueue(self, runtime: Foreign, plan: Mapping[str, Any], stream: int | None) -> None:
        inputs, outputs = (self._descriptions(plan[side]) for side in ("inputs", "outputs"))
        sizes = [(Address, ctypes.addressof(inputs)), (Int, len(inputs))]
        sizes += [(Address, ctypes.addressof(outputs)), (Int, len(outputs))]
        runtime.checked("onShapeChange", *sizes)
        pointers = [self._pointers(plan[side]) for side in ("inputs", "outputs")]
        runtime.checked(
            "enqueue",
            (Address, ctypes.addressof(inputs)),
            (Address, ctypes.addressof(outputs)),
            (Address, ctypes.addressof(pointers[0])),
            (Address, ctypes.addressof(pointers[1])),
            (Address, None),
            (Address, stream),
        )

    def _descriptions(self, tensors: Sequence[Mapping[str, Any]]) -> Any:
        found = (PluginTensorDesc * len(tensors))()
        for description, tensor in zip(found, tensors, strict=True):
            sizes = [evaluate(tree, self.shapes) for tree in tensor["trees"]]
            description.dims, description.type = Dims.of(sizes), tensor["dtype"]
            description.format, description.scale = LINEAR, 1.0
        return found

    def _pointers(self, tensors: Sequence[Mapping[str, Any]]) -> Any:
        names = [tensor["name"] for tensor in tensors]
        for name in names:
            if name not in self.addresses:
                self.scratch.setdefault(name, SCRATCH_ADDRESS + len(self.scratch) * SCRATCH_STEP_BYTES)
        return (Address * len(names))(*[self.addresses.get(name) or self.scratch[name] for name in names])

    def _missing_shapes(self) -> list[str]:
        inputs = [name for name, tensor in self.engine.tensors.items() if tensor["mode"] == "input"]
        return [name for name in inputs if name not in self.shapes and -1 in self.engine.dims(name)]


class Runtime(Simulated):
    interfaces = ("VRuntime",)
    recorded = True

    def __init__(self, simulation: Simulation, registry: Simulated, logger: int) -> None:
        super().__init__(simulation)
        self.registry, self.logger = registry, logger
        self.host_code_allowed = False

    @virtual(None, ctypes.c_bool)
    def setEngineHostCodeAllowed(self, allowed: bool) -> None:
        self.host_code_allowed = allowed

    @virtual(Handle, Address, ctypes.c_uint64)
    def deserializeCudaEngine(self, content: int, size_bytes: int) -> Engine | None:
        try:
            return Engine(self.simulation, read_plan(ctypes.string_at(content, size_bytes)), self.logger)
        except (RuntimeError, ValueError) as error:
            log(self.simulation, self.logger, f"[runtime] {error}")
            return None

    @virtual(Handle)
    def getPluginRegistry(self) -> Simulated:
        return self.registry
