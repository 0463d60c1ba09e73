"""LiteMLA for OpenVINO: all tokens' channels in one row, as its maps have them, and several heads to a product.

The operator's own body wants each head's channels apart, which moves every map twice, and its products of 16 channels
fill no vector unit. Here heads stand together in blocks of 64 channels: a block's products are between all of its
channels, and what is between two heads is set to zero. The convolutions before it make queries, keys and values of a
block lie together, by the order of their output channels; the last of them, too, takes heads together, with zeros
between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.models.operators import LITE_MLA
from evit_deploy.runners.onnx_nodes import attributes, readers_of

BLOCK_CHANNELS = 64  # of 16 to 256, the fastest or nearly so in FP32 and BF16, with AMX and without
GROUP_CHANNELS = 32  # of 16 to 128, the fastest with AMX and in FP32 with AVX-512; elsewhere a trace slower than 16

_BLOCKS = f"{LITE_MLA}Blocks"
_SIGNATURE = "<eps, token_shape, head_shape, scale_shape, map_shape> (qkv, aggregated, same_head, own_head) => (out)"
_BODY = """
    nothing = Constant <value_float: float = 0.0> ()
    epsilon = Constant <value_float: float = @eps> ()
    tokens = Constant <value_ints: ints = @token_shape> ()
    heads = Constant <value_ints: ints = @head_shape> ()
    scales = Constant <value_ints: ints = @scale_shape> ()
    map = Constant <value_ints: ints = @map_shape> ()
    first = Constant <value_ints: ints = [0]> ()
    token_axis = Constant <value_ints: ints = [2]> ()
    last = Constant <value_ints: ints = [-1]> ()
    two_and_one = Constant <value_ints: ints = [2, 1]> ()
    both = Concat <axis = 0> (qkv, aggregated)
    pixels = Transpose <perm = [0, 2, 3, 1]> (both)
    rows = Reshape (pixels, tokens)
    parts = Transpose <perm = [2, 0, 3, 1, 4]> (rows)
    qk_raw, v_part = Split <axis = 0> (parts, two_and_one)
    qk = Relu (qk_raw)
    q_part, k_part = Split <axis = 0, num_outputs = 2> (qk)
    q = Squeeze (q_part, first)
    k = Squeeze (k_part, first)
    v = Squeeze (v_part, first)
    k_t = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (k_t, v)
    context = Where (same_head, products, nothing)
    numerator = MatMul (q, context)
    k_sum = ReduceSum (k, token_axis)
    k_sum_t = Transpose <perm = [0, 1, 3, 2]> (k_sum)
    k_sums = Where (own_head, k_sum_t, nothing)
    weight_sum = MatMul (q, k_sums)
    numerators = Reshape (numerator, heads)
    weight_sums = Unsqueeze (weight_sum, last)
    denominators = Add (weight_sums, epsilon)
    ratio = Div (numerators, denominators)
    blocks = Reshape (ratio, scales)
    by_token = Transpose <perm = [1, 3, 0, 2, 4]> (blocks)
    out_pixels = Reshape (by_token, map)
    out = Transpose <perm = [0, 3, 1, 2]> (out_pixels)
"""


def replace_lite_mla(model: onnx.ModelProto) -> int:
    """Make each LiteMLA behind convolutions in FP32 one of blocks, in place; returns how many.

    Needed are both convolutions' weights at hand, one aggregated scale, and that no other node reads the three maps.
    """
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    readers = readers_of(graph)
    count = 0
    for node in graph.node:
        convolutions = _convolutions(node, makers, readers, weights)
        if not convolutions:
            continue
        given = attributes(node)
        dim, height, width = given["dim"], given["height"], given["width"]
        channels = weights[convolutions[0].input[1]].dims[0] // 3
        order = np.arange(3 * channels).reshape(channels // dim, 3, dim).transpose(1, 0, 2).ravel()
        tensors = [tensor for convolution in convolutions for tensor in _reordered(convolution, order, weights)]
        _join_groups(convolutions[-1], tensors, dim)
        block = dim * _most_heads(channels // dim, BLOCK_CHANNELS // dim)
        head = np.arange(block) // dim
        names = [f"{node.output[0]}/same_head", f"{node.output[0]}/own_head"]
        masks = [head[:, None] == head[None], head[:, None] == np.arange(block // dim)[None]]
        tensors += [from_array(mask, name) for mask, name in zip(masks, names, strict=True)]
        graph.initializer.extend(tensors)
        blocks, tokens = channels // block, height * width
        replacement = make_node(
            _BLOCKS,
            [*node.input, *names],
            node.output,
            name=node.name,
            domain=OPERATOR_DOMAIN,
            eps=given["eps"],
            token_shape=[-1, tokens, 3, blocks, block],
            head_shape=[0, 0, 0, block // dim, dim],
            scale_shape=[2, -1, blocks, tokens, block],
            map_shape=[-1, height, width, 2 * channels],
        )
        node.CopyFrom(replacement)
        count += 1
    if count:
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        header = f'<opset_import: ["" : {opset}], domain: "{OPERATOR_DOMAIN}">'
        model.functions.append(onnx.parser.parse_function(f"{header}\n{_BLOCKS} {_SIGNATURE}\n{{{_BODY}}}"))
    return count


def _convolutions(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, int],
    weights: Mapping[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Projection, depthwise and pointwise convolution before a LiteMLA; none where anything is otherwise."""
    if node.op_type != LITE_MLA or len(node.input) != 2:
        return []
    pointwise = makers.get(node.input[1])
    depthwise = makers.get(pointwise.input[0]) if pointwise else None
    projection = makers.get(node.input[0])
    found = [each for each in (projection, depthwise, pointwise) if each is not None and each.op_type == "Conv"]
    if len(found) != 3 or found[1].input[0] != node.input[0]:
        return []
    if [readers[each.output[0]] for each in found] != [2, 1, 1]:
        return []
    tensors = [weights.get(name) for each in found for name in each.input[1:]]
    if any(tensor is None or tensor.data_type != onnx.TensorProto.FLOAT for tensor in tensors):
        return []
    channels = weights[found[0].input[1]].dims[0]
    groups = [attributes(each).get("group", 1) for each in found]
    return found if groups == [1, channels, channels // attributes(node)["dim"]] else []


def _most_heads(heads: int, most: int) -> int:
    """The most heads that divide all of them and are no more than so many, or one."""
    return max(count for count in range(1, max(most, 1) + 1) if heads % count == 0)


def _reordered(
    convolution: onnx.NodeProto, order: np.ndarray, weights: Mapping[str, onnx.TensorProto]
) -> list[onnx.TensorProto]:
    """New weights, and bias where there is one, that give a convolution its output channels in another order."""
    new = [
        from_array(to_array(weights[name])[order], f"{convolution.output[0]}/{name}") for name in convolution.input[1:]
    ]
    convolution.input[1:] = [tensor.name for tensor in new]
    return new


def _join_groups(convolution: onnx.NodeProto, tensors: Sequence[onnx.TensorProto], dim: int) -> None:
    """Let several heads share a group of a pointwise convolution, in place, with zeros between the heads."""
    weight = next(tensor for tensor in tensors if tensor.name == convolution.input[1])
    kernels = to_array(weight)
    heads = _most_heads(len(kernels) // dim, GROUP_CHANNELS // dim)
    joined = np.zeros((len(kernels) // (heads * dim), heads, dim, heads, dim), kernels.dtype)
    for head, kernel in enumerate(kernels.reshape(-1, heads, dim, dim).swapaxes(0, 1)):
        joined[:, head, :, head] = kernel
    weight.CopyFrom(from_array(joined.reshape(len(kernels), heads * dim, 1, 1), weight.name))
    next(entry for entry in convolution.attribute if entry.name == "group").i = len(joined)
