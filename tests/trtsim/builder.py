"""The builder: configuration, profiles, and building, which gives a plan as JSON.

A plan has what the real one is made of as far as this project decides it: inputs and outputs, profiles, flags, and of
each plugin layer what `plugin_layers` found.
"""

from __future__ import annotations

import base64
import ctypes
import json
from typing import Any

from tests.trtsim.network import Network, PluginLayer
from tests.trtsim.objects import (
    Address,
    Dims,
    Foreign,
    Handle,
    Simulated,
    Simulation,
    Text,
    keep,
    text_address,
    virtual,
)
from tests.trtsim.plugin_layers import PLUGIN_V3

PHASE, STEPS = "Building", 3
ERROR = 1  # ILogger's severity
TF32 = 6  # the BuilderFlag that is set from the start


def setting(name: str, kind: Any) -> Any:
    """A virtual function that keeps its argument in `settings`."""

    @virtual(None, kind)
    def store(self: BuilderConfig, value: Any) -> None:
        self.settings[name] = value

    store.__name__ = name
    return store


def reading(name: str, kind: Any, default: Any) -> Any:
    """A virtual function that gives what `setting` kept."""

    @virtual(kind)
    def read(self: BuilderConfig) -> Any:
        return self.settings.get(name, default)

    return read


class HostMemory(Simulated):
    interfaces = ("VHostMemory",)

    def __init__(self, simulation: Simulation, content: bytes) -> None:
        super().__init__(simulation)
        self.content = content
        self.buffer = keep(ctypes.create_string_buffer(content, max(1, len(content))))

    @virtual(Address)
    def data(self) -> int:
        return ctypes.addressof(self.buffer)

    @virtual(ctypes.c_uint64)
    def size(self) -> int:
        return len(self.content)

    @virtual(ctypes.c_int32)
    def type(self) -> int:
        return 2  # INT8


class TimingCache(Simulated):
    interfaces = ("VTimingCache",)

    def __init__(self, simulation: Simulation, content: bytes) -> None:
        super().__init__(simulation)
        self.content = content

    @virtual(Handle)
    def serialize(self) -> HostMemory:
        return HostMemory(self.simulation, self.content + b"+timed")


class OptimizationProfile(Simulated):
    interfaces = ("VOptimizationProfile",)

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.shapes: dict[str, dict[int, tuple[int, ...]]] = {}

    @virtual(ctypes.c_bool, Text, ctypes.c_int32, Dims)
    def setDimensions(self, name: str, selector: int, dims: tuple[int, ...]) -> bool:
        self.shapes.setdefault(name, {})[selector] = dims
        return True

    @virtual(Dims, Text, ctypes.c_int32)
    def getDimensions(self, name: str, selector: int) -> tuple[int, ...]:
        return self.shapes[name][selector]

    @virtual(ctypes.c_bool)
    def isValid(self) -> bool:
        return all(self._is_valid(shape) for shape in self.shapes.values())

    def ranges(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Name of an input to its least, optimal and largest shape."""
        return {name: (shape[0], shape[1], shape[2]) for name, shape in self.shapes.items()}

    @staticmethod
    def _is_valid(shape: dict[int, tuple[int, ...]]) -> bool:
        if set(shape) != {0, 1, 2}:
            return False
        return all(low <= optimal <= high for low, optimal, high in zip(shape[0], shape[1], shape[2], strict=True))


class BuilderConfig(Simulated):
    interfaces = ("VBuilderConfig",)
    recorded = True

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.flags = {TF32}
        self.profiles: list[OptimizationProfile] = []
        self.pools: dict[int, int] = {}
        self.settings: dict[str, Any] = {}
        self.timing_cache: TimingCache | None = None

    setBuilderOptimizationLevel = setting("setBuilderOptimizationLevel", ctypes.c_int32)
    getBuilderOptimizationLevel = reading("setBuilderOptimizationLevel", ctypes.c_int32, 3)
    setProfilingVerbosity = setting("setProfilingVerbosity", ctypes.c_int32)
    getProfilingVerbosity = reading("setProfilingVerbosity", ctypes.c_int32, 0)
    setHardwareCompatibilityLevel = setting("setHardwareCompatibilityLevel", ctypes.c_int32)
    getHardwareCompatibilityLevel = reading("setHardwareCompatibilityLevel", ctypes.c_int32, 0)
    setProgressMonitor = setting("setProgressMonitor", Address)
    getProgressMonitor = reading("setProgressMonitor", Address, None)

    @virtual(None, ctypes.c_int32)
    def setFlag(self, flag: int) -> None:
        self.flags.add(flag)

    @virtual(None, ctypes.c_int32)
    def clearFlag(self, flag: int) -> None:
        self.flags.discard(flag)

    @virtual(ctypes.c_bool, ctypes.c_int32)
    def getFlag(self, flag: int) -> bool:
        return flag in self.flags

    @virtual(ctypes.c_int32, Handle)
    def addOptimizationProfile(self, profile: OptimizationProfile) -> int:
        if not profile.isValid():
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    @virtual(ctypes.c_int32)
    def getNbOptimizationProfiles(self) -> int:
        return len(self.profiles)

    @virtual(None, ctypes.c_int32, ctypes.c_uint64)
    def setMemoryPoolLimit(self, pool: int, size_bytes: int) -> None:
        self.pools[pool] = size_bytes

    @virtual(ctypes.c_uint64, ctypes.c_int32)
    def getMemoryPoolLimit(self, pool: int) -> int:
        return self.pools.get(pool, 0)

    @virtual(Handle, Address, ctypes.c_uint64)
    def createTimingCache(self, content: int, size_bytes: int) -> TimingCache:
        return TimingCache(self.simulation, ctypes.string_at(content, size_bytes) if size_bytes else b"")

    @virtual(ctypes.c_bool, Handle, ctypes.c_bool)
    def setTimingCache(self, timing_cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing_cache = timing_cache
        return True

    @virtual(Handle)
    def getTimingCache(self) -> TimingCache | None:
        return self.timing_cache


class Builder(Simulated):
    interfaces = ("VBuilder",)

    def __init__(self, simulation: Simulation, registry: Simulated, logger: int) -> None:
        super().__init__(simulation)
        self.registry, self.logger = registry, logger

    @virtual(Handle)
    def createBuilderConfig(self) -> BuilderConfig:
        return BuilderConfig(self.simulation)

    @virtual(Handle, ctypes.c_uint32)
    def createNetworkV2(self, flags: int) -> Network:
        return Network(self.simulation, self, flags)

    @virtual(Handle)
    def createOptimizationProfile(self) -> OptimizationProfile:
        return OptimizationProfile(self.simulation)

    @virtual(Handle)
    def getPluginRegistry(self) -> Simulated:
        return self.registry

    @virtual(Handle, Handle, Handle)
    def buildSerializedNetwork(self, network: Network, config: BuilderConfig) -> HostMemory | None:
        monitor = _Monitor(self.simulation, config.settings.get("setProgressMonitor"))
        try:
            plan = build(network, config, monitor)
        except RuntimeError as error:
            log(self.simulation, self.logger, f"[builder] {error}")
            return None
        return HostMemory(self.simulation, plan)


def log(simulation: Simulation, logger: int, text: str) -> None:
    """Give a logger an error."""
    Foreign(simulation, logger, "ILogger").call("log", None, (ctypes.c_int32, ERROR), (Address, text_address(text)))


def build(network: Network, config: BuilderConfig, monitor: _Monitor) -> bytes:
    """The plan.

    Raises:
        RuntimeError: the real builder would fail: no profile for a dynamic input, a plugin that fails, a cancellation.
    """
    profiles = [profile.ranges() for profile in config.profiles] or [{}]
    for profile in profiles:
        for tensor in network.inputs:
            if tensor.name not in profile and -1 in tensor.dims:
                raise RuntimeError(f"network has a dynamic input {tensor.name} but no profile has it")
            for shape in profile.setdefault(tensor.name, (tensor.dims,) * 3):
                fixed = [(size, given) for size, given in zip(tensor.dims, shape, strict=True) if size != -1]
                if any(size != given for size, given in fixed):
                    raise RuntimeError(f"profile of {tensor.name} has {shape}, the network {tensor.dims}")
    monitor.start()
    plugins = []
    for layer in network.layers:
        monitor.step()
        if isinstance(layer, PluginLayer):
            plugins.append(layer.tune(profiles))
    monitor.finish()
    io = [("input", tensor) for tensor in network.inputs] + [("output", tensor) for tensor in network.outputs]
    document = {
        "network_flags": network.flags,
        "builder_flags": sorted(config.flags),
        "settings": {name: value for name, value in config.settings.items() if name != "setProgressMonitor"},
        "profiles": profiles,
        "io": [{"name": t.name, "mode": mode, "dtype": t.dtype, "trees": t.trees} for mode, t in io],
        "layers": [{"name": layer.name, "is_plugin": layer.kind == PLUGIN_V3} for layer in network.layers],
        "plugins": plugins,
    }
    return base64.b64encode(json.dumps(document).encode())


def read_plan(plan: bytes) -> dict[str, Any]:
    """What a plan holds.

    Raises:
        ValueError: it is no plan, or a damaged one.
    """
    document = json.loads(base64.b64decode(plan, validate=True))
    if not isinstance(document, dict) or "plugins" not in document:
        raise ValueError("no plan of this simulation")
    return document


class _Monitor:
    """The progress monitor, if there is one."""

    def __init__(self, simulation: Simulation, address: int | None) -> None:
        self.foreign = Foreign(simulation, address, "IProgressMonitor") if address else None
        self.steps = 0

    def start(self) -> None:
        if self.foreign is not None:
            arguments = ((Address, text_address(PHASE)), (Address, None), (ctypes.c_int32, STEPS))
            self.foreign.call("phaseStart", None, *arguments)

    def step(self) -> None:
        if self.foreign is None or self.steps == STEPS:
            return
        arguments = ((Address, text_address(PHASE)), (ctypes.c_int32, self.steps))
        self.steps += 1
        if not self.foreign.call("stepComplete", ctypes.c_bool, *arguments):
            raise RuntimeError("the progress monitor cancelled the build")

    def finish(self) -> None:
        if self.foreign is not None:
            self.foreign.call("phaseFinish", None, (Address, text_address(PHASE)))
