"""The ONNX parser's choice between plugin, built-in operator and model-local function, as 10.16 and 11.0 make it.

What other nodes compute is not simulated: their outputs have the types and shapes of ONNX's shape inference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from tests.trtsim.builder import log
from tests.trtsim.expressions import Tree
from tests.trtsim.network import Layer, Network, Tensor, input_trees
from tests.trtsim.objects import Address, Handle, Simulated, Simulation, Text, virtual
from tests.trtsim.plugin_layers import plugin_layer
from tests.trtsim.registry import PREFER, QUICK_ANY, QUICK_AOT, QUICK_JIT, create_plugin, find_creator, wanted_fields
from tests.trtsim.structures import (
    BF16,
    BOOL,
    BUILD_PHASE,
    CHAR_FIELD,
    FLOAT,
    FLOAT32_FIELD,
    HALF,
    INT8,
    INT32,
    INT32_FIELD,
    INT64,
    UINT8,
)

OVERRIDE = 3  # OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE
IDENTITY = 20  # LayerType
UNSUPPORTED_NODE = 8  # ErrorCode
DTYPES: dict[int, int] = {
    TensorProto.FLOAT: FLOAT,
    TensorProto.FLOAT16: HALF,
    TensorProto.BFLOAT16: BF16,
    TensorProto.INT8: INT8,
    TensorProto.INT32: INT32,
    TensorProto.INT64: INT64,
    TensorProto.BOOL: BOOL,
    TensorProto.UINT8: UINT8,
}
BUILT_IN = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
# Bits of the network's flags PREFER_JIT_PYTHON_PLUGINS and PREFER_AOT_PYTHON_PLUGINS.
PREFERENCES = {10: {"jit": 2, "aot": 3}, 11: {"jit": 1, "aot": 2}}


class ParserError(Simulated):
    interfaces = ("IParserError",)
    direct = True

    def __init__(self, simulation: Simulation, text: str, index: int, name: str, op_type: str) -> None:
        super().__init__(simulation)
        self.text, self.index, self.name, self.op_type = text, index, name, op_type

    @virtual(ctypes.c_int32)
    def code(self) -> int:
        return UNSUPPORTED_NODE

    @virtual(Text)
    def desc(self) -> str:
        return self.text

    @virtual(Text)
    def file(self) -> str:
        return "parser.py"

    @virtual(ctypes.c_int32)
    def line(self) -> int:
        return 1

    @virtual(Text)
    def func(self) -> str:
        return "parse"

    @virtual(ctypes.c_int32)
    def node(self) -> int:
        return self.index

    @virtual(Text)
    def nodeName(self) -> str:
        return self.name

    @virtual(Text)
    def nodeOperator(self) -> str:
        return self.op_type


class Parser(Simulated):
    """Attributes:
    choices: of the last graph: (op_type, "plugin", "built-in" or "function") of each node.
    warnings: what a plugin asked for and a node lacks.
    """

    interfaces = ("IParser",)
    direct = True

    def __init__(self, simulation: Simulation, network: Network, logger: int) -> None:
        super().__init__(simulation)
        self.network, self.logger = network, logger
        self.flags = 0
        self.errors: list[ParserError] = []
        self.choices: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.tensors: dict[str, Tensor] = {}

    @virtual(ctypes.c_bool, Address, ctypes.c_uint64, Text)
    def parse(self, data: int, size_bytes: int, path: str | None) -> bool:
        try:
            model = onnx.load_model_from_string(ctypes.string_at(data, size_bytes))
        except Exception as error:  # noqa: BLE001 - protobuf's own class differs between its versions
            self._fail(f"no ONNX model: {error}", -1, "", "")
            return False
        return self._parse_graph(model)

    @virtual(ctypes.c_bool, Text, ctypes.c_int32)
    def parseFromFile(self, path: str, verbosity: int) -> bool:
        return self._parse_graph(onnx.load(Path(path)))

    @virtual(None)
    def delete(self) -> None:
        """Nothing: what was parsed is looked at afterwards."""

    @virtual(ctypes.c_int32)
    def getNbErrors(self) -> int:
        return len(self.errors)

    @virtual(Handle, ctypes.c_int32)
    def getError(self, index: int) -> ParserError:
        return self.errors[index]

    @virtual(None)
    def clearErrors(self) -> None:
        self.errors.clear()

    @virtual(None, ctypes.c_uint32)
    def setFlags(self, flags: int) -> None:
        self.flags = flags

    @virtual(ctypes.c_uint32)
    def getFlags(self) -> int:
        return self.flags

    @virtual(None, ctypes.c_int32)
    def setFlag(self, flag: int) -> None:
        self.flags |= 1 << flag

    @virtual(None, ctypes.c_int32)
    def clearFlag(self, flag: int) -> None:
        self.flags &= ~(1 << flag)

    @virtual(ctypes.c_bool, ctypes.c_int32)
    def getFlag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)

    def _parse_graph(self, model: onnx.ModelProto) -> bool:
        self.choices.clear()
        self.tensors.clear()
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        infos = {info.name: info for info in (*graph.value_info, *graph.output)}
        functions = {function.name for function in model.functions}  # whatever their domain
        constants = {tensor.name for tensor in graph.initializer}
        symbols: dict[str, Tree] = {}
        for tensor in graph.initializer:
            self._add(Tensor(self.simulation, tensor.name, DTYPES[tensor.data_type], list(tensor.dims)))
        for info in graph.input:
            if info.name not in constants:
                self._add_input(info, symbols)
        for index, node in enumerate(graph.node):
            try:
                self._add_node(node, functions, infos, symbols)
            except RuntimeError as error:
                self._fail(str(error), index, node.name, node.op_type)
                return False
        self.network.outputs.extend(self.tensors[info.name] for info in graph.output)
        return True

    def _fail(self, text: str, index: int, name: str, op_type: str) -> None:
        self.errors.append(ParserError(self.simulation, text, index, name, op_type))
        log(self.simulation, self.logger, f"[parser] {text}")

    def _add(self, tensor: Tensor) -> None:
        self.tensors[tensor.name] = tensor

    def _add_input(self, info: onnx.ValueInfoProto, symbols: dict[str, Tree]) -> None:
        dims = info.type.tensor_type.shape.dim
        trees = input_trees(info.name, [d.dim_value if d.HasField("dim_value") else -1 for d in dims])
        for d, tree in zip(dims, trees, strict=True):
            if d.dim_param:
                symbols.setdefault(d.dim_param, tree)
        dtype = DTYPES[info.type.tensor_type.elem_type]
        self._add(Tensor(self.simulation, info.name, dtype, trees, is_input=True))
        self.network.inputs.append(self.tensors[info.name])

    def _add_node(
        self,
        node: onnx.NodeProto,
        functions: set[str],
        infos: Mapping[str, onnx.ValueInfoProto],
        symbols: Mapping[str, Tree],
    ) -> None:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        inputs = [self.tensors[name] for name in node.input if name]
        choice, creator = self._choose(node, attributes, functions)
        self.choices.append((node.op_type, choice))
        layer: Layer
        if choice == "plugin":
            layer = self._plugin_layer(node, attributes, creator, inputs)
        else:
            layer = Layer(self.simulation, node.name, IDENTITY, inputs)
            layer.outputs = [self._output(infos.get(name), name, symbols) for name in node.output]
        for name, tensor in zip(node.output, layer.outputs, strict=True):
            tensor.name = name
            self._add(tensor)
        self.network.layers.append(layer)

    def _choose(
        self, node: onnx.NodeProto, attributes: Mapping[str, AttributeProto], functions: set[str]
    ) -> tuple[str, tuple[str, str, str]]:
        """Plugin asked for by its attribute, built-in operator, function, plugin of the node's name; in this order."""
        version = _text(attributes, "plugin_version", "1")
        namespace = _text(attributes, "plugin_namespace", "")
        asked = "plugin_namespace" in attributes or bool(self.flags >> OVERRIDE & 1)
        names = [(node.op_type, version, namespace), (node.op_type, version, node.domain)]
        if asked and find_creator(self.simulation, names[0]) is not None:
            return "plugin", names[0]
        if node.op_type in BUILT_IN:
            return "built-in", names[0]
        if node.op_type in functions:
            return "function", names[0]
        for name in names:
            if find_creator(self.simulation, name) is not None:
                return "plugin", name
        raise RuntimeError(f"no importer registered for op {node.op_type}, and no plugin of version {version}")

    def _plugin_layer(
        self,
        node: onnx.NodeProto,
        attributes: Mapping[str, AttributeProto],
        name: tuple[str, str, str],
        inputs: Sequence[Tensor],
    ) -> Layer:
        creator = find_creator(self.simulation, name)
        assert creator is not None
        fields = []
        for field in wanted_fields(self.simulation, creator):
            if field in attributes:
                fields.append(_plugin_field(attributes[field]))
            else:
                self.warnings.append(f"{node.op_type} has no attribute {field}")
        request = self._request(attributes)
        plugin = create_plugin(self.simulation, creator, node.name, fields, BUILD_PHASE, request)
        return plugin_layer(self.simulation, node.name, inputs, name, plugin)

    def _request(self, attributes: Mapping[str, AttributeProto]) -> int:
        """Which form of a quickly deployable plugin is asked for."""
        if "aot" in attributes:
            return QUICK_AOT if attributes["aot"].i else QUICK_JIT
        bits = PREFERENCES[self.simulation.major]
        preferred = [PREFER[form] for form, bit in bits.items() if self.network.flags >> bit & 1]
        return preferred[0] if preferred else QUICK_ANY

    def _output(self, info: onnx.ValueInfoProto | None, name: str, symbols: Mapping[str, Tree]) -> Tensor:
        if info is None or not info.type.tensor_type.HasField("shape"):
            raise RuntimeError(f"shape inference says nothing of {name}")
        trees = []
        for axis, d in enumerate(info.type.tensor_type.shape.dim):
            trees.append(d.dim_value if d.HasField("dim_value") else symbols.get(d.dim_param, ("dim", name, axis)))
        return Tensor(self.simulation, name, DTYPES[info.type.tensor_type.elem_type], trees)


def _text(attributes: Mapping[str, AttributeProto], name: str, default: str) -> str:
    return attributes[name].s.decode() if name in attributes else default


def _plugin_field(attribute: AttributeProto) -> tuple[str, int, bytes]:
    """(name, type, data): numbers have 32 bits, and a string ends with NUL."""
    if attribute.type in (AttributeProto.INT, AttributeProto.INTS):
        values: Any = attribute.ints if attribute.type == AttributeProto.INTS else [attribute.i]
        return attribute.name, INT32_FIELD, np.array(list(values), np.int32).tobytes()
    if attribute.type in (AttributeProto.FLOAT, AttributeProto.FLOATS):
        values = attribute.floats if attribute.type == AttributeProto.FLOATS else [attribute.f]
        return attribute.name, FLOAT32_FIELD, np.array(list(values), np.float32).tobytes()
    if attribute.type == AttributeProto.STRING:
        return attribute.name, CHAR_FIELD, attribute.s + b"\0"
    raise RuntimeError(f"attribute {attribute.name} has a type that no plugin field can have")
