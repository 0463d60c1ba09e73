"""Facts about an ONNX file, read from its graph: nothing is run and no external data is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_deploy.bundle import hash_file
from evit_deploy.errors import InputDataError

if TYPE_CHECKING:
    import onnx

MAX_ONNX_BYTES = 2 * 1024**3  # protobuf's own limit
_STANDARD_DOMAIN = "ai.onnx"  # written "" in the file
_WEIGHT_DTYPES = ("float", "float16", "bfloat16", "double")  # the others hold shapes, indices and zero points


def onnx_facts(path: Path) -> dict[str, Any]:
    """Opset, interface, operators, parameters, types, metadata and hash of an ONNX file.

    Returns:
        opset: domain to version; ir_version; producer; inputs and outputs: name, dtype, shape (a number, a name for a
        dynamic dimension, or None); operators: domain to operator to count, subgraphs included, bodies of functions
        not; nodes; functions: domain, name, and the operators of its body; parameters: elements of all floating-point
        weights and quantised ones; initializers: dtype to elements; precision: the types of these, most elements first;
        metadata; external_data; sha256; size_bytes.

    Raises:
        InputDataError: the file is no ONNX model.
    """
    import onnx

    model = _load(path)
    graph = model.graph
    elements: Counter[str] = Counter()
    for tensor in graph.initializer:
        elements[_dtype_name(tensor.data_type)] += prod(tensor.dims)
    weight_elements = _weight_elements(graph)
    is_external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer)
    operators = _operator_counts(graph.node)
    weights = {tensor.name for tensor in graph.initializer}
    return {
        "opset": {entry.domain or _STANDARD_DOMAIN: entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        # Before IR version 4, weights were listed among the inputs as well.
        "inputs": [_value_facts(value) for value in graph.input if value.name not in weights],
        "outputs": [_value_facts(value) for value in graph.output],
        "nodes": sum(sum(counts.values()) for counts in operators.values()),
        "operators": operators,
        "functions": [
            {"domain": function.domain, "name": function.name, "operators": _operator_counts(function.node)}
            for function in model.functions
        ],
        "parameters": weight_elements.total(),
        "initializers": dict(sorted(elements.items())),
        "precision": [name for name, _ in weight_elements.most_common()],
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "external_data": is_external,
        "sha256": hash_file(path),
        "size_bytes": path.stat().st_size,
    }


def _load(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise InputDataError(f"{path} is empty", hint="export or copy it again")
        if size_bytes > MAX_ONNX_BYTES:
            raise InputDataError(f"{path} has {size_bytes} bytes; an ONNX file has at most {MAX_ONNX_BYTES}")
        model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise InputDataError(
            f"{path} is not an ONNX model, or a truncated one", hint="export or copy it again"
        ) from error
    except OSError as error:
        raise InputDataError(f"{path} cannot be read: {error.strerror}") from error
    # Protobuf takes many byte strings for an empty message.
    if model.ir_version == 0 or not model.opset_import or not (model.graph.output or model.graph.node):
        raise InputDataError(f"{path} is not an ONNX model: it has no graph", hint="export or copy it again")
    return model


def _weight_elements(graph: onnx.GraphProto) -> Counter[str]:
    """Elements of the weights by type: of the floating-point ones, and of those that a node dequantises."""
    dequantised = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    elements: Counter[str] = Counter()
    for tensor in graph.initializer:
        name = _dtype_name(tensor.data_type)
        if name in _WEIGHT_DTYPES or tensor.name in dequantised:
            elements[name] += prod(tensor.dims)
    return elements


def _operator_counts(nodes: Iterable[onnx.NodeProto]) -> dict[str, dict[str, int]]:
    counts: Counter[tuple[str, str]] = Counter((node.domain or _STANDARD_DOMAIN, node.op_type) for node in _walk(nodes))
    by_domain: dict[str, dict[str, int]] = {}
    for (domain, operator), count in sorted(counts.items()):
        by_domain.setdefault(domain, {})[operator] = count
    return by_domain


def _walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs (If, Loop, Scan)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)


def _value_facts(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    return {"name": value.name, "dtype": _dtype_name(tensor.elem_type), "shape": shape}


def _dtype_name(code: int) -> str:
    import onnx

    try:
        return str(onnx.TensorProto.DataType.Name(code)).lower()
    except ValueError:
        return f"unknown({code})"
