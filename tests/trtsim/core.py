"""Starting a simulated TensorRT under the real bindings."""

from __future__ import annotations

import ctypes
from typing import Any

from tests.trtsim.builder import Builder
from tests.trtsim.objects import Address, Simulation, keep
from tests.trtsim.parser import Parser
from tests.trtsim.registry import PluginRegistry
from tests.trtsim.runtime import Runtime
from tests.trtsim.setup import library_paths

_started: list[Simulation] = []


def started() -> Simulation:
    """The simulation of this process."""
    return _started[0]


def start(version: str) -> Simulation:
    """Put a simulation behind the stub libraries; once per process, before `import tensorrt`.

    Args:
        version: one of `setup.VERSIONS`, whose folder is on sys.path.
    """
    library, *_ = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in library_paths(version)]
    simulation = Simulation(int(version.partition(".")[0]))
    _started.append(simulation)
    registry = PluginRegistry(simulation)

    def hook(name: str, prototype: Any, function: Any) -> None:
        callback = keep(prototype(function))
        Address.in_dll(library, f"hook_{name}").value = ctypes.cast(callback, Address).value

    with_logger = ctypes.CFUNCTYPE(Address, Address, ctypes.c_int32)
    of_network = ctypes.CFUNCTYPE(Address, Address, Address, ctypes.c_int32)
    hook("getPluginRegistry", ctypes.CFUNCTYPE(Address), lambda: registry.address)
    hook("createInferBuilder_INTERNAL", with_logger, lambda logger, _: Builder(simulation, registry, logger).address)
    hook("createInferRuntime_INTERNAL", with_logger, lambda logger, _: Runtime(simulation, registry, logger).address)
    hook(
        "createNvOnnxParser_INTERNAL",
        of_network,
        lambda network, logger, _: Parser(simulation, simulation.at(network), logger).address,
    )
    return simulation
