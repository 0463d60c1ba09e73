"""The calculated benchmark `kernel-floors`: what it counts around the operators, its rows and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from evit_kernels.projected_multi_scale_attention.launch import projections_pay
from torch import Tensor

from benchmarks import kernel_floors
from benchmarks.attention_layers import AttentionLayer, attention_layers, definition_operations
from benchmarks.deeper_fusion import DeeperFusion, bytes_per_head_launches, deeper_fusions
from benchmarks.floor_rows import floor_rows
from benchmarks.floor_tables import SECTIONS, models_table
from benchmarks.operations import COPIES, POINTWISE, PRODUCTS, Recorder, fused_bytes, total_bytes
from benchmarks.result import RESULTS, Result, read_results
from evit_deploy.models import fused
from evit_deploy.specs import variant_names

MODELS = ("msa-m1", "mit-b0", "msra-m0")
CEILINGS = (kernel_floors.BANDWIDTH, kernel_floors.MATRIX_FLOPS_PER_S, kernel_floors.EXPONENTIALS_PER_S)


@pytest.fixture(scope="module")
def layers() -> list[AttentionLayer]:
    return attention_layers(MODELS, (1, 64), 224)


def record(function: Callable[[], Any], *parameters: Tensor) -> list[tuple[str, int, int, int]]:
    """Name, bytes read, bytes written and bytes of parameters of each operation."""
    with Recorder(parameters) as recorder:
        function()
    return [(o.name, sum(o.reads.values()), sum(o.writes.values()), o.parameter_bytes) for o in recorder.operations]


class TestRecorder:
    x = torch.empty(4, 6, dtype=torch.float16, device="meta")
    weight = torch.empty(6, 5, dtype=torch.float16, device="meta")

    def test_an_operation_reads_and_writes_each_tensor_once(self) -> None:
        assert record(lambda: self.x @ self.weight, self.weight) == [("mm", 48 + 60, 40, 60)]
        assert record(lambda: self.x * self.x) == [("mul", 48, 48, 0)]

    @pytest.mark.parametrize(
        "view",
        [lambda x: x.t(), lambda x: x[1:, ::2], lambda x: x.reshape(2, 12), lambda x: x.expand(3, 4, 6)],
        ids=["transpose", "slice", "reshape", "expand"],
    )
    def test_a_view_is_free(self, view: Callable[[Tensor], Tensor]) -> None:
        assert record(lambda: view(self.x)) == []

    def test_a_reshape_that_copies_is_not(self) -> None:
        assert record(lambda: self.x.t().reshape(24)) == [("clone", 48, 48, 0)]

    def test_a_broadcast_row_is_read_once(self) -> None:
        assert record(lambda: self.x + self.x[:1].expand(4, 6)) == [("add", 48, 48, 0)]
        assert record(lambda: self.x + self.weight.t()[:1].expand(4, 6)) == [("add", 48 + 12, 48, 0)]

    def test_an_operation_in_place_counts(self) -> None:
        y = torch.empty(4, 6, device="meta")
        assert record(lambda: y.mul_(2.0)) == [("mul_", 96, 96, 0)]

    def test_memory_that_is_only_allocated_and_work_of_the_host_do_not_count(self) -> None:
        assert record(lambda: (torch.empty(9, device="meta"), torch.ones(3) + 1)) == []

    def test_a_group_as_one_launch(self) -> None:
        with Recorder() as recorder:
            a = self.x * 2
            b = a + self.x
            torch.cat([b, a])
        times, plus, cat = recorder.operations
        everything = [times, plus, cat]
        assert [o.kind for o in everything] == [POINTWISE, POINTWISE, COPIES]
        assert total_bytes(everything) == 96 + 144 + 192
        assert fused_bytes(everything, everything) == 48 + 96  # x in, the result out
        assert fused_bytes([times, plus], everything) == 48 + 48 + 48  # the concatenation needs both
        assert fused_bytes([plus, cat], everything) == 48 + 48 + 96
        assert fused_bytes([plus], everything) == plus.bytes


def test_the_definition_of_lite_mla_by_hand(layers: list[AttentionLayer]) -> None:
    layer = next(layer for layer in layers if layer.shapes == (*[(1, 192, 14, 14)] * 2, 16, 1e-5))
    operations = definition_operations(layer.calls[64])
    heads, dim, tokens = 8 * 64, 16, 196
    maps, states, rows = heads * dim * tokens, heads * dim * dim, heads * tokens
    by_hand = [
        ("cat", 2 * 3 * maps),
        ("relu", 2 * maps),
        ("relu", 2 * maps),
        ("bmm", 2 * maps + states),
        ("bmm", states + 2 * maps),
        ("sum", maps + heads * dim),
        ("bmm", heads * dim + maps + rows),
        ("add", 2 * rows),
        ("div", 2 * maps + rows),
    ]
    assert [(o.name, o.bytes) for o in operations] == [(name, 2 * elements) for name, elements in by_hand]
    assert {o.kind for o in operations} == {PRODUCTS, POINTWISE, COPIES}


def test_every_size_is_there_once_with_its_models(layers: list[AttentionLayer]) -> None:
    found = [(layer.operator, layer.models) for layer in layers]
    assert found == [
        ("projected_multi_scale_attention", {"msa-m1": 1}),
        ("projected_multi_scale_attention", {"msa-m1": 2}),
        ("projected_multi_scale_attention", {"msa-m1": 2}),
        ("multi_scale_attention", {"msa-m1": 2}),
        ("multi_scale_attention", {"msa-m1": 1}),
        ("lite_mla", {"mit-b0": 2}),
        ("lite_mla", {"mit-b0": 2}),
        ("cascaded_attention", {"msra-m0": 1}),
        ("cascaded_attention", {"msra-m0": 2}),
        ("cascaded_attention", {"msra-m0": 3}),
    ]
    assert {tuple(layer.calls) for layer in layers} == {(1, 64)}
    assert {len(layer.operations) for layer in layers} == {7, 5, 4, 2}


def test_what_deeper_fusions_save_by_hand(layers: list[AttentionLayer]) -> None:
    for layer in layers:
        fusions = {fusion.name: fusion for fusion in deeper_fusions(layer)}
        saved = {name: fusion.saved_bytes for name, fusion in fusions.items()}
        if layer.operator == "projected_multi_scale_attention":
            _, height, width, channels = layer.shapes[0]
            tokens, keys = height * width, layer.shapes[1][1] * layer.shapes[1][2]
            assert saved == {
                # the pooled map, keys and values written and read, and the layer's input read once instead of twice
                "pooling and projection of keys and values": 2 * channels * (keys * (2 + 2 * 2) + tokens),
                "closing Linear": 2 * channels * tokens * 2 * 3 - 3 * 4 * channels * tokens,
            }
        elif layer.operator == "multi_scale_attention":
            _, height, width, channels = layer.shapes[2]
            tokens, keys = height * width, layer.shapes[3][1] * layer.shapes[3][2]
            assert saved == {
                # q, k and v of two branches written and read, and the layer's input read once instead of twice
                "3x3 and 7x7 projections": 2 * channels * tokens * (2 * 2 * 3 + 1),
                "projection of the queries": 2 * channels * tokens * 2,
                "pooling and projection of keys and values": 2 * channels * keys * (2 + 2 * 2),
                # the three branches written and read; against them FP32 sums zeroed, written and read
                "closing Linear": 2 * channels * tokens * 2 * 3 - 3 * 4 * channels * tokens,
            }
            assert fusions["pooling and projection of keys and values"].extra_flops == (
                (-(-tokens // 64) - 1) * keys * channels * 2 * channels * 2
            )
        elif layer.operator == "lite_mla":
            _, channels3, height, width = layer.shapes[0]
            channels, tokens = channels3 // 3, height * width
            assert saved == {
                "projection and aggregation": 2 * channels * tokens * (3 * 7),
                "closing convolution": 2 * channels * tokens * 2 * 2 - 3 * 4 * channels * tokens,
            }
        else:
            _, channels, height, width = layer.shapes[0]
            elements = channels * height * width
            assert saved == {"closing convolution": 2 * 2 * elements}


@pytest.mark.parametrize("model", [name for name in variant_names() if name.startswith("msa-")])
def test_projections_are_in_the_launch_where_they_pay(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size, with the projections outside: what the count says is what the model does."""
    monkeypatch.setattr(fused, "projections_pay", lambda *sizes: False)
    for layer in attention_layers([model], (1,), 224):
        _, height, width, channels = layer.shapes[2]
        fusions = {fusion.name: fusion.pays(*CEILINGS[:2]) for fusion in deeper_fusions(layer)}
        pay = fusions["3x3 and 7x7 projections"] and fusions["projection of the queries"]
        heads = layer.shapes[4]
        assert projections_pay(heads, channels // heads, height, width) is pay


def test_a_layer_of_other_operations_is_not_counted(layers: list[AttentionLayer]) -> None:
    with pytest.raises(ValueError, match="unknown layer around projected_multi_scale_attention"):
        deeper_fusions(replace(layers[0], operations=layers[0].operations[1:]))


@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ({}, True),
        ({"reread_bytes": 1000}, False),
        ({"saved_bytes": -1000}, False),
        ({"extra_flops": 1001}, False),
        ({"held_bytes": 48 * 1024}, True),
        ({"held_bytes": 48 * 1024 + 1}, False),
    ],
    ids=str,
)
def test_when_a_deeper_fusion_pays(changes: dict[str, Any], pays: bool) -> None:
    fusion = DeeperFusion("made up", saved_bytes=1000, reread_bytes=999, extra_flops=0, held_bytes=0)
    assert replace(fusion, **changes).pays(bandwidth=1.0, matrix_flops_per_s=1.0) is pays


def test_one_launch_per_head_moves_more(layers: list[AttentionLayer]) -> None:
    layer = next(layer for layer in layers if layer.operator == "cascaded_attention")
    x, *parameters = layer.calls[64].arguments[:-1]
    heads, part = 4, 64 * 16 * 14 * 14
    elements = sum(parameter.numel() for parameter in parameters)
    for head in range(heads):
        elements += part + (part if head else 0) + part  # its channels, the previous output, its own output
    assert x.numel() == heads * part
    assert bytes_per_head_launches(layer, 64) == 2 * elements


def as_json(rows: Any) -> list[dict[str, Any]]:
    document = Result("made-up", "t", "g", "python -m benchmarks made-up", {"quick": False}, rows).to_json()
    fresh: list[dict[str, Any]] = json.loads(json.dumps(document["rows"]))
    return fresh


@pytest.mark.parametrize("model", MODELS)
def test_the_published_counts_are_those_of_today(model: str) -> None:
    """Nothing is timed, so the numbers must come out the same; another launch geometry asks for another run."""
    published = read_results(RESULTS)[kernel_floors.NAME]["rows"]
    fresh = as_json(floor_rows([model], kernel_floors.BATCHES, 224, *CEILINGS))
    found = {(row["details"]["operator"], str(row["details"]["sizes"]), row["batch"]): row for row in published[:-2]}
    for row in fresh:
        before = found[row["details"]["operator"], str(row["details"]["sizes"]), row["batch"]]
        assert before["details"]["models"][model] == row["details"]["models"][model]
        assert before["value"] == row["value"]
        assert {**before["details"], "models": {}} == {**row["details"], "models": {}}


def test_the_goal_is_missed_where_a_call_moves_as_much_as_its_definition() -> None:
    rows = floor_rows(["msra-m0"], (1,), 224, *CEILINGS)
    worst = kernel_floors._worst_share(rows, 1)
    assert worst.reached is True
    details = {**rows[0].details, "definition": {**rows[0].details["definition"], "bytes": 79240}}
    missed = kernel_floors._worst_share([replace(rows[0], details=details), *rows[1:]], 1)
    assert (missed.subject, missed.value, missed.reached) == (rows[0].subject, 1.0, False)


def test_the_result_says_that_it_is_calculated() -> None:
    protocol = read_results(RESULTS)[kernel_floors.NAME]["protocol"]
    assert (protocol["calculated"], protocol["verified_on_a_gpu"]) == (True, False)
    assert protocol["ceilings"]["bytes_per_s"] == kernel_floors.BANDWIDTH


@pytest.mark.parametrize("section", SECTIONS)
def test_every_table_has_a_cell_in_each_column(section: str) -> None:
    lines = SECTIONS[section](read_results(RESULTS)[kernel_floors.NAME]).splitlines()
    assert len(lines) > 2
    assert {line.count(" | ") for line in lines} == {lines[0].count(" | ")}


def test_the_table_of_models_adds_up_their_calls() -> None:
    document = read_results(RESULTS)[kernel_floors.NAME]
    row = next(line for line in models_table(document).splitlines() if "`mit-b0`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Two layers at 14x14 and two at 7x7, of 128 channels in 8 heads and of 256 in 16, in FP16.
    moved = 2 * 2 * 4 * (128 * 196 + 256 * 49)
    assert cells[:3] == ["`mit-b0`", "4", f"{moved / 1e6:.2f}"]
    assert cells[-2:] == [f"{moved / 4.3e6:.3g}", f"{64 * moved / 4.3e6:.3g}"]
