"""ONNX graphs of one fused operator, node and function as the exporter writes them, for the tests of the plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx
from onnx import TensorProto, helper

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.models.operators import OPERATOR_VERSION
from evit_deploy.onnx.functions import operator_functions

DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
ASKING = {"plugin_namespace": OPERATOR_DOMAIN, "plugin_version": str(OPERATOR_VERSION)}


@dataclass(frozen=True)
class PluginCase:
    """One node.

    Attributes:
        op_type: of the node.
        attributes: of the node, but the two that ask for a plugin.
        maps: name to shape without the batch, of the inputs that have one.
        parameters: name to shape, of the inputs that are weights.
        output: shape of the output without the batch.
    """

    op_type: str
    attributes: Mapping[str, Any]
    maps: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, tuple[int, ...]]
    output: tuple[int, ...]

    def shapes(self, batch: int = -1) -> list[tuple[int, ...]]:
        """Of every input, in order."""
        return [*((batch, *shape) for shape in self.maps.values()), *self.parameters.values()]


def _cascade(heads: int) -> PluginCase:
    window, key_dim, channels, kernel = 3, 8, 16, 5  # of a head
    projected, tokens = 2 * key_dim + channels, window**2
    return PluginCase(
        f"EvitCascadedAttention{heads}",
        {"window": window, "key_dim": key_dim, "kernels": [kernel, *[3] * (heads - 1)], "height": 5, "width": 7},
        {"x": (heads * channels, 5, 7)},
        {
            "qkv_weight": (heads, projected, channels),
            "qkv_bias": (heads, projected),
            "query_weight": (heads, key_dim, kernel, kernel),
            "query_bias": (heads, key_dim),
            "attention_bias": (heads, tokens, tokens),
        },
        (heads * channels, 5, 7),
    )


CASES = {
    case.op_type: case
    for case in (
        PluginCase(
            "EvitMultiScaleAttention",
            {"heads": 2, "head_dim": 8, "height": 6, "width": 7, "query_blocks": 3},
            {"qkv_small": (6, 7, 48), "qkv_medium": (6, 7, 48), "q_large": (6, 7, 16), "kv_large": (3, 4, 32)},
            {},
            (42, 48),
        ),
        PluginCase(
            "EvitProjectedMultiScaleAttention",
            {"heads": 2, "head_dim": 8, "height": 6, "width": 7, "query_blocks": 3},
            {"x": (6, 7, 16), "kv_large": (3, 4, 32)},
            {"weight": (112, 16), "bias": (112,)},
            (42, 48),
        ),
        PluginCase(
            "EvitLiteMLA",
            {"dim": 8, "eps": 1e-5, "height": 5, "width": 7},
            {"qkv": (48, 5, 7), "aggregated": (72, 5, 7)},
            {},
            (40, 5, 7),
        ),
        *(_cascade(heads) for heads in (1, 2, 3, 4)),
    )
}
OP_TYPES = tuple(CASES)
TYPICAL = ("EvitMultiScaleAttention", "EvitLiteMLA", "EvitCascadedAttention3")  # one of each operator


def plugin_graph(
    op_type: str,
    dtype: str = "fp32",
    *,
    batch: int | str = "batch",
    attributes: Mapping[str, Any] | None = None,
    asking: bool = True,
) -> onnx.ModelProto:
    """A graph of one node called "attention"; maps are inputs, parameters are zeros.

    Args:
        op_type: in CASES.
        dtype: in DTYPES, of every tensor.
        batch: a number fixes it.
        attributes: replace the case's; None as a value leaves one out.
        asking: whether the node asks for a plugin.
    """
    case, kind = CASES[op_type], DTYPES[dtype]
    values = {**case.attributes, **(ASKING if asking else {}), **(attributes or {})}
    node = helper.make_node(
        op_type,
        [*case.maps, *case.parameters],
        ["out"],
        name="attention",
        domain=OPERATOR_DOMAIN,
        **{name: value for name, value in values.items() if value is not None},
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, [batch, *shape]) for name, shape in case.maps.items()],
        [helper.make_tensor_value_info("out", kind, [batch, *case.output])],
        [
            helper.make_tensor(name, kind, shape, bytes(prod(shape) * ELEMENT_BYTES[dtype]), raw=True)
            for name, shape in case.parameters.items()
        ],
    )
    return helper.make_model(
        graph,
        functions=operator_functions([op_type], 20),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(OPERATOR_DOMAIN, OPERATOR_VERSION)],
        ir_version=10,
    )
