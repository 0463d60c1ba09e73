"""The operators' definitions against slow references in float64, and the operators as PyTorch sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from evit_kernels import cascaded_attention, lite_mla, multi_scale_attention, projected_multi_scale_attention
from evit_kernels.cascaded_attention import naive as cascaded_definition
from evit_kernels.lite_mla import naive as lite_mla_definition
from evit_kernels.multi_scale_attention import naive as multi_scale_definition
from evit_kernels.projected_multi_scale_attention import naive as projected_definition
from torch import Tensor, nn

from tests import attention_references as references
from tests.attention_references import Arguments, cast, rms_relative
from tests.mutants.definitions import DEFINITIONS as WRONG_DEFINITIONS

DEFINITIONS: dict[str, ModuleType] = {
    "multi_scale_attention": multi_scale_definition,
    "projected_multi_scale_attention": projected_definition,
    "lite_mla": lite_mla_definition,
    "cascaded_attention": cascaded_definition,
}
OPERATORS: dict[str, Any] = {
    "multi_scale_attention": multi_scale_attention.multi_scale_attention,
    "projected_multi_scale_attention": projected_multi_scale_attention.projected_multi_scale_attention,
    "lite_mla": lite_mla.lite_mla,
    "cascaded_attention": cascaded_attention.cascaded_attention,
}
SHAPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "multi_scale_attention": {**references.MULTI_SCALE_SHAPES},
    "projected_multi_scale_attention": {**references.PROJECTED_SHAPES},
    "lite_mla": {**references.LITE_MLA_SHAPES},
    "cascaded_attention": {**references.CASCADED_SHAPES},
}
CASES = [(operator, shape) for operator, shapes in SHAPES.items() for shape in shapes]
MAPS = ("x", "qkv", "aggregated", "qkv_small", "qkv_medium", "q_large", "kv_large")  # arguments that have the batch

# RMS-relative error against the reference in float64, the arguments' own rounding included.
# operator                          float64   float32   float16   bfloat16   the worst of the shapes, measured
# multi_scale_attention             4.2e-16   2.1e-07   8.2e-04   6.7e-03
# projected_multi_scale_attention   4.6e-16   2.1e-07   8.6e-04   6.9e-03
# lite_mla                          4.6e-16   1.3e-07   6.5e-04   4.8e-03
# cascaded_attention                6.6e-16   3.4e-07   1.0e-03   1.4e-02
# The tolerances are four times that.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {
    "multi_scale_attention": dict(zip(DTYPES, (1.7e-15, 8.4e-7, 3.3e-3, 2.7e-2), strict=True)),
    "projected_multi_scale_attention": dict(zip(DTYPES, (1.9e-15, 8.4e-7, 3.5e-3, 2.8e-2), strict=True)),
    "lite_mla": dict(zip(DTYPES, (1.8e-15, 5.2e-7, 2.6e-3, 1.9e-2), strict=True)),
    "cascaded_attention": dict(zip(DTYPES, (2.6e-15, 1.4e-6, 4.0e-3, 5.6e-2), strict=True)),
}


@cache
def case(operator: str, shape: str) -> tuple[Arguments, Tensor]:
    """Arguments in float64 and the reference's result for them."""
    if operator == "cascaded_attention":
        return references.cascaded_case(*SHAPES[operator][shape])
    if operator == "lite_mla":
        arguments = references.lite_mla_arguments(*SHAPES[operator][shape])
        return arguments, references.lite_mla(**arguments)
    if operator == "projected_multi_scale_attention":
        arguments = references.projected_multi_scale_arguments(*SHAPES[operator][shape])
        return arguments, references.projected_multi_scale_attention(**arguments)
    arguments = references.multi_scale_arguments(*SHAPES[operator][shape])
    return arguments, references.multi_scale_attention(**arguments)


def run(operator: str, arguments: Arguments) -> Tensor:
    result: Tensor = getattr(DEFINITIONS[operator], operator)(**arguments)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_definition_matches_the_reference(operator: str, shape: str, dtype: torch.dtype) -> None:
    arguments, expected = case(operator, shape)
    result = run(operator, cast(arguments, dtype))
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert rms_relative(result, expected) <= TOLERANCES[operator][dtype]


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_a_map_in_any_memory_layout_gives_the_same(operator: str, shape: str) -> None:
    arguments, expected = case(operator, shape)
    scattered = {
        name: torch.stack((value, value), dim=-1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    result = OPERATORS[operator](**scattered)
    assert result.is_contiguous()
    assert rms_relative(result, expected) <= TOLERANCES[operator][torch.float64]


@pytest.mark.parametrize(
    ("operator", "fault"), [(operator, fault) for operator, faults in WRONG_DEFINITIONS.items() for fault in faults]
)
def test_the_comparison_finds_a_wrong_definition(operator: str, fault: str) -> None:
    right, wrong = WRONG_DEFINITIONS[operator][fault]
    source = inspect.getsource(DEFINITIONS[operator])
    assert source.count(right) == 1
    names: dict[str, Any] = {}
    exec(compile(source.replace(right, wrong), fault, "exec"), names)
    found = []
    for shape in SHAPES[operator]:
        arguments, expected = case(operator, shape)
        try:
            error = rms_relative(names[operator](**arguments), expected)
        except RuntimeError:  # shapes that no longer fit
            error = float("inf")
        if not error <= TOLERANCES[operator][torch.bfloat16]:
            found.append(shape)
    assert found


class TestLiteMlaZeros:
    """A row of zeros after ReLU makes numerator and denominator zero: eps is what keeps it from 0/0."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [(2, 3), (7, 9)], ids=["quadratic", "linear"])
    @pytest.mark.parametrize("zeroed", ["queries", "keys", "both", "one token's query"])
    def test_gives_zero_and_no_nan(self, zeroed: str, size: tuple[int, int], dtype: torch.dtype) -> None:
        arguments = references.lite_mla_arguments(2, *size, heads=2, dim=8, eps=1e-5)
        for tokens in (arguments["qkv"], arguments["aggregated"]):
            if zeroed == "one token's query":
                tokens[:, :8, 0, 0] = -1.0
            if zeroed in ("queries", "both"):
                tokens[:, :8] = -1.0
            if zeroed in ("keys", "both"):
                tokens[:, 8:16] = -1.0
        expected = references.lite_mla(**arguments)
        result = run("lite_mla", cast(arguments, dtype))
        here = result.view(2, 2, 8, *size)
        assert result.isfinite().all()
        assert (here[..., 0, 0] if zeroed == "one token's query" else here).abs().max() == 0
        torch.testing.assert_close(result.double(), expected, rtol=0.1, atol=0.02)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_eps_of_the_authors_exists_in_half_precision(self, dtype: torch.dtype) -> None:
        """As a float16, 1e-15 would be zero and a zero query's token 0 / 0; the definition computes in FP32."""
        arguments = references.lite_mla_arguments(1, 3, 3, heads=2, dim=4, eps=1e-15)
        arguments["qkv"][:, :4, 0, 0] = 0
        result = run("lite_mla", cast(arguments, dtype))
        assert result.dtype == dtype
        assert result.isfinite().all()
        assert result[:, :4, 0, 0].abs().max() == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_an_eps_that_vanishes_in_fp32_is_refused(self, dtype: torch.dtype) -> None:
        arguments = references.lite_mla_arguments(1, 3, 3, heads=2, dim=4, eps=1e-60)
        with pytest.raises(ValueError, match=r"eps must be above zero and finite in torch.float32, got eps=1e-60"):
            run("lite_mla", cast(arguments, dtype))


def test_padded_keys_have_no_part_in_a_multi_scale_window() -> None:
    """With the values all one, weights that sum to one over the tokens inside give exactly one."""
    arguments = references.multi_scale_arguments(2, 4, 8, heads=2, dim=4)
    for name, split in (("qkv_small", 16), ("qkv_medium", 16), ("kv_large", 8)):
        arguments[name][..., split:] = 1.0
    torch.testing.assert_close(run("multi_scale_attention", arguments), torch.ones(2, 32, 24, dtype=torch.float64))


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_of_a_batch_do_not_mix(operator: str) -> None:
    arguments, _ = case(operator, {"cascaded_attention": "four-windows"}.get(operator, "odd"))
    whole = run(operator, arguments)
    maps = [name for name in arguments if name in MAPS]
    alone = run(operator, {**arguments, **{name: arguments[name][1:2] for name in maps}})
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-12, atol=1e-12)


def without(dim: int) -> Callable[[Tensor], Tensor]:
    """A change that takes the last slice of a dimension away."""
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


WRONG_ARGUMENTS: dict[str, list[tuple[str, Any, str]]] = {
    "multi_scale_attention": [
        ("q_large", lambda x: x[0], r"q_large must have shape \[any, any, any, any\], got \(5, 4, 18\)"),
        ("q_large", lambda x: x[:, :0], r"q_large must have shape"),
        ("q_large", lambda x: x.long(), r"q_large must be a floating point tensor, got x.dtype=torch.int64"),
        ("heads", lambda heads: 4, r"heads must be positive and divide channels, got heads=4 channels=18"),
        ("heads", lambda heads: 0, r"heads must be positive"),
        ("heads", lambda heads: -3, r"heads must be positive"),
        ("qkv_small", without(3), r"qkv_small must have shape \[2, 5, 4, 54\], got \(2, 5, 4, 53\)"),
        ("qkv_small", without(0), r"qkv_small must have shape"),
        ("qkv_medium", without(2), r"qkv_medium must have shape"),
        ("qkv_medium", lambda x: x.float(), r"qkv_medium must be torch.float64 on cpu, got torch.float32"),
        ("kv_large", without(1), r"kv_large must have shape \[2, 3, 2, 36\]"),
        ("kv_large", lambda x: x.to("meta"), r"kv_large must be torch.float64 on cpu, got torch.float64 on meta"),
    ],
    "projected_multi_scale_attention": [
        ("x", lambda x: x[0], r"x must have shape \[any, any, any, any\], got \(5, 4, 18\)"),
        ("x", lambda x: x.long(), r"x must be a floating point tensor, got x.dtype=torch.int64"),
        ("heads", lambda heads: 4, r"heads must be positive and divide channels, got heads=4 channels=18"),
        ("heads", lambda heads: 0, r"heads must be positive"),
        ("kv_large", without(1), r"kv_large must have shape \[2, 3, 2, 36\]"),
        ("kv_large", lambda x: x.float(), r"kv_large must be torch.float64 on cpu, got torch.float32"),
        ("weight", without(0), r"weight must have shape \[126, 18\], got \(125, 18\)"),
        ("weight", without(1), r"weight must have shape"),
        ("bias", without(0), r"bias must have shape \[126\], got \(125,\)"),
        ("bias", lambda x: x.to("meta"), r"bias must be torch.float64 on cpu, got torch.float64 on meta"),
    ],
    "lite_mla": [
        ("qkv", lambda x: x[0], r"qkv must have shape"),
        ("qkv", lambda x: x.int(), r"qkv must be a floating point tensor"),
        ("dim", lambda dim: 7, r"3 \* dim must be positive and divide channels, got 3 \* dim=21 channels=48"),
        ("aggregated", lambda x: x[0], r"aggregated must have shape \[3, any, 5, 7\], got \(48, 5, 7\)"),
        ("aggregated", without(0), r"aggregated must have shape"),
        ("aggregated", without(2), r"aggregated must have shape"),
        ("aggregated", without(1), r"3 \* dim must be positive and divide channels of aggregated, got 3 \* dim=24"),
        ("aggregated", lambda x: x[:, :0], r"aggregated must have shape"),
        ("aggregated", lambda x: x.float(), r"aggregated must be torch.float64 on cpu, got torch.float32"),
        ("dim", lambda dim: 0, r"must be positive"),
        ("dim", lambda dim: -8, r"must be positive"),
        ("eps", lambda eps: 0.0, r"eps must be above zero"),
        ("eps", lambda eps: -1e-5, r"eps must be above zero"),
        ("eps", lambda eps: float("nan"), r"eps must be above zero"),
        ("eps", lambda eps: float("inf"), r"eps must be above zero and finite in torch.float64, got eps=inf"),
    ],
    "cascaded_attention": [
        ("x", lambda x: x[0], r"x must have shape"),
        ("x", lambda x: x.bool(), r"x must be a floating point tensor"),
        ("x", without(1), r"heads must be positive and divide channels, got heads=3 channels=17"),
        ("x", lambda x: x.float(), r"query_weight must be torch.float32 on cpu, got torch.float64"),
        ("window", lambda window: 0, r"window must be positive"),
        ("window", lambda window: -2, r"window must be positive"),
        ("window", lambda window: 3, r"attention_bias must have shape \[3, 9, 9\], got \(3, 4, 4\)"),
        ("query_weight", lambda w: w[0], r"query_weight must have shape"),
        ("query_weight", without(3), r"query_weight must have shape \[3, 2, 5, 5\], got \(3, 2, 5, 4\)"),
        ("query_weight", lambda w: w[..., :4, :4], r"the kernel of query_weight must be odd"),
        ("query_bias", without(1), r"query_bias must have shape \[3, 2\]"),
        ("qkv_weight", without(1), r"qkv_weight must have shape \[3, 10, 6\]"),
        ("qkv_bias", lambda b: b.half(), r"qkv_bias must be torch.float64"),
        ("attention_bias", without(0), r"attention_bias must have shape \[3, 4, 4\]"),
    ],
}


@pytest.mark.parametrize(
    ("operator", "argument", "change", "words"),
    [
        pytest.param(operator, argument, change, words, id=f"{operator}-{argument}-{i}")
        for operator, wrong in WRONG_ARGUMENTS.items()
        for i, (argument, change, words) in enumerate(wrong)
    ],
)
def test_wrong_arguments_are_named(operator: str, argument: str, change: Callable[[Any], Any], words: str) -> None:
    arguments, _ = case(operator, "four-windows" if operator == "cascaded_attention" else "odd")
    wrong = {**arguments, argument: change(arguments[argument])}
    with pytest.raises(ValueError, match=words):
        run(operator, wrong)
    if not any(isinstance(value, Tensor) and value.device.type == "meta" for value in wrong.values()):
        with pytest.raises(ValueError, match=words):
            OPERATORS[operator](**wrong)


class Caller(nn.Module):
    """A module that calls one operator with the first tensor as its input and the rest as constants."""

    def __init__(self, operator: str, arguments: Arguments) -> None:
        super().__init__()
        self.operator = OPERATORS[operator]
        self.maps = [name for name in arguments if name in MAPS]
        self.rest = {name: value for name, value in arguments.items() if name not in self.maps}
        for name, value in self.rest.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, *maps: Tensor) -> Tensor:
        rest = {name: getattr(self, name, value) for name, value in self.rest.items()}
        result: Tensor = self.operator(**dict(zip(self.maps, maps, strict=True)), **rest)
        return result * 2.0


class TestAsPyTorchOperators:
    @pytest.fixture(params=list(OPERATORS))
    def called(self, request: pytest.FixtureRequest) -> Iterator[tuple[str, Arguments, Tensor]]:
        shape = "four-windows" if request.param == "cascaded_attention" else "odd"
        arguments, expected = case(request.param, shape)
        yield request.param, cast(arguments, torch.float32), expected
        torch.compiler.reset()

    @pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
    def test_registration_is_sound(self, called: tuple[str, Arguments, Tensor], layout: str) -> None:
        operator, arguments, _ = called
        if layout == "channels-last":
            arguments = {
                name: value.to(memory_format=torch.channels_last)
                if isinstance(value, Tensor) and value.dim() == 4
                else value
                for name, value in arguments.items()
            }
        torch.library.opcheck(OPERATORS[operator], tuple(arguments.values()))

    def test_shapes_are_known_without_computing(self, called: tuple[str, Arguments, Tensor]) -> None:
        operator, arguments, expected = called
        on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        result = OPERATORS[operator](**on_meta)
        assert (result.device.type, result.shape, result.dtype) == ("meta", expected.shape, torch.float32)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiles_into_one_graph(self, called: tuple[str, Arguments, Tensor], backend: str) -> None:
        operator, arguments, expected = called
        module = Caller(operator, arguments)
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        with torch.no_grad():
            result = compiled(*(arguments[name] for name in module.maps))
        assert rms_relative(result / 2, expected) <= TOLERANCES[operator][torch.float32]

    def test_exports_with_a_dynamic_batch(self, called: tuple[str, Arguments, Tensor]) -> None:
        operator, arguments, expected = called
        module = Caller(operator, arguments)
        maps = tuple(arguments[name] for name in module.maps)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(module, maps, dynamic_shapes=(tuple({0: batch} for _ in maps),))
        assert [node.target for node in program.graph.nodes if "evit" in str(node.target)] == [
            getattr(torch.ops.evit, operator).default
        ]
        for repeats in (1, 2):
            result = program.module()(*(value.repeat(repeats, 1, 1, 1) for value in maps))
            wanted = expected.repeat(repeats, *[1] * (expected.dim() - 1))
            assert rms_relative(result / 2, wanted) <= TOLERANCES[operator][torch.float32]

    def test_inputs_are_left_alone(self, called: tuple[str, Arguments, Tensor]) -> None:
        operator, arguments, _ = called
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
        OPERATORS[operator](**arguments)
        assert all(torch.equal(arguments[name], value) for name, value in before.items())
