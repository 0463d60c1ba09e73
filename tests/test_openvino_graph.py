"""What OpenVINO is given in the place of a graph: the same values, and no split where a convolution can do it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from evit_deploy.runners.openvino_graph import (
    INLINED_NOTE,
    fold_sums,
    prepare_graph,
    split_convolutions,
)
from tests.onnx_texts import PARTS, graph, ops, run
from tests.small_exports import FAMILIES, exported, input_array


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
        ("y = Conv <group = 2> (x, grouped, bias) a, b, c = Split <axis = 1> (y, sizes)", PARTS),
        ("y = Conv (x, weight, bias) a, b, c = Split <axis = 2, num_outputs = 3> (y)", PARTS),
        (
            "y = Conv (x, weight, bias) z = Relu (y) a, b, c = Split <axis = 1> (y, sizes)",
            f"{PARTS}, float[2, 6, 3, 3] z",
        ),
        ("y = Conv (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes)", f"{PARTS}, float[2, 6, 3, 3] y"),
        (
            "y = Conv (x, weight, bias) a, b, c = Split <axis = 1> (y, sizes) z = If (true) <"
            "then_branch = t () => (float[2, 6, 3, 3] p) { p = Relu (y) }, "
            "else_branch = e () => (float[2, 6, 3, 3] q) { q = Neg (y) }>",
            f"{PARTS}, float[2, 6, 3, 3] z",
        ),
    ],
    ids=["groups", "another axis", "another reader", "an output", "read in a branch"],
)
def test_a_convolution_that_cannot_be_split_is_left_alone(body: str, outputs: str) -> None:
    model = graph(body, outputs)
    before = model.SerializeToString()
    assert split_convolutions(model.graph) == 0
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
