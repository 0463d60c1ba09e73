"""The network: tensors, layers, and how plugins become layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from tests.trtsim.expressions import Tree
from tests.trtsim.objects import Address, Dims, Handle, Simulated, Simulation, Text, virtual


class Tensor(Simulated):
    """A tensor whose dimensions are trees."""

    interfaces = ("VTensor",)

    def __init__(self, simulation: Simulation, name: str, dtype: int, trees: Sequence[Tree], is_input: bool = False):
        super().__init__(simulation)
        self.name, self.dtype, self.trees, self.is_input = name, dtype, list(trees), is_input

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes; -1 where one is not constant."""
        return tuple(tree if isinstance(tree, int) else -1 for tree in self.trees)

    @virtual(None, Text)
    def setName(self, name: str) -> None:
        self.name = name

    @virtual(Text)
    def getName(self) -> str:
        return self.name

    @virtual(Dims)
    def getDimensions(self) -> tuple[int, ...]:
        return self.dims

    @virtual(ctypes.c_int32)
    def getType(self) -> int:
        return self.dtype

    @virtual(ctypes.c_bool)
    def isNetworkInput(self) -> bool:
        return self.is_input


class Layer(Simulated):
    """A layer of a type of the enumeration LayerType; what it computes is not simulated."""

    interfaces = ("VLayer",)

    def __init__(self, simulation: Simulation, name: str, kind: int, inputs: Sequence[Tensor]) -> None:
        super().__init__(simulation)
        self.name, self.kind, self.inputs = name, kind, list(inputs)
        self.outputs: list[Tensor] = []

    @virtual(ctypes.c_int32)
    def getType(self) -> int:
        return self.kind

    @virtual(None, Text)
    def setName(self, name: str) -> None:
        self.name = name

    @virtual(Text)
    def getName(self) -> str:
        return self.name

    @virtual(ctypes.c_int32)
    def getNbInputs(self) -> int:
        return len(self.inputs)

    @virtual(Handle, ctypes.c_int32)
    def getInput(self, index: int) -> Tensor | None:
        return _item(self.inputs, index)

    @virtual(ctypes.c_int32)
    def getNbOutputs(self) -> int:
        return len(self.outputs)

    @virtual(Handle, ctypes.c_int32)
    def getOutput(self, index: int) -> Tensor | None:
        return _item(self.outputs, index)


class Network(Simulated):
    interfaces = ("VNetworkDefinition",)

    def __init__(self, simulation: Simulation, builder: Simulated, flags: int) -> None:
        super().__init__(simulation)
        self.builder, self.flags = builder, flags
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Any] = []

    @virtual(Handle, Text, ctypes.c_int32, Dims)
    def addInput(self, name: str, dtype: int, dims: tuple[int, ...]) -> Tensor:
        self.inputs.append(Tensor(self.simulation, name, dtype, input_trees(name, dims), is_input=True))
        return self.inputs[-1]

    @virtual(None, Handle)
    def markOutput(self, tensor: Tensor) -> None:
        self.outputs.append(tensor)

    @virtual(ctypes.c_int32)
    def getNbLayers(self) -> int:
        return len(self.layers)

    @virtual(Handle, ctypes.c_int32)
    def getLayer(self, index: int) -> Layer | None:
        return _item(self.layers, index)

    @virtual(ctypes.c_int32)
    def getNbInputs(self) -> int:
        return len(self.inputs)

    @virtual(Handle, ctypes.c_int32)
    def getInput(self, index: int) -> Tensor | None:
        return _item(self.inputs, index)

    @virtual(ctypes.c_int32)
    def getNbOutputs(self) -> int:
        return len(self.outputs)

    @virtual(Handle, ctypes.c_int32)
    def getOutput(self, index: int) -> Tensor | None:
        return _item(self.outputs, index)

    @virtual(Handle)
    def getBuilder(self) -> Simulated:
        return self.builder

    @virtual(ctypes.c_uint32)
    def getFlags(self) -> int:
        return self.flags

    @virtual(ctypes.c_bool, ctypes.c_int32)
    def getFlag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)


class PluginLayer(Layer):
    """A layer that a plugin computes.

    Subclasses say in `tune` what building it gives: a part of the plan.
    """

    interfaces = ("VLayer", "VPluginV3Layer")

    def __init__(self, simulation: Simulation, name: str, kind: int, inputs: Sequence[Tensor], plugin: int) -> None:
        super().__init__(simulation, name, kind, inputs)
        self.plugin = plugin

    @virtual(Address)
    def getPlugin(self) -> int:
        return self.plugin

    def tune(self, profiles: Sequence[dict[str, tuple[tuple[int, ...], ...]]]) -> dict[str, Any]:
        """Build for optimization profiles: name of a network input to its least, optimal and largest shape."""
        raise NotImplementedError


def input_trees(name: str, dims: Sequence[int]) -> list[Tree]:
    """The trees of a network input: a size, or itself where it is dynamic."""
    return [size if size >= 0 else ("dim", name, axis) for axis, size in enumerate(dims)]


def _item(things: list[Any], index: int) -> Any:
    return things[index] if 0 <= index < len(things) else None
