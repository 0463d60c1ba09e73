from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from evit_deploy.errors import MissingDependencyError, RunnerError
from evit_deploy.models import build_model
from evit_deploy.runners import OnnxRuntimeRunner, TensorSpec, TorchRunner, reference_runner
from evit_deploy.specs import ModelSpec
from tests.small_models import CLASSES, IMAGE_SIZE, SmallNet, random_images, save, small_graph


def expected_logits(images: np.ndarray, seed: int = 0) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = SmallNet(seed)(torch.tensor(images)).numpy()
    return logits


class TestOnnxRuntimeRunner:
    def test_infers_what_the_module_does(self):
        images = random_images(3)
        with OnnxRuntimeRunner(small_graph(), threads=1) as runner:
            outputs = runner.infer({"input": images})
        assert list(outputs) == ["logits"]
        np.testing.assert_allclose(outputs["logits"], expected_logits(images), rtol=1e-4, atol=1e-5)

    def test_a_path_and_its_specs(self, tmp_path: Path):
        (tmp_path / "m.onnx").write_bytes(small_graph())
        with OnnxRuntimeRunner(tmp_path / "m.onnx") as runner:
            assert runner.inputs == (TensorSpec("input", "float32", (None, 3, IMAGE_SIZE, IMAGE_SIZE)),)
            assert runner.outputs == (TensorSpec("logits", "float32", (None, CLASSES)),)

    def test_construction_touches_nothing(self, tmp_path: Path):
        OnnxRuntimeRunner(tmp_path / "absent.onnx", providers=("NoSuchProvider",))

    def test_deactivation_is_repeatable_and_activation_comes_back(self):
        runner = OnnxRuntimeRunner(small_graph())
        runner.deactivate()
        for _ in range(2):
            with runner:
                runner.infer({"input": random_images(1)})
            runner.deactivate()
        with pytest.raises(ValueError, match="not active"):
            runner.infer({"input": random_images(1)})

    def test_the_optimizations_can_be_off(self):
        with OnnxRuntimeRunner(small_graph(), graph_optimization=False) as runner:
            assert runner.infer({"input": random_images(2)})["logits"].shape == (2, CLASSES)

    @pytest.mark.parametrize(
        ("feed", "words"),
        [
            ({"image": random_images(1)}, r"inputs are named \['input'\], got \['image'\]"),
            ({}, r"got \[\]"),
            ({"input": random_images(1).astype(np.float64)}, "has dtype float64"),
            ({"input": random_images(1)[:, :, :8]}, r"has shape \[1, 3, 8, 16\]"),
            ({"input": random_images(1)[0]}, r"has shape \[3, 16, 16\]"),
            ({"input": random_images(0)}, r"is empty"),
            ({"input": [1.0]}, "is no NumPy array"),
        ],
        ids=["name", "none", "dtype", "shape", "rank", "empty", "list"],
    )
    def test_a_feed_that_does_not_fit_says_what_does(self, feed, words: str):
        with OnnxRuntimeRunner(small_graph()) as runner, pytest.raises(RunnerError, match=words) as raised:
            runner.infer(feed)
        assert raised.value.hint == "the model takes input float32[N,3,16,16]"

    def test_a_fixed_batch_is_named(self):
        with OnnxRuntimeRunner(small_graph(batch=2)) as runner, pytest.raises(RunnerError) as raised:
            runner.infer({"input": random_images(3)})
        assert "input float32[2,3,16,16]" in raised.value.hint

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "cannot be loaded|not an ONNX file"), (b"no graph at all", "not an ONNX file"), (None, "no such file")],
        ids=["empty", "text", "absent"],
    )
    def test_a_file_that_is_no_graph(self, tmp_path: Path, content: bytes | None, words: str):
        path = tmp_path / "m.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RunnerError, match=words) as raised:
            OnnxRuntimeRunner(path).activate()
        assert "\n" not in str(raised.value)

    def test_an_unknown_operator_is_named_with_its_node(self):
        node = helper.make_node("Nonsense", ["x"], ["y"], name="the_culprit")
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 10]) for name in ("x", "y")]
        graph = save(helper.make_graph([node], "broken", values[:1], values[1:]))
        with pytest.raises(RunnerError, match="Nonsense") as raised:
            OnnxRuntimeRunner(graph).activate()
        assert "\n" not in str(raised.value)

    def test_a_failing_inference_names_node_and_shapes(self):
        shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 12])
        node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="batch_baked_in")
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 12]), ("y", [1, 12]))]
        graph = save(helper.make_graph([node], "baked", values[:1], values[1:], [shape]))
        with OnnxRuntimeRunner(graph) as runner:
            runner.infer({"x": np.zeros((1, 12), np.float32)})
            with pytest.raises(RunnerError, match=r"x \[2, 12\].*batch_baked_in"):
                runner.infer({"x": np.zeros((2, 12), np.float32)})

    def test_an_absent_provider_is_no_silent_fallback(self):
        runner = OnnxRuntimeRunner(small_graph(), providers=("TensorrtExecutionProvider", "CPUExecutionProvider"))
        with pytest.raises(MissingDependencyError, match="has no TensorrtExecutionProvider"):
            runner.activate()

    @pytest.mark.parametrize(
        ("dtype", "graph_precision", "precision"), [(np.float32, "fp32", "fp32"), (np.float16, "fp16", "fp32")]
    )
    def test_precision_of_the_graph_and_of_what_runs(self, dtype, graph_precision: str, precision: str):
        with OnnxRuntimeRunner(small_graph(dtype=dtype)) as runner:
            assert (runner.graph_precision, runner.precision) == (graph_precision, precision)

    def test_a_quantized_graph_is_int8(self):
        model = onnx.load_from_string(small_graph())
        model.graph.initializer.extend(
            [
                helper.make_tensor("scale", TensorProto.FLOAT, [], [0.02]),
                helper.make_tensor("zero", TensorProto.UINT8, [], [128]),
            ]
        )
        model.graph.node[0].input[0] = "restored"
        quantize = helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["quantized"])
        restore = helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["restored"])
        model.graph.node.insert(0, restore)
        model.graph.node.insert(0, quantize)
        with OnnxRuntimeRunner(model.SerializeToString()) as runner:
            assert runner.precision == "int8"

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]):
        node = helper.make_node("Nonsense", ["x"], ["y"])
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 10]) for name in ("x", "y")]
        with pytest.raises(RunnerError):
            OnnxRuntimeRunner(save(helper.make_graph([node], "broken", values[:1], values[1:]))).activate()
        with OnnxRuntimeRunner(small_graph(dtype=np.float16)) as runner:
            runner.infer({"input": random_images(1).astype(np.float16)})
        assert capfd.readouterr() == ("", "")


class TestTorchRunner:
    def test_infers_what_the_module_does(self):
        images = random_images(3)
        with TorchRunner(SmallNet()) as runner:
            outputs = runner.infer({"input": images})
        np.testing.assert_array_equal(outputs["logits"], expected_logits(images))
        assert (runner.name, runner.precision) == ("torch-eager", "fp32")

    def test_a_module_can_be_built_on_activation(self):
        built: list[int] = []

        def build() -> nn.Module:
            built.append(1)
            return SmallNet()

        runner = TorchRunner(build)
        assert built == []
        with runner:
            runner.infer({"input": random_images(1)})
        assert built == [1]

    def test_threads_and_training_mode_are_restored(self):
        module = SmallNet().train()
        before = torch.get_num_threads()
        with TorchRunner(module, threads=before + 1):
            assert torch.get_num_threads() == before + 1
            assert not module.training
        assert torch.get_num_threads() == before
        assert module.training

    def test_read_only_and_strided_images(self):
        images = random_images(2)
        images.flags.writeable = False
        strided = np.repeat(images, 2, axis=0)[::2]
        with TorchRunner(SmallNet()) as runner:
            for feed in (images, strided):
                np.testing.assert_array_equal(runner.infer({"input": feed})["logits"], expected_logits(images))

    def test_channels_last_changes_the_layout_only(self):
        module, images = SmallNet(), random_images(2)
        with TorchRunner(module, channels_last=True) as runner:
            np.testing.assert_allclose(runner.infer({"input": images})["logits"], expected_logits(images), rtol=1e-4)
        assert module.conv.weight.is_contiguous()

    def test_softmax_and_its_name(self):
        with TorchRunner(SmallNet(), softmax=True) as runner:
            outputs = runner.infer({"input": random_images(2)})
            assert runner.outputs == (TensorSpec("probabilities", "float32", (None, CLASSES)),)
        np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1.0, rtol=1e-6)

    @pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
    def test_half_precision_modules_take_and_give_float32(self, dtype: torch.dtype, precision: str):
        with TorchRunner(SmallNet().to(dtype)) as runner:
            assert runner.precision == precision
            assert runner.infer({"input": random_images(1)})["logits"].dtype == np.float32

    def test_autocast_and_matmul_precision_of_the_caller_do_not_reach_it(self):
        images = random_images(8)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), TorchRunner(SmallNet()) as runner:
                logits = runner.infer({"input": images})["logits"]
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        np.testing.assert_array_equal(logits, expected_logits(images))

    @pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 16, 16), (0, 3, 16, 16)])
    def test_a_fixed_image_shape_is_checked(self, shape: tuple[int, ...]):
        runner = TorchRunner(SmallNet(), image_shape=(3, IMAGE_SIZE, IMAGE_SIZE))
        with runner, pytest.raises(RunnerError) as raised:
            runner.infer({"input": np.zeros(shape, np.float32)})
        assert raised.value.hint == "the model takes input float32[N,3,16,16]"

    def test_a_failing_module_is_a_runner_error_of_one_line(self):
        with TorchRunner(SmallNet()) as runner, pytest.raises(RunnerError, match=r"input \[1, 3, 8, 8\]") as raised:
            runner.infer({"input": np.zeros((1, 3, 8, 8), np.float32)})
        assert "\n" not in str(raised.value)

    def test_a_module_of_two_outputs_is_refused(self):
        class Two(SmallNet):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return super().forward(images), images  # type: ignore[return-value]

        with TorchRunner(Two()) as runner, pytest.raises(RunnerError, match="returned tuple, expected one tensor"):
            runner.infer({"input": random_images(1)})

    def test_an_unknown_mode(self):
        with pytest.raises(ValueError, match="'eager' or 'compile'"):
            TorchRunner(SmallNet(), mode="script")  # type: ignore[arg-type]

    def test_compiled_equals_eager(self):
        images = random_images(2)
        with TorchRunner(SmallNet(), mode="compile", threads=1) as runner:
            runner.warm_up({"input": images})
            logits = runner.infer({"input": images})["logits"]
        assert runner.name == "torch-compile"
        np.testing.assert_allclose(logits, expected_logits(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.exhaustive
    def test_no_compiler_is_a_missing_dependency(self, tmp_path: Path):
        program = (
            "from evit_deploy.runners import TorchRunner\n"
            "from evit_deploy.errors import MissingDependencyError\n"
            "from tests.small_models import SmallNet, random_images\n"
            "with TorchRunner(SmallNet(), mode='compile') as runner:\n"
            "    try:\n"
            "        runner.warm_up({'input': random_images(1)})\n"
            "    except MissingDependencyError as error:\n"
            "        print(error)\n"
        )
        root = Path(__file__).parent.parent
        environment = {
            "PATH": str(tmp_path),
            "CXX": "/no/such/compiler",
            "HOME": str(tmp_path),
            "USER": "nobody",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": f"{root}:{root / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert "needs a C++ compiler and found none: install g++" in done.stdout


class TestReferenceRunner:
    spec = ModelSpec(
        "msa",
        "custom",
        num_classes=5,
        image_size=32,
        config={
            "channels": (8, 8, 16, 16, 16),
            "depths": (1, 1, 1, 1, 1),
            "num_heads": 2,
            "pos_embed_size": (8, 8),
        },
    )

    @pytest.mark.parametrize("softmax", [False, True])
    def test_it_is_the_module_with_the_bundles_weights(self, softmax: bool):
        torch.manual_seed(0)
        module = build_model(self.spec)
        bundle = SimpleNamespace(spec=self.spec, load_state_dict=module.state_dict)
        images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
        with torch.inference_mode():
            wanted = module(torch.from_numpy(images))
            wanted = wanted.softmax(-1) if softmax else wanted
        with reference_runner(bundle, softmax=softmax) as runner:  # type: ignore[arg-type]
            assert runner.inputs[0].shape == (None, 3, 32, 32)
            outputs = runner.infer({"input": images})
        np.testing.assert_array_equal(outputs["probabilities" if softmax else "logits"], wanted.numpy())


def test_importing_the_package_imports_no_runtime():
    program = (
        "import sys, evit_deploy.runners; print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
