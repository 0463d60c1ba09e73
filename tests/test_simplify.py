"""Simplifying: what onnxsim made is compared, kept when equal, and refused with the reason when not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from evit_deploy.errors import MissingDependencyError
from evit_deploy.onnx.simplify import CHECKS_PER_BATCH, Simplification, simplify_graph
from evit_deploy.specs import Preprocessing
from tests.small_exports import changed, error, exported, input_array, run, simplified

NAME = "msa-resized"
BIAS = "model.head.bias"
Fault = Callable[[onnx.ModelProto], onnx.ModelProto]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Let onnxsim return its result with a fault in it."""
    import onnxsim

    simplify = onnxsim.simplify
    monkeypatch.setattr(onnxsim, "simplify", lambda model, **options: (fault(simplify(model, **options)[0]), True))


@pytest.mark.parametrize("name", ["msa", "mit", "msra"])
def test_an_equal_graph_is_kept_and_the_checks_recorded(name: str) -> None:
    model, record = simplified(name)
    nodes = (len(exported(name).graph.node), len(model.graph.node))
    assert record == Simplification(True, "", CHECKS_PER_BATCH, (1, 3), *nodes)
    assert CHECKS_PER_BATCH >= 3
    assert record.to_json() == {
        "applied": True,
        "reason": "",
        "checks": CHECKS_PER_BATCH,
        "batches": [1, 3],
        "nodes_before": nodes[0],
        "nodes_after": nodes[1],
    }
    assert json.loads(json.dumps(record.to_json())) == record.to_json()
    array = input_array(name, 4)
    assert error(run(model, array), run(exported(name), array)) <= 2e-5


def test_the_given_graph_and_what_identifies_it_stay() -> None:
    model = exported(NAME)
    before = model.SerializeToString()
    result, _ = simplify_graph(model, (1, 2))
    assert model.SerializeToString() == before
    assert {p.key: p.value for p in result.metadata_props} == {"one": "1", "two": "zwei"}
    assert [f.name for f in result.functions] == [f.name for f in model.functions]
    assert result.graph.input[0].type == model.graph.input[0].type
    assert result.graph.output[0].type == model.graph.output[0].type
    assert result.opset_import[0].version == 20


def test_something_is_simplified() -> None:
    """Two nodes that do nothing are there before and not after."""
    model = onnx.ModelProto()
    model.CopyFrom(exported(NAME))
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Identity", ["before"], ["between"]))
    model.graph.node.append(onnx.helper.make_node("Identity", ["between"], ["logits"]))
    result, record = simplify_graph(model, (2,))
    assert record.applied
    assert record.nodes_before == len(model.graph.node)
    assert "Identity" not in [node.op_type for node in result.graph.node]


def test_nothing_on_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    simplify_graph(exported(NAME), (1, 2))
    plant(monkeypatch, lambda model: changed(model, BIAS, lambda bias: bias + 1))
    simplify_graph(exported(NAME), (1, 2))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("size", [1e-3, 1.0, float("nan")])
def test_a_changed_weight_is_found(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    plant(monkeypatch, lambda model: changed(model, BIAS, lambda bias: bias + np.float32(size)))
    model = exported(NAME)
    result, record = simplify_graph(model, (2, 3))
    nodes = len(model.graph.node)
    assert result is model
    assert record == Simplification(False, "its outputs differ at batch 2", nodes_before=nodes, nodes_after=nodes)
    assert record.to_json()["checks"] == 0


def test_a_fault_of_larger_batches_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row becomes the first: one image alone does not show it."""

    def repeat_first_row(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.node[-1].output[0] = "rows"
        zero = onnx.numpy_helper.from_array(np.array([0], np.int64), "zero")
        one = onnx.numpy_helper.from_array(np.array([1], np.int64), "one")
        model.graph.initializer.extend([zero, one])
        model.graph.node.extend(
            [
                onnx.helper.make_node("Slice", ["rows", "zero", "one", "zero"], ["first"]),
                onnx.helper.make_node("Shape", ["rows"], ["shape"]),
                onnx.helper.make_node("Expand", ["first", "shape"], ["logits"]),
            ]
        )
        return model

    plant(monkeypatch, repeat_first_row)
    assert simplify_graph(exported(NAME), (1,))[1].applied
    _, record = simplify_graph(exported(NAME), (1, 3))
    assert (record.applied, record.reason) == (False, "its outputs differ at batch 3")


def test_a_batch_baked_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def bake(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.node[-1].output[0] = "rows"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 6], np.int64), "baked"))
        model.graph.node.append(onnx.helper.make_node("Reshape", ["rows", "baked"], ["logits"]))
        return model

    plant(monkeypatch, bake)
    _, record = simplify_graph(exported(NAME), (1, 3))
    assert not record.applied
    assert record.reason.startswith("comparing at batch 3 failed: ")
    assert "\n" not in record.reason


@pytest.mark.parametrize("change", ["renamed", "doubled", "retyped"])
def test_another_interface_is_found(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    def alter(model: onnx.ModelProto) -> onnx.ModelProto:
        if change == "doubled":
            model.graph.node.append(onnx.helper.make_node("Neg", ["logits"], ["more"]))
            model.graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch", 6]))
        elif change == "renamed":
            model.graph.node[-1].output[0] = model.graph.output[0].name = "result"
        else:
            model.graph.node[-1].output[0] = "single"
            double = onnx.TensorProto.DOUBLE
            model.graph.node.append(onnx.helper.make_node("Cast", ["single"], ["logits"], to=double))
            model.graph.output[0].type.tensor_type.elem_type = double
        return model

    plant(monkeypatch, alter)
    _, record = simplify_graph(exported(NAME), (1,))
    assert (record.applied, record.reason) == (False, "its inputs or outputs differ")


def test_pixels_are_compared_on_more_than_black(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(NAME, preprocessing=Preprocessing())
    assert simplify_graph(model, (1, 2))[1].applied
    name = next(t.name for t in model.graph.initializer if t.name.endswith("scale"))
    plant(monkeypatch, lambda graph: changed(graph, name, lambda scale: scale * np.float32(1.1)))
    _, record = simplify_graph(model, (1, 2))
    assert (record.applied, record.reason) == (False, "its outputs differ at batch 1")


def test_onnxsim_giving_up_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: onnx.ModelProto, **options: object) -> None:
        raise RuntimeError("no schema for Foo\nand a second line")

    monkeypatch.setattr("onnxsim.simplify", fail)
    model = exported(NAME)
    result, record = simplify_graph(model, (1,))
    assert result is model
    assert (record.applied, record.reason) == (False, "onnxsim failed: no schema for Foo")


def test_no_batch_to_compare_at_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at one batch size at least"):
        simplify_graph(exported(NAME), ())


def test_a_missing_onnxsim_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    with pytest.raises(
        MissingDependencyError, match=r"onnxsim is not installed: pip install onnxsim, or --no-simplify"
    ):
        simplify_graph(exported(NAME), (1,))
