"""Dimensions as expressions over the network's inputs, and the launch parameters that plugins write with them.

A tree is an int, ("dim", input, axis), or (operation, left, right); in a plan, tuples are lists.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from tests.trtsim.objects import Address, Foreign, Handle, Simulated, Simulation, keep, virtual
from tests.trtsim.structures import DimsExprs

Tree = Any
# In the order of the enumeration DimensionOperation.
OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "SUB": lambda a, b: a - b,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


def evaluate(tree: Tree, shapes: Mapping[str, Sequence[int]]) -> int:
    """The value of a tree for the shapes of the network's inputs."""
    if isinstance(tree, int):
        return tree
    operation, left, right = tree
    if operation == "dim":
        return shapes[left][right]
    return OPERATIONS[operation](evaluate(left, shapes), evaluate(right, shapes))


class Expression(Simulated):
    interfaces = ("VDimensionExpr",)

    def __init__(self, simulation: Simulation, tree: Tree) -> None:
        super().__init__(simulation)
        self.tree = tree

    @virtual(ctypes.c_bool)
    def isConstant(self) -> bool:
        return isinstance(self.tree, int)

    @virtual(ctypes.c_int64)
    def getConstantValue(self) -> int:
        return self.tree if isinstance(self.tree, int) else 0

    @virtual(ctypes.c_bool)
    def isSizeTensor(self) -> bool:
        return False


class ExpressionBuilder(Simulated):
    interfaces = ("VExprBuilder",)

    @virtual(Handle, ctypes.c_int64)
    def constant(self, value: int) -> Expression:
        return Expression(self.simulation, value)

    @virtual(Handle, ctypes.c_int32, Handle, Handle)
    def operation(self, operation: int, left: Expression, right: Expression) -> Expression:
        tree = (list(OPERATIONS)[operation], left.tree, right.tree)
        is_constant = isinstance(left.tree, int) and isinstance(right.tree, int)
        return Expression(self.simulation, evaluate(tree, {}) if is_constant else tree)


def dims_exprs(simulation: Simulation, shapes: Sequence[Sequence[Tree]]) -> Any:
    """An array of DimsExprs; it stays, because plugins keep pointers into it."""
    array = (DimsExprs * max(1, len(shapes)))()
    for i, shape in enumerate(shapes):
        expressions = [Expression(simulation, tree).address for tree in shape]
        array[i].count = len(expressions)
        array[i].expressions[: len(expressions)] = expressions
    return keep(array)


def trees_of(simulation: Simulation, exprs: DimsExprs) -> list[Tree]:
    """The trees in one DimsExprs."""
    return [simulation.at(exprs.expressions[i]).tree for i in range(exprs.count)]


class LaunchParameters(Simulated):
    """What a plugin sets of a launch: name to tree."""

    interfaces = ("IKernelLaunchParams",)
    names = ("GridX", "GridY", "GridZ", "BlockX", "BlockY", "BlockZ", "SharedMem")

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.addresses: dict[str, int] = {}

    def trees(self) -> dict[str, Tree]:
        return {name: _symbolic_tree(self.simulation, address) for name, address in self.addresses.items()}


def _accessors(name: str) -> tuple[Any, Any]:
    @virtual(Address)
    def get(self: LaunchParameters) -> int | None:
        return self.addresses.get(name)

    @virtual(ctypes.c_bool, Address)
    def store(self: LaunchParameters, expression: int) -> bool:
        self.addresses[name] = expression
        return True

    return get, store


for _name in LaunchParameters.names:
    _get, _store = _accessors(_name)
    setattr(LaunchParameters, f"get{_name}", _get)
    setattr(LaunchParameters, f"set{_name}", _store)


class SymbolicExpressions(Simulated):
    """The int32 arguments of a launch, which a plugin sets."""

    interfaces = ("ISymExprs",)

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.addresses: list[int | None] = []

    @virtual(Address, ctypes.c_int32)
    def getSymExpr(self, index: int) -> int | None:
        return self.addresses[index]

    @virtual(ctypes.c_bool, ctypes.c_int32, Address)
    def setSymExpr(self, index: int, expression: int) -> bool:
        self.addresses[index] = expression
        return True

    @virtual(ctypes.c_int32)
    def getNbSymExprs(self) -> int:
        return len(self.addresses)

    @virtual(ctypes.c_bool, ctypes.c_int32)
    def setNbSymExprs(self, count: int) -> bool:
        self.addresses = [None] * count
        return True

    def trees(self) -> list[Tree]:
        missing = [i for i, address in enumerate(self.addresses) if address is None]
        if missing:
            raise RuntimeError(f"extra arguments that the plugin did not set: {missing}")
        return [_symbolic_tree(self.simulation, address) for address in self.addresses if address is not None]


def _symbolic_tree(simulation: Simulation, address: int) -> Tree:
    expression = Foreign(simulation, address, "ISymExpr").call("getExpr", Address)
    return simulation.at(expression).tree
