"""LiteMLA in blocks of heads: the operator's values for every number of heads, and what is left to its own body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from evit_deploy.models.operators import LITE_MLA
from evit_deploy.onnx.functions import operator_functions
from evit_deploy.runners.openvino_lite_mla import replace_lite_mla
from tests.onnx_texts import run
from tests.small_exports import exported, input_array
from tests.tiers import tiered

HEIGHT, WIDTH, CHANNELS = 3, 5, 8


def lite_mla(heads: int, dim: int, more: str = "", outputs: str = "", bias: bool = True) -> onnx.ModelProto:
    """The operator behind its three convolutions, as an export has it."""
    rows = 3 * heads * dim
    bias_name = ", bias" if bias else ""
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20, "evit" : 1]>
        g (float[B, {CHANNELS}, {HEIGHT}, {WIDTH}] x) => (float[B, {2 * heads * dim}, {HEIGHT}, {WIDTH}] z{outputs}) {{
            qkv = Conv (x, projection{bias_name})
            smooth = Conv <group = {rows}, pads = [2, 2, 2, 2]> (qkv, depthwise{bias_name})
            aggregated = Conv <group = {rows // dim}> (smooth, pointwise)
            z = evit.{LITE_MLA} <dim = {dim}, eps = 1e-5, height = {HEIGHT}, width = {WIDTH}> (qkv, aggregated)
            {more}
        }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"projection": (rows, CHANNELS, 1, 1), "depthwise": (rows, 1, 5, 5), "pointwise": (rows, dim, 1, 1)}
    for name, shape in {**shapes, "bias": (rows,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    model.functions.extend(operator_functions([LITE_MLA], 20))
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("heads", "dim", "blocks"),
    [(1, 16, 1), (3, 16, 1), (4, 16, 1), (8, 16, 2), (6, 16, 2), (5, 16, 5), (4, 32, 2), (3, 32, 3), (2, 80, 2)],
)
def test_it_has_the_values_of_the_operator(heads: int, dim: int, blocks: int, bias: bool) -> None:
    feed = {"x": np.random.default_rng(1).standard_normal((3, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)}
    model = lite_mla(heads, dim, bias=bias)
    (before,) = run(model, feed)
    assert replace_lite_mla(model) == 1
    node = next(node for node in model.graph.node if node.output[0] == "z")
    shape = next(list(entry.ints) for entry in node.attribute if entry.name == "token_shape")
    assert shape == [-1, HEIGHT * WIDTH, 3, blocks, heads * dim // blocks]
    np.testing.assert_allclose(run(model, feed)[0], before, rtol=0, atol=2e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("heads", "dim", "channels"),
    [(1, 16, 16), (2, 16, 32), (3, 16, 16), (8, 16, 32), (4, 8, 32), (4, 32, 32), (2, 80, 80)],
)
def test_the_pointwise_convolution_takes_heads_together(heads: int, dim: int, channels: int) -> None:
    model = lite_mla(heads, dim)
    assert replace_lite_mla(model) == 1
    node = next(node for node in model.graph.node if node.output[0] == "aggregated")
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    assert list(weight.dims) == [3 * heads * dim, channels, 1, 1]
    assert [entry.i for entry in node.attribute if entry.name == "group"] == [3 * heads * dim // channels]
    assert np.count_nonzero(numpy_helper.to_array(weight)) == 3 * heads * dim * dim


@pytest.mark.parametrize("mask", ["same_head", "own_head"])
def test_without_a_mask_heads_would_mix(mask: str) -> None:
    feed = {"x": np.random.default_rng(1).standard_normal((1, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)}
    model = lite_mla(4, 16)
    (before,) = run(model, feed)
    replace_lite_mla(model)
    tensor = next(each for each in model.graph.initializer if each.name == f"z/{mask}")
    tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
    assert np.abs(run(model, feed)[0] - before).max() > 0.1 * np.abs(before).max()


def _in_fp16(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))


def _made_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Relu"


def _in_more_groups(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].i = 3


def _of_another_map(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "x"


def _with_another_scale(model: onnx.ModelProto) -> None:
    model.graph.node[3].input.append("aggregated")


@pytest.mark.parametrize("change", [_in_fp16, _made_elsewhere, _in_more_groups, _of_another_map, _with_another_scale])
def test_behind_anything_else_it_is_left_alone(change: Callable[[onnx.ModelProto], None]) -> None:
    model = lite_mla(4, 16)
    change(model)
    before = model.SerializeToString()
    assert replace_lite_mla(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["qkv", "smooth", "aggregated"])
@pytest.mark.parametrize("as_output", [True, False])
def test_a_map_that_is_read_elsewhere_keeps_its_channels(name: str, as_output: bool) -> None:
    more, output = ("", name) if as_output else (f"w = Neg ({name})", "w")
    model = lite_mla(4, 16, more, f", float[B, 192, {HEIGHT}, {WIDTH}] {output}")
    before = model.SerializeToString()
    assert replace_lite_mla(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", tiered(["mit", "mit-quadratic"], "mit".__eq__))
def test_every_one_of_a_model_is_replaced(name: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported(name))
    images = input_array(name, 2)
    (before,) = run(model, {"input": images})
    assert replace_lite_mla(model) == 2
    (after,) = run(model, {"input": images})
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_other_families_have_none() -> None:
    assert replace_lite_mla(exported("msra")) == 0
