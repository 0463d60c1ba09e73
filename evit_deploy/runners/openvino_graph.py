"""What is done to a graph before OpenVINO gets it: functions inlined, and what is slow in it said otherwise.

OpenVINO has its maps with the channels last, where taking some of the channels means copying, and its split copies
without vector instructions, which in `msra` costs as much as a third of the convolutions. Convolutions with a part of
the weights each write what the split would have copied. `openvino_layout` and `openvino_lite_mla` have the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper

from evit_deploy.runners.onnx_nodes import attributes, readers_of
from evit_deploy.runners.openvino_layout import keep_channels_last
from evit_deploy.runners.openvino_lite_mla import replace_lite_mla

INLINED_NOTE = "OpenVINO does not inline functions: it was given the graph with them inlined"


def prepare_graph(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph for OpenVINO, and notes on what a user should know of it; the argument may change too."""
    notes = []
    replace_lite_mla(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        notes.append(INLINED_NOTE)
    split_convolutions(model.graph)
    keep_channels_last(model.graph)
    return model, notes


def split_convolutions(graph: onnx.GraphProto) -> int:
    """Replace Conv -> Split of its channels by one Conv for each part, in place; returns how many were replaced.

    The weights are split in the graph, where OpenVINO folds the nodes away. A Conv that has groups, or whose output
    anything else wants, is left as it is.
    """
    readers = readers_of(graph)
    convolutions = {
        node.output[0]: node for node in graph.node if node.op_type == "Conv" and attributes(node).get("group", 1) == 1
    }
    replaced = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Split"
        and attributes(node).get("axis", 0) == 1
        and node.input[0] in convolutions
        and readers[node.input[0]] == 1
    }
    nodes = []
    for node in graph.node:
        if node.op_type == "Conv" and node.output[0] in replaced:
            continue
        if node.op_type == "Split" and node.input[0] in replaced:
            nodes += _convolutions(convolutions[node.input[0]], node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return len(replaced)


def fold_sums(graph: onnx.GraphProto) -> int:
    """Make x + depthwise(x) one convolution with a 1 more in the middle of each kernel, in place; returns how many.

    Exact but for the rounding of the weights, so for FP32 ones only.
    """
    readers = readers_of(graph)
    weights = {weight.name: weight for weight in graph.initializer}
    depthwise = {node.output[0]: node for node in graph.node if _keeps_size(node, weights)}
    folded = set()
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for x, y in (tuple(node.input), tuple(node.input)[::-1]):
            convolution = depthwise.get(y)
            if convolution is None or convolution.input[0] != x or {readers[y], readers[convolution.input[1]]} != {1}:
                continue
            weight = weights[convolution.input[1]]
            kernels = onnx.numpy_helper.to_array(weight).copy()
            kernels[:, 0, kernels.shape[2] // 2, kernels.shape[3] // 2] += 1
            weight.CopyFrom(onnx.numpy_helper.from_array(kernels, weight.name))
            folded.add(node.output[0])
            convolution.output[0] = node.output[0]
            break
    nodes = [node for node in graph.node if node.op_type != "Add" or node.output[0] not in folded]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(folded)


def _keeps_size(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is a depthwise convolution in FP32 whose output's pixels stand where its input's do."""
    if node.op_type != "Conv" or node.input[1] not in weights:
        return False
    weight = weights[node.input[1]]
    if weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) != 4 or weight.dims[1] != 1:
        return False
    given = attributes(node)
    height, width = weight.dims[2:]
    same = {"group": weight.dims[0], "pads": [height // 2, width // 2] * 2}
    plain = {"auto_pad": b"NOTSET", "strides": [1, 1], "dilations": [1, 1], "kernel_shape": [height, width]}
    return height % 2 == 1 == width % 2 and plain | given == plain | same


def _convolutions(whole: onnx.NodeProto, split: onnx.NodeProto) -> list[onnx.NodeProto]:
    sizes = list(split.input[1:])
    nodes, parts = [], []
    for name in filter(None, whole.input[1:]):  # the weight, and the bias where there is one
        parts.append([f"{output}/{name}" for output in split.output])
        nodes.append(onnx.helper.make_node("Split", [name, *sizes], parts[-1], axis=0))
        if not sizes:
            nodes[-1].attribute.append(onnx.helper.make_attribute("num_outputs", len(split.output)))
    for index, output in enumerate(split.output):
        part = onnx.helper.make_node(
            "Conv", [whole.input[0], *(names[index] for names in parts)], [output], name=output
        )
        part.attribute.extend(whole.attribute)
        nodes.append(part)
    return nodes
