"""Engines in `verify`, `bench` and `inspect`: where nothing can run them, and on a device that stands in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from jsonschema import ValidationError

from evit_deploy import api
from evit_deploy.backends import (
    BACKENDS,
    TENSORRT,
    TRANSFERS_INCLUDED,
    Backend,
    BackendContext,
    deployable_backends,
    find_backend,
    registry,
    resolve_backends,
)
from evit_deploy.backends.registry import make_runner
from evit_deploy.bench.measure import describe_transfers, make_states
from evit_deploy.bench.process import WorkerProcess, WorkerSettings
from evit_deploy.bundle import Bundle
from evit_deploy.environment import Gpu, find_gpus
from evit_deploy.errors import BundleError, RunnerError, UsageError
from evit_deploy.runners import OnnxRuntimeRunner, engines, tensorrt
from evit_deploy.runners.engines import batches_of, check_batches, choose_engine, why_not_batch
from evit_deploy.runners.tensorrt import TensorRtRunner
from evit_deploy.trt import BuildOptions, EngineRecord, build_engine
from evit_deploy.trt.profiles import parse_profiles
from tests.engine_files import NO_PLUGIN, write_engine
from tests.fake_device import FakeDevice
from tests.fake_trt import VERSION, FakeTrt
from tests.in_process import cli
from tests.test_schemas import check

NOT_RUN = "built, not run: no GPU"
IO = [
    {"name": "input", "mode": "input", "dtype": "float32", "shape": [None, 3, 32, 32]},
    {"name": "logits", "mode": "output", "dtype": "float32", "shape": [None, 10]},
]


@pytest.fixture(scope="module")
def no_gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (engines, tensorrt, registry):
            patch.setattr(module, "find_gpus", lambda: ())
        yield


@pytest.fixture(scope="module")
def built(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, EngineRecord]:
    """A bundle with an engine that TensorRT for RTX really built."""
    path = tmp_path_factory.mktemp("built") / "digits.evit"
    shutil.copytree(digits_bundle.path, path)
    bundle = Bundle.open(path)
    options = BuildOptions(flavor="rtx", plugin="off", targets=("sm89",), profiles=parse_profiles(["1:4:8"]))
    return bundle, build_engine(bundle, options).record


@pytest.fixture
def bundle(digits_bundle: Bundle, tmp_path: Path) -> Bundle:
    path = tmp_path / "digits.evit"
    shutil.copytree(digits_bundle.path, path)
    return Bundle.open(path)


def add_engine(bundle: Bundle, **changes: Any) -> EngineRecord:
    return write_engine(bundle.path / "engines", bundle=bundle, **{"io": IO, **changes})


@pytest.mark.usefixtures("no_gpu")
class TestARealEngineWithoutAGpu:
    def test_verify_proves_nothing_and_says_why(self, built: tuple[Bundle, EngineRecord], tmp_path: Path) -> None:
        bundle, record = built
        done = cli("verify", bundle.path, "--engine", record.name, "--json", "--junit", tmp_path / "report.xml")
        assert done.code == 4
        assert NOT_RUN in done.error
        document = json.loads(done.out)
        check(document)
        assert document["verdict"] == "unverified"
        assert document["candidate"] == "tensorrt"
        assert document["subject"]["engine"] == record.name
        assert document["subject"]["engine_sha256"] == record.engine_sha256
        assert [(row["status"], row["reason"], row["passed"]) for row in document["rows"]] == [
            ("unverified", NOT_RUN, False)
        ]
        suite = ElementTree.parse(tmp_path / "report.xml").getroot()
        assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
            "tests": "1",
            "failures": "0",
            "errors": "1",
        }
        (error,) = suite.iter("error")
        assert (error.get("message"), error.get("type")) == (NOT_RUN, "unverified")

    @pytest.mark.parametrize("form", ["name", "engine", "json"])
    def test_it_is_named_or_pointed_at(self, built: tuple[Bundle, EngineRecord], form: str) -> None:
        bundle, record = built
        engine = {"name": record.name, "engine": record.engine_path, "json": record.path}[form]
        report = api.verify(bundle, engine=engine, batches=[2])
        assert (report.verdict, report.exit_code, report.reasons) == ("unverified", 4, (NOT_RUN,))

    @pytest.mark.skipif(bool(find_gpus()), reason="TensorRT would load it, for a GPU that stands in")
    def test_tensorrt_itself_refuses_it_without_a_driver(self, built: tuple[Bundle, EngineRecord]) -> None:
        bundle, record = built
        device = FakeDevice()
        runner = TensorRtRunner(record, read_onnx=bundle.read_onnx, open_device=lambda: device)
        with pytest.raises(RunnerError, match=r"TensorRT did not load the engine; its last message: .*CUDA driver"):
            runner.activate()
        assert (device.calls, device.live) == (["push", "pop"], set())

    def test_inspect_knows_it(self, built: tuple[Bundle, EngineRecord]) -> None:
        bundle, record = built
        for path in (record.engine_path, bundle.path):
            done = cli("inspect", path, "--json")
            assert done.code == 0
            document = json.loads(done.out)
            check(document)
            for key in document.keys() - {"schema", "kind"}:
                with pytest.raises(ValidationError):
                    check({name: value for name, value in document.items() if name != key})
            with pytest.raises(ValidationError):
                check({**document, "surplus": 1})
        assert f"engine               {record.name}: rtx {record.tensorrt_version}, fp32, batch 1:4:8, sm89" in (
            cli("inspect", bundle.path).out
        )
        text = cli("inspect", record.engine_path).out
        for words in ("kind           engine", f"runs here      no, {NOT_RUN}", "not readable without a GPU", "sm89"):
            assert words in text

    def test_bench_has_a_row_that_says_why(self, built: tuple[Bundle, EngineRecord]) -> None:
        bundle, record = built
        done = cli("bench", bundle.path, "--backend", "tensorrt", "--batch", "1,9", "--duration", "1", "--json", "-")
        assert done.code == 4
        document = json.loads(done.out)
        check(document)
        assert {(row["backend"], row["batch"], row["status"], row["reason"]) for row in document["rows"]} == {
            (name, batch, "skipped", NOT_RUN) for name in ("tensorrt", "tensorrt (A/A)") for batch in (1, 9)
        }
        assert document["protocol"]["engines"] == {"tensorrt": record.name}
        assert document["protocol"]["transfers"] == TRANSFERS_INCLUDED


class TestRefusals:
    """Of `verify --engine`, whatever the machine."""

    def test_a_batch_outside_every_profile(self, bundle: Bundle) -> None:
        record = add_engine(bundle, profiles=[{"min": 2, "opt": 4, "max": 8}])
        done = cli("verify", bundle.path, "--engine", record.name, "--batch", "4,9")
        assert (done.code, done.out) == (2, "")
        assert f"batch 9 is outside every profile of {record.name}, 2:4:8: build an engine for it" in done.error
        assert "build-trt --batch 9" in done.error

    def test_an_engine_of_another_bundle(self, bundle: Bundle) -> None:
        record = write_engine(bundle.path / "engines")
        done = cli("verify", bundle.path, "--engine", record.name)
        assert done.code == 1
        assert "was built from another ONNX file" in done.error

    def test_a_damaged_engine(self, bundle: Bundle) -> None:
        record = add_engine(bundle)
        record.engine_path.write_bytes(b"THE plan of an engine")
        done = cli("verify", bundle.path, "--engine", record.name)
        assert done.code == 1
        assert "has changed since it was built" in done.error

    def test_an_engine_that_is_not_there(self, bundle: Bundle) -> None:
        record = add_engine(bundle)
        done = cli("verify", bundle.path, "--engine", "other")
        assert done.code == 1
        assert f"other.engine does not exist; there: {record.name}" in done.error


class TestOnAGpuThatStandsIn:
    @pytest.fixture
    def run(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        """`verify` of an engine whose device computes what ONNX Runtime does, unless told otherwise."""

        def run(*, right: bool = True, batches: list[int] | None = None, **changes: Any) -> Any:
            device = FakeDevice()
            record = add_engine(bundle, **changes)
            profiles = [(p["min"], p["opt"], p["max"]) for p in record.profiles]
            with OnnxRuntimeRunner(bundle.read_onnx()) as truth:
                compute = (lambda images, classes: truth.infer({"input": images})["logits"]) if right else None
                trt = FakeTrt(device, IO, profiles, compute=compute)
                monkeypatch.setattr(tensorrt, "load_flavor", trt.flavor)
                monkeypatch.setattr(tensorrt, "open_first_gpu", lambda: device)
                report = api.verify(bundle, engine=record.name, batches=batches)
            assert (device.live, trt.alive) == (set(), [])
            return report

        return run

    def test_an_engine_that_computes_the_same_passes(self, run: Callable[..., Any]) -> None:
        report = run(profiles=[{"min": 1, "opt": 4, "max": 8}, {"min": 9, "opt": 16, "max": 16}])
        assert (report.verdict, report.exit_code, report.executed_precision) == ("pass", 0, "fp32")
        assert {(row.batch, row.permuted) for row in report.rows} == {
            (1, False),
            *((size, order) for size in (3, 4, 8, 9, 16) for order in (False, True)),
        }

    def test_one_that_computes_something_else_fails_and_no_block_of_the_graph_is_blamed(
        self, run: Callable[..., Any]
    ) -> None:
        report = run(right=False, batches=[2])
        assert (report.verdict, report.exit_code, report.first_bad_block) == ("fail", 3, None)

    def test_one_of_another_version_is_refused(self, run: Callable[..., Any]) -> None:
        with pytest.raises(BundleError, match=f"was built with TensorRT 11.3.0.1, and {VERSION} is installed here"):
            run(tensorrt_version="11.3.0.1")


class TestChoosing:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with an sm_89, PyCUDA, and TensorRT for RTX."""
        monkeypatch.setattr(engines, "find_gpus", lambda: (Gpu("a GPU", None, None, "8.9"),))
        monkeypatch.setattr(engines, "installed_version", lambda flavor: VERSION if flavor == "rtx" else None)
        monkeypatch.setattr(engines, "find_spec", lambda name: name)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_the_newest_that_fits(self, bundle: Bundle) -> None:
        add_engine(bundle, created="2026-01-01T00:00:00+00:00", precision="fp32")
        newer = add_engine(bundle, created="2026-02-01T00:00:00+00:00", precision="fp16")
        add_engine(bundle, created="2026-03-01T00:00:00+00:00", targets=["sm90"])
        add_engine(bundle, created="2026-04-01T00:00:00+00:00", tensorrt_version="11.5.0.1")
        add_engine(bundle, created="2026-05-01T00:00:00+00:00", flavor="tensorrt")
        damaged = add_engine(bundle, created="2026-06-01T00:00:00+00:00", precision="bf16")
        damaged.engine_path.unlink()
        choice = choose_engine(bundle)
        assert choice.record is not None
        assert (choice.record.name, choice.reason) == (newer.name, None)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"targets": ["sm90"]}, "the GPU here, which is sm89"),
            ({"tensorrt_version": "11.5.0.1"}, f"built with TensorRT 11.5.0.1, and {VERSION} is installed here"),
            ({"flavor": "tensorrt"}, "built, not run: the TensorRT of flavor tensorrt is not installed"),
        ],
        ids=["gpu", "version", "flavor"],
    )
    def test_none_fits(self, bundle: Bundle, changes: dict[str, Any], words: str) -> None:
        record = add_engine(bundle, **changes)
        for name in (None, record.name):
            choice = choose_engine(bundle, name)
            assert choice.record is not None
            assert choice.record.name == record.name
            assert words in (choice.reason or "")

    def test_no_pycuda(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        add_engine(bundle)
        monkeypatch.setattr(engines, "find_spec", lambda name: None)
        assert "built, not run: pycuda is not installed" in (choose_engine(bundle).reason or "")

    def test_a_gpu_of_unknown_capability_refuses_nothing(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "find_gpus", lambda: (Gpu("a GPU", None, None, None),))
        add_engine(bundle, targets=["sm90"])
        assert choose_engine(bundle).reason is None

    def test_no_engine_and_only_a_damaged_one(self, bundle: Bundle) -> None:
        choice = choose_engine(bundle)
        assert (choice.record, choice.reason) == (None, "the bundle has no engine: evit-deploy build-trt")
        add_engine(bundle).engine_path.unlink()
        choice = choose_engine(bundle)
        assert choice.record is None
        assert "is missing" in (choice.reason or "")

    def test_a_plugin_is_left_to_the_runner(self, bundle: Bundle) -> None:
        plugin = {**NO_PLUGIN, "used": True, "layers": 1, "form": "jit", "kernel_hash": "a" * 64, "arches": [89]}
        add_engine(bundle, plugin=plugin)
        assert choose_engine(bundle).reason is None

    def test_batches_of_an_engine(self, bundle: Bundle) -> None:
        record = add_engine(bundle, profiles=[{"min": 1, "opt": 8, "max": 64}, {"min": 100, "opt": 100, "max": 128}])
        assert batches_of(record) == (1, 3, 8, 64, 100, 128)
        assert batches_of(add_engine(bundle, profiles=[{"min": 4, "opt": 4, "max": 4}])) == (4,)
        check_batches(record, [1, 64, 128])
        with pytest.raises(UsageError, match=r"batch 65 is outside every profile of .*, 1:8:64, 100:100:128"):
            check_batches(record, [1, 65])
        assert why_not_batch(record, 64) is None

    def test_the_arm_is_measured_by_default_where_an_engine_fits(self, bundle: Bundle) -> None:
        assert TENSORRT not in {arm.name for arm in resolve_backends(None, bundle)}
        record = add_engine(bundle)
        (arm,) = [arm for arm in resolve_backends(None, bundle) if arm.name == TENSORRT]
        assert arm.engine == str(record.path)

    def test_a_batch_outside_its_profiles_is_a_row_that_says_so(self, bundle: Bundle) -> None:
        record = add_engine(bundle, profiles=[{"min": 1, "opt": 4, "max": 8}])
        states, base = make_states(resolve_backends([TENSORRT], bundle), [1, 9], None)
        assert base is states[0]
        assert set(states[0].lost) == {9}
        assert states[0].lost[9].status == "skipped"
        assert f"batch 9 is outside every profile of {record.name}, 1:4:8" in states[0].lost[9].reason

    def test_a_named_engine_is_measured_and_its_row_says_why_not(self, bundle: Bundle) -> None:
        record = add_engine(bundle, targets=["sm90"])
        assert TENSORRT not in {arm.name for arm in resolve_backends(None, bundle)}
        (arm,) = [arm for arm in resolve_backends(None, bundle, record.name) if arm.name == TENSORRT]
        states, _ = make_states([find_backend("onnxruntime"), arm], [1], None)
        assert "the GPU here, which is sm89" in states[-1].lost[1].reason
        assert TENSORRT not in {arm.name for arm in deployable_backends(bundle)}
        assert TENSORRT in {arm.name for arm in deployable_backends(bundle, record.name)}

    def test_an_engine_without_its_backend(self, bundle: Bundle) -> None:
        record = add_engine(bundle)
        with pytest.raises(UsageError, match="no backend runs it: onnxruntime: name backend tensorrt as well"):
            resolve_backends(["onnxruntime"], bundle, record.name)
        with pytest.raises(BundleError, match="does not exist"):
            resolve_backends([TENSORRT], bundle, "other")

    def test_its_process_gets_the_engine_and_makes_its_runner(self, bundle: Bundle, tmp_path: Path) -> None:
        record = add_engine(bundle)
        (arm,) = resolve_backends([TENSORRT], bundle, record.name)
        worker = WorkerProcess(arm, WorkerSettings(bundle.path, tmp_path, 1), "label")
        worker.close()
        arguments = worker._process.args
        assert isinstance(arguments, list)
        assert arguments[arguments.index("--engine") + 1] == str(record.path)
        runner = make_runner(arm.factory, BackendContext(bundle, 1, arm.engine))
        assert isinstance(runner, TensorRtRunner)
        assert (runner.name, runner.graph_precision) == ("tensorrt", "fp32")


def test_an_arm_without_a_bundle_has_no_engine_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in ((), ("a GPU",)):
        monkeypatch.setattr(registry, "find_gpus", lambda gpus=gpus: gpus)
        assert BACKENDS[TENSORRT].why_not()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["onnxruntime", "torch-eager"], "none (CPU)"),
        (["torch-fused"], "host to device and back, within the latency"),
        (
            ["onnxruntime", "torch-fused", "tensorrt"],
            "onnxruntime: none (CPU); torch-fused, tensorrt: host to device and back, within the latency",
        ),
    ],
)
def test_transfers_are_told_of_each_arm(names: list[str], text: str) -> None:
    assert describe_transfers([find_backend(name) for name in names]) == text


def test_every_arm_on_a_gpu_says_that_it_copies() -> None:
    on_gpu: list[Backend] = [arm for arm in BACKENDS.values() if "on a GPU" in arm.title]
    assert len(on_gpu) == 6
    assert {arm.transfers for arm in on_gpu} == {TRANSFERS_INCLUDED}
    assert np.all([arm.transfers == "none (CPU)" for arm in BACKENDS.values() if arm not in on_gpu])
