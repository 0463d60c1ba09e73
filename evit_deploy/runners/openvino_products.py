"""Matrix products with weights as the 1x1 convolutions that they are, for OpenVINO.

A classifier's product has few rows, one for each image, so that its time is the reading of its weights. In BF16
OpenVINO reads them faster for a convolution; and a convolution stays in the precision that it is marked with, where a
product ignores the mark. The rows become the pixels of one map: as maps, they would have the weights read for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx.helper import make_node

from evit_deploy.runners.onnx_nodes import attributes
from evit_deploy.runners.openvino_layout import CHANNELS_FIRST, CHANNELS_LAST

LARGE = 2**19  # weights, 1 MiB in BF16: what a core's cache has not kept since the last call

_GEMM_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def convolve_large_products(graph: onnx.GraphProto) -> int:
    """Replace each Gemm with at least `LARGE` weights, in place; returns how many."""
    sizes = {weight.name: weight.dims[0] * weight.dims[1] for weight in graph.initializer if len(weight.dims) == 2}
    return _replace(graph, [node for node in graph.node if _is_plain(node) and sizes.get(node.input[1], 0) >= LARGE])


def convolve_last_product(graph: onnx.GraphProto) -> bool:
    """Replace the Gemm that makes the output, in place; False where none does."""
    output = graph.output[0].name
    return bool(_replace(graph, [node for node in graph.node if _is_plain(node) and output in node.output]))


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
