"""What a runner reads off an ONNX file before a runtime gets it: the graph, and the precision it is written in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evit_deploy.errors import RunnerError

if TYPE_CHECKING:
    import onnx

PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}  # ONNX's names to ours
_QUANTIZED_OPERATORS = frozenset({"DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"})
_LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # their second input are weights


def load_model(model: str | Path | bytes, runner: str, *, weights: bool) -> onnx.ModelProto:
    """The parsed file.

    Args:
        model: path of the .onnx file, or its bytes.
        runner: who asks, for messages.
        weights: also read what lies in files beside it.

    Raises:
        RunnerError: there is no such file, or it is no ONNX file.
    """
    import onnx

    if not isinstance(model, bytes) and not Path(model).is_file():
        raise RunnerError(f"{runner}: no such file: {model}", hint="give the path of an .onnx file")
    try:
        if isinstance(model, bytes):
            loaded = onnx.load_model_from_string(model)
        else:
            loaded = onnx.load(str(model), load_external_data=weights)
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise RunnerError(f"{runner}: this is not an ONNX file: {' '.join(str(error).split())}") from error
    if not loaded.graph.input or not loaded.graph.output:
        raise RunnerError(f"{runner}: this is not an ONNX file: its graph has no input or no output")
    return loaded


def precision_of(graph: onnx.GraphProto) -> str:
    """The precision of most of the weights, "int8" where the graph quantizes, "unknown" where nothing tells."""
    if any(node.op_type in _QUANTIZED_OPERATORS for node in graph.node):
        return "int8"
    sizes: Counter[str] = Counter()
    for weight in graph.initializer:
        sizes[type_names([weight.data_type])[0]] += int(np.prod(weight.dims)) if weight.dims else 1
    floats = [name for name, _ in sizes.most_common() if name in PRECISIONS]
    if not floats:
        floats = type_names(value.type.tensor_type.elem_type for value in (*graph.output, *graph.input))
    return next((PRECISIONS[name] for name in floats if name in PRECISIONS), "unknown")


def count_quantized_layers(graph: onnx.GraphProto) -> int:
    """How many layers have INT8 weights, behind a DequantizeLinear; the attention's own have not."""
    stored = {weight.name for weight in graph.initializer}
    weights = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    return sum(node.op_type in _LAYER_OPERATORS and node.input[1] in weights for node in graph.node)


def type_names(types: Iterable[int]) -> list[str]:
    """ONNX's names of tensor types, for example FLOAT16."""
    import onnx

    return [onnx.TensorProto.DataType.Name(t) for t in types]
