"""What is done to a graph before OpenVINO gets it: functions inlined, and convolutions that are split into parts split.

OpenVINO has its maps with the channels last, where taking some of the channels means copying, and its split copies
without vector instructions, which in `msra` costs as much as a third of the convolutions. Convolutions with a part of
the weights each write what the split would have copied.
"""

from __future__ import annotations

from collections import Counter

import onnx
import onnx.helper
import onnx.inliner

INLINED_NOTE = "OpenVINO does not inline functions: it was given the graph with them inlined"


def prepare_graph(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph for OpenVINO, and notes on what a user should know of it; the argument may change too."""
    notes = []
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        notes.append(INLINED_NOTE)
    split_convolutions(model.graph)
    return model, notes


def split_convolutions(graph: onnx.GraphProto) -> int:
    """Replace Conv -> Split of its channels by one Conv for each part, in place; returns how many were replaced.

    The weights are split in the graph, where OpenVINO folds the nodes away. A Conv that has groups, or whose output
    anything else wants, is left as it is.
    """
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    readers.update(_names_in_subgraphs(graph))
    convolutions = {
        node.output[0]: node for node in graph.node if node.op_type == "Conv" and _attribute(node, "group", 1) == 1
    }
    replaced = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Split"
        and _attribute(node, "axis", 0) == 1
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


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _names_in_subgraphs(graph: onnx.GraphProto) -> Counter[str]:
    """What the branches of If and the bodies of loops read."""
    names: Counter[str] = Counter()
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                names.update(name for part in inner.node for name in part.input)
                names.update(output.name for output in inner.output)
                names.update(_names_in_subgraphs(inner))
    return names
