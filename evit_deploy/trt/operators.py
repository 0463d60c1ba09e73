"""The fused operators as TensorRT plugins: one description each, from which both forms of plugin are made.

Adding an operator is adding its entry to PLUGIN_OPERATORS. Nothing here needs TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evit_kernels.launch import KernelLaunch

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.errors import EvitDeployError, InputDataError
from evit_deploy.models.operators import (
    CASCADED_ATTENTION,
    LITE_MLA,
    MULTI_SCALE_ATTENTION,
    OPERATOR_VERSION,
    PROJECTED_MULTI_SCALE_ATTENTION,
)
from evit_deploy.trt.description import FLOAT, INT, INTS, Attributes, PluginOperator, Shapes

if TYPE_CHECKING:
    import onnx

PLUGIN_NAMESPACE = OPERATOR_DOMAIN
PLUGIN_VERSION = str(OPERATOR_VERSION)
MAX_CASCADE_HEADS = 4  # of any published model

_NO_PLUGIN = "--no-plugin builds with TensorRT's own layers"
_PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}


@dataclass(frozen=True)
class PluginLayer:
    """A node of a graph that a plugin can take.

    Attributes:
        name: of the node, or of its output where the node has none.
        op_type: in PLUGIN_OPERATORS.
        attributes: as `PluginOperator.read_attributes` gives them.
        input_shapes: of every input; -1 for a dynamic batch.
        dtype: "fp32", "fp16" or "bf16", of every tensor.
        launch: the preferred one.
    """

    name: str
    op_type: str
    attributes: Mapping[str, Any]
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    launch: KernelLaunch


def plugin_layers(onnx_bytes: bytes) -> list[PluginLayer]:
    """The nodes of a graph that TensorRT's parser would give to plugins, in order.

    These are nodes of the top-level graph that ask for one; a call inside a function or a subgraph is never replaced.

    Raises:
        InputDataError: no ONNX model.
        EvitDeployError: a node whose attributes or inputs contradict each other, or that no kernel takes.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(onnx_bytes)
    except DecodeError as error:
        raise InputDataError("the graph is no ONNX model, or a truncated one", hint="export it again") from error
    nodes = [node for node in model.graph.node if _asks_for_plugin(node)]
    if not nodes:
        return []
    tensors = dict(_tensors(model.graph))
    if any(name not in tensors for node in nodes for name in node.input):
        tensors |= dict(_tensors(onnx.shape_inference.infer_shapes(model, data_prop=True).graph))
    return [_layer(node, tensors) for node in nodes]


def _asks_for_plugin(node: onnx.NodeProto) -> bool:
    found = {attribute.name: attribute.s.decode(errors="replace") for attribute in node.attribute}
    asked = {name: found.get(name) for name in _PLUGIN_ATTRIBUTES}
    return node.op_type in PLUGIN_OPERATORS and node.domain == OPERATOR_DOMAIN and asked == _PLUGIN_ATTRIBUTES


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """Name, element type and shape of every tensor that the file says it of; -1 where a size is dynamic."""
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type and tensor.HasField("shape"):
            sizes = (d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
            yield value.name, (tensor.elem_type, tuple(sizes))
    for initializer in graph.initializer:
        yield initializer.name, (initializer.data_type, tuple(initializer.dims))


def _layer(node: onnx.NodeProto, tensors: Mapping[str, tuple[int, tuple[int, ...]]]) -> PluginLayer:
    import onnx

    operator = PLUGIN_OPERATORS[node.op_type]
    name = node.name or node.output[0]
    try:
        unknown = [tensor for tensor in node.input if tensor not in tensors]
        if unknown:
            raise ValueError(f"the shape of its input {unknown[0]!r} is not known")
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = operator.read_attributes({k: v for k, v in values.items() if k not in _PLUGIN_ATTRIBUTES})
        shapes = tuple(tensors[tensor][1] for tensor in node.input)
        dtype = _dtype([tensors[tensor][0] for tensor in node.input])
        launch = operator.launch(attributes, shapes, dtype)
    except ValueError as error:
        raise EvitDeployError(f"layer {name} ({node.op_type}) has no plugin: {error}", hint=_NO_PLUGIN) from error
    return PluginLayer(name, node.op_type, attributes, shapes, dtype, launch)


def _dtype(elem_types: Sequence[int]) -> str:
    """Triton's name of the one element type."""
    from onnx import TensorProto

    names: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    if len(set(elem_types)) != 1 or elem_types[0] not in names:
        found = ", ".join(TensorProto.DataType.Name(elem_type) for elem_type in elem_types)
        raise ValueError(f"its inputs must all be FLOAT, FLOAT16 or BFLOAT16, got {found}")
    return names[elem_types[0]]


def _map_sizes(attributes: Attributes, shapes: Shapes) -> dict[str, int]:
    _, _, height, width = shapes[0]
    return {"height": height, "width": width}


def _token_sizes(tokens: int) -> Callable[[Attributes, Shapes], dict[str, int]]:
    """For an operator whose input of that number has the shape of the tokens, [B, H, W, C]."""

    def sizes(attributes: Attributes, shapes: Shapes) -> dict[str, int]:
        _, height, width, channels = shapes[tokens]
        return {"height": height, "width": width, "head_dim": channels // attributes["heads"]}

    return sizes


def _cascade_sizes(attributes: Attributes, shapes: Shapes) -> dict[str, int]:
    return {**_map_sizes(attributes, shapes), "key_dim": shapes[3][1]}


def _three_branches(tokens: int) -> Callable[[Sequence[Sequence[Any]]], list[Any]]:
    """As `_token_sizes`; every token gets three branches side by side."""

    def shape(shapes: Sequence[Sequence[Any]]) -> list[Any]:
        batch, height, width, channels = shapes[tokens]
        return [batch, height * width, channels * 3]

    return shape


def _lite_mla_shape(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    (batch, channels, height, width), (_, aggregated_channels, _, _) = shapes
    return [batch, (channels + aggregated_channels) // 3, height, width]


def _same_shape(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    return list(shapes[0])


def _cascaded_attention(heads: int) -> PluginOperator:
    def sizes(attributes: Attributes, shapes: Shapes) -> dict[str, int]:
        if shapes[3][0] != heads:
            raise ValueError(f"{CASCADED_ATTENTION}{heads} has {heads} heads, but its inputs have {shapes[3][0]}")
        return _cascade_sizes(attributes, shapes)

    return PluginOperator(
        op_type=f"{CASCADED_ATTENTION}{heads}",
        operator="cascaded_attention",
        inputs=("x", "qkv_weight", "qkv_bias", "query_weight", "query_bias", "attention_bias"),
        maps=1,
        output="out",
        attributes={"window": INT, "key_dim": INT, "kernels": INTS, "height": INT, "width": INT},
        arguments=("window",),
        sizes=sizes,
        output_shape=_same_shape,
    )


PLUGIN_OPERATORS: Mapping[str, PluginOperator] = {
    operator.op_type: operator
    for operator in (
        PluginOperator(
            op_type=MULTI_SCALE_ATTENTION,
            operator="multi_scale_attention",
            inputs=("qkv_small", "qkv_medium", "q_large", "kv_large"),
            maps=4,
            output="out",
            attributes={"heads": INT, "head_dim": INT, "height": INT, "width": INT, "query_blocks": INT},
            arguments=("heads",),
            sizes=_token_sizes(2),
            output_shape=_three_branches(2),
        ),
        PluginOperator(
            op_type=PROJECTED_MULTI_SCALE_ATTENTION,
            operator="projected_multi_scale_attention",
            inputs=("x", "kv_large", "weight", "bias"),
            maps=2,
            output="out",
            attributes={"heads": INT, "head_dim": INT, "height": INT, "width": INT, "query_blocks": INT},
            arguments=("heads",),
            sizes=_token_sizes(0),
            output_shape=_three_branches(0),
        ),
        PluginOperator(
            op_type=LITE_MLA,
            operator="lite_mla",
            inputs=("qkv", "aggregated"),
            maps=2,
            output="out",
            attributes={"dim": INT, "eps": FLOAT, "height": INT, "width": INT},
            arguments=("dim", "eps"),
            sizes=_map_sizes,
            output_shape=_lite_mla_shape,
        ),
        *(_cascaded_attention(heads) for heads in range(1, MAX_CASCADE_HEADS + 1)),
    )
}
