"""The Triton kernels against the definitions in float64: interpreted on the CPU, or compiled where there is a GPU.

Every tensor that a kernel is to fill is full of NaN before. The reference works on the arguments as the kernel gets
them, rounded to the kernel's dtype: what is compared is the computation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from evit_kernels import availability
from evit_kernels.registry import OPERATORS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evit_deploy.models.attention_calls import AttentionCall
from evit_deploy.specs import variant_names
from tests import attention_references as references
from tests.attention_references import Arguments, cast, rms_relative
from tests.published import distinct_calls, size_of
from tests.tiers import tiered
from tests.triton_interpreter import widen_bfloat16_products

pytest.importorskip("triton", reason="Triton is needed to run kernels")  # published for Linux only

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# RMS-relative error against the definition in float64, the worst of all cases below, measured in the interpreter.
# operator                          float32   float16   bfloat16
# multi_scale_attention             7.0e-07   2.4e-04   4.2e-03
# projected_multi_scale_attention   7.8e-07   4.2e-04   9.5e-03
# lite_mla                          2.0e-07   2.2e-04   6.3e-03
# cascaded_attention                1.5e-06   2.0e-03   3.4e-02
# The tolerances are three times that. A GPU's exp2 and TF32 products were never measured.
TOLERANCES = {
    "multi_scale_attention": dict(zip(DTYPES, (2.1e-6, 7.2e-4, 1.3e-2), strict=True)),
    "projected_multi_scale_attention": dict(zip(DTYPES, (2.4e-6, 1.3e-3, 2.9e-2), strict=True)),
    "lite_mla": dict(zip(DTYPES, (6.0e-7, 6.6e-4, 1.9e-2), strict=True)),
    "cascaded_attention": dict(zip(DTYPES, (4.5e-6, 6.0e-3, 0.11), strict=True)),
}
DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
# What only a kernel tells apart: head dims of several chunks, maps of several splits.
KERNEL_SHAPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "multi_scale_attention": {"head-dim-80": (1, 7, 7, 2, 80)},
    "projected_multi_scale_attention": {"several-chunks": (1, 10, 9, 7, 13)},
    "lite_mla": {
        "head-dim-80": (1, 9, 10, 2, 80),
        "head-dim-80-quadratic": (1, 8, 9, 2, 80),
        "several-splits": (1, 33, 65, 2, 16),
    },
    "cascaded_attention": {"wide-heads": (1, 7, 7, 2, 16, 80, 7, (5, 3))},
}
SHAPES = {operator: {**shapes, **KERNEL_SHAPES[operator]} for operator, shapes in references.SHAPES.items()}
# In FP16 and BF16 the fast tier runs two shapes of each operator; in FP32, which finds the wrong kernels, every one.
HALF_SHAPES = {
    "multi_scale_attention": ("odd", "padded-by-one"),
    "projected_multi_scale_attention": ("odd", "padded-by-one"),
    "lite_mla": ("odd", "quadratic-32"),
    "cascaded_attention": ("padded-right", "padded-bottom"),
}
CASES = tiered(
    ((operator, shape, dtype) for operator, shapes in SHAPES.items() for shape in shapes for dtype in DTYPES),
    lambda operator, shape, dtype: dtype == torch.float32 or shape in HALF_SHAPES[operator],
)
MAPS = ("x", "qkv", "aggregated", "qkv_small", "qkv_medium", "q_large", "kv_large")  # arguments that have the batch


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's BF16 products are made right."""
    widen_bfloat16_products(monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if (request.param == "cpu") != availability.interpreting():
        pytest.skip("TRITON_INTERPRET decides between interpreter and GPU")
    return str(request.param)


def arguments_of(operator: str, shape: str) -> Arguments:
    return references.arguments_from(operator, SHAPES[operator][shape])


def check(operator: str, arguments: Arguments, dtype: torch.dtype, device: str) -> Tensor:
    """Run the kernel and compare; returns the kernel's result on the CPU."""
    given_arguments = cast(arguments, dtype)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given_arguments.items()}
    result = OPERATORS[operator].fused(**on_device)
    assert result.dtype == dtype
    expected = OPERATORS[operator].definition(**cast(given_arguments, torch.float64))
    assert result.shape == expected.shape
    error = rms_relative(result.cpu(), expected)
    assert error <= TOLERANCES[operator][dtype]
    return result.cpu()


@pytest.mark.parametrize(("operator", "shape", "dtype"), CASES, ids=str)
def test_kernel_matches_the_definition(operator: str, shape: str, dtype: torch.dtype, device: str) -> None:
    check(operator, arguments_of(operator, shape), dtype, device)


def arguments_like(call: AttentionCall, side: int | None = None) -> Arguments:
    """Random arguments, in float64, of a published layer's sizes, its map cut to at most `side` tokens a side."""
    cut = (lambda tokens: tokens) if side is None else (lambda tokens: min(tokens, side))
    shapes = size_of(call)
    if call.operator == "lite_mla":
        (_, channels, height, width), (_, aggregated_channels, _, _), dim, eps = shapes
        heads = (channels + aggregated_channels) // (3 * dim)
        return references.lite_mla_arguments(1, cut(height), cut(width), heads, dim, eps=eps)
    if call.operator == "multi_scale_attention":
        (_, height, width, channels), heads = shapes[2], shapes[4]
        return references.multi_scale_arguments(1, cut(height), cut(width), heads, channels // heads)
    if call.operator == "projected_multi_scale_attention":
        (_, height, width, channels), heads = shapes[0], shapes[4]
        return references.projected_multi_scale_arguments(1, cut(height), cut(width), heads, channels // heads)
    (x, *others), window = shapes[:-1], shapes[-1]
    shapes = ((*x[:2], cut(x[2]), cut(x[3])), *others)
    names = ("x", "qkv_weight", "qkv_bias", "query_weight", "query_bias", "attention_bias")
    # Scores of about one, as trained weights give: a softmax that is all or nothing shows rounding, not the kernel.
    gains = (1.0, shapes[1][-1] ** -0.5, 0.1, 1 / shapes[3][-1], 0.1, 0.5)
    tensors = zip(names, shapes, gains, strict=True)
    arguments = {name: references.draw(*shape, seed=i, gain=gain) for i, (name, shape, gain) in enumerate(tensors)}
    return {**arguments, "window": window}


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", variant_names())
def test_every_size_of_the_published_models(model: str, device: str) -> None:
    for call in distinct_calls(model):
        check(call.operator, arguments_like(call), torch.float16, device)


# Tokens of a side that leave several windows of 3 and pooled keys, more tokens than a head has dims, one whole window.
CROPPED_TOKENS = {
    "multi_scale_attention": 4,
    "projected_multi_scale_attention": 4,
    "lite_mla": 8,
    "cascaded_attention": 7,
}


@pytest.mark.parametrize("family", ["msa", "mit", "msra"])
def test_every_kernel_of_the_published_models(family: str, device: str) -> None:
    """Each set of compile-time constants once, on a cropped map: height and width are run-time arguments."""
    checked = set()
    for model in variant_names():
        for call in distinct_calls(model) if model.startswith(f"{family}-") else ():
            arguments = cast(arguments_like(call, CROPPED_TOKENS[call.operator]), torch.float16)
            launch = OPERATORS[call.operator].launch_of(*arguments.values())
            kernel = (launch.kernel, *sorted(launch.constants.items()), launch.num_warps)
            if kernel not in checked:
                checked.add(kernel)
                check(call.operator, arguments, torch.float16, device)
    assert len(checked) > 3


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 16),
    width=st.integers(1, 16),
    heads=st.integers(1, 3),
    dim=st.integers(2, 24),
    dtype=st.sampled_from(DTYPES),
)
def test_multi_scale_attention_of_any_size(
    device: str, batch: int, height: int, width: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    arguments = references.multi_scale_arguments(batch, height, width, heads, dim)
    check("multi_scale_attention", arguments, dtype, device)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 16),
    width=st.integers(1, 16),
    heads=st.integers(1, 3),
    dim=st.integers(2, 16),
    dtype=st.sampled_from(DTYPES),
)
def test_projected_multi_scale_attention_of_any_size(
    device: str, batch: int, height: int, width: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    arguments = references.projected_multi_scale_arguments(batch, height, width, heads, dim)
    check("projected_multi_scale_attention", arguments, dtype, device)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    heads=st.integers(2, 5),
    dim=st.integers(2, 40),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_lite_mla_of_any_size(
    device: str, batch: int, height: int, width: int, heads: int, dim: int, channels_last: bool, dtype: torch.dtype
) -> None:
    arguments = references.lite_mla_arguments(batch, height, width, heads, dim, eps=1e-5)
    if channels_last:
        arguments["qkv"] = arguments["qkv"].contiguous(memory_format=torch.channels_last)
    if channels_last != (heads == 3):  # with three heads the maps lie differently
        arguments["aggregated"] = arguments["aggregated"].contiguous(memory_format=torch.channels_last)
    result = check("lite_mla", arguments, dtype, device)
    assert availability.memory_format_of(result) == availability.memory_format_of(arguments["qkv"])


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    key_dim=st.integers(2, 20),
    head_channels=st.integers(2, 40),
    window=st.integers(1, 7),
    kernel=st.sampled_from((1, 3, 5)),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_cascaded_attention_of_any_size(
    device: str,
    batch: int,
    height: int,
    width: int,
    heads: int,
    key_dim: int,
    head_channels: int,
    window: int,
    kernel: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    # The module that gives the parameters wants values of attn_ratio * key_dim channels.
    kernels = (kernel,) + (1,) * (heads - 1)
    arguments, _ = references.cascaded_case(batch, height, width, heads, key_dim, head_channels, window, kernels)
    arguments = {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    if channels_last:
        arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    result = check("cascaded_attention", arguments, dtype, device)
    assert availability.memory_format_of(result) == availability.memory_format_of(arguments["x"])


class TestExtremes:
    """Values that break a kernel whose scores, sums or denominators are kept in half precision."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_scores_beyond_half_precision(self, dtype: torch.dtype, device: str) -> None:
        arguments = references.multi_scale_arguments(1, 8, 9, heads=2, dim=8)
        for name in ("qkv_small", "qkv_medium", "kv_large", "q_large"):
            arguments[name][..., : arguments["q_large"].shape[-1]] *= 300.0  # queries, or the pooled keys
        arguments["qkv_small"][..., 16:32] *= 300.0
        result = check("multi_scale_attention", arguments, dtype, device)
        assert result.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_projected_scores_beyond_half_precision(self, dtype: torch.dtype, device: str) -> None:
        arguments = references.projected_multi_scale_arguments(1, 8, 9, heads=2, dim=8)
        for rows in (slice(16), slice(48, 64), slice(96, 112)):  # the queries of each branch
            arguments["weight"][rows] *= 300.0
        if dtype == torch.float32:
            check("projected_multi_scale_attention", arguments, dtype, device)
            return
        # Queries rounded to half precision choose other keys than exact ones, so only the overflow is looked for.
        on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast(arguments, dtype).items()}
        result = OPERATORS["projected_multi_scale_attention"].fused(**on_device)
        assert result.isfinite().all()
        assert result.abs().max() < 20

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_tokens_of_zeros_give_the_biases_of_the_values(self, dtype: torch.dtype, device: str) -> None:
        """Also next to the map's edge, where slots off the map have the biases as well."""
        arguments = references.projected_multi_scale_arguments(1, 8, 9, heads=2, dim=4)
        arguments["x"].zero_()
        arguments["kv_large"][..., 8:] = 1.0
        result = check("projected_multi_scale_attention", arguments, dtype, device)
        for branch in range(2):
            values = arguments["bias"][24 * branch + 16 : 24 * branch + 24].expand(72, 8)
            torch.testing.assert_close(result[0, :, 8 * branch : 8 * branch + 8].double(), values, rtol=0.02, atol=0.01)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("zeroed", ["queries", "keys", "everything"])
    def test_rows_of_zeros_in_a_window(self, zeroed: str, dtype: torch.dtype, device: str) -> None:
        arguments = references.multi_scale_arguments(1, 8, 9, heads=2, dim=4)
        for name in ("qkv_small", "qkv_medium"):
            arguments[name][..., {"queries": slice(8), "keys": slice(8, 16), "everything": slice(None)}[zeroed]] = 0.0
        if zeroed != "keys":
            arguments["q_large"].zero_()
        if zeroed != "queries":
            arguments["kv_large"][..., :8] = 0.0
        result = check("multi_scale_attention", arguments, dtype, device)
        assert result.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [(3, 4), (17, 23)], ids=["quadratic", "linear"])
    def test_sums_beyond_half_precision(self, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
        """300 x 300 x 391 tokens is 500 times the largest FP16 number."""
        arguments = references.lite_mla_arguments(1, *size, heads=2, dim=16, eps=1e-5)
        arguments = {k: v * 100.0 if isinstance(v, Tensor) else v for k, v in arguments.items()}
        result = check("lite_mla", arguments, dtype, device)
        assert result.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [(3, 4), (7, 9)], ids=["quadratic", "linear"])
    @pytest.mark.parametrize("zeroed", ["queries", "keys", "both"])
    def test_zero_denominators(self, zeroed: str, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
        arguments = references.lite_mla_arguments(2, *size, heads=2, dim=16, eps=1e-5)
        for tokens in (arguments["qkv"], arguments["aggregated"]):
            if zeroed != "keys":
                tokens[:, :16] = -1.0
            if zeroed != "queries":
                tokens[:, 16:32] = -1.0
        on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast(arguments, dtype).items()}
        result = OPERATORS["lite_mla"].fused(**on_device)
        assert result.abs().max() == 0  # and so no NaN

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_cascades(self, dtype: torch.dtype, device: str) -> None:
        arguments = arguments_of("cascaded_attention", "padded-both")
        arguments["x"] = arguments["x"] * 50.0
        result = OPERATORS["cascaded_attention"].fused(
            **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast(arguments, dtype).items()}
        )
        assert result.isfinite().all()

    def test_slots_behind_a_window_do_not_leak(self, device: str) -> None:
        """The heads' inputs cancel on every token; what no token owns would grow past FP16, and meet a weight of 0."""
        heads, key_dim, channels, window = 2, 2, 2, 3
        x = torch.full((1, heads * channels, window, window), 300.0, dtype=torch.float64)
        x[:, channels:] = -300.0
        weight = torch.zeros(heads, 2 * key_dim + channels, channels, dtype=torch.float64)
        weight[0, 2 * key_dim :] = torch.eye(channels)
        weight[1, 2 * key_dim :] = torch.eye(channels) * 300.0
        arguments = {
            "x": x,
            "qkv_weight": weight,
            "qkv_bias": torch.zeros(heads, 2 * key_dim + channels, dtype=torch.float64),
            "query_weight": torch.zeros(heads, key_dim, 3, 3, dtype=torch.float64),
            "query_bias": torch.zeros(heads, key_dim, dtype=torch.float64),
            "attention_bias": torch.zeros(heads, window**2, window**2, dtype=torch.float64),
            "window": window,
        }
        assert check("cascaded_attention", arguments, torch.float16, device).isfinite().all()

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_a_nan_is_not_hidden(self, operator: str, device: str) -> None:
        arguments = arguments_of(operator, "four-windows" if operator == "cascaded_attention" else "odd")
        name = next(iter(arguments))
        arguments[name] = arguments[name].clone()
        arguments[name].view(-1)[arguments[name].numel() // 2] = float("nan")
        on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast(arguments, torch.float32).items()}
        assert OPERATORS[operator].fused(**on_device).isnan().any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_scattered_tensors_are_gathered_first(operator: str, device: str) -> None:
    arguments = arguments_of(operator, "four-windows" if operator == "cascaded_attention" else "odd")
    given_arguments = cast(arguments, torch.float32)
    scattered = {
        name: torch.stack((value, value), dim=-1).to(device)[..., 0] if isinstance(value, Tensor) else value
        for name, value in given_arguments.items()
    }
    assert not any(value.is_contiguous() for value in scattered.values() if isinstance(value, Tensor))
    result = OPERATORS[operator].fused(**scattered)
    expected = OPERATORS[operator].definition(**cast(given_arguments, torch.float64))
    assert rms_relative(result.cpu(), expected) <= TOLERANCES[operator][torch.float32]


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_of_a_batch_do_not_mix(operator: str, device: str) -> None:
    arguments = arguments_of(operator, "four-windows" if operator == "cascaded_attention" else "odd")
    maps = [name for name in arguments if name in MAPS]
    given_arguments = cast(arguments, torch.float32)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given_arguments.items()}
    whole = OPERATORS[operator].fused(**on_device)
    alone = OPERATORS[operator].fused(**{**on_device, **{name: on_device[name][1:2] for name in maps}})
    assert torch.equal(whole[1:2], alone)


class TestRefusals:
    """What the kernels do not take is said before anything is launched."""

    def test_double_precision(self) -> None:
        with pytest.raises(ValueError, match=r"lite_mla: kernels exist for float32, float16 and bfloat16, got x.dtype"):
            OPERATORS["lite_mla"].fused(*[torch.zeros(1, 12, 2, 2, dtype=torch.float64)] * 2, 4, 1e-5)

    def test_a_device_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match=r"kernels run on CUDA devices, got x.device=device\(type='cpu'\)"):
            OPERATORS["lite_mla"].fused(*[torch.zeros(1, 12, 2, 2)] * 2, 4, 1e-5)

    def test_a_machine_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(availability, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="lite_mla: Triton is not installed"):
            OPERATORS["lite_mla"].fused(*[torch.zeros(1, 12, 2, 2)] * 2, 4, 1e-5)

    @pytest.mark.parametrize(
        ("operator", "shapes", "words"),
        [
            ("lite_mla", (*[(1, 3 * 129, 2, 2)] * 2, 129, 1e-5), "head dim of at most 128, got 129"),
            ("lite_mla", (*[(1, 3 * 16, 2**14, 2**14)] * 2, 16, 1e-5), r"below 2\^31 elements, got 48x16384x16384"),
            (
                "lite_mla",
                ((1, 3, 2**14, 2**14), (1, 24, 2**14, 2**14), 1, 1e-5),
                r"below 2\^31 elements, got 24x16384x16384",
            ),
            (
                "multi_scale_attention",
                ((1, 2, 2, 387), (1, 2, 2, 387), (1, 2, 2, 129), (1, 1, 1, 258), 1),
                "head dim of at most 128, got 129",
            ),
            (
                "projected_multi_scale_attention",
                ((1, 2, 2, 17), (1, 1, 1, 34), (119, 17), (119,), 1),
                "head dim of at most 16, got 17",
            ),
            (
                "projected_multi_scale_attention",
                ((1, 2**14, 2**14, 16), (1, 2**13, 2**13, 32), (112, 16), (112,), 1),
                r"below 2\^31 elements, got 16384x16384x48",
            ),
            (
                "cascaded_attention",
                ((1, 4, 9, 9), (1, 8, 4), (1, 8), (1, 2, 3, 3), (1, 2), (1, 81, 81), 9),
                "windows of at most 64 tokens, got 9x9",
            ),
            (
                "cascaded_attention",
                ((1, 4, 2, 2), (1, 134, 4), (1, 134), (1, 65, 3, 3), (1, 65), (1, 4, 4), 2),
                "key dim of at most 64, got 65",
            ),
            (
                "cascaded_attention",
                ((1, 129, 2, 2), (1, 133, 129), (1, 133), (1, 2, 3, 3), (1, 2), (1, 4, 4), 2),
                "heads of at most 128 channels, got 129",
            ),
        ],
    )
    def test_sizes(self, operator: str, shapes: tuple[Any, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        arguments = [torch.empty(()).expand(shape) if isinstance(shape, tuple) else shape for shape in shapes]
        with pytest.raises(ValueError, match=f"{operator}: .*{words}"):
            OPERATORS[operator].fused(*arguments)

    def test_the_reason_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert not availability.can_run("some_operator", "it is Sunday", raise_error=False)
            assert availability.can_run("some_operator", None, raise_error=False)
        messages = [record.getMessage() for record in caplog.records]
        assert messages == ["some_operator runs as plain PyTorch: it is Sunday"]
