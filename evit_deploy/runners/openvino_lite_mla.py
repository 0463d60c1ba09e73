"""LiteMLA for OpenVINO: all tokens' channels in one row, as its maps have them, and several heads to a product.

The operator's own body wants each head's channels apart, which moves every map twice, and its products of 16 channels
fill no vector unit. Here heads stand together in blocks of 64 channels: a block's products are between all of its
channels, and what is between two heads is set to zero. The convolutions before it make queries, keys and values of a
block lie together, by the order of their output channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.models.operators import LITE_MLA
from evit_deploy.runners.onnx_nodes import attributes, readers_of

BLOCK_CHANNELS = 64  # of 16 to 256, the fastest or nearly so in FP32 and BF16, with AMX and without

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
    orders: dict[str, np.ndarray] = {}  # by the convolution's output
    count = 0
    for node in graph.node:
        convolutions = _convolutions(node, makers, readers, weights)
        if not convolutions:
            continue
        given = attributes(node)
        dim, height, width = given["dim"], given["height"], given["width"]
        channels = weights[convolutions[0].input[1]].dims[0] // 3
        block = _block_channels(channels, dim)
        order = np.arange(3 * channels).reshape(channels // dim, 3, dim).transpose(1, 0, 2).ravel()
        orders |= {convolution.output[0]: order for convolution in convolutions}
        head = np.arange(block) // dim
        names = [f"{node.output[0]}/same_head", f"{node.output[0]}/own_head"]
        masks = [head[:, None] == head[None], head[:, None] == np.arange(block // dim)[None]]
        graph.initializer.extend(from_array(mask, name) for mask, name in zip(masks, names, strict=True))
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
        nodes = [part for node in graph.node for part in _with_channels_in(orders.get(node.output[0]), node)]
        del graph.node[:]
        graph.node.extend(nodes)
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


def _block_channels(channels: int, dim: int) -> int:
    """The most channels that are whole heads, divide all channels, and are no more than a block, or one head."""
    heads = channels // dim
    most = max(BLOCK_CHANNELS // dim, 1)
    return dim * max(count for count in range(1, most + 1) if heads % count == 0)


def _with_channels_in(order: np.ndarray | None, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A convolution with its output channels in another order, for OpenVINO to fold; any other node as it is."""
    if order is None:
        return [node]
    out = node.output[0]
    indices = make_node("Constant", [], [f"{out}/order"], value_ints=order.tolist())
    gathers = [make_node("Gather", [name, f"{out}/order"], [f"{out}/{name}"], axis=0) for name in node.input[1:]]
    node.input[1:] = [f"{out}/{name}" for name in node.input[1:]]
    return [indices, *gathers, node]
