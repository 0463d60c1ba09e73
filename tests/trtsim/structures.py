"""The plain structures that plugins and TensorRT pass each other."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

from tests.trtsim.objects import MAX_DIMS, Address, Dims

# DataType
FLOAT, HALF, INT8, INT32, BOOL, UINT8, BF16, INT64 = 0, 1, 2, 3, 4, 5, 7, 8
LINEAR = 0  # TensorFormat
BUILD, RUNTIME = 1, 2  # PluginCapabilityType
BUILD_PHASE, RUNTIME_PHASE = 0, 1  # TensorRTPhase
MIN, OPT, MAX = 0, 1, 2  # OptProfileSelector
INPUT, OUTPUT = 1, 2  # TensorIOMode

# PluginFieldType, and the bytes of one element
FLOAT32_FIELD, INT32_FIELD, CHAR_FIELD = 1, 5, 6
FIELD_BYTES = {0: 2, 1: 4, 2: 8, 3: 1, 4: 2, 5: 4, 6: 1}


class DimsExprs(ctypes.Structure):
    """Addresses of dimension expressions."""

    _fields_: ClassVar = [("count", ctypes.c_int32), ("expressions", Address * MAX_DIMS)]


class PluginTensorDesc(ctypes.Structure):
    _fields_: ClassVar = [
        ("dims", Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class DynamicPluginTensorDesc(ctypes.Structure):
    _fields_: ClassVar = [("desc", PluginTensorDesc), ("min", Dims), ("max", Dims), ("opt", Dims)]


class PluginField(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_char_p),
        ("data", Address),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class PluginFieldCollection(ctypes.Structure):
    _fields_: ClassVar = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(PluginField))]


class InterfaceInfo(ctypes.Structure):
    _fields_: ClassVar = [("kind", ctypes.c_char_p), ("major", ctypes.c_int32), ("minor", ctypes.c_int32)]


def field_names(collection: int) -> list[str]:
    """Names in a collection at an address."""
    fields = PluginFieldCollection.from_address(collection)
    return [fields.fields[i].name.decode() for i in range(fields.count)]


def read_fields(collection: int) -> list[tuple[str, int, bytes]]:
    """(name, type, data) of a collection at an address."""
    fields = PluginFieldCollection.from_address(collection)
    found = []
    for i in range(fields.count):
        field = fields.fields[i]
        size = field.length * FIELD_BYTES[field.type]
        found.append((field.name.decode(), field.type, ctypes.string_at(field.data, size) if size else b""))
    return found


def make_fields(fields: Sequence[tuple[str, int, bytes]]) -> tuple[PluginFieldCollection, list[Any]]:
    """A collection of (name, type, data), and the memory it points to."""
    buffers = [ctypes.create_string_buffer(data, max(1, len(data))) for _, _, data in fields]
    array = (PluginField * max(1, len(fields)))()
    for i, ((name, kind, data), buffer) in enumerate(zip(fields, buffers, strict=True)):
        array[i] = PluginField(name.encode(), ctypes.addressof(buffer), kind, len(data) // FIELD_BYTES[kind])
    collection = PluginFieldCollection(len(fields), ctypes.cast(array, ctypes.POINTER(PluginField)))
    return collection, [array, *buffers]
