"""`build-trt` and the TensorRT runner on a simulated machine with a data-centre GPU: real bindings, no TensorRT.

What is built and run stands in `tests.trtsim.running`. Nothing here computes: order and arguments of calls are tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.models.attention_calls import AttentionCall, attention_calls
from tests.small_exports import ATTENTION, FAMILIES, SPECS, input_array, run, simplified
from tests.tiers import tiered
from tests.tiny_bundle import tiny_manifest
from tests.trtsim.machine import ARCH, GPU
from tests.trtsim.running import BATCHES, PROFILES, run_in_child
from tests.trtsim.runtime import AUX_STREAMS
from tests.trtsim.setup import VERSIONS

pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only

MODEL = "msra"  # the attention layers of a cascade have weights, and heads of their own
# One batch size is prepared: profile, shapes, addresses; one execution without a graph; the capture.
SHAPES = ["setOptimizationProfileAsync", "synchronize", "setInputShape", "setTensorAddress", "getEngine", "inferShapes"]
SHAPES += ["getTensorShape", "setTensorAddress"]
FIRST = ["copy_in", "enqueueV3", "synchronize", "begin_capture", "enqueueV3", "end_capture"]
REPLAY = ["record", "copy_in", "record", "graph_launch", "record", "copy_out", "record", "synchronize"]

Results = dict[str, Any]


RUNS = [f"{version}-{form}" for version in VERSIONS for form in ("aot", "jit")]
FAST_RUNS = (RUNS[0], RUNS[-1])  # each version and each form


@pytest.fixture(scope="module", params=tiered(RUNS, FAST_RUNS.__contains__))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernel_folder: Path) -> Results:
    version, _, form = request.param.rpartition("-")
    folder, machine = tmp_path_factory.mktemp("bundles"), tmp_path_factory.mktemp("machine")
    with BundleWriter(folder / f"{MODEL}.evit") as writer:
        (writer.path / "model.onnx").write_bytes(simplified(MODEL)[0].SerializeToString())
        save_file({"head.bias": np.zeros(1, np.float32)}, writer.path / "weights.safetensors")
        writer.commit(tiny_manifest(model=SPECS[MODEL].to_json()))
    result = run_in_child(version, form, folder, machine, kernel_folder)[MODEL]
    assert "error" not in result, result["traceback"]
    return {**result, "form": form, "version": version}


@pytest.fixture(scope="module")
def attention() -> list[AttentionCall]:
    return attention_calls(SPECS[MODEL], torch.float32)


def methods(calls: list[Any], *, launches: bool = False) -> list[str]:
    """Names of the calls that every engine makes; on request, those that only plugins registered here make."""
    of_plugins = ("load", "launch", "setAuxStreams")
    return [method for _, method, _ in calls if launches or method not in of_plugins]


def arguments(calls: list[Any], method: str) -> list[Any]:
    return [given for _, called, given in calls if called == method]


def test_the_simulation_knew_every_call_and_nothing_in_it_failed(ran: Results) -> None:
    assert ran["unknown"] == []
    assert ran["faults"] == []


def test_the_record_says_what_was_built(ran: Results) -> None:
    record = ran["record"]
    assert (record["flavor"], record["tensorrt_version"]) == ("tensorrt", ran["version"])
    assert (record["gpu"], record["targets"]) == (GPU, [f"sm{ARCH}"])
    assert [tuple(profile.values()) for profile in record["profiles"]] == list(PROFILES)
    plugin = record["plugin"]
    assert (plugin["used"], plugin["form"], plugin["layers"]) == (True, ran["form"], len(ATTENTION[MODEL]))
    assert plugin["op_types"] == {name: ATTENTION[MODEL].count(name) for name in ATTENTION[MODEL]}
    assert sum(layer["type"] == "PluginV3" for layer in record["layers"]) == len(ATTENTION[MODEL])
    assert record["warnings"] == []


def test_the_same_engine_is_built_once(ran: Results) -> None:
    assert ran["reused"] == [False, True]


def test_outputs_have_the_shape_of_the_batch_and_come_from_the_device(ran: Results) -> None:
    assert [inference["shapes"] for inference in ran["inferences"]] == [
        {"logits": [batch, SPECS[MODEL].num_classes]} for batch in BATCHES
    ]
    assert [inference["sums"] for inference in ran["inferences"]] == [{"logits": 0.0}] * len(BATCHES)


def test_a_new_batch_size_runs_once_before_it_is_captured(ran: Results) -> None:
    for inference in (ran["inferences"][0], ran["inferences"][2]):
        assert methods(inference["calls"]) == [*SHAPES, *FIRST, *REPLAY]
        assert inference["captured"] is True
    assert ran["fallback"] == ""


def test_a_known_batch_size_only_replays_its_graph(ran: Results) -> None:
    assert methods(ran["inferences"][1]["calls"], launches=True) == REPLAY


def test_each_batch_uses_a_profile_that_takes_it(ran: Results) -> None:
    chosen = [arguments(inference["calls"], "setOptimizationProfileAsync") for inference in ran["inferences"]]
    assert [[index for index, _ in calls] for calls in chosen] == [[0], [], [1]]
    shapes = [arguments(inference["calls"], "setInputShape") for inference in ran["inferences"]]
    size = list(SPECS[MODEL].input_shape)
    assert shapes == [[["input", [2, *size]]], [], [["input", [7, *size]]]]


def test_everything_is_put_into_one_stream_that_is_not_the_default(ran: Results) -> None:
    last = ("copy_in", "copy_out", "enqueueV3", "record", "graph_launch", "begin_capture", "launch", "synchronize")
    streams = {
        given[-1] for inference in ran["inferences"] for name in last for given in arguments(inference["calls"], name)
    }
    assert len(streams) == 1
    assert streams != {0}


def test_tensorrt_reads_and_writes_where_the_copies_go(ran: Results) -> None:
    for inference in (ran["inferences"][0], ran["inferences"][2]):
        calls = inference["calls"]
        addresses = dict(arguments(calls, "setTensorAddress"))
        assert {target for target, _ in arguments(calls, "copy_in")} == {addresses["input"]}
        assert {source for source, _ in arguments(calls, "copy_out")} == {addresses["logits"]}
        assert addresses["input"] != addresses["logits"]


def test_times_are_those_between_the_events(ran: Results) -> None:
    assert [inference["timings"] for inference in ran["inferences"]] == [
        "Timings(h2d=1.5, compute=1.5, d2h=1.5)"
    ] * len(BATCHES)


def test_plugins_launch_each_layers_kernel_also_inside_the_graph(ran: Results, attention: list[AttentionCall]) -> None:
    for inference in (ran["inferences"][0], ran["inferences"][2]):
        launches = arguments(inference["calls"], "launch")
        if ran["form"] == "aot":
            assert launches == []
            continue
        expected = [
            (call.launch.kernel.partition(":")[2], inference["batch"] * call.launch.programs_per_image)
            for call in attention
        ]
        assert [(entry, grid) for entry, grid, _, _ in launches] == expected * 2
        assert launches[: len(expected)] == launches[len(expected) :], "a graph's addresses are those of before"
        for (_, _, given, _), call in zip(launches, [*attention, *attention], strict=True):
            assert given[len(call.launch.inputs) : -1] == list(call.launch.extras.values())


def test_kernels_are_loaded_before_anything_runs(ran: Results, attention: list[AttentionCall]) -> None:
    names = [methods(inference["calls"], launches=True) for inference in ran["inferences"]]
    distinct = {call.launch.kernel + repr(call.launch.constants) for call in attention}
    expected = len(distinct) if ran["form"] == "jit" else 0
    assert names[0].count("load") == expected
    assert names[0][:expected] == ["load"] * expected
    assert [name.count("load") for name in names[1:]] == [0, 0]


def test_plugins_get_streams_that_can_be_launched_on(ran: Results) -> None:
    counts = [[count for _, count in arguments(inference["calls"], "setAuxStreams")] for inference in ran["inferences"]]
    assert counts == ([[AUX_STREAMS], [], [AUX_STREAMS]] if ran["form"] == "jit" else [[], [], []])


def test_a_batch_outside_every_profile_is_refused(ran: Results) -> None:
    kind, text = ran["outside"]
    assert kind == "RunnerError"
    assert "batch 9 is outside every profile" in text
    assert "evit-deploy build-trt --batch 9" in text


def test_a_failing_plugin_is_an_error_with_its_reason_and_the_runner_goes_on(ran: Results) -> None:
    assert ran["recovered"] is True
    if ran["form"] == "aot":
        assert ran["failing"] is None, "nothing of ours runs then"
        return
    kind, text = ran["failing"]
    assert kind == "RunnerError"
    assert "a planted launch failure" in text


def test_everything_is_given_back(ran: Results) -> None:
    assert ran["left"] == []


# The same file in another runtime


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_runtime_ignores_what_asks_for_the_plugin(family: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(simplified(family)[0])
    asking = [
        (node, attribute)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name in ("plugin_namespace", "plugin_version")
    ]
    assert len(asking) == 2 * len(ATTENTION[family])
    for node, attribute in asking:
        node.attribute.remove(attribute)
    array = input_array(family, 3)
    assert np.array_equal(run(model, array), run(simplified(family)[0], array))
