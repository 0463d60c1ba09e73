"""A plugin's fields, which TensorRT's parser makes of a node and its builder keeps in an engine, and back.

The bindings copy neither names nor values: a field lives as long as what was made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_deploy.errors import EvitDeployError
from evit_deploy.trt.description import FLOAT, PluginOperator


def attribute_field(trt: Any, operator: PluginOperator, name: str, value: Any) -> Any:
    """An attribute as a field; TensorRT's parser knows no single numbers, only arrays of 32 bits."""
    if operator.attributes[name] == FLOAT:
        return trt.PluginField(name, np.array(value, np.float32).reshape(-1), trt.PluginFieldType.FLOAT32)
    return integer_field(trt, name, np.reshape(value, -1))


def integer_field(trt: Any, name: str, values: Any) -> Any:
    """Integers of 32 bits."""
    return trt.PluginField(name, np.array(values, np.int32), trt.PluginFieldType.INT32)


def text_field(trt: Any, name: str, content: str) -> Any:
    """Bytes of UTF-8."""
    return trt.PluginField(name, np.frombuffer(content.encode(), np.int8), trt.PluginFieldType.CHAR)


def numbers(field: Any) -> Any:
    """What a field of numbers holds, copied."""
    return np.array(field.data)


def text(field: Any) -> str:
    """What a field of text holds; TensorRT may end it in zeros."""
    return bytes(field.data).rstrip(b"\0").decode(errors="replace")


def numbers_of_shapes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Shapes as one list: for each its rank and that many sizes."""
    return [number for shape in shapes for number in (len(shape), *shape)]


def shapes_from(found: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of `numbers_of_shapes`: for each input its rank and that many sizes."""
    rest, shapes = [int(number) for number in found], []
    while rest:
        rank = rest[0]
        if not 0 <= rank < len(rest):
            raise EvitDeployError("the engine's plugin has sizes that cannot be read", hint="build the engine again")
        shapes.append(tuple(rest[1 : rank + 1]))
        rest = rest[rank + 1 :]
    return tuple(shapes)
