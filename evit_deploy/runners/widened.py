"""A BF16 graph with FP32 in the place of BF16, for a runtime without BF16 operators.

Every BF16 number is an FP32 number, so the weights stay what they are; what is not seen is the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without BF16: weights, constants, casts and declared types are FP32."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node_list in (copy.graph.node, *(function.node for function in copy.functions)):
        _widen_nodes(node_list)
    for graph in (copy.graph, *_subgraphs(copy.graph.node)):
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return copy


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    import onnx

    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            for graph in (attribute.g, *attribute.graphs):
                _widen_nodes(graph.node)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    import onnx

    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values: Any = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                if graph.node:
                    yield graph
                    yield from _subgraphs(graph.node)
