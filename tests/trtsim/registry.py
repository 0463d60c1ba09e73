"""The plugin registry, and creating plugins through their creators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tests.trtsim.objects import Address, Foreign, Simulated, Simulation, Text, keep, text_address, virtual
from tests.trtsim.structures import InterfaceInfo, field_names, make_fields

Int = ctypes.c_int32
Name = tuple[str, str, str]  # name, version, namespace

QUICK_ANY, QUICK_JIT, QUICK_AOT = 0, 3, 4  # QuickPluginCreationRequest: UNKNOWN, STRICT_JIT, STRICT_AOT
PREFER = {"jit": 1, "aot": 2}


class PluginRegistry(Simulated):
    interfaces = ("IPluginRegistry",)
    direct = True

    @virtual(ctypes.c_bool, Address, Text)
    def registerCreator(self, creator: int, namespace: str) -> bool:
        if creator_name(self.simulation, creator) in map(self._name, self.simulation.creators):
            return False
        self.simulation.creators.append(creator)
        return True

    @virtual(Address, Text, Text, Text)
    def getCreator(self, name: str, version: str, namespace: str | None) -> int | None:
        return find_creator(self.simulation, (name, version, namespace or ""))

    @virtual(Address, Address)
    def getAllCreators(self, count: int) -> int:
        creators = self.simulation.creators
        Int.from_address(count).value = len(creators)
        return ctypes.addressof(keep((Address * max(1, len(creators)))(*creators)))

    @virtual(Address, Address)
    def getAllCreatorsRecursive(self, count: int) -> int:
        return int(self.getAllCreators(count))

    def _name(self, creator: int) -> Name:
        return creator_name(self.simulation, creator)


def creator_name(simulation: Simulation, creator: int) -> Name:
    """Name, version and namespace of a creator."""
    foreign = Foreign(simulation, creator, "IPluginCreatorV3One")
    name, version, namespace = (foreign.call(f"getPlugin{part}", Text) for part in ("Name", "Version", "Namespace"))
    return name, version, namespace


def find_creator(simulation: Simulation, name: Name) -> int | None:
    """The creator of exactly this name, version and namespace."""
    found = (creator for creator in simulation.creators if creator_name(simulation, creator) == name)
    return next(found, None)


def wanted_fields(simulation: Simulation, creator: int) -> list[str]:
    """Names of the fields that a creator asks for."""
    return field_names(Foreign(simulation, creator, "IPluginCreatorV3One").call("getFieldNames", Address))


def create_plugin(
    simulation: Simulation,
    creator: int,
    layer: str,
    fields: Sequence[tuple[str, int, bytes]],
    phase: int,
    request: int,
) -> int:
    """The address of a new plugin.

    Args:
        simulation: the simulated TensorRT.
        creator: address of its creator.
        layer: name for the plugin.
        fields: (name, type, data).
        phase: of TensorRTPhase.
        request: of QuickPluginCreationRequest; only quickly deployable plugins are told.

    Raises:
        RuntimeError: the creator gave none.
    """
    info = Foreign(simulation, creator, "IVersionedInterface").call("getInterfaceInfo", InterfaceInfo)
    collection, memory = make_fields(fields)
    common = ((Address, ctypes.addressof(collection)), (Int, phase))
    if info.kind == b"PLUGIN CREATOR_V3QUICK":
        name, _, namespace = creator_name(simulation, creator)
        foreign = Foreign(simulation, creator, "IPluginCreatorQuick")
        texts = ((Address, text_address(name)), (Address, text_address(namespace)))
        plugin = foreign.call("createPlugin", Address, *texts, *common, (Int, request))
    else:
        foreign = Foreign(simulation, creator, "IPluginCreatorV3One")
        plugin = foreign.call("createPlugin", Address, (Address, text_address(layer)), *common)
    del memory
    if not plugin:
        raise RuntimeError(f"could not create the plugin of {layer}")
    return int(plugin)
