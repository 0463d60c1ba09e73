"""The runner of the fused model: on the CPU, where the operators compute their definitions, and on a GPU in a graph."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evit_deploy.backends import BACKENDS, BackendContext, find_backend, registry, resolve_backends
from evit_deploy.backends.registry import make_runner
from evit_deploy.bench.assemble import compare_outputs
from evit_deploy.bench.measure import make_states
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import LimitError, MissingDependencyError, RunnerError
from evit_deploy.models import load_model
from evit_deploy.models.fused import FusedLiteMLA, fused_model
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.parity.gate import TOLERANCES
from evit_deploy.runners import TensorSpec, TorchFusedRunner, fused_runner
from evit_deploy.runners.float32 import full_float32
from evit_deploy.runners.torch_fused import MAX_BATCH_SIZES, Precision
from evit_deploy.specs import ModelSpec, Preprocessing
from tests.small_exports import FAMILIES, SPECS, expected, input_array, reference
from tests.small_models import IMAGE_SIZE, SmallNet, random_images
from tests.tiers import tiered

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
FUSED = ("torch-fused", "torch-fused-fp16", "torch-fused-bf16")


def runner_of(name: str, device: str = "cpu", precision: Precision = "fp32", graph: bool = True) -> TorchFusedRunner:
    spec = SPECS[name]
    return TorchFusedRunner(
        lambda: fused_model(reference(name), spec),
        precision=precision,
        device=device,
        cuda_graph=graph,
        image_shape=spec.input_shape,
    )


def assert_parity(logits: np.ndarray, truth: np.ndarray, precision: str) -> None:
    result = compare_outputs({"logits": truth}, [{"logits": logits}], TOLERANCES[precision])
    assert result.passed, result


def mit_with_eps(eps: float) -> nn.Module:
    spec = SPECS["mit"]
    spec = replace(spec, config={**spec.config, "attention_eps": eps})
    fused = fused_model(load_model(spec, random_state_dict(spec, 0)), spec)
    assert {module.eps for module in fused.modules() if isinstance(module, FusedLiteMLA)} == {eps}
    return fused


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with real weights, and a graph that nobody here opens."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "m.evit", SPECS["msra"])


def write_bundle(path: Path, spec: ModelSpec, precision: str = "fp32") -> Bundle:
    onnx = {"opset": 20, "precision": precision, "dynamic_batch": True, "batch": None, "max_batch": 5}
    manifest = {"model": spec.to_json(), "preprocessing": Preprocessing().to_json(), "origin": {}, "onnx": onnx}
    with BundleWriter(path) as writer:
        (writer.path / "model.onnx").write_bytes(b"model")
        save_file(random_state_dict(spec, 0), writer.path / "weights.safetensors")
        return writer.commit(manifest)


def is_fast(name: str, precision: str) -> bool:
    """Every family in FP32; half precision, which CPUs emulate slowly, once each."""
    return (precision == "fp32" and name in FAMILIES) or (name, precision) in (("msra", "fp16"), ("msa", "bf16"))


class TestOnTheCpu:
    @pytest.mark.parametrize(("name", "precision"), tiered(product(SPECS, PRECISIONS), is_fast))
    def test_equals_the_reference(self, name: str, precision: Precision) -> None:
        with runner_of(name, precision=precision) as runner:
            assert runner.precision == precision
            for count in (3, 1):
                array = input_array(name, count)
                logits = runner.infer({"input": array})["logits"]
                assert logits.dtype == np.float32
                assert_parity(logits, expected(name, array), precision)

    def test_half_precision_is_half_precision(self) -> None:
        array = input_array("msa", 2)
        logits = {}
        for precision in PRECISIONS:
            with runner_of("msa", precision=precision) as runner:
                logits[precision] = runner.infer({"input": array})["logits"]
        for precision in ("fp16", "bf16"):
            with pytest.raises(AssertionError):
                assert_parity(logits[precision], logits["fp32"], "fp32")

    def test_names_and_specs(self) -> None:
        assert [runner_of("msa", precision=precision).name for precision in PRECISIONS] == list(FUSED)
        runner = runner_of("msa")
        assert runner.inputs == (TensorSpec("input", "float32", (None, 3, 40, 40)),)
        with runner:
            runner.infer({"input": input_array("msa", 1)})
            assert runner.outputs == (TensorSpec("logits", "float32", (None, 6)),)

    def test_construction_touches_nothing(self) -> None:
        def never() -> nn.Module:
            raise AssertionError

        assert TorchFusedRunner(never, device="cuda").precision == "unknown"
        with pytest.raises(ValueError, match="precision is one of fp32, fp16, bf16, got 'int8'"):
            TorchFusedRunner(never, precision="int8")  # type: ignore[arg-type]

    def test_deactivation_is_repeatable_and_activation_comes_back(self) -> None:
        runner = runner_of("mit")
        runner.deactivate()
        for _ in range(2):
            with runner:
                runner.infer({"input": input_array("mit", 1)})
            runner.deactivate()
        with pytest.raises(ValueError, match="not active"):
            runner.infer({"input": input_array("mit", 1)})

    def test_a_module_that_is_given_is_left_as_it_is(self) -> None:
        module = SmallNet().train()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with TorchFusedRunner(module, device="cpu", precision="fp16") as runner:
            runner.infer({"input": random_images(1)})
        assert module.training
        assert module.conv.weight.is_contiguous()
        for name, value in module.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])

    def test_read_only_and_strided_images(self) -> None:
        images = input_array("msra", 2)
        images.flags.writeable = False
        strided = np.repeat(images, 2, axis=0)[::2]
        with runner_of("msra") as runner:
            results = [runner.infer({"input": feed})["logits"] for feed in (images, strided)]
        np.testing.assert_array_equal(*results)

    @pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 16, 16), (0, 3, 16, 16)], ids=str)
    def test_a_feed_that_does_not_fit(self, shape: tuple[int, ...]) -> None:
        runner = TorchFusedRunner(SmallNet(), device="cpu", image_shape=(3, IMAGE_SIZE, IMAGE_SIZE))
        with runner, pytest.raises(RunnerError) as raised:
            runner.infer({"input": np.zeros(shape, np.float32)})
        assert raised.value.hint == "the model takes input float32[N,3,16,16]"

    @pytest.mark.parametrize(
        ("name", "operators"),
        [
            ("msa", ("projected_multi_scale_attention", "multi_scale_attention")),
            ("mit", ("lite_mla",)),
            ("msra", ("cascaded_attention",)),
        ],
    )
    def test_it_says_which_attention_is_no_kernel(
        self, name: str, operators: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        with runner_of(name) as runner, caplog.at_level(logging.INFO, logger="evit_deploy"):
            assert runner.plain_attention == ()
            for _ in range(2):
                runner.infer({"input": input_array(name, 1)})
        reasons = tuple(f"{operator}: kernels run on CUDA devices, got cpu" for operator in operators)
        assert runner.plain_attention == reasons
        assert [record.getMessage() for record in caplog.records] == [
            f"torch-fused: attention as plain PyTorch: {'; '.join(reasons)}"
        ]
        assert not runner.captured

    def test_a_module_without_attention_has_nothing_to_say(self) -> None:
        with TorchFusedRunner(SmallNet(), device="cpu") as runner:
            runner.infer({"input": random_images(1)})
        assert runner.plain_attention == ()

    def test_settings_of_the_process_neither_reach_it_nor_change(self) -> None:
        images = random_images(8)
        with TorchFusedRunner(SmallNet(), device="cpu") as runner:
            expected_logits = runner.infer({"input": images})["logits"]
            matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            benchmark = torch.backends.cudnn.benchmark
            torch.set_float32_matmul_precision("medium")
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = runner.infer({"input": images})["logits"]
                assert torch.get_float32_matmul_precision() == "medium"
            finally:
                torch.set_float32_matmul_precision(matmul)
        assert torch.backends.cudnn.allow_tf32 == cudnn
        assert torch.backends.cudnn.benchmark == benchmark
        np.testing.assert_array_equal(logits, expected_logits)


class TestFullFloat32:
    def test_it_is_full_inside_and_as_before_after(self) -> None:
        matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        try:
            with suppress(KeyError), full_float32():
                inside = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                raise KeyError
            assert inside == ("highest", False)
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cudnn.allow_tf32
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = convolutions

    @pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the old interface only")
    def test_a_process_that_uses_the_new_interface(self) -> None:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        before = matmul.fp32_precision, conv.fp32_precision
        matmul.fp32_precision = conv.fp32_precision = "tf32"
        try:
            with full_float32():
                assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


class TestErrors:
    @pytest.mark.parametrize(("eps", "precision"), [(1e-15, "fp32"), (1e-15, "bf16"), (1e-15, "fp16"), (1e-5, "fp16")])
    def test_an_eps_that_half_precision_does_not_have(self, eps: float, precision: Precision) -> None:
        with TorchFusedRunner(mit_with_eps(eps), precision=precision, device="cpu") as runner:
            assert np.isfinite(runner.infer({"input": input_array("mit", 2)})["logits"]).all()

    def test_a_weight_that_half_precision_does_not_have(self) -> None:
        module = SmallNet()
        with torch.no_grad():
            module.head.weight[0, 0] = 1e5
        with pytest.raises(RunnerError, match=r"head\.weight has 1e\+05, beyond the range of fp16"):
            TorchFusedRunner(module, precision="fp16", device="cpu").activate()
        TorchFusedRunner(module, precision="bf16", device="cpu").activate()

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(MissingDependencyError, match=r"torch-fused: PyTorch .*CUDA.*NVIDIA GPU"):
            TorchFusedRunner(SmallNet()).activate()

    def test_a_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(MissingDependencyError, match="there is no cuda:3: found 1 CUDA devices"):
            TorchFusedRunner(SmallNet(), device="cuda:3").activate()

    def test_another_kind_of_device(self) -> None:
        with pytest.raises(ValueError, match="device is cuda, cuda:N or cpu, got 'meta'"):
            TorchFusedRunner(SmallNet(), device="meta").activate()

    @pytest.mark.parametrize(
        ("message", "kind", "words"),
        [
            ("CUDA out of memory. Tried to allocate 2 GiB", LimitError, "out of memory: use a smaller batch"),
            ("DefaultCPUAllocator: can't allocate memory", LimitError, "out of memory: use a smaller batch"),
            ("an illegal\n memory access", RunnerError, r"input \[2, 3, 16, 16\]: an illegal memory access"),
        ],
    )
    def test_a_failing_inference(self, message: str, kind: type[Exception], words: str) -> None:
        class Failing(SmallNet):
            def forward(self, images: Tensor) -> Tensor:
                raise RuntimeError(message)

        with TorchFusedRunner(Failing(), device="cpu") as runner, pytest.raises(kind, match=words) as info:
            runner.infer({"input": random_images(2)})
        assert "\n" not in str(info.value)

    def test_a_module_of_two_outputs_is_refused(self) -> None:
        class Two(SmallNet):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images), images  # type: ignore[return-value]

        with (
            TorchFusedRunner(Two(), device="cpu") as runner,
            pytest.raises(RunnerError, match="returned tuple, expected one tensor"),
        ):
            runner.infer({"input": random_images(1)})


class TestArms:
    def test_without_a_gpu_they_stay_out_of_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "find_gpus", lambda: ())
        assert not set(FUSED) & {arm.name for arm in resolve_backends(None)}
        states, _ = make_states([find_backend("torch-eager"), *map(find_backend, FUSED)], [1], None)
        lost = {state.name: state.lost[1] for state in states if state.lost}
        assert set(lost) == set(FUSED)
        assert {(one.status, one.reason) for one in lost.values()} == {
            ("skipped", "there is no NVIDIA GPU with its driver: evit-deploy doctor")
        }

    def test_with_one_the_precision_of_the_bundle_is_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "find_gpus", lambda: ("a GPU",))
        assert [arm.name for arm in resolve_backends(None)][-1] == "torch-fused"
        assert [arm.name for arm in resolve_backends(FUSED)] == list(FUSED)

    @pytest.mark.parametrize(("arm", "precision"), zip(FUSED, PRECISIONS, strict=True))
    def test_they_make_the_runner_of_their_name(self, arm: str, precision: str, bundle: Bundle) -> None:
        runner = make_runner(BACKENDS[arm].factory, BackendContext(bundle, 1))
        assert isinstance(runner, TorchFusedRunner)
        assert (runner.name, runner._asked_precision, runner._device_name) == (arm, precision, "cuda")
        assert runner.inputs[0].shape == (None, *bundle.spec.input_shape)

    def test_a_bundle_decides_its_precision(self, tmp_path: Path) -> None:
        half = write_bundle(tmp_path / "half.evit", SPECS["msra"], precision="bf16")
        with fused_runner(half, device="cpu") as runner:
            assert (runner.name, runner.precision) == ("torch-fused-bf16", "bf16")

    def test_a_bundle_runs(self, bundle: Bundle) -> None:
        array = input_array("msra", 2)
        with fused_runner(bundle, device="cpu") as runner:
            assert_parity(runner.infer({"input": array})["logits"], expected("msra", array), "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("graph", [True, False], ids=["graph", "no-graph"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", SPECS)
    def test_equals_the_reference(self, name: str, precision: Precision, graph: bool) -> None:
        with runner_of(name, "cuda", precision, graph) as runner:
            for count in (3, 1, 3):
                array = input_array(name, count)
                assert_parity(runner.infer({"input": array})["logits"], expected(name, array), precision)
                assert runner.captured == graph
            assert runner.plain_attention == ()

    @pytest.mark.parametrize("name", SPECS)
    def test_a_graph_computes_what_the_same_forward_pass_does_without(self, name: str) -> None:
        array = input_array(name, 4)
        logits = []
        for graph in (True, False):
            with runner_of(name, "cuda", "fp32", graph) as runner:
                logits.append(runner.infer({"input": array})["logits"])
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5 * float(np.abs(logits[1]).max()))

    def test_every_replay_sees_its_own_images_and_gives_its_own_result(self) -> None:
        first, second = input_array("msra", 4)[:2], input_array("msra", 4)[2:]
        with runner_of("msra", "cuda") as runner:
            results = [runner.infer({"input": feed})["logits"] for feed in (first, second, first)]
        assert not np.array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])
        assert_parity(results[1], expected("msra", second), "fp32")

    def test_more_batch_sizes_than_are_kept(self) -> None:
        with runner_of("msra", "cuda") as runner:
            for count in (*range(1, MAX_BATCH_SIZES + 3), 1):
                array = input_array("msra", count)
                assert_parity(runner.infer({"input": array})["logits"], expected("msra", array), "fp32")
            assert len(runner._slots) == MAX_BATCH_SIZES

    def test_what_cannot_be_captured_runs_without_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        class Synchronizing(SmallNet):
            def forward(self, images: Tensor) -> Tensor:
                assert images.sum().item() == images.sum().item()
                return super().forward(images)

        images = random_images(2)
        with torch.inference_mode():
            truth = SmallNet()(torch.from_numpy(images)).numpy()
        with TorchFusedRunner(Synchronizing()) as runner, caplog.at_level(logging.WARNING, logger="evit_deploy"):
            for _ in range(2):
                assert_parity(runner.infer({"input": images})["logits"], truth, "fp32")
            assert not runner.captured
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("torch-fused: batch 2 runs without a CUDA graph: ")
        with runner_of("msra", "cuda") as after:  # nothing is left of the capture that failed
            array = input_array("msra", 1)
            assert_parity(after.infer({"input": array})["logits"], expected("msra", array), "fp32")
            assert after.captured

    def test_a_batch_that_does_not_fit_leaves_the_runner_usable(self) -> None:
        class Greedy(SmallNet):
            def forward(self, images: Tensor) -> Tensor:
                if len(images) > 1:
                    torch.empty(2**45, dtype=torch.uint8, device=images.device)
                return super().forward(images)

        with TorchFusedRunner(Greedy()) as runner:
            with pytest.raises(LimitError, match="out of memory"):
                runner.infer({"input": random_images(2)})
            assert runner.infer({"input": random_images(1)})["logits"].shape == (1, 10)
