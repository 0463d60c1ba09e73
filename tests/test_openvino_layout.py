"""Maps with the channels last for OpenVINO: the same values, and nothing moved within an attention."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from evit_deploy.runners.openvino import shared_core
from evit_deploy.runners.openvino_graph import prepare_graph
from evit_deploy.runners.openvino_layout import (
    carry_channels_last,
    cast_identities,
    flatten_channels_last,
    multiply_channels_last,
)
from tests.onnx_texts import graph, ops, run
from tests.small_exports import exported

IMAGE = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}

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


# x's pixels, [2, 4, 9], and what they make with themselves, [2, 9, 9], each by way of its transpose
_FACTORS = """
    flat_shape = Constant <value_ints = [2, 4, 9]> ()
    flat = Reshape (x, flat_shape)
    a = Transpose <perm = [0, 2, 1]> (flat)
    b = MatMul (a, flat)
    left = Transpose <perm = [0, 2, 1]> (a)
    right = Transpose <perm = [0, 2, 1]> (b)
"""
_SHAPE = """
    batch = Constant <value_ints = [2]> () channels = Constant <value_ints = [4]> ()
    side = Constant <value_ints = [3]> () shape = Concat <axis = 0> (batch, channels, side, side)
"""
_MAP = "float[2, 4, 3, 3] z"


def test_a_product_of_transposed_matrices_is_made_with_the_channels_last() -> None:
    model = graph(f"{_FACTORS} {_SHAPE} y = MatMul (left, right) z = Reshape (y, shape)", _MAP)
    (before,) = run(model, IMAGE)
    assert multiply_channels_last(model.graph) == 1
    product = next(node for node in model.graph.node if node.name == "y")
    assert list(product.input) == ["b", "a"]
    np.testing.assert_allclose(run(model, IMAGE)[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{_SHAPE} y = MatMul (flat, right) z = Reshape (y, shape)", _MAP),
        (f"{_SHAPE} y = MatMul (left, b) z = Reshape (y, shape)", _MAP),
        (f"{_SHAPE} y = MatMul (left, right) z = Reshape (y, shape)", f"{_MAP}, float[2, 4, 9] y"),
        (f"{_SHAPE} y = MatMul (left, right) z = Reshape (y, shape) w = Neg (y)", f"{_MAP}, float[2, 4, 9] w"),
        ("shape = Constant <value_ints = [2, 4, 3, 3]> () y = MatMul (left, right) z = Reshape (y, shape)", _MAP),
        (
            "rest = Constant <value_ints = [2, -1]> () four = Constant <value_ints = [4]> ()"
            "shape = Concat <axis = 0> (rest, four) y = MatMul (left, right) z = Reshape (y, shape)",
            "float[2, 9, 4] z",
        ),
    ],
    ids=["left as it is", "right as it is", "an output", "another reader", "a shape in one", "no map"],
)
def test_another_product_is_left_alone(body: str, outputs: str) -> None:
    model = graph(f"{_FACTORS} {body}", outputs)
    before = model.SerializeToString()
    assert multiply_channels_last(model.graph) == 0
    assert model.SerializeToString() == before


_CARRIED = """
    pixels = Transpose <perm = [0, 2, 3, 1]> (x)
    halves = Constant <value_ints = [2, 2]> ()
    p, q = Split <axis = 3> (pixels, halves)
    head = Transpose <perm = [0, 3, 1, 2]> (p)
    part_0, part_1 = Split <axis = 1> (x, halves)
    sum = Add (part_1, head)
    both = Concat <axis = 1> (head, sum)
    z = Relu (both)
"""


@pytest.mark.parametrize(
    ("more", "outputs", "transposes"),
    [
        ("", _MAP, 3),
        ("w = Neg (sum)", f"{_MAP}, float[2, 2, 3, 3] w", 4),
        ("", f"{_MAP}, float[2, 2, 3, 3] sum, float[2, 2, 3, 3] part_0, float[2, 2, 3, 3] head", 6),
        (
            "w = If (true) <then_branch = t () => (float[2, 2, 3, 3] r) { r = Neg (sum) }, "
            "else_branch = e () => (float[2, 2, 3, 3] s) { s = Relu (part_0) }>",
            f"{_MAP}, float[2, 2, 3, 3] w",
            5,
        ),
        ("w = Add (part_0, x_half)", f"{_MAP}, float[2, 2, 3, 3] w", 4),
    ],
    ids=["alone", "another reader", "outputs", "branches", "a sum with a map that has the channels first"],
)
def test_what_is_done_with_maps_is_done_with_the_channels_last(more: str, outputs: str, transposes: int) -> None:
    model = graph(f"{_CARRIED} x_half, x_other = Split <axis = 1, num_outputs = 2> (x) {more}", outputs)
    before = run(model, IMAGE)
    assert carry_channels_last(model.graph) == 4
    assert ops(model).count("Transpose") == transposes
    for left, right in zip(before, run(model, IMAGE), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "body",
    [
        "part, other = Split <axis = 1, num_outputs = 2> (x) z = Add (part, other)",
        "z = Concat <axis = 1> (x, x)",
        "y = Transpose <perm = [0, 2, 3, 1]> (x) z = Relu (y)",
    ],
)
def test_without_a_map_made_channels_first_nothing_changes(body: str) -> None:
    model = graph(body, "float[2, ?, ?, ?] z")
    before = model.SerializeToString()
    assert carry_channels_last(model.graph) == 0
    assert model.SerializeToString() == before


_BRANCHES = """
    y = If (true) <
        then_branch = t () => (float[2, 4, 3, 3] r) { r = Identity (x) },
        else_branch = e () => (float[2, 4, 3, 3] s) { s = Relu (x) }>
    z = Neg (y)
"""


def test_an_identity_of_a_branch_is_a_cast_to_its_own_type() -> None:
    model = graph(_BRANCHES, _MAP)
    before = run(model, IMAGE)
    assert cast_identities(model.graph) == 1
    np.testing.assert_array_equal(before, run(model, IMAGE))


def test_an_identity_of_a_type_not_told_is_left_alone() -> None:
    model = graph(_BRANCHES, _MAP)
    for entry in model.graph.node[0].attribute:
        entry.g.output[0].ClearField("type")
    before = model.SerializeToString()
    assert cast_identities(model.graph) == 0
    assert model.SerializeToString() == before


def test_the_cascade_of_msra_moves_no_map_between_heads() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("msra"))
    prepared, _ = prepare_graph(model)
    makers = {output: node for node in prepared.graph.node for output in node.output}
    sums = [node for node in prepared.graph.node if node.op_type == "Add" and node.output[0].startswith("cascade_")]
    assert sums
    for node in sums:
        assert sorted(makers[name].op_type for name in node.input) == ["Reshape", "Split"]


@pytest.mark.parametrize("name", ["mit", "msra"])
def test_openvino_keeps_no_identity(name: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported(name))
    network = shared_core().read_model(prepare_graph(model)[0].SerializeToString())
    compiled = shared_core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {node.get_rt_info()["layerType"].value for node in compiled.get_runtime_model().get_ops()}
    assert "Convolution" in kinds
    assert "Identity" not in kinds
