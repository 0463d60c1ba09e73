"""Products as convolutions and with weights in INT8: the values, which products, and what is no plain product."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from evit_deploy.environment import cpu_isa
from evit_deploy.runners import openvino_products as module
from evit_deploy.runners.openvino import OpenVinoRunner, Precision
from evit_deploy.runners.openvino_products import (
    GROUP,
    INT8_WEIGHTS_NOTE,
    LARGE,
    compress_large_products,
    convolve_large_products,
    convolve_last_product,
)
from tests.onnx_texts import run as run_text
from tests.small_exports import FAMILIES, error, exported, input_array, run

needs_bf16 = pytest.mark.skipif(not cpu_isa()["bf16"], reason="this CPU has no BF16")


def two_products(hidden: int, given: int = 16) -> onnx.ModelProto:
    """`given` values to `hidden` without a bias, and to 8 with one."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[B, N] x) => (float[B, 8] y) {
            h = Gemm <transB = 1> (x, first)
            y = Gemm <transB = 1> (h, last, bias)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in {"first": (hidden, given), "last": (8, hidden), "bias": (8,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type in ("Gemm", "Conv")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_product_of_a_model_has_the_same_values(family: str) -> None:
    model, changed = exported(family), copy.deepcopy(exported(family))
    assert convolve_last_product(changed.graph)
    onnx.checker.check_model(changed, full_check=True)
    assert changed.graph.output[0] == model.graph.output[0]
    assert not any(changed.graph.output[0].name in node.output for node in changed.graph.node if node.op_type == "Gemm")
    array = input_array(family, 3)
    assert error(run(changed, array), run(model, array)) < 1e-6


@pytest.mark.parametrize(
    ("hidden", "found"),
    [(LARGE // 16, ["Conv", "Gemm"]), (LARGE // 16 - 1, ["Gemm", "Gemm"]), (LARGE // 8, ["Conv"] * 2)],
)
def test_products_are_large_from_a_number_of_weights(hidden: int, found: list[str]) -> None:
    model = two_products(hidden)
    feed = {"x": np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)}
    (before,) = run_text(model, feed)
    assert convolve_large_products(model.graph) == found.count("Conv")
    onnx.checker.check_model(model, full_check=True)
    assert kinds(model) == found
    np.testing.assert_allclose(run_text(model, feed)[0], before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("change", ["transB", "alpha", "operator"])
def test_another_product_is_left_alone(change: str) -> None:
    model = two_products(LARGE // 8)
    for node in model.graph.node:
        if change == "transB":
            del node.attribute[:]
        elif change == "alpha":
            node.attribute.append(helper.make_attribute("alpha", 2.0))
        else:
            node.op_type = "MatMul"
    before = model.SerializeToString()
    assert not convolve_large_products(model.graph)
    assert not convolve_last_product(model.graph)
    assert not compress_large_products(model.graph)
    assert model.SerializeToString() == before


def first_weights(model: onnx.ModelProto) -> np.ndarray:
    weights = next(weight for weight in model.graph.initializer if weight.name == "first")
    return numpy_helper.to_array(weights).copy()


def set_first_weights(model: onnx.ModelProto, values: np.ndarray) -> None:
    weights = next(weight for weight in model.graph.initializer if weight.name == "first")
    weights.CopyFrom(numpy_helper.from_array(values, "first"))


class TestInt8Weights:
    @pytest.mark.parametrize("given", [GROUP, 4 * GROUP])
    def test_each_weight_is_off_by_half_a_step_at_most(self, given: int) -> None:
        model = two_products(LARGE // given, given)
        weights = first_weights(model)
        weights[0] *= 1e20
        weights[1] *= 1e-20
        weights[2, :GROUP] = 0
        weights[3, 1:] = 0
        set_first_weights(model, weights)
        last = next(node for node in model.graph.node if node.output[0] == "y")
        last.input[1] = "missing"  # only the first is looked at
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["B", "H"]))
        assert compress_large_products(model.graph) == 1
        model.graph.node.remove(last)
        onnx.checker.check_model(model, full_check=True)
        (columns,) = run_text(model, {"x": np.eye(given, dtype=np.float32)})
        groups = weights.reshape(len(weights), -1, GROUP)
        step = np.abs(groups).max(axis=2, keepdims=True) / 127
        off = np.abs(columns.T.reshape(groups.shape) - groups)
        assert (off <= 0.501 * step).all()
        assert off.max() > 0
        np.testing.assert_array_equal(columns.T[2, :GROUP], 0)
        np.testing.assert_allclose(columns.T[3], weights[3], rtol=1e-6)

    def test_a_product_of_a_batch(self) -> None:
        model = two_products(LARGE // GROUP, GROUP)
        feed = {"x": np.random.default_rng(1).standard_normal((3, GROUP)).astype(np.float32)}
        (before,) = run_text(model, feed)
        assert compress_large_products(model.graph) == 1
        assert convolve_large_products(model.graph) == 0
        onnx.checker.check_model(model, full_check=True)
        assert kinds(model) == ["Gemm", "Gemm"]
        after = run_text(model, feed)[0]
        assert 1e-4 < error(after, before) < 2e-2
        kept = sum(np.prod(weight.dims) for weight in model.graph.initializer if weight.data_type == 3)
        assert kept == LARGE

    @pytest.mark.parametrize("what", ["small", "rows of 48", "NaN", "infinity", "FP16"])
    def test_what_keeps_its_weights(self, what: str) -> None:
        given = 48 if what == "rows of 48" else GROUP
        model = two_products(LARGE // given + (-1 if what == "small" else 1), given)
        weights = first_weights(model)
        if what in ("NaN", "infinity"):
            weights[5, 7] = np.nan if what == "NaN" else np.inf
        set_first_weights(model, weights.astype(np.float16) if what == "FP16" else weights)
        before = model.SerializeToString()
        assert compress_large_products(model.graph) == 0
        assert model.SerializeToString() == before
        assert convolve_large_products(model.graph) == (what != "small")

    @needs_bf16
    @pytest.mark.parametrize(("precision", "large"), [("mixed", 1), ("mixed", 2**30), ("bf16", 1)])
    def test_openvino_has_them_in_int8(self, precision: Precision, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LARGE", large)
        with OpenVinoRunner(exported("mit").SerializeToString(), precision=precision, threads=1) as runner:
            assert runner.precision == "bf16"
            assert runner.executed.get("i8", 0) == (precision == "mixed" and large == 1)
            assert (INT8_WEIGHTS_NOTE in runner.notes) == (precision == "mixed" and large == 1)


@needs_bf16
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("large", [1, 2**30])
def test_openvino_computes_every_row_of_a_batch(
    precision: Precision, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", large)
    array = input_array("mit", 6)
    wanted = run(exported("mit"), array)
    with OpenVinoRunner(exported("mit").SerializeToString(), precision=precision, threads=2) as runner:
        convolutions = runner.executed["bf16"]
        layers = [
            node.get_rt_info()["layerType"].value for node in runner._compile(1).model.get_runtime_model().get_ops()
        ]
        for rows in (1, 3, 6):
            logits = runner.infer({"input": array[:rows]})["logits"]
            assert logits.shape == wanted[:rows].shape
            assert error(logits, wanted[:rows]) < 0.1  # random weights in BF16; of swapped rows it is above 0.7
    assert convolutions > 0
    assert ("FullyConnected" in layers) == (large > 1 or precision == "mixed")  # with weights in INT8 it is one
