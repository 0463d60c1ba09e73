"""Q/DQ pairs in graphs: which layers get them, that they are what every runtime takes, and what they compute."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evit_deploy.errors import ExportError, UsageError
from evit_deploy.onnx.quantize import (
    Layer,
    check_quantized,
    excluded_layers,
    find_layers,
    quantize_graph,
    with_layer_inputs,
)
from evit_deploy.runners.onnx_graph import count_quantized_layers
from evit_deploy.runners.openvino import OpenVinoRunner
from evit_deploy.specs import Preprocessing
from tests import small_exports
from tests.small_models import SmallNet, random_images, small_graph

# Convolutions and Gemms outside the attention operators, by family.
LAYERS = {"msa": {"Conv": 15, "Gemm": 8}, "mit": {"Conv": 30, "Gemm": 2}, "msra": {"Conv": 54, "Gemm": 1}}


def small_model() -> onnx.ModelProto:
    return onnx.load_model_from_string(small_graph())


def thresholds_of(model: onnx.ModelProto, layers: tuple[Layer, ...], array: np.ndarray) -> dict[str, float]:
    """The largest magnitudes that one batch shows."""
    extended = with_layer_inputs(model, layers)
    session = small_exports.session_of(extended)
    names = [output.name for output in extended.graph.output]
    found = dict(zip(names, session.run(names, {model.graph.input[0].name: array}), strict=True))
    found[model.graph.input[0].name] = array
    return {layer.activation: float(np.abs(found[layer.activation]).max()) for layer in layers}


def quantized_export(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto, list[Layer]]:
    """A family's graph, the same with its inner layers quantized, and those."""
    model = small_exports.simplified(name)[0]
    layers = tuple(layer for layer in find_layers(model) if not layer.at_edge)
    limits = thresholds_of(model, layers, small_exports.input_array(name, 4))
    return model, quantize_graph(model, layers, limits), list(layers)


def fake_quantized(value: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.clip(np.rint(value / scale), -128, 127) * scale


@pytest.mark.parametrize("family", small_exports.FAMILIES)
def test_layers_of_a_family(family: str) -> None:
    model = small_exports.simplified(family)[0]
    layers = find_layers(model)
    assert Counter(layer.op_type for layer in layers) == LAYERS[family]
    edges = [layer for layer in layers if layer.at_edge]
    assert [layer.activation == "input" for layer in edges] == [True, False]
    assert [layer.node for layer in edges] == [layers[0].node, layers[-1].node]
    assert {layer.module for layer in layers if "." not in layer.module} <= {"head", "stem"}


def test_a_layer_without_a_name_of_its_own_has_that_of_its_block() -> None:
    layers = {layer.node: layer for layer in find_layers(small_exports.simplified("msa")[0])}
    nameless = [layer for layer in layers.values() if layer.module == "stages.1.blocks.0"]
    assert nameless
    assert all(layer.op_type == "Gemm" for layer in nameless)


def test_neither_a_product_of_activations_nor_a_computed_weight_is_a_layer() -> None:
    """MatMul of two activations, Gemm with its weight behind an Identity, Conv of another domain, FP64."""
    weights = {"w": np.ones((3, 3), np.float32), "d": np.ones((3, 3), np.float64)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "x"], ["a"], name="activations"),
            helper.make_node("Identity", ["w"], ["i"], name="identity"),
            helper.make_node("Gemm", ["a", "i"], ["b"], name="computed"),
            helper.make_node("MatMul", ["w", "b"], ["c"], name="left"),
            helper.make_node("Conv", ["c", "w"], ["e"], name="foreign", domain="other"),
            helper.make_node("MatMul", ["e", "d"], ["f"], name="double"),
            helper.make_node("MatMul", ["f", "w"], ["y"], name="layer"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    assert [layer.node for layer in find_layers(helper.make_model(graph))] == ["layer"]


def test_a_layer_without_a_name_is_refused() -> None:
    model = small_model()
    model.graph.node[0].name = ""
    with pytest.raises(ExportError, match="1 layers of the graph have no name"):
        find_layers(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("node_a", {"node_a"}),
        ("stages.1", {"node_b", "node_c"}),
        ("stages.1.blocks", {"node_b"}),
        ("stages.1.blocks.0", {"node_b"}),
        ("stages.1.blocks.0.expand", {"node_b"}),
        ("head", {"node_d"}),
    ],
)
def test_names_mean_layers(name: str, expected: set[str]) -> None:
    assert excluded_layers(NAMED, [name]) == dict.fromkeys(expected, name)


@pytest.mark.parametrize(
    ("name", "hint"), [("stages.11", "did you mean 'stages.1"), ("node", "node_"), ("zzz", "the report of a run")]
)
def test_a_name_that_means_nothing(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="no layer, block or stage") as caught:
        excluded_layers(NAMED, [name])
    assert hint in caught.value.hint


def named(node: str, module: str) -> Layer:
    return Layer(node, "Conv", module, "x", "w", 1, False)


NAMED = (
    named("node_a", "stages.10.blocks.0"),
    named("node_b", "stages.1.blocks.0.expand"),
    named("node_c", "stages.1.transition"),
    named("node_d", "head"),
)


@pytest.mark.parametrize("family", small_exports.FAMILIES)
def test_every_chosen_layer_has_two_symmetric_pairs_and_nothing_else_changes(family: str) -> None:
    model, quantized, layers = quantized_export(family)
    onnx.checker.check_model(quantized, full_check=True)
    activations = {layer.activation for layer in layers}
    before, after = (Counter(node.op_type for node in m.graph.node) for m in (model, quantized))
    assert after - before == {"QuantizeLinear": len(activations), "DequantizeLinear": len(activations) + len(layers)}
    assert not before - after
    assert quantized.functions == model.functions
    assert quantized.metadata_props == model.metadata_props
    assert list(quantized.graph.input) == list(model.graph.input)
    assert list(quantized.graph.output) == list(model.graph.output)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    producers = {node.output[0]: node for node in quantized.graph.node}
    for node in (node for node in quantized.graph.node if node.name in {layer.node for layer in layers}):
        restored, weight = (producers[name] for name in node.input[:2])
        assert [restored.op_type, weight.op_type] == ["DequantizeLinear"] * 2
        for pair in (restored, producers[restored.input[0]], weight):
            assert constants[pair.input[2]].dtype == np.int8
            assert not constants[pair.input[2]].any()
        stored = constants[weight.input[0]]
        assert stored.dtype == np.int8
        assert np.abs(stored).reshape(len(stored), -1).max(axis=1).min() == 127, "each output channel has its own scale"
        assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
        for bias in node.input[2:]:
            assert constants[bias].dtype == np.float32, "biases stay as they are"


@pytest.mark.parametrize("family", small_exports.FAMILIES)
def test_a_quantized_family_stays_near(family: str) -> None:
    model, quantized, _ = quantized_export(family)
    array = small_exports.input_array(family, 4)
    error = small_exports.error(small_exports.run(quantized, array), small_exports.run(model, array))
    assert 1e-4 < error < 0.6  # of random weights; of trained ones see test_quantize.py


@pytest.mark.parametrize("family", small_exports.FAMILIES)
def test_openvino_runs_what_is_quantized_in_int8(family: str) -> None:
    """Of `msra` many layers are the attention's own, which stay in FP32: the graph is INT8 all the same."""
    model, quantized, layers = quantized_export(family)
    with OpenVinoRunner(model.SerializeToString(), threads=1) as runner:
        every = sum(runner.executed.values())
    with OpenVinoRunner(quantized.SerializeToString(), threads=1) as runner:
        assert (runner.precision, runner.graph_precision) == ("int8", "int8")
        executed = runner.executed
    low = sum(count for kind, count in executed.items() if kind in ("i8", "u8"))
    assert (low, sum(executed.values())) == (len(layers), every)
    assert count_quantized_layers(quantized.graph) == len(layers)
    assert count_quantized_layers(model.graph) == 0


def test_what_a_quantized_graph_computes() -> None:
    """Both layers of the small model against rounding and saturation written out in NumPy."""
    model, images, net = small_model(), random_images(6), SmallNet()
    layers = find_layers(model)
    limits = {layer.activation: 1.3 for layer in layers}
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in net.named_parameters()}
    for name in ("conv.weight", "head.weight"):
        flat = np.abs(weights[name]).reshape(len(weights[name]), -1).max(axis=1) / 127
        weights[name] = fake_quantized(weights[name], flat.reshape(-1, *[1] * (weights[name].ndim - 1)))
    x = fake_quantized(images.astype(np.float64), 1.3 / 127)
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    maps = np.einsum("bchwij,ocij->bohw", patches, weights["conv.weight"]) + weights["conv.bias"][:, None, None]
    maps = np.maximum(maps, 0)[:, :, :6, :6].reshape(len(x), 8, 3, 2, 3, 2).mean(axis=(3, 5))
    flat = fake_quantized(maps.reshape(len(x), -1), 1.3 / 127)
    expected = flat @ weights["head.weight"].T + weights["head.bias"]
    got = small_exports.run(quantize_graph(model, layers, limits), images)
    assert (np.abs(images) > 1.3).any(), "saturation is part of the test"
    # A value that lies between two integers may be rounded to the other one in FP32.
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02)
    assert np.abs(small_exports.run(model, images) - expected).max() > 0.2, "without Q/DQ the test would fail"


def test_a_matmul_has_its_output_channels_last() -> None:
    weight = np.diag([1.0, 10.0, 100.0]).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    quantized = quantize_graph(model, find_layers(model), {"x": 1.0})
    array = np.array([[1.0, 1.0, 1.0]], np.float32)
    np.testing.assert_allclose(small_exports.run(quantized, array), array @ weight, rtol=1e-6)


def test_a_weight_that_two_layers_share_and_one_keeps() -> None:
    """The FP32 layer still has its own weight, of the same orientation as before."""
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w"], ["a"], name="first"),
            helper.make_node("Gemm", ["a", "w"], ["y"], name="second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(rows, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    first, second = find_layers(model)
    array = np.array([[1.0, -1.0, 0.5]], np.float32)
    exact = small_exports.run(model, array)
    for chosen in ([first], [second], [first, second]):
        quantized = quantize_graph(model, chosen, {"x": 1.0, "a": 10.0})
        assert small_exports.error(small_exports.run(quantized, array), exact) < 0.1


def planted(model: onnx.ModelProto, fault: str) -> None:
    """One change to the first layer's pairs that some runtime would refuse or misread."""
    producers = {node.output[0]: node for node in model.graph.node}
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    restored, weight = (producers[name] for name in layer.input[:2])
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    if fault == "zero point":
        tensor = constants[producers[restored.input[0]].input[2]]
        tensor.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), tensor.name))
    elif fault == "uint8":
        tensor = constants[restored.input[2]]
        tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), tensor.name))
    elif fault == "weight":
        layer.input[1] = weight.input[0]
    elif fault == "activation":
        layer.input[0] = producers[restored.input[0]].input[0]
    elif fault == "axis":
        next(a for a in weight.attribute if a.name == "axis").i = 1
    elif fault == "scales":
        tensor = constants[weight.input[1]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:1], tensor.name))


@pytest.mark.parametrize("fault", ["zero point", "uint8", "weight", "activation", "axis", "scales"])
def test_the_check_finds(fault: str) -> None:
    model = small_model()
    layers = find_layers(model)
    quantized = quantize_graph(model, layers, {layer.activation: 1.0 for layer in layers})
    check_quantized(quantized, layers)
    planted(quantized, fault)
    with pytest.raises(ExportError, match="quantizer"):
        check_quantized(quantized, layers)


def test_a_graph_with_preprocessing_keeps_its_pixels() -> None:
    model = small_exports.exported("msra", preprocessing=Preprocessing())
    first = find_layers(model)[0]
    assert first.at_edge
    assert first.activation != model.graph.input[0].name
