"""What OpenVINO is given in the place of a graph: the same values, and no split where a convolution can do it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from evit_deploy.runners.openvino_graph import (
    INLINED_NOTE,
    flatten_channels_last,
    fold_sums,
    prepare_graph,
    split_convolutions,
)
from tests.small_exports import FAMILIES, exported, input_array

_WEIGHTS = {
    "weight": np.arange(6 * 4, dtype=np.float32).reshape(6, 4, 1, 1) / 7,
    "bias": np.arange(6, dtype=np.float32),
    "sizes": np.array([1, 3, 2]),
    "grouped": np.arange(12, dtype=np.float32).reshape(6, 2, 1, 1),
    "true": np.array(True),
    "depthwise": np.arange(4 * 9, dtype=np.float32).reshape(4, 1, 3, 3) / 11,
    "offsets": np.arange(4, dtype=np.float32),
}
_OUTPUTS = "float[2, ?, 3, 3] a, float[2, ?, 3, 3] b, float[2, ?, 3, 3] c"


def graph(body: str, outputs: str = _OUTPUTS) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[2, 4, 3, 3] x) => ({outputs}) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in _WEIGHTS.items())
    return model


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, feed)
    return results


def ops(model: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes)",
        "y = Conv (x, weight) a, b, c = Split <axis = 1> (y, sizes)",
        "y = Conv (x, weight, bias) a, b, c = Split <axis = 1, num_outputs = 3> (y)",
        "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes)",
    ],
)
def test_each_part_has_its_own_convolution(body: str) -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}
    model = graph(body)
    before = run(model, feed)
    assert split_convolutions(model.graph) == 1
    assert ops(model).count("Conv") == 3
    for left, right in zip(before, run(model, feed), strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = Conv <group = 2> (x, grouped, bias) a, b, c = Split <axis = 1> (y, sizes)", _OUTPUTS),
        ("y = Conv (x, weight, bias) a, b, c = Split <axis = 2, num_outputs = 3> (y)", _OUTPUTS),
        (
            "y = Conv (x, weight, bias) z = Relu (y) a, b, c = Split <axis = 1> (y, sizes)",
            f"{_OUTPUTS}, float[2, 6, 3, 3] z",
        ),
        ("y = Conv (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes)", f"{_OUTPUTS}, float[2, 6, 3, 3] y"),
        (
            "y = Conv (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes) z = If (true) <"
            "then_branch = t () => (float[2, 6, 3, 3] p) { p = Relu (y) }, "
            "else_branch = e () => (float[2, 6, 3, 3] q) { q = Neg (y) }>",
            f"{_OUTPUTS}, float[2, 6, 3, 3] z",
        ),
    ],
    ids=["groups", "another axis", "another reader", "an output", "read in a branch"],
)
def test_a_convolution_that_cannot_be_split_is_left_alone(body: str, outputs: str) -> None:
    model = graph(body, outputs)
    before = model.SerializeToString()
    assert split_convolutions(model.graph) == 0
    assert model.SerializeToString() == before


_ROWS = "zeros = Constant <value_ints = [0, 0]> () rest = Constant <value_ints = [-1]> ()"
_FLATTENED = f"{_ROWS} shape = Concat <axis = 0> (zeros, rest)"


@pytest.mark.parametrize("shape", [f"{_FLATTENED}", "shape = Constant <value_ints = [0, 0, -1]> ()"])
def test_a_map_is_flattened_with_the_channels_last(shape: str) -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}
    model = graph(f"{shape} y = Conv (x, weight, bias) z = Reshape (y, shape)", "float[2, 6, 9] z")
    before = run(model, feed)
    assert flatten_channels_last(model.graph) == 1
    assert ops(model).count("Transpose") == 2
    np.testing.assert_array_equal(run(model, feed), before)


@pytest.mark.parametrize(
    ("body", "output"),
    [
        (f"{_FLATTENED} z = Reshape (x, shape)", "float[2, 4, 9] z"),
        ("shape = Constant <value_ints = [0, -1]> () y = Conv (x, weight) z = Reshape (y, shape)", "float[2, 54] z"),
        (f"{_ROWS} y = Conv (x, weight) shape = Shape (y) z = Reshape (y, shape)", "float[2, 6, 3, 3] z"),
        (
            "y = Conv (x, weight) ends = Shape <start = 0, end = 2> (y) rest = Constant <value_ints = [-1]> ()"
            "shape = Concat <axis = 0> (ends, rest) z = Reshape (y, shape)",
            "float[2, 6, 9] z",
        ),
    ],
    ids=["no convolution", "another shape", "a shape not known", "a shape partly known"],
)
def test_another_reshape_is_left_alone(body: str, output: str) -> None:
    model = graph(body, output)
    before = model.SerializeToString()
    assert flatten_channels_last(model.graph) == 0
    assert model.SerializeToString() == before


_DEPTHWISE = "y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, depthwise, offsets)"


@pytest.mark.parametrize("add", ["Add (x, y)", "Add (y, x)"])
@pytest.mark.parametrize("weights", ["x, depthwise, offsets", "x, depthwise"])
def test_a_sum_with_a_depthwise_convolution_is_one_convolution(add: str, weights: str) -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}
    body = f"y = Conv <group = 4, pads = [1, 1, 1, 1]> ({weights}) z = {add}"
    model = graph(body, "float[2, 4, 3, 3] z")
    (before,) = run(model, feed)
    assert fold_sums(model.graph) == 1
    assert ops(model) == ["Conv"]
    np.testing.assert_allclose(run(model, feed)[0], before, rtol=0, atol=1e-6 * np.abs(before).max())


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{_DEPTHWISE} w = Relu (x) z = Add (w, y)", ""),
        (f"{_DEPTHWISE} z = Add (x, y)", ", float[2, 4, 3, 3] y"),
        (f"{_DEPTHWISE} z = Add (x, y) u = Neg (depthwise)", ", float[4, 1, 3, 3] u"),
        ("y = Conv <group = 4, pads = [2, 2, 0, 0]> (x, depthwise, offsets) z = Add (x, y)", ""),
        ("y = Conv <group = 4, pads = [2, 2, 2, 2], dilations = [2, 2]> (x, depthwise) z = Add (x, y)", ""),
        ('y = Conv <group = 4, auto_pad = "SAME_UPPER"> (x, depthwise) z = Add (x, y)', ""),
        ("y = Conv <pads = [1, 1, 1, 1]> (x, whole) z = Add (x, y)", ""),
        ("w = Neg (depthwise) y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w) z = Add (x, y)", ""),
        (f"{_DEPTHWISE} z = Mul (x, y)", ""),
    ],
    ids=["another term", "an output", "weights read", "shifted", "dilated", "auto", "not depthwise", "made", "product"],
)
def test_another_sum_is_left_alone(body: str, outputs: str) -> None:
    model = graph(body, f"float[2, 4, 3, 3] z{outputs}")
    whole = np.zeros((4, 4, 3, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(whole, "whole"))
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    assert fold_sums(model.graph) == 0
    assert model.SerializeToString() == before


def test_the_sums_of_msra_are_folded_and_keep_their_values() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("msra"))
    images = input_array("msra", 3)
    (before,) = run(model, {"input": images})
    prepared, _ = prepare_graph(model)
    adds = ops(prepared).count("Add")
    count = fold_sums(prepared.graph)
    assert count > 0
    assert ops(prepared).count("Add") == adds - count
    (after,) = run(prepared, {"input": images})
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_values(name: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported(name))
    images = input_array(name, 3)
    (before,) = run(model, {"input": images})
    prepared, notes = prepare_graph(model)
    assert notes == [INLINED_NOTE]
    assert not prepared.functions
    (after,) = run(prepared, {"input": images})
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_the_cascade_of_msra_has_no_split_left_behind_a_convolution() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("msra"))
    prepared, _ = prepare_graph(model)
    makers = {node.output[0]: node.op_type for node in prepared.graph.node}
    splits = [node for node in prepared.graph.node if node.op_type == "Split"]
    assert splits
    assert not [node.name for node in splits if makers.get(node.input[0]) == "Conv"]
