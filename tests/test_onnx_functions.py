"""The operators' ONNX functions against the definitions in float64, called as a graph calls them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from evit_kernels.cascaded_attention.naive import cascaded_attention
from evit_kernels.lite_mla.naive import lite_mla
from evit_kernels.multi_scale_attention.naive import multi_scale_attention
from evit_kernels.projected_multi_scale_attention.naive import projected_multi_scale_attention
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from evit_deploy.constants import MAX_OPSET, MIN_OPSET, OPERATOR_DOMAIN
from evit_deploy.models.operators import OPERATOR_VERSION, SCORES_PER_BLOCK_BYTES, query_blocks, split_op_type
from evit_deploy.onnx import functions
from evit_deploy.onnx.functions import operator_functions
from tests import attention_references as references
from tests.attention_references import Arguments, cast, rms_relative
from tests.mutants.definitions import FUNCTIONS as WRONG_FUNCTIONS

# RMS-relative error of float32 graphs against the definition in float64, the worst of the shapes, measured in ONNX
# Runtime: EvitMultiScaleAttention 2.1e-7, EvitLiteMLA 1.4e-7, EvitCascadedAttention 3.4e-7.
TOLERANCE = 1.5e-6
OPSETS = range(MIN_OPSET, MAX_OPSET + 1)
MAPS = ("qkv", "aggregated", "x", "qkv_small", "qkv_medium", "q_large", "kv_large")  # first dimension: the batch
PLUGIN_ATTRIBUTES = {"plugin_namespace": OPERATOR_DOMAIN, "plugin_version": str(OPERATOR_VERSION)}

SHAPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "EvitMultiScaleAttention": {**references.MULTI_SCALE_SHAPES},
    "EvitProjectedMultiScaleAttention": {**references.PROJECTED_SHAPES},
    "EvitLiteMLA": {**references.LITE_MLA_SHAPES},
    "EvitCascadedAttention": {**references.CASCADED_SHAPES},
}
CASES = [(operator, shape) for operator, shapes in SHAPES.items() for shape in shapes]
# One with padding and more than one window or block each, where a test does not need every shape.
TYPICAL = {
    "EvitMultiScaleAttention": "padded-by-one",
    "EvitProjectedMultiScaleAttention": "padded-by-one",
    "EvitLiteMLA": "odd",
    "EvitCascadedAttention": "padded-bottom",
}
OPERATORS = tuple(SHAPES)


@cache
def case(operator: str, shape: str) -> tuple[str, dict[str, Any], Arguments, Tensor]:
    """op_type, attributes, float32 tensors and the definition's result for them in float64."""
    if operator == "EvitMultiScaleAttention":
        arguments = cast(references.multi_scale_arguments(*SHAPES[operator][shape]), torch.float32)
        _, height, width, channels = arguments["q_large"].shape
        heads = arguments.pop("heads")
        expected = multi_scale_attention(**cast(arguments, torch.float64), heads=heads)
        attributes = {"heads": heads, "head_dim": channels // heads, "query_blocks": height}
        op_type = operator
    elif operator == "EvitProjectedMultiScaleAttention":
        arguments = cast(references.projected_multi_scale_arguments(*SHAPES[operator][shape]), torch.float32)
        _, height, width, channels = arguments["x"].shape
        heads = arguments.pop("heads")
        expected = projected_multi_scale_attention(**cast(arguments, torch.float64), heads=heads)
        attributes = {"heads": heads, "head_dim": channels // heads, "query_blocks": height}
        op_type = operator
    elif operator == "EvitLiteMLA":
        arguments = cast(references.lite_mla_arguments(*SHAPES[operator][shape]), torch.float32)
        attributes = {"dim": arguments.pop("dim"), "eps": arguments.pop("eps")}
        height, width = arguments["qkv"].shape[2:]
        expected = lite_mla(**cast(arguments, torch.float64), **attributes)
        op_type = operator
    else:
        arguments = cast(references.cascaded_case(*SHAPES[operator][shape])[0], torch.float32)
        arguments = {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        window = arguments.pop("window")
        expected = cascaded_attention(**cast(arguments, torch.float64), window=window)
        heads, key_dim = arguments["query_weight"].shape[:2]
        attributes = {"window": window, "key_dim": key_dim, "kernels": list(SHAPES[operator][shape][-1])}
        op_type = f"{operator}{heads}"
        height, width = arguments["x"].shape[2:]
    return op_type, {**attributes, "height": height, "width": width}, arguments, expected


def graph_of(
    op_type: str,
    attributes: Mapping[str, Any],
    arguments: Arguments,
    expected: Tensor,
    *,
    opset: int = 20,
    batch: int | str = "batch",
) -> onnx.ModelProto:
    """A graph of one node; maps are inputs with the given batch, parameters are initializers."""
    node = helper.make_node(
        op_type, list(arguments), ["out"], domain=OPERATOR_DOMAIN, **{**attributes, **PLUGIN_ATTRIBUTES}
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *value.shape[1:]])
        for name, value in arguments.items()
        if name in MAPS
    ]
    parameters = [
        onnx.numpy_helper.from_array(value.numpy(), name) for name, value in arguments.items() if name not in MAPS
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, *expected.shape[1:]])
    graph = helper.make_graph([node], "one", inputs, [output], parameters)
    return helper.make_model(
        graph,
        functions=operator_functions([op_type], opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(OPERATOR_DOMAIN, OPERATOR_VERSION)],
        ir_version=10,
    )


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed_of(arguments: Arguments) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in arguments.items() if name in MAPS}


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_onnx_runtime_gives_what_the_definition_gives(operator: str, shape: str) -> None:
    op_type, attributes, arguments, expected = case(operator, shape)
    (result,) = session_of(graph_of(op_type, attributes, arguments, expected)).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_the_reference_evaluator_gives_what_the_definition_gives(operator: str, shape: str) -> None:
    op_type, attributes, arguments, expected = case(operator, shape)
    (result,) = ReferenceEvaluator(graph_of(op_type, attributes, arguments, expected)).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_opset(operator: str, opset: int) -> None:
    op_type, attributes, arguments, expected = case(operator, TYPICAL[operator])
    model = graph_of(op_type, attributes, arguments, expected, opset=opset)
    assert [(entry.domain, entry.version) for f in model.functions for entry in f.opset_import] == [("", opset)]
    onnx.checker.check_model(model, full_check=True)
    (result,) = session_of(model).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_one_dynamic_graph_serves_every_batch(operator: str, shape: str) -> None:
    op_type, attributes, arguments, expected = case(operator, shape)
    session = session_of(graph_of(op_type, attributes, arguments, expected))
    first = {name: value[:1] for name, value in feed_of(arguments).items()}
    for batch in (1, 2, 5):
        scaled = {
            name: np.concatenate([value * np.float32(1 - 0.1 * i) for i in range(batch)])
            for name, value in first.items()
        }
        (result,) = session.run(None, scaled)
        alone = [session.run(None, {k: v[i : i + 1] for k, v in scaled.items()})[0] for i in range(batch)]
        assert result.shape == (batch, *expected.shape[1:])
        np.testing.assert_allclose(result, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    (result,) = session.run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_graph_of_a_fixed_batch(operator: str) -> None:
    op_type, attributes, arguments, expected = case(operator, TYPICAL[operator])
    batch = len(next(iter(arguments.values())))
    model = graph_of(op_type, attributes, arguments, expected, batch=batch)
    onnx.checker.check_model(model, full_check=True)
    (result,) = session_of(model).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize("operator", OPERATORS)
def test_inlined_it_gives_the_same(operator: str) -> None:
    op_type, attributes, arguments, expected = case(operator, TYPICAL[operator])
    inlined = onnx.inliner.inline_local_functions(graph_of(op_type, attributes, arguments, expected))
    assert not inlined.functions
    assert all(node.domain == "" for node in inlined.graph.node)
    (result,) = session_of(inlined).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 8, 48])
def test_query_blocks_do_not_change_the_result(blocks: int) -> None:
    op_type, attributes, arguments, expected = case("EvitMultiScaleAttention", "padded-by-one")
    model = graph_of(op_type, {**attributes, "query_blocks": blocks}, arguments, expected)
    (result,) = session_of(model).run(None, feed_of(arguments))
    assert rms_relative(torch.from_numpy(result), expected) <= TOLERANCE


@pytest.mark.parametrize("zeroed", [slice(0, 8), slice(8, 16), slice(0, 16)], ids=["queries", "keys", "both"])
def test_lite_mla_of_zeros_is_zero(zeroed: slice) -> None:
    op_type, attributes, arguments, expected = case("EvitLiteMLA", "odd")
    maps = {name: value.clone() for name, value in arguments.items()}
    for packed in maps.values():
        packed.view(3, 2, 24, 35)[:, :, zeroed] = -1.0
    (result,) = session_of(graph_of(op_type, attributes, arguments, expected)).run(None, feed_of(maps))
    assert not result.any()


@pytest.mark.parametrize(
    ("operator", "fault"), [(operator, fault) for operator, faults in WRONG_FUNCTIONS.items() for fault in faults]
)
def test_the_comparison_finds_a_wrong_function(operator: str, fault: str) -> None:
    right, wrong = WRONG_FUNCTIONS[operator][fault]
    source = inspect.getsource(functions)
    assert source.count(right) == 1
    names: dict[str, Any] = {"__name__": fault}
    exec(compile(source.replace(right, wrong), fault, "exec"), names)
    found = []
    for shape in SHAPES[operator]:
        op_type, attributes, arguments, expected = case(operator, shape)
        model = graph_of(op_type, attributes, arguments, expected)
        del model.functions[:]
        model.functions.extend(names["operator_functions"]([op_type], 20))
        try:
            (result,) = session_of(model).run(None, feed_of(arguments))
            error = rms_relative(torch.from_numpy(result), expected)
        except Exception:  # noqa: BLE001 - ONNX Runtime raises a dozen classes for shapes that no longer fit
            error = float("inf")
        if not error <= 1000 * TOLERANCE:
            found.append(shape)
    assert found


@pytest.mark.parametrize(
    "op_type",
    [
        "EvitNothing",
        "EvitLiteMLA2",
        "EvitMultiScaleAttention8",
        "EvitCascadedAttention",
        "EvitCascadedAttention0",
        "Evit-LiteMLA",
        "evitlitemla",
        "",
    ],
)
def test_an_unknown_operator_is_an_error(op_type: str) -> None:
    known = "EvitMultiScaleAttention, EvitProjectedMultiScaleAttention, EvitLiteMLA, EvitCascadedAttention<heads>"
    with pytest.raises(ValueError, match=re.escape(f"unknown fused operator, got op_type={op_type!r}, known: {known}")):
        operator_functions(["EvitLiteMLA", op_type], 20)


def test_every_operator_gets_one_function() -> None:
    types = ["EvitLiteMLA", "EvitCascadedAttention3", "EvitLiteMLA", "EvitCascadedAttention2"]
    made = operator_functions(types, 20)
    assert [function.name for function in made] == ["EvitCascadedAttention2", "EvitCascadedAttention3", "EvitLiteMLA"]
    assert {function.domain for function in made} == {OPERATOR_DOMAIN}
    assert operator_functions([], 20) == []


@pytest.mark.parametrize(
    ("op_type", "parts"),
    [
        ("EvitLiteMLA", ("EvitLiteMLA", None)),
        ("EvitCascadedAttention12", ("EvitCascadedAttention", 12)),
        ("Evit3Attention", ("Evit3Attention", None)),
        ("7", ("7", None)),
    ],
)
def test_splitting_an_op_type(op_type: str, parts: tuple[str, int | None]) -> None:
    assert split_op_type(op_type) == parts


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Every node, those of branches and loop bodies included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    ("op_type", "declared"),
    [
        ("EvitMultiScaleAttention", {"heads", "head_dim", "height", "width", "query_blocks"}),
        ("EvitProjectedMultiScaleAttention", {"heads", "head_dim", "height", "width", "query_blocks"}),
        ("EvitLiteMLA", {"dim", "eps", "height", "width"}),
        ("EvitCascadedAttention1", {"window", "key_dim", "kernels", "height", "width"}),
        ("EvitCascadedAttention4", {"window", "key_dim", "kernels", "height", "width"}),
    ],
)
def test_attributes_are_declared_and_used(op_type: str, declared: set[str], opset: int) -> None:
    (function,) = operator_functions([op_type], opset)
    nodes = list(nodes_of(function.node))
    used = {attribute.ref_attr_name for node in nodes for attribute in node.attribute if attribute.ref_attr_name}
    assert used == declared
    assert set(function.attribute) == declared | set(PLUGIN_ATTRIBUTES)
    assert not function.attribute_proto
    assert {node.domain for node in nodes} == {""}
    assert all(onnx.defs.has(node.op_type, opset) for node in nodes)


class TestQueryBlocks:
    counts = st.integers(min_value=1, max_value=2**12)

    @given(tokens=counts, keys=counts, heads=st.integers(min_value=1, max_value=64))
    @example(tokens=3136, keys=784, heads=8)
    @example(tokens=1, keys=1, heads=1)
    @example(tokens=4093, keys=4093, heads=64)
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def test_cut_the_queries_into_equal_parts(self, tokens: int, keys: int, heads: int) -> None:
        blocks = query_blocks(tokens, keys, heads)
        assert 1 <= blocks <= tokens
        assert tokens % blocks == 0
        scores_bytes = 4 * tokens * keys * heads
        if scores_bytes <= SCORES_PER_BLOCK_BYTES:
            assert blocks == 1
        if scores_bytes >= tokens * SCORES_PER_BLOCK_BYTES:
            assert blocks == tokens

    @given(side=st.integers(min_value=1, max_value=64), heads=st.integers(min_value=1, max_value=16))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def test_more_keys_never_make_fewer_blocks(self, side: int, heads: int) -> None:
        blocks = [query_blocks(side**2, keys, heads) for keys in (1, 7, 49, 196, 784, 3136)]
        assert blocks == sorted(blocks)

    @pytest.mark.parametrize("side", [7, 14, 28, 32, 56, 64, 96, 128])
    def test_scores_of_a_block_fit_a_cache_at_published_sizes(self, side: int) -> None:
        keys = (-(-side // 2)) ** 2
        blocks = query_blocks(side**2, keys, 8)
        assert 4 * side**2 * keys * 8 / blocks <= 2 * SCORES_PER_BLOCK_BYTES
