"""The counts of bytes and operations against independent ones: PyTorch's own counter, and windows one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from evit_kernels.registry import OPERATORS
from evit_kernels.work import EXPONENTIALS, MATRIX, MEMORY, Floor, Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evit_deploy.specs import variant_names
from tests import attention_references as references
from tests.published import calls_of, distinct_calls
from tests.tiers import tiered

WINDOWS = (3, 7)


def on_meta(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(v.to("meta") if isinstance(v, Tensor) else v for v in arguments.values())


# Each model's layers in turn, and shapes that no model has: odd, tiny, padded.
PUBLISHED = [("published", model) for model in variant_names()]
ODD = [(operator, shape) for operator, shapes in references.SHAPES.items() for shape in shapes]
FAST_MODELS = ("msa-m1", "msa-m5", "mit-b0", "mit-b2", "msra-m0", "msra-m5")
CASES = tiered([*PUBLISHED, *ODD], lambda kind, name: kind != "published" or name in FAST_MODELS)


def layers_of(kind: str, name: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Operator and arguments of each layer of a published model, or of the one shape of an operator."""
    if kind == "published":
        for call in distinct_calls(name, torch.float16, batch=2):
            yield call.operator, call.arguments
    else:
        yield kind, on_meta(references.arguments_of(kind, name))


class Softmaxes(TorchDispatchMode):
    """How many exponentials the softmaxes take that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.exponentials = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_softmax":
            self.exponentials += args[0].numel()
        return func(*args, **(kwargs or {}))


def counted(operator: str, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Floating-point operations and exponentials of the definition, as PyTorch runs it."""
    with FlopCounterMode(display=False) as flops, Softmaxes() as softmaxes:
        OPERATORS[operator].definition(*arguments)
    return flops.get_total_flops(), softmaxes.exponentials


def padded_pairs(height: int, width: int) -> int:
    """Pairs of query and key inside the windows of both edges of which one is padding: the definition computes them."""
    surplus = 0
    for window in WINDOWS:
        for top in range(0, height, window):
            for left in range(0, width, window):
                tokens = min(window, height - top) * min(window, width - left)
                surplus += window**4 - tokens**2
    return surplus


def taps_outside(kernel: int, window: int) -> int:
    """Taps of a depthwise kernel over a window whose source is padding: the definition computes them."""
    offsets = range(-(kernel // 2), kernel // 2 + 1)
    inside = range(window)
    return sum(
        y + dy not in inside or x + dx not in inside for y in inside for x in inside for dy in offsets for dx in offsets
    )


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_operations_are_what_pytorch_counts_but_for_what_is_useless(kind: str, name: str) -> None:
    for operator, arguments in layers_of(kind, name):
        check_operations(operator, arguments)


def check_operations(operator: str, arguments: tuple[Any, ...]) -> None:
    work = OPERATORS[operator].work_of(*arguments)
    flops, exponentials = counted(operator, arguments)
    if operator.endswith("multi_scale_attention"):
        tokens = arguments[0] if operator.startswith("projected") else arguments[2]
        (batch, height, width, channels), heads = tokens.shape, arguments[4]
        pairs = batch * padded_pairs(height, width)
        assert work.other_flops == 0
        assert flops - work.matrix_flops == 4 * channels * pairs
        assert exponentials - work.exponentials == heads * pairs
    elif operator == "lite_mla":
        (batch, channels3, height, width), aggregated, dim = arguments[0].shape, arguments[1], arguments[2]
        tokens, heads = height * width, batch * (channels3 + aggregated.shape[1]) // (3 * dim)
        # The definition takes the linear order's denominator, k q, as a matrix product; and sums k before.
        denominator = heads * 2 * dim * tokens if tokens > dim else 0
        assert flops - work.matrix_flops == denominator
        assert work.other_flops - denominator == heads * tokens * min(dim, tokens)
        assert (work.exponentials, exponentials) == (0, 0)
    else:
        x, _, _, query_weight, _, _, window = arguments
        heads, key_dim, kernel = query_weight.shape[:3]
        windows = x.shape[0] * -(-x.shape[2] // window) * -(-x.shape[3] // window)
        assert work.exponentials == exponentials
        outside = 2 * windows * heads * key_dim * taps_outside(kernel, window)
        assert flops - work.matrix_flops - work.other_flops == outside


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bytes_are_what_the_tensors_take(kind: str, name: str) -> None:
    for operator, arguments in layers_of(kind, name):
        result = OPERATORS[operator].call(*arguments)
        work = OPERATORS[operator].work_of(*arguments)
        inputs = [torch.empty(v.shape, dtype=v.dtype) for v in arguments if isinstance(v, Tensor)]
        assert work.read_bytes == sum(x.untyped_storage().nbytes() for x in inputs)
        assert work.written_bytes == result.untyped_storage().nbytes()
        assert work.bytes == work.read_bytes + work.written_bytes


@pytest.mark.parametrize("operator", OPERATORS)
def test_maps_count_once_an_image_and_parameters_once_a_batch(operator: str) -> None:
    model = {"lite_mla": "mit-b0", "cascaded_attention": "msra-m0"}.get(operator, "msa-m1")
    calls = {batch: calls_of(model, torch.float16, batch) for batch in (1, 64)}
    one_call, many_call = (next(call for call in calls[batch] if call.operator == operator) for batch in calls)
    one, many = (OPERATORS[operator].work_of(*call.arguments) for call in (one_call, many_call))
    assert (many.matrix_flops, many.exponentials) == (64 * one.matrix_flops, 64 * one.exponentials)
    assert (many.other_flops, many.written_bytes) == (64 * one.other_flops, 64 * one.written_bytes)
    parameters = 64 * one.read_bytes - many.read_bytes
    maps = {"projected_multi_scale_attention": 2, "cascaded_attention": 1}.get(operator, len(one_call.arguments))
    weights = [v for v in one_call.arguments[maps:] if isinstance(v, Tensor)]
    assert parameters == 63 * sum(v.numel() * 2 for v in weights)


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_that_the_operator_refuses_are_refused(operator: str) -> None:
    _, arguments = next(layers_of(operator, next(iter(references.SHAPES[operator]))))
    with pytest.raises(ValueError, match="must have shape"):
        OPERATORS[operator].work_of(arguments[0][0], *arguments[1:])


class TestFloor:
    work = Work(read_bytes=300, written_bytes=100, matrix_flops=5000, exponentials=70)

    def test_the_counts_it_is_made_of(self) -> None:
        assert self.work.bytes == 400
        assert self.work.flops_per_byte == 12.5

    @pytest.mark.parametrize(
        ("ceilings", "floor"),
        [
            ((100.0, 5000.0, 70.0), Floor(4.0, MEMORY)),
            ((400.0, 1000.0, 70.0), Floor(5.0, MATRIX)),
            ((400.0, 5000.0, 10.0), Floor(7.0, EXPONENTIALS)),
        ],
        ids=[MEMORY, MATRIX, EXPONENTIALS],
    )
    def test_the_largest_term_binds(self, ceilings: tuple[float, float, float], floor: Floor) -> None:
        assert self.work.floor_s(*ceilings) == floor

    @pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
    @pytest.mark.parametrize("which", range(3))
    def test_a_ceiling_is_above_zero(self, which: int, wrong: float) -> None:
        ceilings = [1.0, 1.0, 1.0]
        ceilings[which] = wrong
        with pytest.raises(ValueError, match=f"the ceiling of {(MEMORY, MATRIX, EXPONENTIALS)[which]} must be above"):
            self.work.floor_s(*ceilings)
