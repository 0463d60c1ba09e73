"""A classifier's matrix products, for OpenVINO: as 1x1 convolutions, or with weights in INT8.

Such a product has few rows, one for each image, so that its time is the reading of its weights. In BF16 OpenVINO reads
them faster for a convolution; and a convolution stays in the precision that it is marked with, where a product ignores
the mark. The rows become the pixels of one map: as maps, they would have the weights read for each.

Weights in INT8 are half as many bytes again. OpenVINO makes BF16 of them as it reads them, and multiplies in that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array

from evit_deploy.runners.onnx_nodes import attributes
from evit_deploy.runners.openvino_layout import CHANNELS_FIRST, CHANNELS_LAST

LARGE = 2**19  # weights, 1 MiB in BF16: what a core's cache has not kept since the last call
GROUP = 32  # weights of a row that share a scale; with 64 a product is a trace faster, and less accurate
INT8_WEIGHTS_NOTE = f"the weights of large products are INT8, {GROUP} to a scale"

_INT8_MAX = 127

_GEMM_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def convolve_large_products(graph: onnx.GraphProto) -> int:
    """Replace each Gemm with at least `LARGE` weights, in place; returns how many."""
    return _replace(graph, _large_products(graph))


def convolve_last_product(graph: onnx.GraphProto) -> bool:
    """Replace the Gemm that makes the output, in place; False where none does."""
    output = graph.output[0].name
    return bool(_replace(graph, [node for node in graph.node if _is_plain(node) and output in node.output]))


def compress_large_products(graph: onnx.GraphProto) -> int:
    """Give each Gemm with at least `LARGE` weights these in INT8, in place; returns how many.

    `GROUP` weights after one another in a row share a scale, their largest magnitude / 127, so that a weight is off by
    no more than 1/254 of the largest next to it. Products whose rows do not divide into such groups, or whose weights
    are no FP32 or not finite, are left alone.
    """
    weights = {weight.name: weight for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT}
    compressed = {}
    for product in _large_products(graph):
        name, out = product.input[1], product.output[0]
        if name not in weights:
            continue
        values = to_array(weights[name])
        if values.shape[1] % GROUP or not np.isfinite(values).all():
            continue
        groups = values.reshape(len(values), -1, GROUP)
        scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(_INT8_MAX)
        integers = np.rint(groups / np.where(scales == 0, 1, scales)).astype(np.int8)
        parts = [f"{out}/integers", f"{out}/scales", f"{out}/{name}"]
        graph.initializer.extend([from_array(integers, parts[0]), from_array(scales, parts[1])])
        compressed[out] = [
            make_node("Cast", [parts[0]], [f"{out}/floats"], to=onnx.TensorProto.FLOAT),
            make_node("Mul", [f"{out}/floats", parts[1]], [f"{out}/groups"]),
            make_node("Constant", [], [f"{out}/shape"], value_ints=values.shape),
            make_node("Reshape", [f"{out}/groups", f"{out}/shape"], [parts[2]]),
        ]
        product.input[1] = parts[2]
    nodes = [part for node in graph.node for part in (*compressed.get(node.output[0], ()), node)]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(compressed)


def _large_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    sizes = {weight.name: weight.dims[0] * weight.dims[1] for weight in graph.initializer if len(weight.dims) == 2}
    return [node for node in graph.node if _is_plain(node) and sizes.get(node.input[1], 0) >= LARGE]


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether a node is a product with weights that have a row for each output."""
    return node.op_type == "Gemm" and _GEMM_DEFAULTS | attributes(node) == _GEMM_DEFAULTS | {"transB": 1}


def _replace(graph: onnx.GraphProto, products: Sequence[onnx.NodeProto]) -> int:
    names = {product.output[0] for product in products}
    nodes = [part for node in graph.node for part in (_convolution(node) if node.output[0] in names else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(names)


def _convolution(product: onnx.NodeProto) -> list[onnx.NodeProto]:
    rows, weight, *bias = product.input
    out = product.output[0]
    return [
        make_node("Constant", [], [f"{out}/map_axes"], value_ints=[0, 2]),
        make_node("Constant", [], [f"{out}/kernel_axes"], value_ints=[2, 3]),
        make_node("Unsqueeze", [rows, f"{out}/map_axes"], [f"{out}/pixels"]),
        make_node("Transpose", [f"{out}/pixels"], [f"{out}/map"], perm=CHANNELS_FIRST),
        make_node("Unsqueeze", [weight, f"{out}/kernel_axes"], [f"{out}/{weight}"]),
        make_node("Conv", [f"{out}/map", f"{out}/{weight}", *bias], [f"{out}/conv"], name=product.name),
        make_node("Transpose", [f"{out}/conv"], [f"{out}/out_pixels"], perm=CHANNELS_LAST),
        make_node("Squeeze", [f"{out}/out_pixels", f"{out}/map_axes"], [out]),
    ]
