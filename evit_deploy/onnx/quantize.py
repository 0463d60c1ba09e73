"""INT8 in the graph: pairs of QuantizeLinear and DequantizeLinear in front of both inputs of chosen layers.

Only inputs are quantized. A layer's output keeps its precision for what comes next (an addition, a normalisation, an
attention operator), and a runtime that computes in INT8 fuses the pairs into the layer. What every runtime takes:
symmetric ranges, zero points of 0, weights stored as int8 with one scale per output channel, biases in FP32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import onnx
from onnx import numpy_helper

from evit_deploy.errors import ExportError, UsageError
from evit_deploy.onnx.blocks import BLOCK_PREFIX

LAYER_TYPES = ("Conv", "Gemm", "MatMul")
HEAD = "head"  # everything behind the last block
_OUTPUT_CHANNEL = {"Conv": 0, "Gemm": 0, "MatMul": 1}  # axis of the weight; a Gemm's after `_transposed`
_MODULE_PREFIX = "model."  # the exported module wraps the model under this name
_INFERRED_KEY, _INFERRED_VALUE = "onnx.infer", "onnxruntime.quant"  # keeps the quantizer from inferring shapes again


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized: a Conv, Gemm or MatMul of the main graph with a constant weight.

    Attributes:
        node: the node's name.
        op_type: Conv, Gemm or MatMul.
        module: the model's own name of it where its weights still carry one, else that of its block.
        activation: the tensor that it works on.
        weight: name of the constant.
        weight_elements: how many numbers it holds.
        at_edge: no other such layer comes before it, or none after it.
    """

    node: str
    op_type: str
    module: str
    activation: str
    weight: str
    weight_elements: int
    at_edge: bool

    def is_called(self, name: str) -> bool:
        """Whether `name` means this layer: its node, its module, or a block or stage that it is part of."""
        return name == self.node or name == self.module or self.module.startswith(f"{name}.")


def find_layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """The layers of a graph that can be quantized, in graph order.

    What a fused operator computes inside is none of them, and neither is a product of two activations.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    blocks = _blocks_of_nodes(graph)
    nodes = [
        node
        for node in graph.node
        if node.op_type in LAYER_TYPES
        and not node.domain
        and node.input[0] not in weights
        and node.input[1] in weights
        and weights[node.input[1]].data_type == onnx.TensorProto.FLOAT
    ]
    unnamed = [node for node in nodes if not node.name]
    if unnamed:
        raise ExportError(f"{len(unnamed)} layers of the graph have no name", hint="quantize a bundle of this tool")
    edges = _edge_outputs(graph, {node.output[0] for node in nodes})
    return tuple(
        Layer(
            node=node.name,
            op_type=node.op_type,
            module=_module_name(node) or blocks[node.output[0]],
            activation=node.input[0],
            weight=node.input[1],
            weight_elements=int(np.prod(weights[node.input[1]].dims)),
            at_edge=node.output[0] in edges,
        )
        for node in nodes
    )


def excluded_layers(layers: Sequence[Layer], names: Iterable[str]) -> dict[str, str]:
    """Which layers the given names mean.

    Args:
        layers: those of the graph.
        names: nodes, modules, blocks or stages; see `Layer.is_called`.

    Returns:
        By node name, the name that excluded it.

    Raises:
        UsageError: a name that means no layer.
    """
    found: dict[str, str] = {}
    for name in names:
        meant = [layer.node for layer in layers if layer.is_called(name)]
        if not meant:
            close = get_close_matches(name, sorted(_names(layers)), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "the report of a run without it lists every layer"
            raise UsageError(f"no layer, block or stage that could be quantized is called {name!r}", hint=hint)
        found |= dict.fromkeys(meant, name)
    return found


def _names(layers: Iterable[Layer]) -> set[str]:
    """Everything that `Layer.is_called` takes."""
    found: set[str] = set()
    for layer in layers:
        parts = layer.module.split(".")
        found |= {layer.node, *(".".join(parts[: end + 1]) for end in range(len(parts)))}
    return found


def with_layer_inputs(model: onnx.ModelProto, layers: Iterable[Layer]) -> onnx.ModelProto:
    """A copy whose graph also returns the tensors that the layers work on, each once."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    present = {value.name for value in (*model.graph.output, *model.graph.input)}
    wanted = dict.fromkeys(layer.activation for layer in layers if layer.activation not in present)
    extended.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted
    )
    return extended


def quantize_graph(model: onnx.ModelProto, layers: Sequence[Layer], thresholds: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of an FP32 graph whose given layers take INT8.

    Args:
        model: the graph that `layers` were found in.
        layers: those to quantize.
        thresholds: by activation tensor, the magnitude that becomes 127; above zero.

    Raises:
        ExportError: ONNX Runtime's quantizer left something out.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    prepared = _transposed(model, {layer.node for layer in layers if layer.op_type == "Gemm"})
    onnx.helper.set_model_props(prepared, {_INFERRED_KEY: _INFERRED_VALUE})
    typed = {value.name for value in (*prepared.graph.value_info, *prepared.graph.input, *prepared.graph.output)}
    for name in dict.fromkeys(layer.activation for layer in layers if layer.activation not in typed):
        prepared.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    limits = {layer.activation: np.float32(thresholds[layer.activation]) for layer in layers}
    quantizer = QDQQuantizer(
        prepared,
        True,  # one scale per output channel
        False,  # the full range of 8 bits
        QuantType.QInt8,
        QuantType.QInt8,
        {name: TensorData(lowest=-limit, highest=limit) for name, limit in limits.items()},
        [layer.node for layer in layers],
        [],
        list(LAYER_TYPES),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "OpTypesToExcludeOutputQuantization": list(LAYER_TYPES),
        },
    )
    quantized: onnx.ModelProto = quantizer.quantize_model()
    _sort(quantized.graph)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    check_quantized(quantized, layers)
    return quantized


def _transposed(model: onnx.ModelProto, nodes: set[str]) -> onnx.ModelProto:
    """A copy in which the named Gemms keep their weights as [output, input], the output channels first."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    for node in copy.graph.node:
        turned = next((attribute for attribute in node.attribute if attribute.name == "transB"), None)
        if node.name not in nodes or (turned is not None and turned.i):
            continue
        name = f"{node.input[1]}_transposed"
        if name not in weights:
            value = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[1]]).T)
            copy.graph.initializer.append(numpy_helper.from_array(value, name))
            weights[name] = copy.graph.initializer[-1]
        node.input[1] = name
        if turned is not None:
            node.attribute.remove(turned)
        node.attribute.append(onnx.helper.make_attribute("transB", 1))
    return copy


def _sort(graph: onnx.GraphProto) -> None:
    """Put the pairs, which the quantizer appends, in front of what takes them; all other nodes keep their order."""
    pending = {output: node for node in graph.node for output in node.output}
    ordered: list[onnx.NodeProto] = []

    def place(node: onnx.NodeProto) -> None:
        if pending.pop(node.output[0], None) is None:
            return
        for name in node.input:
            if name in pending:
                place(pending[name])
        ordered.append(node)

    for node in list(graph.node):
        place(node)
    del graph.node[:]
    graph.node.extend(ordered)


def check_quantized(model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
    """See that every layer has its two pairs, symmetric, with one scale per output channel of the weight.

    Raises:
        ExportError: the first layer that has not.
    """
    nodes = {node.name: node for node in model.graph.node}
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def faultless(node: onnx.NodeProto | None, op_type: str) -> bool:
        if node is None or node.op_type != op_type or node.domain or len(node.input) != 3:
            return False
        zero = constants.get(node.input[2])
        return zero is not None and zero.data_type == onnx.TensorProto.INT8 and not numpy_helper.to_array(zero).any()

    for layer in layers:
        activation, weight = (producers.get(name) for name in nodes[layer.node].input[:2])
        if not faultless(activation, "DequantizeLinear") or not faultless(weight, "DequantizeLinear"):
            raise ExportError(f"ONNX Runtime's quantizer left out an input of {layer.node}")
        assert activation is not None
        assert weight is not None
        axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), None)
        stored, scales = constants.get(weight.input[0]), constants.get(weight.input[1])
        if not faultless(producers.get(activation.input[0]), "QuantizeLinear"):
            raise ExportError(f"ONNX Runtime's quantizer did not quantize what {layer.node} works on")
        if stored is None or scales is None or axis != _OUTPUT_CHANNEL[layer.op_type]:
            raise ExportError(f"ONNX Runtime's quantizer gave the weight of {layer.node} no scale per output channel")
        if list(scales.dims) != [stored.dims[axis]] or not (numpy_helper.to_array(scales) > 0).all():
            raise ExportError(f"ONNX Runtime's quantizer gave the weight of {layer.node} unusable scales")


def _module_name(node: onnx.NodeProto) -> str | None:
    """`stages.0.blocks.0.local.expand` from the name of the weight or the bias, or None where folding took both."""
    for name, suffix in zip(node.input[1:], ("weight", "bias"), strict=False):
        if name.startswith(_MODULE_PREFIX) and name.endswith(suffix):
            return name.removeprefix(_MODULE_PREFIX).removesuffix(suffix).rstrip("._")
    return None


def _blocks_of_nodes(graph: onnx.GraphProto) -> dict[str, str]:
    """For every output of every node, the first block that depends on it, or `HEAD`."""
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, str] = {}
    for end in [output for output in producers if output.startswith(BLOCK_PREFIX)]:
        pending = [end]
        while pending:
            tensor = pending.pop()
            if tensor in found or tensor not in producers:
                continue
            found[tensor] = end.removeprefix(BLOCK_PREFIX)
            pending.extend(producers[tensor].input)
    return {output: found.get(output, HEAD) for output in producers}


def _edge_outputs(graph: onnx.GraphProto, layers: set[str]) -> set[str]:
    """Outputs, among those of the layers, that depend on no other layer or that no other layer depends on."""
    behind_one: set[str] = set()
    before_one: set[str] = set()
    for node in graph.node:
        if any(name in behind_one or name in layers for name in node.input):
            behind_one.update(node.output)
    for node in reversed(graph.node):
        if any(name in before_one or name in layers for name in node.output):
            before_one.update(node.input)
    return {output for output in layers if output not in behind_one or output not in before_one}
