"""OpenVINO behind the runner contract: what it computes, in which precision it really does, and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evit_deploy.environment import cpu_isa
from evit_deploy.errors import MissingDependencyError, RunnerError
from evit_deploy.runners import OnnxRuntimeRunner, TensorSpec
from evit_deploy.runners import openvino as module
from evit_deploy.runners.base import Runner
from evit_deploy.runners.openvino import MAX_BATCH_SIZES, WIDENED_NOTE, OpenVinoRunner, Precision
from evit_deploy.runners.openvino_graph import prepare_graph
from tests.small_exports import FAMILIES, error, expected, exported, input_array
from tests.small_models import CLASSES, IMAGE_SIZE, random_images, small_graph

HAS_BF16 = cpu_isa()["bf16"]
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no BF16")
INLINED = "OpenVINO does not inline functions: it was given the graph with them inlined"


def reference_logits(graph: bytes, images: np.ndarray) -> np.ndarray:
    with OnnxRuntimeRunner(graph, threads=1) as runner:
        logits: np.ndarray = runner.infer({"input": images})["logits"]
    return logits


def as_bf16(data: bytes) -> bytes:
    """The graph with BF16 weights and activations, FP32 outside."""
    model = onnx.load_model_from_string(data)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    nodes = model.graph.node
    nodes[0].input[0], nodes[-1].output[0] = "low_input", "low_logits"
    nodes.insert(0, helper.make_node("Cast", ["input"], ["low_input"], to=TensorProto.BFLOAT16))
    nodes.append(helper.make_node("Cast", ["low_logits"], ["logits"], to=TensorProto.FLOAT))
    result: bytes = model.SerializeToString()
    return result


def quantized(data: bytes) -> bytes:
    """The graph with a quantized convolution: Q/DQ on its input, DQ on its weights."""
    model = onnx.load_model_from_string(data)
    graph = model.graph
    weights = {w.name: w for w in graph.initializer}
    values = numpy_helper.to_array(weights["conv.weight"])
    scale = np.abs(values).reshape(len(values), -1).max(axis=1) / 127
    low = np.rint(values / scale[:, None, None, None]).astype(np.int8)
    graph.initializer.remove(weights["conv.weight"])
    graph.initializer.extend(
        [
            numpy_helper.from_array(low, "low"),
            numpy_helper.from_array(scale.astype(np.float32), "low_scale"),
            numpy_helper.from_array(np.zeros(len(values), np.int8), "low_zero"),
            numpy_helper.from_array(np.float32(4 / 127), "in_scale"),
            numpy_helper.from_array(np.int8(0), "in_zero"),
        ]
    )
    conv = next(node for node in graph.node if node.op_type == "Conv")
    conv.input[0], conv.input[1] = "restored", "conv.weight"
    for node in (
        helper.make_node("DequantizeLinear", ["low", "low_scale", "low_zero"], ["conv.weight"], axis=0),
        helper.make_node("DequantizeLinear", ["quantized", "in_scale", "in_zero"], ["restored"]),
        helper.make_node("QuantizeLinear", ["input", "in_scale", "in_zero"], ["quantized"]),
    ):
        graph.node.insert(0, node)
    result: bytes = model.SerializeToString()
    return result


class TestPrecision:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_fp32_is_fp32(self, family: str) -> None:
        images = input_array(family, 3)
        with OpenVinoRunner(exported(family).SerializeToString(), threads=1) as runner:
            logits = runner.infer({"input": images})["logits"]
        assert error(logits, expected(family, images)) < 2e-5
        assert (runner.precision, runner.graph_precision) == ("fp32", "fp32")
        assert set(runner.executed) == {"f32"}
        assert runner.notes == (INLINED,)

    @needs_bf16
    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_fp32_graph_in_bf16(self, family: str) -> None:
        images = input_array(family, 3)
        with OpenVinoRunner(exported(family).SerializeToString(), precision="bf16", threads=1) as runner:
            logits = runner.infer({"input": images})["logits"]
        assert 1e-4 < error(logits, expected(family, images)) < 1e-1
        assert (runner.name, runner.precision, runner.graph_precision) == ("openvino-bf16", "bf16", "bf16")
        assert set(runner.executed) == {"bf16"}
        assert any("every layer in BF16, the attention too" in note for note in runner.notes)

    @needs_bf16
    def test_a_bf16_graph(self) -> None:
        images = random_images(2)
        with OpenVinoRunner(as_bf16(small_graph()), threads=1) as runner:
            logits = runner.infer({"input": images})["logits"]
        assert 1e-4 < error(logits, reference_logits(small_graph(), images)) < 2e-2
        assert (runner.name, runner.precision, runner.graph_precision) == ("openvino", "bf16", "bf16")

    def test_an_fp16_graph_with_fp16_tensors_outside(self) -> None:
        images = random_images(2)
        with OpenVinoRunner(small_graph(dtype=np.float16), threads=1) as runner:
            logits = runner.infer({"input": images.astype(np.float16)})["logits"]
            assert runner.inputs[0].dtype == "float16"
        assert logits.dtype == np.float16
        assert error(logits, reference_logits(small_graph(), images)) < 5e-3
        assert (runner.precision, runner.graph_precision) == ("fp32", "fp16")
        assert runner.notes == (WIDENED_NOTE,)

    def test_a_quantized_graph_runs_in_int8(self) -> None:
        images = random_images(2)
        with OpenVinoRunner(quantized(small_graph()), threads=1) as runner:
            logits = runner.infer({"input": images})["logits"]
        assert error(logits, reference_logits(small_graph(), images)) < 5e-2
        assert runner.graph_precision == "int8"
        assert "i8" in "".join(runner.executed) or "u8" in "".join(runner.executed)

    def test_signed_and_unsigned_inputs_are_one_precision(self) -> None:
        assert module._computed_precision({"f32": 30, "i8": 20, "u8": 15}, 0) == "int8"
        assert module._computed_precision({"f32": 3, "u8": 2}, 0) == "fp32"
        assert module._computed_precision({}, 0) == "unknown"

    def test_layers_that_are_to_stay_in_fp32_do_not_count(self) -> None:
        assert module._computed_precision({"f32": 90, "u8": 67}, 67) == "int8"
        assert module._computed_precision({"f32": 90, "u8": 33}, 67) == "fp32"
        assert module._computed_precision({"f32": 157}, 67) == "fp32"
        assert module._computed_precision({"bf16": 157}, 67) == "bf16"

    def test_the_products_of_the_attention_do_not_count(self) -> None:
        """`msra` has more of them than layers with weights, and INT8 graphs have them in FP32."""
        nodes = prepare_graph(copy.deepcopy(exported("msra")))[0].graph.node
        products = [node for node in nodes if node.op_type == "MatMul"]
        layers = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
        with OpenVinoRunner(exported("msra").SerializeToString(), threads=1) as runner:
            assert products
            assert sum(runner.executed.values()) == len(layers)

    def test_the_hint_is_never_left_to_openvino(self) -> None:
        with OpenVinoRunner(small_graph(), threads=1) as runner:
            (compiled,) = runner._compiled.values()
            assert compiled.model.get_property("INFERENCE_PRECISION_HINT").get_type_name() in ("f32", "float32")
            assert compiled.model.get_property("INFERENCE_NUM_THREADS") == 1
            assert compiled.model.get_property("NUM_STREAMS") == 1

    @needs_bf16
    def test_a_hint_that_openvino_changes_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As it does with FP16 on a CPU without FP16: it computes in BF16."""
        core = module.shared_core()

        class Core:
            def compile_model(self, network: Any, device: str, config: dict[str, Any]) -> Any:
                return core.compile_model(network, device, config | {"INFERENCE_PRECISION_HINT": "bf16"})

            def __getattr__(self, attribute: str) -> Any:
                return getattr(core, attribute)

        monkeypatch.setattr(module, "shared_core", Core)
        runner = OpenVinoRunner(small_graph(), threads=1)
        with pytest.raises(RunnerError, match="asked for f32, OpenVINO takes bf"):
            runner.activate()
        with pytest.raises(ValueError, match="not active"):
            runner.infer({"input": random_images(1)})

    @pytest.mark.parametrize(
        ("make", "precision"), [(lambda: as_bf16(small_graph()), None), (small_graph, "bf16")], ids=["graph", "asked"]
    )
    def test_bf16_on_a_cpu_without(
        self, make: Callable[[], bytes], precision: Precision | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without_capability(monkeypatch, "BF16")
        with pytest.raises(
            MissingDependencyError, match=r"this CPU has no BF16, OpenVINO finds FP32, (FP16, )?INT8:"
        ) as raised:
            OpenVinoRunner(make(), precision=precision).activate()
        assert "\n" not in str(raised.value)

    def test_bf16_is_for_fp32_graphs(self) -> None:
        with pytest.raises(RunnerError, match="runs FP32 graphs, and this one is fp16: name backend openvino"):
            OpenVinoRunner(small_graph(dtype=np.float16), precision="bf16").activate()


class TestContract:
    def test_specs_and_batches(self) -> None:
        images = random_images(MAX_BATCH_SIZES + 2)
        truth = reference_logits(small_graph(), images)
        with OpenVinoRunner(small_graph(), threads=1) as runner:
            assert runner.inputs == (TensorSpec("input", "float32", (None, 3, IMAGE_SIZE, IMAGE_SIZE)),)
            assert runner.outputs == (TensorSpec("logits", "float32", (None, CLASSES)),)
            for rows in (*range(1, MAX_BATCH_SIZES + 3), 1):
                logits = runner.infer({"input": images[:rows]})["logits"]
                np.testing.assert_allclose(logits, truth[:rows], rtol=1e-4, atol=1e-5)
            assert len(runner._compiled) == MAX_BATCH_SIZES

    def test_a_call_does_not_ask_openvino_for_shapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = random_images(1)
        with OpenVinoRunner(small_graph(), threads=1) as runner:
            runner.infer({"input": images})
            monkeypatch.setattr(module, "_tensor_spec", None)  # asking takes longer than many a layer
            runner.infer({"input": images})
            assert [spec.name for spec in (*runner.inputs, *runner.outputs)] == ["input", "logits"]

    def test_a_result_is_not_overwritten_by_the_next(self) -> None:
        first, second = random_images(2), random_images(2, seed=1)
        with OpenVinoRunner(small_graph(), threads=1) as runner:
            kept = runner.infer({"input": first})["logits"]
            copy = kept.copy()
            runner.infer({"input": second})
        np.testing.assert_array_equal(kept, copy)

    @pytest.mark.parametrize(("threads", "rows", "streams"), [(2, 4, 2), (2, 3, 1), (4, 6, 2), (1, 4, 1)])
    def test_a_batch_is_divided_among_streams(self, threads: int, rows: int, streams: int) -> None:
        """Evenly, and the rows come back in their order."""
        images, others = random_images(rows), random_images(rows, seed=1)
        with OpenVinoRunner(small_graph(), threads=threads) as runner:
            kept = runner.infer({"input": images})["logits"]
            logits = runner.infer({"input": others})["logits"]
            assert len(runner._compiled[rows].requests) == streams
        np.testing.assert_allclose(kept, reference_logits(small_graph(), images), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits, reference_logits(small_graph(), others), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fault", ["start", "wait"])
    def test_no_stream_runs_on_when_another_fails(self, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They read the caller's arrays."""
        requests = FakeRequest(), FakeRequest(fault), FakeRequest()
        with OpenVinoRunner(small_graph(), threads=3) as runner:
            runner.infer({"input": random_images(3)})
            monkeypatch.setattr(runner, "_last_requests", requests)
            with pytest.raises(RunnerError, match=r"inference failed with input \[3, .*: out of luck"):
                runner.infer({"input": random_images(3)})
        assert not any(request.runs for request in requests)
        assert requests[0].was_started

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("kind", ["strided", "read-only", "columns first", "unaligned"])
    def test_images_that_cannot_be_shared(self, kind: str, threads: int) -> None:
        images = random_images(2)
        wanted = reference_logits(small_graph(), images)
        if kind == "strided":
            images = np.repeat(images, 2, axis=0)[::2]
        elif kind == "read-only":
            images.flags.writeable = False
        elif kind == "unaligned":
            images = np.frombuffer(bytearray(1 + images.nbytes), np.uint8)[1:].view(np.float32).reshape(images.shape)
            images[:] = random_images(2)
        else:
            images = np.asfortranarray(images)
        assert not images.flags.carray
        with OpenVinoRunner(small_graph(), threads=threads) as runner:
            logits = runner.infer({"input": images})["logits"]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)

    def test_arrays_are_checked_however_the_last_ones_were(self) -> None:
        images = random_images(2)
        with OpenVinoRunner(small_graph(), threads=1) as runner:
            with pytest.raises(RunnerError, match="inputs are named"):
                runner.infer({})
            for _ in range(2):
                runner.infer({"input": images})
                for wrong, message in (
                    ({"image": images}, "inputs are named"),
                    ({"input": images, "other": images}, "inputs are named"),
                    ({"input": images.astype(np.float64)}, "dtype float64"),
                    ({"input": images[:, :2]}, "shape"),
                    ({"input": images.tolist()}, "no NumPy array"),
                    ({}, "inputs are named"),
                ):
                    with pytest.raises(RunnerError, match=message):
                        runner.infer(wrong)  # type: ignore[arg-type]
            assert runner.infer({"input": images[:1]})["logits"].shape[0] == 1

    def test_a_fixed_batch(self) -> None:
        images = random_images(2)
        with OpenVinoRunner(small_graph(batch=2), threads=1) as runner:
            assert runner.inputs[0].shape[0] == 2
            logits = runner.infer({"input": images})["logits"]
            with pytest.raises(RunnerError, match="shape"):
                runner.infer({"input": random_images(3)})
        np.testing.assert_allclose(logits, reference_logits(small_graph(), images), rtol=1e-4, atol=1e-5)

    def test_pixels_and_softmax(self) -> None:
        graph = small_graph(pixels=((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)), softmax=True, output="probabilities")
        pixels = np.random.default_rng(0).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        with OpenVinoRunner(graph, threads=1) as runner, OnnxRuntimeRunner(graph, threads=1) as other:
            assert runner.inputs[0].dtype == "uint8"
            got, truth = (one.infer({"input": pixels})["probabilities"] for one in (runner, other))
        np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-6)

    def test_activation_comes_back_and_deactivation_is_repeatable(self) -> None:
        runner: Runner = OpenVinoRunner(small_graph(), threads=1)
        runner.deactivate()
        for _ in range(2):
            with runner:
                runner.infer({"input": random_images(1)})
            runner.deactivate()
        with pytest.raises(ValueError, match="not active"):
            runner.infer({"input": random_images(1)})

    @pytest.mark.parametrize("model", [b"", b"no graph at all", "absent.onnx"], ids=["empty", "text", "absent"])
    def test_what_is_no_graph_is_one_line(self, model: bytes | str) -> None:
        with pytest.raises(RunnerError, match=r"not an ONNX file|no such file") as raised:
            OpenVinoRunner(model).activate()
        assert "\n" not in str(raised.value)

    def test_an_unknown_operator_is_named(self) -> None:
        model = onnx.load_model_from_string(small_graph())
        model.graph.node[1].op_type = "Nonsense"
        with pytest.raises(RunnerError, match=r"cannot be loaded: .*Nonsense") as raised:
            OpenVinoRunner(model.SerializeToString()).activate()
        assert "\n" not in str(raised.value)
        assert "src/" not in str(raised.value)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(MissingDependencyError, match=r"OpenVINO is not installed: .* openvino"):
            OpenVinoRunner(small_graph()).activate()


class FakeRequest:
    """An asynchronous request that runs until it is waited for, and fails at `fault`."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.runs, self.was_started = fault, False, False

    def set_tensor(self, name: str, tensor: Any) -> None:
        assert (name, tensor.shape[0]) == ("input", 1)

    def start_async(self) -> None:
        if self.fault == "start":
            raise RuntimeError("out of luck")
        self.runs = self.was_started = True

    def wait(self) -> None:
        self.runs = False
        if self.fault == "wait":
            raise RuntimeError("out of luck")


def without_capability(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """OpenVINO finds a CPU without a type."""
    core = module.shared_core()

    class Core:
        def get_property(self, device: str, key: str) -> Any:
            found = core.get_property(device, key)
            return [one for one in found if one != name] if key == "OPTIMIZATION_CAPABILITIES" else found

        def __getattr__(self, attribute: str) -> Any:
            return getattr(core, attribute)

    monkeypatch.setattr(module, "shared_core", Core)


INTERRUPTED = """
import faulthandler, signal, sys, threading
faulthandler.enable()
from evit_deploy.runners.openvino import OpenVinoRunner
from tests.small_models import small_graph
first, second = (OpenVinoRunner(small_graph(), threads=1) for _ in range(2))
first.activate()
second.activate()
first.deactivate()
second.deactivate()
signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
"""


def test_an_interrupt_after_two_runners_is_an_interrupt(child_environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr, done.stderr[-2000:]
