"""Questions to the nodes of an ONNX graph: attributes, integers put together, and who reads what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import onnx.helper


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that a node has, strings as bytes; ONNX's defaults are not among them."""
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def integers(name: str, makers: Mapping[str, onnx.NodeProto]) -> list[int] | None:
    """What a name stands for that is integers put together."""
    node = makers.get(name)
    if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value_ints":
        return list(node.attribute[0].ints)
    if node is not None and node.op_type == "Concat":
        parts = [integers(part, makers) for part in node.input]
        return None if None in parts else [value for part in parts if part is not None for value in part]
    return None


def readers_of(graph: onnx.GraphProto) -> Counter[str]:
    """How often each name is read, as an output of the graph too."""
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    return readers + names_in_subgraphs(graph.node)


def names_in_subgraphs(nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
    """What the branches of If and the bodies of loops read."""
    names: Counter[str] = Counter()
    for node in nodes:
        for inner in subgraphs_of(node):
            names.update(name for part in inner.node for name in part.input)
            names.update(output.name for output in inner.output)
            names.update(names_in_subgraphs(inner.node))
    return names


def subgraphs_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of an If, the body of a loop."""
    graphs: list[onnx.GraphProto] = []
    for entry in node.attribute:
        graphs += [entry.g] if entry.type == onnx.AttributeProto.GRAPH else entry.graphs
    return graphs
