"""Python objects that TensorRT's bindings take for C++ ones: memory that begins with a table of virtual functions.

A class names the interfaces it implements and marks methods with `virtual`; where a method stands in a table is a fact
of TensorRT's version (`slots`). A call of any other slot is noted in `Simulation.unknown` and answered with zero; an
exception is noted in `Simulation.faults` and answered with zero.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.trtsim.slots import SLOTS, TABLE_SIZE

Address = ctypes.c_void_p
MAX_DIMS = 8

Handle = type("Handle", (), {"__doc__": "In a signature: a pointer to one of our objects, None for the null pointer."})
Text = type("Text", (), {"__doc__": "In a signature: a C string."})


class Dims(ctypes.Structure):
    """In a signature: sizes by reference as an argument, by value as a result; a tuple for Python."""

    _fields_: ClassVar = [("count", ctypes.c_int32), ("sizes", ctypes.c_int64 * MAX_DIMS)]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Dims:
        return cls(len(sizes), (ctypes.c_int64 * MAX_DIMS)(*sizes))

    def tuple(self) -> tuple[int, ...]:
        return tuple(self.sizes[: self.count])


@dataclass
class Simulation:
    """One simulated TensorRT; one per process.

    Attributes:
        major: 10 or 11.
        creators: addresses of the registered plugin creators.
        calls: (class, method, arguments, result) of every call the bindings made of a class with `recorded`.
        unknown: (interface, slot) of every call that nothing here answers.
        faults: a traceback for every exception inside the simulation.
    """

    major: int
    creators: list[int] = field(default_factory=list)
    calls: list[tuple[str, str, tuple[Any, ...], Any]] = field(default_factory=list)
    unknown: list[tuple[str, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    tables: dict[tuple[type, str], int] = field(default_factory=dict)
    objects: dict[int, Simulated] = field(default_factory=dict)

    def slot(self, interface: str, method: str) -> int:
        """Place of a virtual function in the table of its interface."""
        return SLOTS[interface][method][0 if self.major == 10 else 1]

    def at(self, address: int | None) -> Any:
        """The object at an address; None for the null pointer."""
        return self.objects[address] if address else None

    def steps(self, *classes: str) -> list[tuple[str, tuple[Any, ...]]]:
        """(method, arguments) of the calls of these classes, in order."""
        return [(method, arguments) for name, method, arguments, _ in self.calls if name in classes]


def virtual(result: Any, *arguments: Any) -> Callable[[Any], Any]:
    """Mark a method as the virtual function of its name.

    Args:
        result: a ctypes type, Handle, Text, Dims, or None.
        arguments: the same, for what comes after `this`.
    """

    def mark(method: Any) -> Any:
        method.signature = (result, arguments)
        return method

    return mark


class Simulated:
    """An object of one simulation. TensorRT's classes hold a pointer to each implementation behind their own table.

    Attributes:
        interfaces: the implementations behind it, in order; or its own table where it is `direct`.
        direct: the object is an interface itself.
        recorded: calls are noted in `Simulation.calls`.
    """

    interfaces: ClassVar[tuple[str, ...]]
    direct: ClassVar[bool] = False
    recorded: ClassVar[bool] = False

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        tables = [_table(simulation, type(self), interface) for interface in self.interfaces]
        self._parts = [(Address * 1)(table) for table in tables]
        if self.direct:
            self._memory = self._parts[0]
        else:
            own = _table(simulation, type(self), "")
            self._memory = (Address * (1 + len(tables)))(own, *map(ctypes.addressof, self._parts))
        self.address = ctypes.addressof(self._memory)
        for part in (self._memory, *self._parts):
            simulation.objects[ctypes.addressof(part)] = self


class Foreign:
    """An object that the bindings implement: a plugin, a creator, a logger."""

    def __init__(self, simulation: Simulation, address: int, interface: str) -> None:
        self.simulation, self.address, self.interface = simulation, address, interface

    def call(self, method: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        """Call a virtual function; arguments are pairs of a ctypes type and a value."""
        table = ctypes.cast(self.address, ctypes.POINTER(Address))[0]
        entry = ctypes.cast(table, ctypes.POINTER(Address))[self.simulation.slot(self.interface, method)]
        if result is Text:
            text = self.call(method, Address, *arguments)
            return ctypes.string_at(text).decode() if text else None
        prototype = ctypes.CFUNCTYPE(result, Address, *[kind for kind, _ in arguments])
        return prototype(entry)(self.address, *[value for _, value in arguments])

    def checked(self, method: str, *arguments: tuple[Any, Any]) -> None:
        """Call a virtual function that returns 0 for success.

        Raises:
            RuntimeError: it returned something else.
        """
        code = self.call(method, ctypes.c_int32, *arguments)
        if code != 0:
            raise RuntimeError(f"{self.interface}.{method} failed with {code}")


_kept: list[Any] = []  # what C++ holds pointers to
_texts: dict[str, Any] = {}
_type_information = ctypes.cast(ctypes.CDLL("libstdc++.so.6")._ZTISt9exception, Address).value  # any class will do


def text_address(text: str) -> int:
    """The address of a C string that stays."""
    if text not in _texts:
        _texts[text] = ctypes.create_string_buffer(text.encode())
    return ctypes.addressof(_texts[text])


def keep(thing: Any) -> Any:
    """Let memory live as long as the process."""
    _kept.append(thing)
    return thing


def _table(simulation: Simulation, owner: type[Simulated], interface: str) -> int:
    """Address of the table of an interface of a class; "" for a table of destructors only."""
    if (owner, interface) in simulation.tables:
        return simulation.tables[owner, interface]
    methods = {}
    for name in SLOTS.get(interface, {}):
        method = getattr(owner, name, None)
        if method is not None:
            methods[simulation.slot(interface, name)] = method
    entries = [
        _callback(simulation, methods[slot]) if slot in methods else _unknown(simulation, owner, interface, slot)
        for slot in range(TABLE_SIZE)
    ]
    words = [0, _type_information, *[ctypes.cast(entry, Address).value for entry in entries]]
    table = keep((Address * len(words))(*words))
    keep(entries)
    simulation.tables[owner, interface] = ctypes.addressof(table) + 2 * ctypes.sizeof(Address)
    return simulation.tables[owner, interface]


def _unknown(simulation: Simulation, owner: type[Simulated], interface: str, slot: int) -> Any:
    if not owner.direct and slot < 2:  # destructors
        return ctypes.CFUNCTYPE(None, Address)(lambda this: None)

    def note(this: int) -> int:
        simulation.unknown.append((interface or owner.__name__, slot))
        return 0

    return ctypes.CFUNCTYPE(ctypes.c_int64, Address)(note)


def _callback(simulation: Simulation, method: Any) -> Any:
    result, kinds = method.signature

    def call(*words: Any) -> Any:
        target, this, *values = words if result is Dims else (None, *words)
        answer = None
        try:
            owner = simulation.objects[this]
            arguments = [_to_python(simulation, kind, value) for kind, value in zip(kinds, values, strict=True)]
            answer = method(owner, *arguments)
            if owner.recorded:
                simulation.calls.append((type(owner).__name__, method.__name__, tuple(arguments), answer))
        except Exception:  # noqa: BLE001 - it must not reach C++; whoever asks finds it in `faults`
            simulation.faults.append(traceback.format_exc())
        return _to_c(result, answer, target)

    c_kinds = [Address if kind in (Handle, Text, Dims) else kind for kind in kinds]
    if result is Dims:
        return ctypes.CFUNCTYPE(Address, Address, Address, *c_kinds)(call)
    return ctypes.CFUNCTYPE(Address if result in (Handle, Text) else result, Address, *c_kinds)(call)


def _to_python(simulation: Simulation, kind: Any, value: Any) -> Any:
    if kind is Handle:
        return simulation.at(value)
    if kind is Text:
        return ctypes.string_at(value).decode() if value else None
    if kind is Dims:
        return Dims.from_address(value).tuple()
    return value


def _to_c(kind: Any, answer: Any, target: int | None) -> Any:
    if kind is Dims:
        assert target is not None
        ctypes.memmove(target, ctypes.byref(Dims.of(answer or ())), ctypes.sizeof(Dims))
        return target
    if kind is Handle:
        return None if answer is None else answer.address
    if kind is Text:
        return None if answer is None else text_address(answer)
    return answer if answer is not None or kind in (None, Address) else 0
