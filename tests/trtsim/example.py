"""`python -m tests.trtsim.example VERSION RESULT`: a plugin of a few lines over the simulation, for the tests of that.

No `from __future__ import annotations` here: the bindings read annotations as objects.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from tests.trtsim import core
from tests.trtsim.builder import read_plan
from tests.trtsim.parser import Parser

simulation = core.start(sys.argv[1])

import tensorrt as trt  # noqa: E402
import tensorrt.plugin as trtp  # noqa: E402

PROFILE = {"x": ((1, 40), (8, 40), (64, 40))}
ASKING = {"plugin_namespace": "evit", "plugin_version": "1"}
PTX = ".visible .entry example(){ret;}"

_Outputs = tuple[trtp.TensorDesc]


@trtp.register("evit::Example")
def describe(x: trtp.TensorDesc, dims: npt.NDArray[np.int32]) -> _Outputs:
    return (x.like(),)


@trtp.autotune("evit::Example")
def tune(x: trtp.TensorDesc, outputs: _Outputs) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination("FP32|FP16, FP32|FP16", "LINEAR", [1, 2])]


@trtp.aot_impl("evit::Example")
def implement(
    x: trtp.TensorDesc, dims: npt.NDArray[np.int32], outputs: _Outputs, tactic: int
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    if dims[0] == 13:
        raise ValueError("a planted failure")
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.cdiv(x.shape_expr[0] * x.shape_expr[1], 64 * tactic)
    launch.block_x = 128
    extras = trtp.SymIntExprs(2)
    extras[0] = trtp.SymInt32(x.shape_expr[0])
    extras[1] = trtp.SymInt32(int(dims[1]))
    return "example", PTX, launch, extras


class Log(trt.ILogger):
    """Keeps what TensorRT says."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(message)


def model(
    op_type: str, attributes: Mapping[str, Any], *, function: bool, domain: str = "evit", dtype: int = TensorProto.FLOAT
) -> bytes:
    """A graph of one node, with a function of its name or without."""
    node = helper.make_node(op_type, ["x"], ["y"], domain=domain, name="one", **attributes)
    identity = helper.make_node("Identity", ["a"], ["b"])
    names = ["dims", *ASKING]
    body = helper.make_function("evit", op_type, ["a"], ["b"], [identity], [helper.make_opsetid("", 20)], names)
    tensors = [helper.make_tensor_value_info(name, dtype, ["batch", 40]) for name in ("x", "y")]
    graph: bytes = helper.make_model(
        helper.make_graph([node], "g", tensors[:1], tensors[1:]),
        functions=[body] if function else [],
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("evit", 1)],
    ).SerializeToString()
    return graph


def build(graph: bytes, override: bool = False) -> dict[str, Any]:
    """Parse and build with the bindings alone."""
    log = Log()
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    mask = (1 << int(flags.STRONGLY_TYPED)) | (1 << int(flags.PREFER_AOT_PYTHON_PLUGINS))
    network = builder.create_network(mask)
    parser = trt.OnnxParser(network, log)
    if override:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    simulated = [thing for thing in simulation.objects.values() if isinstance(thing, Parser)][-1]
    result: dict[str, Any] = {"parsed": parser.parse(graph), "choices": list(simulated.choices), "plan": None}
    result["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    if result["parsed"]:
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("x", *PROFILE["x"])
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        result["plan"] = None if plan is None else read_plan(bytes(plan))
    return {**result, "warnings": list(simulated.warnings), "log": log.lines}


def constants() -> dict[str, int]:
    """The numbers that the simulation has written down, as the bindings have them."""
    names = {
        "FLOAT": trt.DataType.FLOAT,
        "HALF": trt.DataType.HALF,
        "INT8": trt.DataType.INT8,
        "INT32": trt.DataType.INT32,
        "BOOL": trt.DataType.BOOL,
        "UINT8": trt.DataType.UINT8,
        "BF16": trt.DataType.BF16,
        "INT64": trt.DataType.INT64,
        "LINEAR": trt.TensorFormat.LINEAR,
        "BUILD": trt.PluginCapabilityType.BUILD,
        "RUNTIME": trt.PluginCapabilityType.RUNTIME,
        "BUILD_PHASE": trt.TensorRTPhase.BUILD,
        "RUNTIME_PHASE": trt.TensorRTPhase.RUNTIME,
        "INPUT": trt.TensorIOMode.INPUT,
        "OUTPUT": trt.TensorIOMode.OUTPUT,
        "FLOAT32_FIELD": trt.PluginFieldType.FLOAT32,
        "INT32_FIELD": trt.PluginFieldType.INT32,
        "CHAR_FIELD": trt.PluginFieldType.CHAR,
        "OVERRIDE": trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE,
        "PLUGIN_V3": trt.LayerType.PLUGIN_V3,
        "IDENTITY": trt.LayerType.IDENTITY,
        "ERROR": trt.ILogger.Severity.ERROR,
        "UNSUPPORTED_NODE": trt.ErrorCode.UNSUPPORTED_NODE,
        "QUICK_ANY": trt.QuickPluginCreationRequest.UNKNOWN,
        "QUICK_JIT": trt.QuickPluginCreationRequest.STRICT_JIT,
        "QUICK_AOT": trt.QuickPluginCreationRequest.STRICT_AOT,
        "prefer-jit": trt.NetworkDefinitionCreationFlag.PREFER_JIT_PYTHON_PLUGINS,
        "prefer-aot": trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS,
    }
    operations = {f"operation-{name}": value for name, value in trt.DimensionOperation.__members__.items()}
    return {name: int(value) for name, value in {**names, **operations}.items()}


def results() -> dict[str, Any]:
    asking = {"dims": [16, 2], **ASKING}
    found = {
        "asked": build(model("Example", asking, function=True)),
        "half": build(model("Example", asking, function=True, dtype=TensorProto.FLOAT16)),
        "bfloat16": build(model("Example", asking, function=True, dtype=TensorProto.BFLOAT16)),
        "not-asked": build(model("Example", {"dims": [16, 2]}, function=True)),
        "overridden": build(model("Example", {"dims": [16, 2]}, function=True), override=True),
        "other-version": build(model("Example", {**asking, "plugin_version": "2"}, function=True)),
        "other-namespace": build(model("Example", {**asking, "plugin_namespace": "other"}, function=True)),
        "no-function": build(model("Example", {"dims": [16, 2]}, function=False)),
        "built-in": build(model("Relu", {}, function=True)),
        "nothing": build(model("Nothing", {}, function=False)),
        "missing-attribute": build(model("Example", ASKING, function=True)),
        "failing": build(model("Example", {**asking, "dims": [13, 2]}, function=True)),
        "faults": list(simulation.faults),
        "unknown": list(simulation.unknown),
    }
    found["constants"] = constants()
    network = trt.Builder(Log()).create_network(0)
    network.name = "no slot is known for this"
    found["unknown-after"] = list(simulation.unknown)
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(results()), encoding="utf-8")
