"""A model in FP16 and BF16: what is stored in which type, what stays in FP32, and what a plain `.half()` would lose."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from evit_kernels.cascaded_attention import naive as cascaded_naive
from evit_kernels.lite_mla import naive as lite_mla_naive
from evit_kernels.multi_scale_attention import naive as multi_scale_naive
from onnx import TensorProto, helper
from torch import Tensor, nn

from evit_deploy.errors import ExportError, UsageError
from evit_deploy.models import load_model
from evit_deploy.models import operators as model_operators
from evit_deploy.models.blocks import block_names, block_outputs
from evit_deploy.models.fused import fused_model
from evit_deploy.models.precision import HEAD, in_precision
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.onnx.export import export_graph, inline_operators
from evit_deploy.onnx.precision import precision_counts, sums_in_fp32, value_types
from tests.small_exports import FAMILIES, SPECS, error, expected, input_array, large_image_mit, reference, session_of
from tests.tiers import tiered

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
FAST_HALF = (("mit", "fp16"), ("msra", "bf16"))
# The worst row's RMS-relative error to FP32 of these small models with random weights, and twice that.
TOLERANCE = {"fp16": 1e-2, "bf16": 8e-2}
BF16_OPSET = 22


@cache
def graph(family: str, precision: str, keep_fp32: tuple[str, ...] = (), io: str = "fp32") -> onnx.ModelProto:
    """The graph of a small model; copy before changing."""
    fused = fused_model(reference(family), SPECS[family])
    model = in_precision(fused, precision, keep_fp32)
    opset = BF16_OPSET if precision == "bf16" else 20
    return export_graph(model, SPECS[family], opset=opset, max_batch=5, precision=precision, io=io)


def logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        result: np.ndarray = model(torch.from_numpy(images)).float().numpy()
    return result


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class TestModule:
    @pytest.mark.parametrize("precision", HALF)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_near_the_reference_and_stored_in_the_type(self, family: str, precision: str) -> None:
        fused = fused_model(reference(family), SPECS[family])
        model = in_precision(fused, precision)
        images = input_array(family, 3)
        assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {HALF[precision]}
        assert {output.dtype for output in block_outputs(model, torch.from_numpy(images)).values()} == {HALF[precision]}
        assert 0 < error(logits(model, images), expected(family, images)) < TOLERANCE[precision]
        assert {tensor.dtype for tensor in fused.parameters()} == {torch.float32}, "the given module changed"

    def test_a_kept_block_is_in_fp32_and_its_neighbours_are_not(self) -> None:
        model = in_precision(fused_model(reference("msra"), SPECS["msra"]), "fp16", ["stages.2.blocks.0"])
        outputs = block_outputs(model, torch.from_numpy(input_array("msra", 1)))
        kept = {name for name, output in outputs.items() if output.dtype == torch.float32}
        assert kept == {"stages.2.blocks.0"}
        types = {name: tensor.dtype for name, tensor in model.named_buffers()}
        assert types["stages.2.blocks.0.mixer.m.qkv_weight"] == torch.float32

    def test_what_leaves_the_range_between_two_kept_blocks_is_not_lost(self) -> None:
        """Residual values of 1e5 in front of two blocks: FP16 loses them, two blocks in FP32 and BF16 do not."""
        spec = SPECS["msra"]
        fused = fused_model(reference("msra"), spec)
        names = block_names(fused)
        first, second = names[-2:]
        fused.get_submodule(first).register_forward_hook(lambda module, inputs, output: output + 1e5)
        parent, _, last = second.rpartition(".")
        setattr(fused.get_submodule(parent), last, Shift(-1e5))
        images = input_array("msra", 2)
        assert not np.isfinite(logits(in_precision(fused, "fp16"), images)).all()
        assert not np.isfinite(logits(in_precision(fused, "fp16", [first]), images)).all()
        kept = logits(in_precision(fused, "fp16", [first, second]), images)
        assert error(kept, logits(fused, images)) < 2e-2
        assert np.isfinite(logits(in_precision(fused, "bf16"), images)).all()

    def test_an_unknown_block(self) -> None:
        with pytest.raises(UsageError, match=r"no block 'stages\.2\.block\.0'") as info:
            in_precision(fused_model(reference("msra"), SPECS["msra"]), "fp16", ["stages.2.block.0"])
        assert "stages.2.blocks.0" in info.value.hint

    def test_a_weight_beyond_the_range_names_its_block(self) -> None:
        spec = SPECS["mit"]
        state = random_state_dict(spec, 0)
        state["head.classifier.4.weight"][0, 0] = 1e6
        fused = fused_model(load_model(spec, state), spec)
        with pytest.raises(ExportError, match=r"head\.classifier\.4\.weight has 1e\+06, .* fp16") as info:
            in_precision(fused, "fp16")
        assert f"--keep-fp32 {HEAD}" in info.value.hint
        assert np.isfinite(logits(in_precision(fused, "fp16", [HEAD]), input_array("mit", 1))).all()
        in_precision(fused, "bf16")


class TestGraph:
    @pytest.mark.parametrize(("family", "precision"), tiered(product(FAMILIES, HALF), lambda *case: case in FAST_HALF))
    def test_only_sums_are_in_fp32(self, family: str, precision: str) -> None:
        model = graph(family, precision)
        onnx.checker.check_model(model, full_check=True)
        types = value_types(model)
        wide = [
            node.op_type
            for node in model.graph.node
            if types.get(node.output[0]) == TensorProto.FLOAT and node.op_type != "Cast"
        ]
        sums = [node.op_type for node in model.graph.node if node.op_type in ("ReduceMean", "GlobalAveragePool")]
        assert wide == sums, "an island of FP32"
        assert sums, "the model has a pooled head"
        counts = precision_counts(model)
        assert counts.nodes_by_type["float32"] == len(sums)
        assert counts.casts == 2 + 2 * len(sums), "one at each end, and two around each sum"
        weights = {tensor.data_type for tensor in model.graph.initializer if tensor.data_type in (1, 10, 16)}
        assert weights == {TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_counts_find_a_planted_island(self, family: str) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(graph(family, "fp16"))
        before = precision_counts(model)
        index, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Add")
        widen = [helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT) for name in node.input]
        narrow = helper.make_node("Cast", [f"{node.output[0]}/wide"], [node.output[0]], to=TensorProto.FLOAT16)
        add = helper.make_node("Add", [n.output[0] for n in widen], [f"{node.output[0]}/wide"])
        nodes = list(model.graph.node)
        nodes[index : index + 1] = [*widen, add, narrow]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        after = precision_counts(model)
        assert after.casts == before.casts + 3
        assert after.nodes_by_type["float32"] == before.nodes_by_type["float32"] + 1

    @pytest.mark.parametrize("family", FAMILIES)
    def test_fp16_in_onnx_runtime(self, family: str) -> None:
        images = input_array(family, 3)
        model = graph(family, "fp16")
        for candidate in (model, inline_operators(model)):
            (result,) = session_of(candidate).run(None, {"input": images})
            assert result.dtype == np.float32
            assert error(result, expected(family, images)) < TOLERANCE["fp16"]

    def test_fp16_input_and_output(self) -> None:
        images = input_array("msa", 2)
        model = graph("msa", "fp16", io="fp16")
        (result,) = session_of(model).run(None, {"input": images.astype(np.float16)})
        assert result.dtype == np.float16
        assert precision_counts(model).casts == 2, "only those around the pooled mean"
        assert error(result.astype(np.float32), expected("msa", images)) < TOLERANCE["fp16"]

    @pytest.mark.exhaustive
    def test_neighbours_in_fp32_have_no_cast_between_them(self) -> None:
        names = block_names(fused_model(reference("msra"), SPECS["msra"]))
        plain = precision_counts(graph("msra", "fp16")).casts
        one = precision_counts(graph("msra", "fp16", (names[-1],))).casts
        two = precision_counts(graph("msra", "fp16", tuple(names[-2:]))).casts
        assert (one, two) == (plain + 2, plain + 2)

    def test_mixed_attention_runs(self) -> None:
        """One function serves nodes of both types."""
        names = block_names(fused_model(reference("msra"), SPECS["msra"]))
        images = input_array("msra", 2)
        (result,) = session_of(graph("msra", "fp16", (names[-1],))).run(None, {"input": images})
        assert error(result, expected("msra", images)) < TOLERANCE["fp16"]

    def test_a_sum_of_low_precision_is_widened_and_others_are_left(self) -> None:
        value = helper.make_tensor_value_info
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["low"], keepdims=0),
            helper.make_node("ReduceMean", ["y"], ["wide"], keepdims=0),
        ]
        inputs = [value("x", TensorProto.FLOAT16, [2, 70000]), value("y", TensorProto.FLOAT, [2, 3])]
        outputs = [value("low", TensorProto.FLOAT16, []), value("wide", TensorProto.FLOAT, [])]
        model = helper.make_model(
            helper.make_graph(nodes, "sums", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)]
        )
        changed = sums_in_fp32(model)
        onnx.checker.check_model(changed, full_check=True)
        assert [node.op_type for node in changed.graph.node] == ["Cast", "ReduceMean", "Cast", "ReduceMean"]
        assert [node.op_type for node in model.graph.node] == ["ReduceMean", "ReduceMean"], "the argument changed"


# What breaks a plain conversion, emulated with PyTorch's half on the CPU: ONNX Runtime and OpenVINO compute wider.


def naive_half_lite_mla(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
    """The formula with every intermediate value stored in the type of its input, as a converted graph has it."""
    batch, _, height, width = qkv.shape
    x = torch.cat([qkv, aggregated], dim=1).reshape(batch, -1, 3 * dim, height * width)
    q, k, v = F.relu(x[:, :, :dim]), F.relu(x[:, :, dim : 2 * dim]), x[:, :, 2 * dim :]
    numerator = (v @ k.transpose(-1, -2)) @ q
    denominator = k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ q
    return (numerator / (denominator + torch.tensor(eps).to(q.dtype))).reshape(batch, -1, height, width)


def naive_half_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def rms_rel(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt())


class TestBreakingInputs:
    @pytest.mark.parametrize("side", [512, 1024])
    def test_lite_mla_over_the_tokens_of_a_large_image(self, side: int) -> None:
        """Stride 16: side / 16 squared tokens; values as a trained model has them, deviation 4 and some more."""
        generator = torch.Generator().manual_seed(side)
        maps = [6 * torch.randn(1, 2 * 3 * 16, side // 16, side // 16, generator=generator) + 4 for _ in range(2)]
        low = [value.half() for value in maps]
        want = lite_mla_naive.lite_mla(*(value.double() for value in low), 16, 1e-5)
        assert not naive_half_lite_mla(*low, 16, 1e-5).isfinite().all()
        got = lite_mla_naive.lite_mla(*low, 16, 1e-5)
        assert got.dtype == torch.float16
        assert rms_rel(got, want) < 1e-3

    @pytest.mark.parametrize("eps", [1e-15, 1e-8])
    def test_lite_mla_of_rows_that_are_all_zero(self, eps: float) -> None:
        """float16(1e-15) is 0, and a query that is zero after its ReLU is then 0 / 0."""
        maps = [torch.rand(1, 3 * 8, 6, 6).half() for _ in range(2)]
        for packed in maps:
            packed[:, :8, :3] = -1
        assert naive_half_lite_mla(*maps, 8, eps).isnan().any()
        got = lite_mla_naive.lite_mla(*maps, 8, eps)
        assert got.isfinite().all()
        assert (got[:, :, :3] == 0).all()

    def test_an_eps_that_vanishes_in_what_is_computed_in(self) -> None:
        maps = [torch.rand(1, 24, 6, 6).half() for _ in range(2)]
        with pytest.raises(ValueError, match=r"eps must be above zero and finite in torch\.float32"):
            lite_mla_naive.lite_mla(*maps, 8, 1e-60)

    def test_scores_beyond_the_range(self) -> None:
        """Large queries and keys, one of which each query means: naive scores are infinite, and their softmax NaN."""
        generator = torch.Generator().manual_seed(0)
        dim, side = 8, 7
        qkv = torch.randn(1, side, side, 3 * dim, generator=generator)
        qkv[..., :dim] = 300.0 * qkv[..., :dim].sign()
        qkv[..., dim : 2 * dim] *= 300.0
        low = qkv.half()
        pooled = torch.randn(1, 4, 4, 2 * dim, generator=generator).half()
        want = multi_scale_naive.multi_scale_attention(*(x.double() for x in (low, low, low[..., :dim], pooled)), 1)
        tokens = low.reshape(1, side * side, 3 * dim)
        assert naive_half_attention(*tokens.split(dim, dim=-1)).isnan().any()
        got = multi_scale_naive.multi_scale_attention(low, low, low[..., :dim], pooled, 1)
        assert got.isfinite().all()
        assert rms_rel(got, want) < 2e-3

    def test_cascade_beyond_the_range(self) -> None:
        generator = torch.Generator().manual_seed(0)
        heads, key_dim, channels, window = 2, 4, 16, 4
        x = torch.randn(1, channels, 8, 8, generator=generator).half()
        width = channels // heads
        arguments = (
            torch.randn(heads, 2 * key_dim + width, width, generator=generator).half(),
            torch.full((heads, 2 * key_dim + width), 0.1).half(),
            400 * torch.ones(heads, key_dim, 3, 3).half(),
            torch.zeros(heads, key_dim).half(),
            torch.zeros(heads, window**2, window**2).half(),
        )
        queries = F.conv2d(x[:, :width], arguments[0][0, :key_dim, :, None, None])
        queries = F.conv2d(queries, arguments[2][0][:, None], padding=1, groups=key_dim)
        keys = F.conv2d(x[:, :width], arguments[0][0, key_dim : 2 * key_dim, :, None, None])
        scores = queries.flatten(2).transpose(-1, -2) @ (100 * keys).flatten(2)
        assert not scores.isfinite().all(), "the planted scores do not leave FP16's range"
        big = (arguments[0].clone(), *arguments[1:])
        big[0][:, key_dim : 2 * key_dim] *= 100
        got = cascaded_naive.cascaded_attention(x, *big, window)
        assert got.isfinite().all()

    @pytest.mark.parametrize("side", tiered([512, 1024], (512).__eq__))
    def test_a_whole_model_on_a_large_image(self, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
        _, fused, image = large_image_mit(side)
        model = in_precision(fused, "fp16")
        want, got = logits(fused, image), logits(model, image)
        assert error(got, want) < 5e-2
        monkeypatch.setattr(model_operators, "_lite_mla", naive_half_lite_mla)
        assert error(logits(fused, image), want) < 1e-4, "in FP32 it is the same formula"
        assert not np.isfinite(logits(model, image)).all()
