"""The functions' two forms for half precision, against the definitions in float64; inputs are rounded first.

ONNX Runtime computes FP16 products in wider types and is blind to overflow, so the scaled form also runs node by node
in NumPy, where each product of FP16 tensors gives FP16 values and says how far its partial sums can come.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from evit_kernels.cascaded_attention.naive import cascaded_attention
from evit_kernels.lite_mla.naive import lite_mla
from evit_kernels.multi_scale_attention.naive import multi_scale_attention
from evit_kernels.projected_multi_scale_attention.naive import projected_multi_scale_attention
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_matmul import MatMul
from torch import Tensor

from evit_deploy.constants import MAX_OPSET, MIN_OPSET
from evit_deploy.onnx import functions, scaled
from evit_deploy.onnx.functions import Form, operator_functions, replace_functions
from tests.attention_references import Arguments, rms_relative
from tests.test_onnx_functions import CASES, MAPS, OPERATORS, TYPICAL, case, graph_of, nodes_of, session_of

FP16_MAX = 65504.0
# RMS-relative error, the worst of the shapes and inputs, measured: 8.3e-4 for both forms in ONNX Runtime, 1.7e-3 with
# every node's result in FP16 (cascaded attention, whose four heads pass their errors on).
TOLERANCE = 2.5e-3
HALF_FORMS: tuple[Form, ...] = ("fp32-accumulation", "scaled")
PRODUCTS = {  # matrix products in each operator's attention; those of lite_mla's denominator are none in this form
    "EvitMultiScaleAttention": 6,
    "EvitProjectedMultiScaleAttention": 6,
    "EvitLiteMLA": 2,
    "EvitCascadedAttention": 2,
}


def definition(op_type: str, attributes: dict[str, Any], arguments: Arguments) -> Tensor:
    """The operator in float64 on the arguments rounded to FP16."""
    exact = {name: value.half().double() for name, value in arguments.items()}
    if op_type == "EvitLiteMLA":
        return lite_mla(**exact, dim=attributes["dim"], eps=attributes["eps"])
    if op_type == "EvitMultiScaleAttention":
        return multi_scale_attention(**exact, heads=attributes["heads"])
    if op_type == "EvitProjectedMultiScaleAttention":
        return projected_multi_scale_attention(**exact, heads=attributes["heads"])
    return cascaded_attention(**exact, window=attributes["window"])


def half_graph(
    op_type: str, attributes: dict[str, Any], arguments: Arguments, expected: Tensor, form: Form
) -> onnx.ModelProto:
    """One node whose inputs, parameters and result are FP16."""
    model = graph_of(op_type, attributes, arguments, expected)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    changed = replace_functions(model, form)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def half_feed(arguments: Arguments) -> dict[str, np.ndarray]:
    return {name: value.half().numpy() for name, value in arguments.items() if name in MAPS}


class Products:
    """What the matrix products of one run saw: how many, of which types, and how far any partial sum could come."""

    def __init__(self) -> None:
        self.count = 0
        self.largest_sum = 0.0
        self.dtypes: set[str] = set()


def run_in_half(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> tuple[Tensor, Products]:
    """Node by node; a product of FP16 matrices is rounded to FP16 as a GPU's is, infinity included."""
    seen = Products()

    def product(self: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        seen.count += 1
        seen.dtypes |= {str(a.dtype), str(b.dtype)}
        a_exact, b_exact = a.astype(np.float64), b.astype(np.float64)
        seen.largest_sum = max(seen.largest_sum, float((np.abs(a_exact) @ np.abs(b_exact)).max()))
        return ((a_exact @ b_exact).astype(a.dtype),)

    with np.errstate(all="ignore"), mock.patch.object(MatMul, "_run", product):
        (result,) = ReferenceEvaluator(model).run(None, feed)
    return torch.from_numpy(result), seen


@pytest.mark.parametrize("form", HALF_FORMS)
@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_onnx_runtime_gives_what_the_definition_gives(operator: str, shape: str, form: Form) -> None:
    op_type, attributes, arguments, _ = case(operator, shape)
    expected = definition(op_type, attributes, arguments)
    (result,) = session_of(half_graph(op_type, attributes, arguments, expected, form)).run(None, half_feed(arguments))
    assert result.dtype == np.float16
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_the_scaled_form_stays_in_range_and_near(operator: str, shape: str) -> None:
    op_type, attributes, arguments, _ = case(operator, shape)
    expected = definition(op_type, attributes, arguments)
    result, seen = run_in_half(half_graph(op_type, attributes, arguments, expected, "scaled"), half_feed(arguments))
    assert rms_relative(result, expected) <= TOLERANCE
    assert seen.dtypes == {"float16"}
    assert seen.count >= PRODUCTS[operator]
    assert seen.largest_sum <= 4**scaled.BOUND_BITS * (1 + 2**-8)


def lite_mla_of(maps: list[Tensor], dim: int, eps: float) -> tuple[str, dict[str, Any], Arguments]:
    height, width = maps[0].shape[2:]
    attributes = {"dim": dim, "eps": eps, "height": height, "width": width}
    return "EvitLiteMLA", attributes, {"qkv": maps[0], "aggregated": maps[1]}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lite_mla_large_image() -> tuple[str, dict[str, Any], Arguments]:
    """1024 px at stride 16, 4096 tokens; the values of a trained model and some more."""
    return lite_mla_of([6 * normal(1, 96, 64, 64, seed=seed) + 4 for seed in (0, 1)], 16, 1e-5)


def lite_mla_large_values() -> tuple[str, dict[str, Any], Arguments]:
    """Up to FP16's largest value: k's sums and both products are far beyond it."""
    return lite_mla_of([(12000 * normal(2, 48, 12, 20, seed=seed)).clamp(-6e4, 6e4) for seed in (2, 3)], 8, 1e-5)


def lite_mla_uneven_channels() -> tuple[str, dict[str, Any], Arguments]:
    """Channels of q, k and v whose sizes lie thousands apart."""
    sizes = 4.0 ** torch.arange(24).remainder(6).view(1, 24, 1, 1)
    return lite_mla_of([sizes.repeat(1, 2, 1, 1) * normal(1, 48, 16, 16, seed=seed) for seed in (4, 5)], 8, 1e-5)


def multi_scale_large_scores() -> tuple[str, dict[str, Any], Arguments]:
    """Queries of 600 times a sign, keys 300 times one: q k^T reaches 1.4e6, and each query means one key."""
    channels = 8
    qkv = normal(1, 14, 14, 3 * channels, seed=8)
    qkv[..., :channels] = 600 * qkv[..., :channels].sign()
    qkv[..., channels : 2 * channels] *= 300
    pooled = normal(1, 7, 7, 2 * channels, seed=9)
    pooled[..., :channels] *= 300
    arguments = {"qkv_small": qkv, "qkv_medium": qkv, "q_large": qkv[..., :channels], "kv_large": pooled}
    attributes = {"heads": 1, "head_dim": channels, "query_blocks": 14, "height": 14, "width": 14}
    return "EvitMultiScaleAttention", attributes, arguments


def cascade_large_scores() -> tuple[str, dict[str, Any], Arguments]:
    """Depthwise kernels of 400 make queries of thousands, keys of hundreds."""
    heads, key_dim, channels, window = 2, 4, 16, 4
    width = channels // heads
    weight = normal(heads, 2 * key_dim + width, width, seed=10)
    weight[:, key_dim : 2 * key_dim] *= 100
    arguments = {
        "x": normal(1, channels, 8, 8, seed=11),
        "qkv_weight": weight,
        "qkv_bias": torch.full((heads, 2 * key_dim + width), 0.1),
        "query_weight": 400 * torch.ones(heads, key_dim, 3, 3),
        "query_bias": torch.zeros(heads, key_dim),
        "attention_bias": torch.zeros(heads, window**2, window**2),
    }
    attributes = {"window": window, "key_dim": key_dim, "kernels": [3, 3], "height": 8, "width": 8}
    return f"EvitCascadedAttention{heads}", attributes, arguments


BREAKING: tuple[Callable[[], tuple[str, dict[str, Any], Arguments]], ...] = (
    lite_mla_large_image,
    lite_mla_large_values,
    lite_mla_uneven_channels,
    multi_scale_large_scores,
    cascade_large_scores,
)


def unscaled(body: str, like: str) -> str:
    """A fault: every product in the node's own type, as it comes."""

    def plain(match: re.Match[str]) -> str:
        name, left, right = match.groups()
        return f"""{name}_a = CastLike ({left}, {like})
    {name}_b = CastLike ({right}, {like})
    {name}_low = MatMul ({name}_a, {name}_b)
    {name} = Cast <to = 1> ({name}_low)"""

    return scaled.CONSTANTS + re.sub(r"(\w+) = MatMul \((\w+), (\w+)\)", plain, body)


@pytest.mark.parametrize("make", BREAKING, ids=lambda make: make.__name__)
def test_what_breaks_plain_products(
    make: Callable[[], tuple[str, dict[str, Any], Arguments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    op_type, attributes, arguments = make()
    expected = definition(op_type, attributes, arguments)
    feed = half_feed(arguments)
    result, seen = run_in_half(half_graph(op_type, attributes, arguments, expected, "scaled"), feed)
    assert rms_relative(result, expected) <= TOLERANCE
    assert seen.largest_sum <= 4**scaled.BOUND_BITS * (1 + 2**-8)
    wide = half_graph(op_type, attributes, arguments, expected, "fp32-accumulation")
    (computed,) = session_of(wide).run(None, feed)
    assert rms_relative(torch.from_numpy(computed), expected) <= TOLERANCE
    monkeypatch.setattr(functions, "with_scaled_products", unscaled)
    broken, seen = run_in_half(half_graph(op_type, attributes, arguments, expected, "scaled"), feed)
    assert not broken.isfinite().all()
    assert seen.largest_sum > FP16_MAX


@pytest.mark.parametrize("form", HALF_FORMS)
def test_zero_queries_give_zero(form: Form) -> None:
    """float16(1e-15) is 0, and a query that is zero after its ReLU would be 0 / 0."""
    maps = [normal(1, 24, 6, 6, seed=seed).abs() for seed in (6, 7)]
    for packed in maps:
        packed[:, :8, :3] = -1
    op_type, attributes, arguments = lite_mla_of(maps, 8, 1e-15)
    expected = definition(op_type, attributes, arguments)
    result, _ = run_in_half(half_graph(op_type, attributes, arguments, expected, form), half_feed(arguments))
    assert (result[:, :, :3] == 0).all()
    assert rms_relative(result, expected) <= TOLERANCE


@pytest.mark.parametrize("form", HALF_FORMS)
def test_all_zero_maps(form: Form) -> None:
    for operator in OPERATORS:
        op_type, attributes, arguments, expected = case(operator, TYPICAL[operator])
        zeros = {name: torch.zeros_like(value) for name, value in arguments.items()}
        result, _ = run_in_half(half_graph(op_type, attributes, zeros, expected, form), half_feed(zeros))
        assert not result.any(), operator


# What the scaled form's text says, and what it must not say without a test noticing.
MUTANTS = {
    "no scale of the left": ("{name}_part = Mul ({name}_small, {a}_scale)", "{name}_part = Identity ({name}_small)"),
    "no scale of the right": ("{name} = Mul ({name}_part, {b}_scale)", "{name} = Identity ({name}_part)"),
    "largest value where the sum counts": ('right, "ReduceSum"', 'right, "ReduceMax"'),
    "one value's sum where the largest counts": ('"ReduceMax", "last_axis"', '"ReduceMin", "last_axis"'),
    "a bound without room": ("BOUND_BITS = 7 ", "BOUND_BITS = 9 "),
    "rounded down": ("= Ceil (", "= Floor ("),
    "another base": ("1.4426950408889634", "2.302585092994046"),
    "weights as they are": ("{name}_wide = Mul ({source}, bound)", "{name}_wide = Identity ({source})"),
    "negative values ignored": ("{name}_size = Abs ({source})", "{name}_size = Identity ({source})"),
    "zeros divided by zero": (
        "{name}_reduced = Max ({name}_found, smallest_size)",
        "{name}_reduced = Identity ({name}_found)",
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_comparison_finds_a_wrong_scale(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[fault]
    source = inspect.getsource(scaled)
    assert right in source
    names: dict[str, Any] = {"__name__": fault}
    exec(compile(source.replace(right, wrong), fault, "exec"), names)
    monkeypatch.setattr(functions, "with_scaled_products", names["with_scaled_products"])
    cases = [(*make(), 4**scaled.BOUND_BITS) for make in (lite_mla_large_values, multi_scale_large_scores)]
    zeros = lite_mla_of([torch.zeros(1, 24, 4, 4)] * 2, 8, 1e-5)
    found = False
    for op_type, attributes, arguments, bound in (*cases, (*zeros, 4**scaled.BOUND_BITS)):
        expected = definition(op_type, attributes, arguments)
        graph = half_graph(op_type, attributes, arguments, expected, "scaled")
        result, seen = run_in_half(graph, half_feed(arguments))
        near = torch.allclose(result.double(), expected, rtol=0.05, atol=float(expected.abs().max()) * 0.01)
        found = found or not near or seen.largest_sum > bound * (1 + 2**-8)
    assert found


@pytest.mark.parametrize("opset", range(MIN_OPSET, MAX_OPSET + 1))
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_opset(operator: str, opset: int) -> None:
    op_type = f"{operator}3" if operator == "EvitCascadedAttention" else operator
    for form in HALF_FORMS:
        (function,) = operator_functions([op_type], opset, form)
        assert all(onnx.defs.has(node.op_type, opset) for node in nodes_of(function.node))


def test_replacing_functions_leaves_the_rest() -> None:
    op_type, attributes, arguments, expected = case("EvitLiteMLA", "odd")
    model = graph_of(op_type, attributes, arguments, expected, opset=19)
    other = helper.make_function("other", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [])
    model.functions.append(other)
    before = model.SerializeToString()
    changed = replace_functions(model, "scaled")
    assert model.SerializeToString() == before
    assert [(f.domain, f.name) for f in changed.functions] == [("other", "Twice"), ("evit", "EvitLiteMLA")]
    assert changed.functions[1] == operator_functions(["EvitLiteMLA"], 19, "scaled")[0]
    assert changed.graph == model.graph
    assert changed.opset_import == model.opset_import
