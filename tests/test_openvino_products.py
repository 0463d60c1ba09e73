"""Products as convolutions: the same values, which products, and what is no plain product."""

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
from evit_deploy.runners.openvino_products import LARGE, convolve_large_products, convolve_last_product
from tests.onnx_texts import run as run_text
from tests.small_exports import FAMILIES, error, exported, input_array, run

needs_bf16 = pytest.mark.skipif(not cpu_isa()["bf16"], reason="this CPU has no BF16")


def two_products(hidden: int) -> onnx.ModelProto:
    """16 values to `hidden` without a bias, and to 8 with one."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[B, 16] x) => (float[B, 8] y) {
            h = Gemm <transB = 1> (x, first)
            y = Gemm <transB = 1> (h, last, bias)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in {"first": (hidden, 16), "last": (8, hidden), "bias": (8,)}.items():
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
    assert model.SerializeToString() == before


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
    assert ("FullyConnected" in layers) == (large > 1)
