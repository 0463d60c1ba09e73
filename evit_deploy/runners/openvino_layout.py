"""A graph's maps with the channels last, where OpenVINO has them, all the way through an attention.

A reshape or a product that wants the channels first makes OpenVINO move a map before and after it, in `msra` for each
head of each block, and a product of transposed matrices keeps it from making one loop of scores, softmax and values.
Written with the channels last, the same values need no move.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx.helper import make_attribute, make_node

from evit_deploy.runners.onnx_nodes import attributes, integers, names_in_subgraphs, readers_of, subgraphs_of

CHANNELS_LAST = [0, 2, 3, 1]
CHANNELS_FIRST = [0, 3, 1, 2]
_MATRIX_TRANSPOSE = [0, 2, 1]
_ELEMENTWISE = frozenset({"Add", "Relu"})


def keep_channels_last(graph: onnx.GraphProto) -> None:
    """All of this module, in place."""
    flatten_channels_last(graph)
    multiply_channels_last(graph)
    carry_channels_last(graph)
    cast_identities(graph)


def flatten_channels_last(graph: onnx.GraphProto) -> int:
    """Flatten Conv -> Reshape to [B, C, H * W] by way of [B, H * W, C], in place; returns how many were changed.

    OpenVINO sees that nothing moves in the first transpose, and takes the second into the matrix product behind it.
    """
    makers = {output: node for node in graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    before = len(graph.node)
    for node in graph.node:
        source = makers.get(node.input[0]) if node.op_type == "Reshape" else None
        if source is None or source.op_type != "Conv" or integers(node.input[1], makers) != [0, 0, -1]:
            nodes.append(node)
            continue
        flat = node.output[0]
        nodes += [
            make_node("Transpose", [node.input[0]], [f"{flat}/last"], perm=CHANNELS_LAST),
            make_node("Shape", [node.input[0]], [f"{flat}/channels"], start=1, end=2),
            make_node("Constant", [], [f"{flat}/rows"], value_ints=[0, -1]),
            make_node("Concat", [f"{flat}/rows", f"{flat}/channels"], [f"{flat}/shape"], axis=0),
            make_node("Reshape", [f"{flat}/last", f"{flat}/shape"], [f"{flat}/flat"]),
            make_node("Transpose", [f"{flat}/flat"], [flat], perm=_MATRIX_TRANSPOSE, name=node.name),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return (len(nodes) - before) // 5


def multiply_channels_last(graph: onnx.GraphProto) -> int:
    """Make Reshape(a^T b^T) to a map [B, C, H, W] from b a, which is [B, H * W, C], in place; returns how many.

    The shape has to be put together from four integers, none but the batch a 0, and nothing else to read the product.
    """
    makers = {output: node for node in graph.node for output in node.output}
    readers = readers_of(graph)
    products: dict[str, tuple[str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMul" and readers[node.output[0]] == 1:
            factors = [makers.get(name) for name in node.input]
            if all(factor is not None and _permutation(factor) == _MATRIX_TRANSPOSE for factor in factors):
                left, right = (factor.input[0] for factor in factors if factor is not None)
                products[node.output[0]] = (right, left)
    replaced = set()
    for node in graph.node:
        shape = makers.get(node.input[1]) if node.op_type == "Reshape" and node.input[0] in products else None
        if shape is None or shape.op_type != "Concat" or len(shape.input) != 4:
            nodes.append(node)
            continue
        out = node.output[0]
        batch, channels, height, width = shape.input
        nodes += [
            make_node("MatMul", products[node.input[0]], [f"{out}/rows"], name=node.input[0]),
            make_node("Concat", [batch, height, width, channels], [f"{out}/shape"], axis=0),
            make_node("Reshape", [f"{out}/rows", f"{out}/shape"], [f"{out}/last"]),
            make_node("Transpose", [f"{out}/last"], [out], perm=CHANNELS_FIRST, name=node.name),
        ]
        replaced.add(node.input[0])
    del graph.node[:]
    graph.node.extend(node for node in nodes if not replaced.intersection(node.output))
    return len(replaced)


def carry_channels_last(graph: onnx.GraphProto) -> int:
    """Compute sums, activations and concatenations of maps with the channels last on those, in place; returns how many.

    Such maps are what a Transpose made channels-first, and the parts of a Split that are added to one. Who wants the
    channels first gets them so, by a Transpose in front of the first of these readers.
    """
    last = {node.output[0]: node.input[0] for node in graph.node if _permutation(node) == CHANNELS_FIRST}
    terms = [set(node.input) for node in graph.node if node.op_type == "Add"]
    added = {name for names in terms if names & last.keys() for name in names}
    given: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    count = 0

    def want_channels_first(names: Iterable[str]) -> None:
        for name in sorted(last.keys() & set(names) - given):
            nodes.append(make_node("Transpose", [last[name]], [name], perm=CHANNELS_FIRST))
            given.add(name)

    for node in graph.node:
        if _permutation(node) == CHANNELS_FIRST:
            continue
        if _is_split_of_channels(node) and added.intersection(node.output):
            whole = node.input[0]
            if whole not in last:
                nodes.append(make_node("Transpose", [whole], [f"{whole}/last"], perm=CHANNELS_LAST))
                last[whole] = f"{whole}/last"
                given.add(whole)
            nodes.append(_with_channels_last(node, last, [whole]))
        elif _takes_maps_alike(node) and last.keys() >= set(node.input):
            nodes.append(_with_channels_last(node, last, node.input))
        else:
            want_channels_first([*node.input, *names_in_subgraphs([node])])
            nodes.append(node)
            continue
        last.update({name: f"{name}/last" for name in node.output})
        count += 1
    want_channels_first(output.name for output in graph.output)
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def cast_identities(graph: onnx.GraphProto) -> int:
    """Make a branch's output that is an Identity a Cast to its own type, in place; returns how many.

    A branch cannot give what it was given without a node. OpenVINO keeps an Identity, as a layer that wants the
    channels first, and drops such a cast.
    """
    count = 0
    for node in graph.node:
        for branch in subgraphs_of(node):
            types = {output.name: output.type.tensor_type.elem_type for output in branch.output}
            for inner in branch.node:
                kind = types.get(inner.output[0], onnx.TensorProto.UNDEFINED)
                if inner.op_type == "Identity" and kind != onnx.TensorProto.UNDEFINED:
                    inner.op_type = "Cast"
                    inner.attribute.append(make_attribute("to", kind))
                    count += 1
            count += cast_identities(branch)
    return count


def _permutation(node: onnx.NodeProto) -> list[int] | None:
    return list(node.attribute[0].ints) if node.op_type == "Transpose" and node.attribute else None


def _is_split_of_channels(node: onnx.NodeProto) -> bool:
    return node.op_type == "Split" and attributes(node).get("axis", 0) == 1


def _takes_maps_alike(node: onnx.NodeProto) -> bool:
    """Whether all inputs are maps of one layout, which may be either."""
    return node.op_type in _ELEMENTWISE or (node.op_type == "Concat" and attributes(node).get("axis", 0) == 1)


def _with_channels_last(node: onnx.NodeProto, last: Mapping[str, str], maps: Iterable[str]) -> onnx.NodeProto:
    """The node on other maps, along the last axis where it has one."""
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    names = [last[name] for name in maps]
    changed.input[:] = names + list(node.input[len(names) :])
    changed.output[:] = [f"{name}/last" for name in node.output]
    for entry in changed.attribute:
        if entry.name == "axis":
            entry.i = 3
    return changed
