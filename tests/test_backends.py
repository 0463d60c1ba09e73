"""The registry of backends: names to runners, what a machine or a bundle rules out, and what ONNX Runtime is told."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evit_deploy import api
from evit_deploy.backends import BACKENDS, VERIFY, Backend, BackendContext, backend_runner, registry, resolve_backends
from evit_deploy.backends.factories import make_onnxruntime
from evit_deploy.bench.assemble import Subject, check_parity
from evit_deploy.bench.measure import UNCHECKED_ON_RANDOM, make_states, run_bench
from evit_deploy.bench.plan import Effort
from evit_deploy.bench.state import ArmState
from evit_deploy.bundle import Bundle
from evit_deploy.errors import MissingDependencyError, RunnerError, UsageError
from evit_deploy.runners import OnnxRuntimeRunner, ort
from evit_deploy.runners.openvino import OpenVinoRunner
from evit_deploy.runners.ort import CPU, CUDA, TENSORRT_PROVIDER, provider_options
from tests.small_models import random_images, small_graph

ON_THE_CPU = ["onnxruntime", "openvino", "openvino-bf16", "openvino-mixed"]


def with_precision(bundle: Bundle, precision: str) -> Bundle:
    """The bundle, its manifest with another precision of the graph."""
    changed = copy.copy(bundle)
    changed.manifest = {**bundle.manifest, "onnx": {**bundle.manifest["onnx"], "precision": precision}}
    return changed


class TestRunners:
    @pytest.mark.parametrize("name", ON_THE_CPU)
    def test_a_name_gives_a_runner_of_that_name(self, name: str, digits_bundle: Bundle) -> None:
        runner = backend_runner(digits_bundle, name, threads=1)
        assert runner.name == name

    def test_the_graph_is_the_one_of_the_manifest(self, digits_bundle: Bundle) -> None:
        checked = make_onnxruntime(BackendContext(digits_bundle, 1))
        measured = make_onnxruntime(BackendContext(digits_bundle, 1, measured=True))
        assert isinstance(checked, OnnxRuntimeRunner)
        assert isinstance(measured, OnnxRuntimeRunner)
        assert (checked._model, checked._memory_pattern) == (digits_bundle.read_onnx(), False)
        assert (measured._model, measured._memory_pattern) == (digits_bundle.onnx_path, True)

    def test_an_unknown_name_has_the_closest(self, digits_bundle: Bundle) -> None:
        with pytest.raises(UsageError, match="unknown backend 'openvin': did you mean 'openvino'"):
            backend_runner(digits_bundle, "openvin")

    def test_an_engine_is_for_one_backend(self, digits_bundle: Bundle) -> None:
        with pytest.raises(UsageError, match="an engine is given, and no backend runs it: openvino"):
            backend_runner(digits_bundle, "openvino", engine="e")

    def test_without_an_engine_there_is_nothing_to_run(self, digits_bundle: Bundle) -> None:
        with pytest.raises(MissingDependencyError, match="tensorrt cannot run: "):
            backend_runner(digits_bundle, "tensorrt")

    def test_bf16_of_a_graph_that_is_not_fp32(self, digits_bundle: Bundle) -> None:
        with pytest.raises(UsageError, match="does not run this bundle: its graph is fp16, and FP32 is needed"):
            backend_runner(with_precision(digits_bundle, "fp16"), "openvino-bf16")

    def test_bf16_of_a_cpu_without_it_is_a_row_that_says_so(
        self, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "cpu_isa", lambda: {"bf16": False})
        (backend,) = resolve_backends(["openvino-bf16"], digits_bundle)
        states, _ = make_states([backend], [1], None, digits_bundle)
        assert states[0].lost[1].status == "skipped"
        assert states[0].lost[1].reason.startswith("this CPU has no BF16 (avx512_bf16 or amx_bf16)")

    def test_a_bundle_that_does_not_fit_is_a_row_that_says_so(
        self, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "cpu_isa", lambda: {"bf16": True})
        half = with_precision(digits_bundle, "bf16")
        states, _ = make_states(resolve_backends(["openvino-bf16"], half), [1], None, half)
        assert states[0].lost[1].reason == "its graph is bf16, and FP32 is needed"


class TestVerify:
    def test_what_it_takes(self) -> None:
        assert set(ON_THE_CPU) < set(VERIFY)
        assert not {"torch-eager", "torch-compile", "tensorrt"} & set(VERIFY)

    def test_openvino_passes_at_the_graphs_tolerance(self, digits_bundle: Bundle) -> None:
        report = api.verify(digits_bundle, backend="openvino", batches=(1, 3), threads=1)
        assert (report.verdict, report.candidate, report.executed_precision) == ("pass", "openvino", "fp32")
        assert report.tolerance.precision == "fp32"
        assert any("does not inline functions" in note for note in report.notes)

    @pytest.mark.skipif(BACKENDS["openvino-bf16"].why_not() is not None, reason="this CPU has no BF16")
    @pytest.mark.parametrize("backend", ["openvino-bf16", "openvino-mixed"])
    def test_bf16_is_judged_by_its_own_tolerance_or_the_given_one(self, backend: str, digits_bundle: Bundle) -> None:
        def verify(tolerance: float | None = None) -> Any:
            return api.verify(digits_bundle, backend=backend, batches=(3,), threads=1, tolerance=tolerance)

        report = verify()
        assert (report.verdict, report.executed_precision, report.tolerance.precision) == ("pass", "bf16", "bf16")
        assert verify(1e-5).verdict == "fail"

    def test_a_provider_that_is_not_here_leaves_it_unverified(self, digits_bundle: Bundle) -> None:
        report = api.verify(digits_bundle, backend="onnxruntime-cuda", batches=(1,))
        assert (report.verdict, report.exit_code) == ("unverified", 4)
        assert "has no CUDAExecutionProvider" in report.summary()


class FakeSession:
    """What ONNX Runtime makes: it has the providers that it is said to have."""

    def __init__(self, asked: dict[str, Any], got: list[str]) -> None:
        self.asked, self._got = asked, got

    def get_providers(self) -> list[str]:
        return self._got


class TestProviders:
    @pytest.fixture
    def runtime(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """ONNX Runtime with both providers; `got` is what a session really has."""
        import onnxruntime

        fake = SimpleNamespace(got=None, sessions=[])

        def session(source: Any, options: Any, *, providers: list[str], provider_options: Any) -> FakeSession:
            made = FakeSession({"providers": providers, "options": provider_options}, fake.got or providers)
            fake.sessions.append(made)
            return made

        module = SimpleNamespace(
            get_available_providers=lambda: [TENSORRT_PROVIDER, CUDA, CPU],
            SessionOptions=onnxruntime.SessionOptions,
            GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
            InferenceSession=session,
        )
        monkeypatch.setattr(ort, "_import_onnxruntime", lambda: module)
        return fake

    @pytest.mark.parametrize(
        ("name", "providers"),
        [("onnxruntime-cuda", [CUDA, CPU]), ("onnxruntime-tensorrt", [TENSORRT_PROVIDER, CUDA, CPU])],
    )
    def test_they_are_asked_for_in_order_and_say_that_they_are_unproven(
        self, name: str, providers: list[str], digits_bundle: Bundle, runtime: SimpleNamespace
    ) -> None:
        runner = backend_runner(digits_bundle, name)
        runner.activate()
        (session,) = runtime.sessions
        assert session.asked["providers"] == providers
        assert session.asked["options"][providers.index(CUDA)] == {"use_tf32": "0"}
        assert runner.notes == (ort._UNPROVEN,)

    @pytest.mark.parametrize("got", [[CPU], [CUDA, CPU]])
    def test_a_provider_that_did_not_start_is_an_error(self, got: list[str], runtime: SimpleNamespace) -> None:
        runtime.got = got
        runner = OnnxRuntimeRunner(small_graph(), name="trt", providers=(TENSORRT_PROVIDER, CUDA, CPU))
        with pytest.raises(RunnerError, match="a provider failed to start"):
            runner.activate()
        with pytest.raises(ValueError, match="not active"):
            runner.infer({"input": random_images(1)})

    def test_tensorrt_is_allowed_the_graphs_own_precision_only(self, runtime: SimpleNamespace) -> None:
        allowed = {
            precision: provider_options(TENSORRT_PROVIDER, precision) for precision in ("fp32", "fp16", "bf16", "int8")
        }
        assert allowed == {
            "fp32": {},
            "fp16": {"trt_fp16_enable": "1"},
            "bf16": {"trt_bf16_enable": "1"},
            "int8": {"trt_int8_enable": "1"},
        }
        with OnnxRuntimeRunner(small_graph(dtype=np.float16), providers=(TENSORRT_PROVIDER, CUDA, CPU)) as runner:
            assert (runner.graph_precision, runner.precision) == ("fp16", "fp16")
        assert runtime.sessions[0].asked["options"][0] == {"trt_fp16_enable": "1"}

    def test_without_a_gpu_onnxruntime_is_not_even_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "find_gpus", lambda: ())
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
        for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
            requirement = BACKENDS[name].requirement
            assert requirement is not None
            assert requirement() == "there is no NVIDIA GPU with its driver: evit-deploy doctor"

    def test_with_a_gpu_the_provider_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(registry, "find_gpus", lambda: ("a GPU",))
        assert "this ONNX Runtime has no CUDAExecutionProvider" in (BACKENDS["onnxruntime-cuda"].why_not() or "")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        assert BACKENDS["onnxruntime-cuda"].why_not() is None
        assert "onnxruntime-cuda" in {backend.name for backend in resolve_backends(None)}
        assert "onnxruntime-tensorrt" not in {backend.name for backend in resolve_backends(None)}


class TestBench:
    @pytest.mark.exhaustive
    def test_given_images_are_run(self, digits_bundle: Bundle, tmp_path: Any) -> None:
        path = tmp_path / "images.npy"
        size = digits_bundle.spec.image_size
        np.save(path, np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32))
        report = run_bench(
            digits_bundle,
            inputs=path,
            batches=(2,),
            backends=["openvino"],
            threads=1,
            duration_s=120.0,
            effort=Effort(target_processes=2, max_rounds=1, min_round_s=0.0, warmup_s=0.0),
        )
        row = report.rows[0]
        assert (row.status, row.precision) == ("ok", "fp32")
        assert row.parity is not None
        assert row.parity.passed
        assert report.protocol["inputs"] == "images.npy"

    def test_an_int8_graph_is_not_judged_on_random_images(self, tmp_path: Any) -> None:
        path = tmp_path / "o.npz"
        logits = np.random.default_rng(0).standard_normal((1, 10)).astype(np.float32)
        np.savez(path, logits=logits)
        states = [
            ArmState(name, Backend(name, "", "m:f"), graph_precision="int8", outputs={1: [path]})
            for name in ("quantized", "reference")
        ]
        judged = check_parity(*states, 1, Subject([1], 1, "0" * 64, 0))
        assert judged is not None
        assert judged.passed
        unjudged = check_parity(*states, 1, Subject([1], 1, "0" * 64, 0, unchecked=UNCHECKED_ON_RANDOM))
        assert unjudged is not None
        assert unjudged.passed is None
        assert "give some like its own with --input" in unjudged.reason


def test_openvino_is_the_runner_of_both(digits_bundle: Bundle) -> None:
    for name, precision in (("openvino", None), ("openvino-bf16", "bf16"), ("openvino-mixed", "mixed")):
        runner = backend_runner(digits_bundle, name, threads=3)
        assert isinstance(runner, OpenVinoRunner)
        assert (runner._asked_precision, runner._threads) == (precision, 3)
