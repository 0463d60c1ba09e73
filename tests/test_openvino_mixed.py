"""Mixed precision in OpenVINO: which layers stay in FP32, that they do, and that it is more accurate than BF16."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import openvino
import pytest

from evit_deploy.environment import cpu_isa
from evit_deploy.errors import RunnerError
from evit_deploy.runners import openvino_mixed as module
from evit_deploy.runners.openvino import OpenVinoRunner, shared_core
from evit_deploy.runners.openvino_graph import prepare_graph
from evit_deploy.runners.openvino_mixed import MIXED_NOTE, keep_in_fp32, mark_layers
from evit_deploy.runners.openvino_products import convolve_last_product
from tests.small_exports import FAMILIES, error, expected, exported, input_array
from tests.small_models import small_graph
from tests.tiers import tiered

needs_bf16 = pytest.mark.skipif(not cpu_isa()["bf16"], reason="this CPU has no BF16")


def description_of(model: onnx.ModelProto, folder: Path) -> ElementTree.Element:
    """A graph as OpenVINO describes it."""
    network = shared_core().read_model(prepare_graph(copy.deepcopy(model))[0].SerializeToString())
    openvino.serialize(network, folder / "network.xml", folder / "network.bin")
    return ElementTree.parse(folder / "network.xml").getroot()


def kept_layers(family: str, folder: Path) -> int:
    """How many layers with weights are to stay in FP32, the classifier one of them."""
    model = copy.deepcopy(exported(family))
    convolve_last_product(model.graph)
    tree = description_of(model, folder)
    kinds = {layer.get("name"): layer.get("type") for layer in tree.iterfind("layers/layer")}
    return sum(kinds[name] in ("Convolution", "GroupConvolution", "MatMul") for name in mark_layers(tree))


def sums_and_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """The names of a graph's sums of two maps, each with how many values of one image it makes."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.output)}
    weights = {weight.name for weight in inferred.initializer}
    return {
        node.name: math.prod(size.dim_value for size in shapes[node.output[0]][1:])
        for node in inferred.node
        if node.op_type == "Add" and not weights & set(node.input)
    }


def logits_in(model: onnx.ModelProto, array: np.ndarray, precision: str) -> np.ndarray:
    with OpenVinoRunner(model.SerializeToString(), precision=precision, threads=1) as runner:  # type: ignore[arg-type]
        logits: np.ndarray = runner.infer({"input": array})["logits"]
    return logits


class TestLayers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_stays_in_fp32(self, family: str, tmp_path: Path) -> None:
        tree = description_of(exported(family), tmp_path)
        kinds = {layer.get("name"): layer.get("type") for layer in tree.iterfind("layers/layer")}
        names = mark_layers(tree)
        kept = {kinds[name] for name in names}
        assert names[0] == "input"
        assert [kinds[name] for name in names].count("Convolution") == 1
        assert ("GroupConvolution" in kept, "Sigmoid" in kept) == (family == "msra", family == "msra")
        assert "logits" in names
        sizes = sums_and_sizes(exported(family))
        small = sorted(set(sizes.values()))[: 2 if family == "msra" else 0]
        assert all((name in names) == (size in small) for name, size in sizes.items())
        assert len(small) < len(set(sizes.values()))
        marked = tree.findall("layers/layer/rt_info/attribute[@name='precise']")
        assert len(marked) == len(names) < len(kinds)
        first = [kinds[name] for name in names].index("Convolution")
        plain = tree.findall("layers/layer/rt_info/attribute[@name='primitives_priority']/../..")
        assert [layer.get("name") for layer in plain] == [names[first]]

    def test_sums_between_heads_do_not_stay_in_fp32(self, tmp_path: Path) -> None:
        tree = description_of(exported("msra"), tmp_path)
        layers = {layer.get("name", "") for layer in tree.iterfind("layers/layer")}
        between = {name for name in layers if name.startswith("cascade_")}
        assert between
        assert between.isdisjoint(mark_layers(tree))

    def test_a_network_without_convolution_and_mean(self) -> None:
        tree = ElementTree.fromstring(
            "<net><layers><layer id='0' name='x' type='Parameter'/><layer id='1' name='y' type='ReLU'/>"
            "<layer id='2' name='r' type='Result'/></layers><edges><edge from-layer='0' to-layer='1'/>"
            "<edge from-layer='1' to-layer='2'/></edges></net>"
        )
        assert mark_layers(tree) == []


class TestComputed:
    @needs_bf16
    @pytest.mark.parametrize("family", tiered(FAMILIES, "msra".__eq__))
    def test_it_is_more_accurate_than_bf16(self, family: str) -> None:
        array = input_array(family, 64)
        wanted = expected(family, array).reshape(1, -1)  # one row: of 64 rows' errors the RMS, not the worst
        mixed, low = (
            error(logits_in(exported(family), array, precision).reshape(1, -1), wanted)
            for precision in ("mixed", "bf16")
        )
        assert 1e-4 < mixed < low

    @needs_bf16
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_it_says_of_itself(self, family: str, tmp_path: Path) -> None:
        with OpenVinoRunner(exported(family).SerializeToString(), precision="mixed", threads=1) as runner:
            assert runner.infer({"input": input_array(family, 3)})["logits"].dtype == np.float32
        assert (runner.name, runner.precision, runner.graph_precision) == ("openvino-mixed", "bf16", "bf16")
        assert runner.executed.keys() == {"bf16", "f32"}
        assert runner.executed["f32"] == kept_layers(family, tmp_path) < runner.executed["bf16"]
        assert MIXED_NOTE in runner.notes
        assert not any("every layer in BF16" in note for note in runner.notes)

    @needs_bf16
    def test_an_openvino_that_ignores_the_marks_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "mark_layers", lambda tree: [])
        runner = OpenVinoRunner(exported("msra").SerializeToString(), precision="mixed", threads=1)
        with pytest.raises(RunnerError, match="asked for BF16 and FP32, OpenVINO takes bf16"):
            runner.activate()
        assert runner._network is None

    @needs_bf16
    @pytest.mark.parametrize("name", ["primitives_priority", "of_no_meaning"])
    def test_the_image_is_reordered_only_without_the_mark(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(module._PLAIN_INPUT, "name", name)
        with OpenVinoRunner(exported("msra").SerializeToString(), precision="mixed", threads=1) as runner:
            nodes = [node.get_rt_info() for node in runner._compile(1).model.get_runtime_model().get_ordered_ops()]
        kinds = [node["layerType"].value for node in nodes]
        assert ("Reorder" in kinds[: kinds.index("Convolution")]) == (name == "of_no_meaning")

    @needs_bf16
    def test_a_cpu_without_code_for_the_image_as_it_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        array = input_array("msra", 3)
        before = logits_in(exported("msra"), array, "mixed")
        monkeypatch.setitem(module._PLAIN_INPUT, "value", "cpu:brgconv_avx512_amx")
        assert error(logits_in(exported("msra"), array, "mixed"), before) < 1e-2

    def test_a_graph_that_is_not_fp32(self) -> None:
        runner = OpenVinoRunner(small_graph(dtype=np.float16), precision="mixed", threads=1)
        with pytest.raises(RunnerError, match="openvino-mixed runs FP32 graphs, and this one is fp16"):
            runner.activate()

    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        network = shared_core().read_model(small_graph())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        with pytest.raises(RunnerError, match=r"cannot be written to .*none: ") as caught:
            keep_in_fp32(shared_core(), network, "openvino-mixed")
        assert caught.value.hint == "free some space there, or set TMPDIR"

    def test_nothing_is_left_in_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        network = shared_core().read_model(small_graph())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert keep_in_fp32(shared_core(), network, "openvino-mixed").inputs[0].any_name == "input"
        assert list(tmp_path.iterdir()) == []
