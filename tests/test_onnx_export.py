"""Exported graphs: one node per attention layer, the batch as asked for, and the reference's logits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from evit_deploy.constants import INPUT_NAME, OPERATOR_DOMAIN, OUTPUT_NAME, SOFTMAX_OUTPUT_NAME
from evit_deploy.errors import ExportError, UsageError
from evit_deploy.images.decode import normalize
from evit_deploy.models.blocks import block_names, block_outputs
from evit_deploy.models.fused import fused_model
from evit_deploy.onnx.blocks import BLOCK_PREFIX, marked_block_names, remove_markers, with_block_outputs
from evit_deploy.onnx.export import export_graph, fused_operator_types, inline_operators
from evit_deploy.specs import Preprocessing
from tests.small_exports import (
    ATTENTION,
    BATCHES,
    MAX_BATCH,
    SPECS,
    error,
    expected,
    exported,
    input_array,
    reference,
    run,
    session_of,
    simplified,
)
from tests.tiers import tiered

SMALLEST = "msa-resized"
SIZE = SPECS[SMALLEST].image_size
TOLERANCE = 2e-5  # RMS-relative, per row; measured at most 9.3e-6 (msra)
PREPROCESSING = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", tiered(SPECS, "mit-quadratic".__ne__))
class TestEveryFamily:
    @pytest.mark.parametrize("batch", BATCHES)
    def test_gives_the_references_logits(self, name: str, batch: int) -> None:
        array = input_array(name, batch)
        wanted = expected(name, array)
        assert error(run(exported(name), array), wanted) <= TOLERANCE
        assert error(run(simplified(name)[0], array), wanted) <= TOLERANCE
        assert batch == 1 or error(wanted[:1], wanted[1:2]) > 0.05  # the images do not all look the same to it

    def test_has_one_node_and_its_function_per_attention_layer(self, name: str) -> None:
        for model in (exported(name), simplified(name)[0]):
            types = fused_operator_types(model)
            assert types == ATTENTION[name]
            assert sorted(f.name for f in model.functions) == sorted(set(types))
            declared = {f.name: set(f.attribute) for f in model.functions}
            for node in model.graph.node:
                if node.domain == OPERATOR_DOMAIN:
                    assert {attribute.name for attribute in node.attribute} == declared[node.op_type]

    def test_inlined_it_is_plain_and_gives_the_same(self, name: str) -> None:
        model = exported(name)
        before = model.SerializeToString()
        inlined = inline_operators(model)
        assert model.SerializeToString() == before
        assert not inlined.functions
        assert fused_operator_types(inlined) == []
        assert [entry.domain for entry in inlined.opset_import] == [""]
        onnx.checker.check_model(inlined, full_check=True)
        array = input_array(name, 3)
        assert error(run(inlined, array), run(model, array)) <= TOLERANCE

    def test_has_no_batch_normalisation_left(self, name: str) -> None:
        operators = {node.op_type for node in inline_operators(exported(name)).graph.node}
        assert "BatchNormalization" not in operators
        assert {"Conv", "MatMul"} <= operators

    def test_names_every_block_before_and_after_simplifying(self, name: str) -> None:
        for model in (exported(name), simplified(name)[0], inline_operators(exported(name))):
            assert marked_block_names(model.graph) == block_names(reference(name))
            assert not [node for node in model.graph.node if node.op_type == "BlockOutput"]

    def test_a_blocks_tensor_is_what_the_block_returns(self, name: str) -> None:
        array = input_array(name, 2)
        blocks = block_outputs(reference(name), torch.from_numpy(array))
        for model in (exported(name), simplified(name)[0]):
            extended = with_block_outputs(model, blocks)
            assert len(model.graph.output) == 1
            names = [output.name for output in extended.graph.output]
            outputs = dict(zip(names, session_of(extended).run(None, {INPUT_NAME: array}), strict=True))
            assert names == [OUTPUT_NAME, *(BLOCK_PREFIX + block for block in blocks)]
            for block, wanted in blocks.items():
                assert error(outputs[BLOCK_PREFIX + block], wanted.numpy()) <= TOLERANCE, block

    def test_interface_and_metadata(self, name: str) -> None:
        model = exported(name)
        size = SPECS[name].image_size
        assert [(i.name, shape_of(i)) for i in model.graph.input] == [(INPUT_NAME, ["batch", 3, size, size])]
        assert [(o.name, shape_of(o)) for o in model.graph.output] == [(OUTPUT_NAME, ["batch", 6])]
        assert {p.key: p.value for p in model.metadata_props} == {"one": "1", "two": "zwei"}
        onnx.checker.check_model(model, full_check=True)


class TestBatch:
    def test_a_dynamic_graph_has_no_batch_baked_in(self) -> None:
        """Larger than the example the graph was traced with, smaller, and the largest."""
        session = session_of(exported(SMALLEST))
        assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
        array = input_array(SMALLEST, MAX_BATCH)
        whole = session.run(None, {INPUT_NAME: array})[0]
        rows = [session.run(None, {INPUT_NAME: array[i : i + 1]})[0] for i in range(MAX_BATCH)]
        assert error(whole, np.concatenate(rows)) <= TOLERANCE

    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_fixed_graph_takes_that_batch_only(self, batch: int) -> None:
        model = exported(SMALLEST, batch=batch)
        assert shape_of(model.graph.input[0]) == [batch, 3, SIZE, SIZE]
        assert shape_of(model.graph.output[0]) == [batch, 6]
        array = input_array(SMALLEST, 4)
        assert error(run(model, array[:batch]), expected(SMALLEST, array[:batch])) <= TOLERANCE
        with pytest.raises(Exception, match="invalid dimensions"):
            run(model, array)

    def test_a_largest_batch_of_one_is_a_fixed_one(self) -> None:
        model = exported(SMALLEST, max_batch=1)
        assert shape_of(model.graph.input[0]) == [1, 3, SIZE, SIZE]


class TestPreprocessing:
    @pytest.fixture(scope="class")
    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)

    @pytest.mark.parametrize("order", ["RGB", "BGR"])
    def test_takes_pixels_and_gives_probabilities(self, pixels: np.ndarray, order: str) -> None:
        preprocessing = Preprocessing(PREPROCESSING.mean, PREPROCESSING.std, channel_order=order)
        model = exported(SMALLEST, preprocessing=preprocessing, softmax=True)
        (taken,) = model.graph.input
        assert (taken.name, taken.type.tensor_type.elem_type) == (INPUT_NAME, TensorProto.UINT8)
        assert shape_of(taken) == ["batch", SIZE, SIZE, 3]
        assert [o.name for o in model.graph.output] == [SOFTMAX_OUTPUT_NAME]
        planes = [
            (pixels[..., c].astype(np.float64) / 255 - PREPROCESSING.mean[c]) / PREPROCESSING.std[c] for c in range(3)
        ]
        images = np.stack(planes if order == "RGB" else planes[::-1], axis=1).astype(np.float32)
        np.testing.assert_allclose(images, normalize(pixels, preprocessing), rtol=1e-5, atol=1e-5)
        logits = expected(SMALLEST, images).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        result = run(model, pixels)
        assert error(result, weights / weights.sum(axis=1, keepdims=True)) <= TOLERANCE
        assert error(run(model, pixels[:1]), result[:1]) <= TOLERANCE

    def test_keeps_the_names_of_the_blocks(self) -> None:
        model = exported(SMALLEST, preprocessing=PREPROCESSING, softmax=True)
        assert marked_block_names(model.graph) == block_names(reference(SMALLEST))


class TestOpset:
    @pytest.mark.parametrize(("name", "opset"), [(SMALLEST, 18), (SMALLEST, 23), ("msra", 18)])
    def test_is_the_one_asked_for(self, name: str, opset: int) -> None:
        model = exported(name, opset=opset)
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", opset), (OPERATOR_DOMAIN, 1)}
        assert {(e.domain, e.version) for f in model.functions for e in f.opset_import} == {("", opset)}
        array = input_array(name, 3)
        assert error(run(model, array), expected(name, array)) <= TOLERANCE

    @pytest.mark.parametrize("opset", [0, 17, 24])
    def test_out_of_range_is_a_usage_error(self, opset: int) -> None:
        with pytest.raises(UsageError, match=f"opset {opset} is not supported: choose 18 to 23"):
            export_graph(reference(SMALLEST), SPECS[SMALLEST], opset=opset)


def test_an_export_leaves_the_module_the_log_and_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    fused = fused_model(reference(SMALLEST), SPECS[SMALLEST])
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    model = export_graph(fused, SPECS[SMALLEST], opset=20, max_batch=2)
    assert shape_of(model.graph.input[0])[0] == "batch"
    assert not model.metadata_props
    assert capfd.readouterr().out == ""
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    assert not any(module._forward_hooks for module in fused.modules())
    assert logging.getLogger("torch.onnx").level == level


def test_a_module_the_exporter_refuses_is_a_one_line_error(capfd: pytest.CaptureFixture[str]) -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).mean((2, 3))
            return x if x.sum() > 0 else -x

    model = Refused()
    with pytest.raises(ExportError, match=r"the PyTorch exporter refused msa-custom: .*data-dependent") as caught:
        export_graph(model, SPECS[SMALLEST], opset=20)
    assert str(caught.value).isprintable()  # one line, no colours
    assert not model.stem._forward_hooks
    assert capfd.readouterr().out == ""


class TestRemoveMarkers:
    """On graphs written by hand: the chain input -> a -> b -> logits of Identity nodes."""

    def graph(self, *markers: tuple[str, str, str]) -> onnx.GraphProto:
        """Markers (block, source, result) behind the nodes that make the sources; what follows reads the results."""
        latest = {"input": "input", "a": "a", "b": "b"}
        nodes = []
        for source, result in (("input", "a"), ("a", "b"), ("b", "logits")):
            nodes.append(helper.make_node("Identity", [latest[source]], [result], name=result))
            for block, marked, output in markers:
                if marked == result:
                    nodes.append(
                        helper.make_node("BlockOutput", [latest[marked]], [output], domain=OPERATOR_DOMAIN, block=block)
                    )
                    latest[marked] = output
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "logits")]
        return helper.make_graph(nodes, "chain", ends[:1], ends[1:], value_info=infos)

    def edges(self, graph: onnx.GraphProto) -> list[tuple[str, str]]:
        return [(node.input[0], node.output[0]) for node in graph.node]

    def test_a_block_takes_its_tensors_place(self) -> None:
        graph = self.graph(("one", "a", "m"))
        remove_markers(graph)
        assert self.edges(graph) == [("input", "block/one"), ("block/one", "b"), ("b", "logits")]
        assert marked_block_names(graph) == ["one"]
        assert [info.name for info in graph.value_info] == ["b"]

    def test_blocks_in_a_row(self) -> None:
        graph = self.graph(("one", "a", "m"), ("two", "b", "n"))
        remove_markers(graph)
        assert self.edges(graph) == [("input", "block/one"), ("block/one", "block/two"), ("block/two", "logits")]

    def test_of_two_blocks_with_one_tensor_the_first_names_it(self) -> None:
        graph = self.graph(("inner", "a", "m"), ("outer", "a", "n"))
        remove_markers(graph)
        assert self.edges(graph) == [("input", "block/inner"), ("block/inner", "b"), ("b", "logits")]

    def test_without_markers_nothing_changes(self) -> None:
        graph = self.graph()
        before = graph.SerializeToString()
        remove_markers(graph)
        assert graph.SerializeToString() == before
        assert marked_block_names(graph) == []


def test_an_exported_file_needs_nothing_of_ours(tmp_path: Path) -> None:
    """A process without this project in its path runs the file."""
    array = input_array("msra", 2)
    onnx.save(exported("msra"), tmp_path / "model.onnx")
    np.save(tmp_path / "input.npy", array)
    script = (
        "import json, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])\n"
        "print(json.dumps(session.run(None, {'input': numpy.load('input.npy')})[0].tolist()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert error(np.array(json.loads(done.stdout)), expected("msra", array)) <= TOLERANCE
