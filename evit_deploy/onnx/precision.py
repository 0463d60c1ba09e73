"""Precision inside a graph: sums in FP32, and a count of what is computed in which type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

LOW_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Operators that add many values up; what a runtime adds them in is its own choice, unless they are FP32.
_SUMS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "GlobalAveragePool"})
_FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}


@dataclass(frozen=True)
class PrecisionCounts:
    """How many nodes of the main graph give which floating-point type; a call of a function is one node.

    Attributes:
        nodes_by_type: "float16" and so on to nodes, casts not among them.
        casts: casts from one floating-point type to another.
    """

    nodes_by_type: dict[str, int]
    casts: int


def sums_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every operator that adds up a low-precision tensor does so in FP32, between two casts."""
    types = value_types(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        low = types.get(node.input[0], 0) if node.input else 0
        if node.op_type not in _SUMS or node.domain or low not in LOW_TYPES:
            nodes.append(node)
            continue
        source, result = node.input[0], node.output[0]
        wide_source, wide_result = f"{result}/sum_input", f"{result}/sum"
        nodes.append(helper.make_node("Cast", [source], [wide_source], f"{result}/widen", to=TensorProto.FLOAT))
        node.input[0], node.output[0] = wide_source, wide_result
        nodes.append(node)
        nodes.append(helper.make_node("Cast", [wide_result], [result], f"{result}/narrow", to=low))
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def without_hard_swish(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with HardSwish written out, x * max(0, min(1, x / 6 + 1/2)): TensorRT has none for BF16."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        if node.op_type != "HardSwish" or node.domain:
            nodes.append(node)
            continue
        source, result = node.input[0], node.output[0]
        gate = f"{result}/gate"
        nodes.append(helper.make_node("HardSigmoid", [source], [gate], gate, alpha=1 / 6, beta=0.5))
        nodes.append(helper.make_node("Mul", [source, gate], [result], node.name))
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def precision_counts(model: onnx.ModelProto) -> PrecisionCounts:
    """Count the nodes of the main graph by the floating-point type of their first output."""
    types = value_types(model)
    nodes: Counter[str] = Counter()
    casts = 0
    for node in model.graph.node:
        name = _FLOATS.get(types.get(node.output[0], 0))
        if name is None:
            continue
        if node.op_type == "Cast" and types.get(node.input[0], 0) in _FLOATS:
            casts += 1
        else:
            nodes[name] += 1
    return PrecisionCounts(dict(sorted(nodes.items())), casts)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of the main graph that shape inference knows."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types
