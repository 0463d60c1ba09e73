"""What is measured: figures of tensors, the operators' inner values, and every tensor of a model, by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_deploy.errors import InputDataError
from evit_deploy.headroom import inner
from evit_deploy.headroom.limits import BF16, FP16, FloatType
from evit_deploy.headroom.rows import ACTIVATION, BIAS, IN_FP32, INNER, STORED, WEIGHT, TensorRow
from evit_deploy.headroom.statistics import TensorStatistics
from evit_deploy.headroom.watch import HEAD, Watch
from evit_deploy.models.blocks import block_names, block_outputs
from evit_deploy.models.precision import in_precision
from tests import attention_references as references
from tests.checkpoints import images, rms_relative
from tests.headroom_models import FAR, fused_of, measured, planted, scaled, weights_of
from tests.small_exports import FAMILIES, SPECS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BATCH = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Limits


@pytest.mark.parametrize("kind", [FP16, BF16], ids=lambda kind: kind.name)
def test_a_type_has_the_limits_that_torch_gives_it(kind: FloatType) -> None:
    info = torch.finfo(DTYPES[kind.name])
    assert kind.largest == info.max
    assert kind.smallest_normal == info.tiny == info.smallest_normal
    assert kind.smallest == info.tiny * info.eps
    around = torch.tensor([kind.zeroed_up_to, kind.zeroed_up_to * (1 + 2.0**-10)])
    assert (around.to(DTYPES[kind.name]) != 0).tolist() == [False, True]


def test_margins_by_hand() -> None:
    assert FP16.overflow_bits(65504.0) == 0
    assert FP16.overflow_bits(65504.0 / 8) == pytest.approx(3)
    assert FP16.overflow_bits(65504.0 * 4) == pytest.approx(-2)
    assert FP16.underflow_bits(2.0**-14) == 0
    assert FP16.underflow_bits(2.0**-16) == -2
    assert FP16.underflow_bits(1.0) == 14
    assert FP16.overflow_bits(0.0) is None
    assert FP16.underflow_bits(0.0) is None
    assert BF16.overflow_bits(2.0**100) == pytest.approx(28, abs=0.01)
    assert BF16.underflow_bits(1.0) == 126


# Statistics


def statistics(values: Tensor, *, sums: Tensor | None = None, size: int = 2, kind: str = ACTIVATION) -> TensorRow:
    """A row from values that come in batches of `size` images."""
    gathered = TensorStatistics("block", "tensor", kind, "op", STORED)
    for start in range(0, len(values), size):
        part = values[start : start + size]
        names = [str(start + i) for i in range(len(part))]
        gathered.add(part, None if sums is None else sums[start : start + size], names)
    return gathered.row()


def test_figures_do_not_depend_on_the_batches() -> None:
    values = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    values[4, 1, 2] = -9.0
    values[2] = 0
    for size in (1, 2, 3, 7):
        row = statistics(values, size=size)
        assert row.max_abs == 9.0
        assert row.image == "4"
        assert row.rms == pytest.approx(math.sqrt(float((values**2).sum()) / (6 * 12)))
        assert row.max_sum is None
        assert row.zeroed_share == {"fp16": 0.0, "bf16": 0.0}


def test_a_sum_counts_for_the_margin_and_names_its_image() -> None:
    values, sums = torch.tensor([[3.0], [1.0]]), torch.tensor([[4.0], [65504.0 * 2]])
    row = statistics(values, sums=sums)
    assert (row.max_abs, row.max_sum, row.image) == (3.0, 131008.0, "1")
    assert row.overflow_bits(FP16) == pytest.approx(-1)
    assert row.underflow_bits(FP16) == pytest.approx(14 + math.log2(math.sqrt(5)))
    assert row.margin_bits(FP16) == row.overflow_bits(FP16)


def test_the_share_that_becomes_zero_is_of_the_values_that_are_not() -> None:
    values = torch.tensor([[0.0, 2.0**-25, 2.0**-24, -(2.0**-26), 1.0]])
    row = statistics(values)
    assert row.zeroed_share == {"fp16": 0.5, "bf16": 0.0}
    assert int((values.half() != 0).sum()) == 2


def test_squares_that_do_not_fit_fp32_are_no_matter() -> None:
    row = statistics(torch.full((2, 3), 1e30))
    assert row.rms == pytest.approx(1e30)
    assert row.overflow_bits(BF16) == pytest.approx(math.log2(3.3895e38 / 1e30), abs=1e-3)


def test_zeros_fit_everything_and_a_bias_has_no_underflow() -> None:
    row = statistics(torch.zeros(2, 3))
    assert (row.rms, row.overflow_bits(FP16), row.underflow_bits(FP16)) == (0.0, None, None)
    assert row.margin_bits(FP16) == math.inf
    small = torch.full((1, 3), 1e-6)
    assert statistics(small, kind=WEIGHT).margin_bits(FP16) < 0
    assert statistics(small, kind=BIAS).margin_bits(FP16) > 30


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_what_fp32_itself_cannot_carry_is_an_error(value: float, word: str) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = value
    with pytest.raises(InputDataError, match=f"block tensor is {word} in FP32 already, image 1"):
        statistics(values)
    with pytest.raises(InputDataError, match=f"block tensor is {word} in FP32 already, image 1"):
        statistics(torch.ones(2, 3), sums=values.abs())


# The operators, written out

Seen = dict[str, list[tuple[Tensor, Tensor | None, str]]]

ATTENTIONS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "lite_mla": ("lite_mla", lambda: references.lite_mla_arguments(2, 5, 7, 3, 8)),
    "lite_mla-quadratic": ("lite_mla", lambda: references.lite_mla_arguments(2, 3, 2, 2, 16)),
    "multi_scale": ("multi_scale_attention", lambda: references.multi_scale_arguments(2, 8, 9, 2, 4)),
    "projected": (
        "projected_multi_scale_attention",
        lambda: references.projected_multi_scale_arguments(2, 7, 10, 2, 4),
    ),
    "cascaded": ("cascaded_attention", lambda: references.cascaded_case(2, 5, 8, 3, 4, 6, 3, (3, 5, 3))[0]),
}


def written_out(name: str, arguments: dict[str, Any]) -> tuple[Tensor, list[Seen]]:
    """The result, and per image what was reported."""
    seen: list[Seen] = []

    def report_of(image: int) -> inner.Report:
        seen.append({})

        def report(name: str, values: Tensor, *, sums: Tensor | None = None, storage: str = IN_FP32) -> None:
            seen[image].setdefault(name, []).append((values, sums, storage))

        return report

    return inner.run_operator(name, report_of, tuple(arguments.values())), seen


def largest(seen: list[Seen], name: str) -> tuple[float, float]:
    """Of the values and of the sums, over all images."""
    reports = [report for image in seen for report in image[name]]
    return (
        max(float(values.abs().max()) for values, _, _ in reports),
        max(float(sums.max()) for _, sums, _ in reports if sums is not None),
    )


@pytest.mark.parametrize("case", ATTENTIONS)
def test_an_operator_written_out_is_its_definition(case: str) -> None:
    name, make = ATTENTIONS[case]
    arguments = make()
    result, seen = written_out(name, arguments)
    definition = getattr(__import__(f"evit_kernels.{name}.naive", fromlist=[name]), name)
    assert references.rms_relative(result, definition(**arguments)) < 1e-12
    assert len(seen) == 2
    assert all(
        values.dtype == torch.float64 for image in seen for reports in image.values() for values, _, _ in reports
    )


@pytest.mark.parametrize("case", ["multi_scale", "projected"])
def test_queries_in_blocks_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = ATTENTIONS[case]
    arguments = make()
    whole, seen_whole = written_out(name, arguments)
    monkeypatch.setattr(inner, "query_blocks", lambda tokens, keys, heads: 5)
    parts, seen = written_out(name, arguments)
    assert references.rms_relative(parts, whole) < 1e-12
    assert len(seen[0]["large.scores"]) == 5
    assert len(seen_whole[0]["large.scores"]) == 1
    assert largest(seen, "large.scores") == pytest.approx(largest(seen_whole, "large.scores"))


def test_the_sums_of_lite_mla_by_its_formula() -> None:
    arguments = ATTENTIONS["lite_mla"][1]()
    _, seen = written_out("lite_mla", arguments)
    x = torch.cat([arguments["qkv"], arguments["aggregated"]], dim=1).reshape(2, 3, 24, 35)
    q, k, v = x[:, :, :8].relu(), x[:, :, 8:16].relu(), x[:, :, 16:]
    context = torch.einsum("bhvn,bhkn->bhvk", v, k)
    of_context = torch.einsum("bhvn,bhkn->bhvk", v.abs(), k)
    numerator = torch.einsum("bhvk,bhkn->bhvn", context, q)
    denominator = torch.einsum("bhkn,bhkm->bhm", k, q) + 1e-5
    assert largest(seen, "context") == pytest.approx((float(context.abs().max()), float(of_context.max())))
    assert largest(seen, "k_sum") == pytest.approx((float(k.sum(-1).max()),) * 2)
    assert largest(seen, "numerator")[0] == pytest.approx(float(numerator.abs().max()))
    assert float(seen[1]["denominator"][0][0].max()) == pytest.approx(float(denominator[1].max()))
    assert {name: reports[0][2] for name, reports in seen[0].items()} == {
        **dict.fromkeys(("q", "k", "v"), STORED),
        **dict.fromkeys(("context", "k_sum", "numerator", "denominator"), IN_FP32),
    }


def test_the_quadratic_order_has_the_scores_instead_of_the_context() -> None:
    arguments = ATTENTIONS["lite_mla-quadratic"][1]()
    _, seen = written_out("lite_mla", arguments)
    assert set(seen[0]) == {"q", "k", "v", "scores", "numerator", "denominator"}
    x = torch.cat([arguments["qkv"], arguments["aggregated"]], dim=1).reshape(2, 2, 48, 6)
    scores = torch.einsum("bhkn,bhkm->bhnm", x[:, :, 16:32].relu(), x[:, :, :16].relu())
    sums = torch.einsum("bhvn,bhnm->bhvm", x[:, :, 32:].abs(), scores)
    assert largest(seen, "scores")[0] == pytest.approx(float(scores.max()))
    assert largest(seen, "numerator")[1] == pytest.approx(float(sums.max()))


def test_the_sums_of_a_softmax_attention_by_its_formula() -> None:
    arguments = ATTENTIONS["multi_scale"][1]()
    _, seen = written_out("multi_scale_attention", arguments)
    q = arguments["q_large"].reshape(2, 72, 2, 4)
    k, v = arguments["kv_large"].reshape(2, 20, 2, 2, 4).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)  # as the product gives them, before they are scaled down
    shifted = scores / 2 - (scores / 2).amax(-1, keepdim=True)
    weighed = torch.einsum("bhnm,bmhd->bhnd", (scores / 2).softmax(-1), v.abs())
    of_scores = torch.einsum("bnhd,bmhd->bhnm", q.abs(), k.abs())
    assert largest(seen, "large.scores") == pytest.approx((float(scores.abs().max()), float(of_scores.max())))
    assert largest(seen, "large.numerator")[1] == pytest.approx(float(weighed.max()))
    denominators = torch.cat([image["large.denominator"][0][0].flatten() for image in seen])
    assert float(denominators.max()) == pytest.approx(float(shifted.exp().sum(-1).max()))


def test_the_heads_of_a_cascade_are_told_apart() -> None:
    arguments = ATTENTIONS["cascaded"][1]()
    _, seen = written_out("cascaded_attention", arguments)
    stored = {name for name, reports in seen[0].items() if reports[0][2] == STORED}
    everywhere = {f"head{i}.{name}" for i in range(3) for name in ("q", "k", "v", "refined_q", "output")}
    assert stored == everywhere | {"head1.input", "head2.input"}
    assert set(seen[0]) - stored == {
        f"head{i}.{name}" for i in range(3) for name in ("scores", "denominator", "numerator")
    }
    first = F.conv2d(arguments["x"][:, :6], arguments["qkv_weight"][0, :4, :, None, None], arguments["qkv_bias"][0, :4])
    # The map is padded with zeros to whole windows, whose queries are the bias.
    expected = max(float(first.abs().max()), float(arguments["qkv_bias"][0, :4].abs().max()))
    assert max(float(image["head0.q"][0][0].abs().max()) for image in seen) == pytest.approx(expected)


# A whole model


@pytest.mark.parametrize("family", [*FAMILIES, "mit-quadratic"])
def test_measuring_changes_nothing(family: str) -> None:
    model = fused_of(SPECS[family], weights_of(family))
    batch = images(SPECS[family].image_size, BATCH)
    with torch.no_grad():
        plain = model(batch)
        logits = Watch(model).measure(batch, ["a", "b", "c"])
        assert rms_relative(logits, plain) < 1e-5
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(model(batch), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_a_row(family: str) -> None:
    """Counted a second way: weights by name, leaf modules by hooks, blocks by the outputs that localisation uses."""
    spec = SPECS[family]
    model = fused_of(spec, weights_of(family))
    batch = images(spec.image_size, BATCH)
    rows = measured(model, batch)
    blocks = (*block_names(model), HEAD)
    full_names = {tensor if block == HEAD else f"{block}.{tensor}": row for (block, tensor), row in rows.items()}

    weights = dict((*model.named_parameters(), *model.named_buffers()))
    for name, value in weights.items():
        row = full_names.get(name) or rows[blocks[0], name]
        assert row.kind == (BIAS if name.endswith(("bias", "pos_embed")) else WEIGHT)
        assert row.max_abs == float(value.detach().abs().max())
        assert row.image is None
    assert sum(row.kind in (WEIGHT, BIAS) for row in rows.values()) == len(weights)

    returned: dict[str, float] = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and isinstance(
            module, nn.Conv2d | nn.Linear | nn.LayerNorm
        ):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: returned.update({name: float(output.abs().max())})
            )
    taken: dict[str, float] = {}
    for name in blocks[:-1]:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: taken.update({name: float(inputs[0].abs().max())})
        )
    outputs = block_outputs(model, batch)
    taken[HEAD] = float(outputs[blocks[-2]].abs().max())
    assert returned
    for name, value in returned.items():
        row = full_names.get(name) or full_names[f"{name}.convolution"]  # of a block that is one convolution
        assert row.max_abs == pytest.approx(value, rel=1e-4), name
    for name in blocks:
        assert rows[name, "input"].max_abs == pytest.approx(taken[name], rel=1e-4), name
    assert rows[blocks[0], "input"].max_abs == float(batch.abs().max())
    assert {block for block, _ in rows} == set(blocks)


# Results of additions and activations that a reader would look for, and the inner values of each family.
NAMED = {
    "msa": {
        ("stem", "add"),
        ("stem", "pos_embed"),
        ("stages.0.blocks.0", "local.add"),
        ("stages.0.blocks.0", "add.2"),
        ("stages.0.blocks.0", "attn.large.scores"),
        ("stages.0.blocks.0", "norm1.variance"),
        ("head", "mean.sum"),
    },
    "mit": {
        ("stages.2.blocks.1", "context_module.add"),
        ("stages.2.blocks.1", "context_module.main.k_sum"),
        ("stages.2.blocks.1", "context_module.main.denominator"),
        ("stages.0.blocks.0", "main.depth_conv.act.hardswish"),
        ("head", "head.global_pool.pool.mean.sum"),
    },
    "msra": {
        ("stages.2.blocks.1", "mixer.m.head2.scores"),
        ("stages.2.blocks.1", "mixer.m.head2.input"),
        ("stages.2.blocks.1", "mixer.add"),
        ("stages.1.downsample", "patchmerge.se.mul"),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_named_as_one_would_look_for_them(family: str) -> None:
    rows = measured(fused_of(SPECS[family], weights_of(family)), images(SPECS[family].image_size, BATCH))
    assert NAMED[family] <= set(rows)
    for row in rows.values():
        assert row.storage == (STORED if row.kind != INNER else row.storage)
        assert row.rms <= row.max_abs * (1 + 1e-6)
        assert row.max_sum is None or row.max_sum >= row.max_abs * (1 - 1e-4), row.name
    of_images = {row.image for row in rows.values() if row.kind == ACTIVATION}
    assert of_images <= {None, *(f"image {i}" for i in range(BATCH))}
    assert len(of_images - {None}) == BATCH


def test_a_pooled_sum_and_a_variance_by_hand() -> None:
    model = fused_of(SPECS["msa"], weights_of("msa"))
    batch = images(SPECS["msa"].image_size, BATCH)
    rows = measured(model, batch)
    last = list(block_outputs(model, batch).values())[-1]
    assert rows[HEAD, "mean.sum"].max_sum == pytest.approx(float(last.abs().sum((2, 3)).max()), rel=1e-4)
    assert rows[HEAD, "mean.sum"].storage == IN_FP32
    pooled = last.mean((2, 3))
    squares = float(pooled.var(dim=-1, unbiased=False).max())
    assert rows[HEAD, "norm.variance"].max_abs == pytest.approx(squares, rel=1e-2)
    assert rows[HEAD, "norm.variance"].max_sum == pytest.approx(squares * last.shape[1], rel=1e-2)


# Planted


def failing(rows: dict[tuple[str, str], TensorRow]) -> dict[str, set[str]]:
    """Stored tensors below a margin of one bit in FP16, by block."""
    found: dict[str, set[str]] = {}
    for row in rows.values():
        if row.storage == STORED and row.margin_bits(FP16) < 1:
            found.setdefault(row.block, set()).add(row.tensor)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_large_values_are_found_where_they_were_planted_and_only_there(family: str) -> None:
    spec = SPECS[family]
    batch = images(spec.image_size, BATCH)
    assert failing(measured(fused_of(spec, weights_of(family)), batch)) == {}
    block, weights = planted(family)
    found = failing(measured(fused_of(spec, weights), batch))
    assert set(found) == {block}
    expected = {
        "msa": {"expand", "expand.weight", "depthwise.weight"},
        "mit": {"context_module.main.qkv.conv", "context_module.main.v", "context_module.main.lite_mla"},
        "msra": {"ffn0.m.pw1.conv", "ffn0.m.act.relu", "ffn0.m.pw2.conv.weight"},
    }
    assert expected[family] <= found[block]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_said_to_overflow_does_and_the_kept_blocks_cure_it(family: str) -> None:
    spec = SPECS[family]
    batch = images(spec.image_size, BATCH)
    block, weights = planted(family)
    model = fused_of(spec, weights)
    with torch.no_grad():
        expected = model(batch)
        assert not in_precision(model, "fp16")(batch).isfinite().all()
        kept = in_precision(model, "fp16", [block])(batch)
    assert rms_relative(kept.float(), expected) < 1e-2


def test_a_residual_stream_beyond_fp16_names_every_block_that_carries_it() -> None:
    """The sum that a block adds to is carried on, past norms that hide it from everything else."""
    spec = SPECS["msa"]
    names = ("stages.0.blocks.0.ffn.project.weight", "stages.0.blocks.0.ffn.project.bias")
    model = fused_of(spec, scaled(weights_of("msa"), dict.fromkeys(names, FAR)))
    batch = images(spec.image_size, BATCH)
    found = failing(measured(model, batch))
    assert "stem" not in found
    assert {"stages.0.blocks.0", "stages.1.transition", "stages.1.blocks.0"} <= set(found)
    assert "input" in found["stages.1.transition"]
    with torch.no_grad():
        expected = model(batch)
        assert not in_precision(model, "fp16")(batch).isfinite().all()
        kept = in_precision(model, "fp16", list(found))(batch)
        assert rms_relative(kept.float(), expected) < 1e-2
