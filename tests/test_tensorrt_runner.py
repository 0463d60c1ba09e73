"""The runner of engines over a device and bindings that stand in: order of calls, refusals, and what is given back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evit_deploy.errors import BundleError, EvitDeployError, LimitError, RunnerError
from evit_deploy.runners import BuiltNotRunError, TensorSpec, tensorrt
from evit_deploy.runners.engine_slot import describe_profiles, profile_index
from evit_deploy.runners.tensorrt import MAX_BATCH_SIZES, TensorRtRunner
from evit_deploy.trt import plugin as plugin_module
from evit_deploy.trt.profiles import BatchProfile
from evit_deploy.trt.record import EngineRecord
from tests.engine_files import IO, write_engine
from tests.fake_device import FakeDevice
from tests.fake_trt import VERSION, FakeTrt

PROFILES = [{"min": 1, "opt": 4, "max": 8}, {"min": 5, "opt": 16, "max": 16}]
JIT_PLUGIN = {
    "used": True,
    "layers": 2,
    "form": "jit",
    "kernel_hash": "a" * 64,
    "reason": "",
    "op_types": {"EvitLiteMLA": 2},
    "arches": [80, 89],
}
STREAM = "0x101"


def images(batch: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (batch, 3, 4, 4)).astype(dtype)


def expected(array: np.ndarray) -> np.ndarray:
    """What the engine computes: the sum of an image's elements plus the class's number."""
    sums: np.ndarray = array.reshape(len(array), -1).sum(axis=1, keepdims=True) + np.arange(5)
    return sums


class Bench:
    """A runner with everything it stands on."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        *,
        device: FakeDevice | None = None,
        record: EngineRecord | None = None,
        cuda_graph: bool = True,
        read_onnx: Callable[[], bytes] | None = None,
        **trt: Any,
    ) -> None:
        self.device = device or FakeDevice()
        self.record = record or write_engine(folder, profiles=PROFILES)
        profiles = [(p["min"], p["opt"], p["max"]) for p in self.record.profiles]
        self.trt = FakeTrt(self.device, self.record.io, profiles, **trt)
        monkeypatch.setattr(tensorrt, "load_flavor", self.trt.flavor)
        self.runner = TensorRtRunner(
            self.record, read_onnx=read_onnx, cuda_graph=cuda_graph, open_device=lambda: self.device
        )

    def infer(self, array: np.ndarray) -> np.ndarray:
        return self.runner.infer({"input": array})["logits"]

    def assert_nothing_left(self) -> None:
        assert self.device.live == set()
        assert self.trt.alive == []
        assert self.device.depth == 0
        assert not [call for call in self.device.calls if call.startswith("LATE")]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Bench]:
    return lambda **options: Bench(monkeypatch, tmp_path / "engines", **options)


class TestInference:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no-graph"])
    def test_arrays_go_in_and_come_out(
        self, make: Callable[..., Bench], tmp_path: Path, dtype: str, cuda_graph: bool
    ) -> None:
        io = [{**tensor, "dtype": dtype} for tensor in IO]
        bench = make(record=write_engine(tmp_path, profiles=PROFILES, io=io), cuda_graph=cuda_graph)
        with bench.runner as runner:
            for batch in (3, 1, 8, 16, 3):
                array = images(batch, dtype, seed=batch)
                logits = bench.infer(array)
                assert logits.dtype == dtype
                np.testing.assert_array_equal(logits, expected(array))
                assert runner.captured == cuda_graph
        bench.assert_nothing_left()

    def test_every_replay_sees_its_own_images_and_gives_its_own_array(self, make: Callable[..., Bench]) -> None:
        bench = make()
        with bench.runner:
            first, second = images(2, seed=1), images(2, seed=2)
            results = [bench.infer(array) for array in (first, second, first)]
        np.testing.assert_array_equal(results[0], expected(first))
        np.testing.assert_array_equal(results[1], expected(second))
        np.testing.assert_array_equal(results[2], results[0])

    def test_strided_and_read_only_images(self, make: Callable[..., Bench]) -> None:
        bench = make()
        array = images(4)
        array.flags.writeable = False
        with bench.runner:
            np.testing.assert_array_equal(bench.infer(array[::2]), expected(array[::2]))

    def test_the_order_of_calls(self, make: Callable[..., Bench]) -> None:
        bench = make()
        with bench.runner:
            bench.infer(images(2))
            first, bench.device.calls = bench.device.calls, []
            bench.infer(images(2))
            second, bench.device.calls = bench.device.calls, []
        assert first == [
            *("push", "runtime", "deserialize host code False", "engine", "stream", *["event"] * 4, "pop"),
            *("push", "context", f"profile 0 on {STREAM}", f"synchronize {STREAM}"),
            *("shape input[2, 3, 4, 4]", "pinned float32[2, 3, 4, 4]", "allocate 384", "address input 0x100000"),
            "infer_shapes",
            *("pinned float32[2, 5]", "allocate 40", "address logits 0x200000"),
            *(f"copy_in on {STREAM}", f"execute on {STREAM}", f"synchronize {STREAM}"),  # once outside of any graph
            *(f"capture on {STREAM}", f"execute on {STREAM}", "graph"),
            *(f"record on {STREAM}", f"copy_in on {STREAM}", f"record on {STREAM}", f"launch on {STREAM}"),
            *(f"record on {STREAM}", f"copy_out on {STREAM}", f"record on {STREAM}", f"synchronize {STREAM}"),
            *(*["elapsed"] * 3, "pop"),
        ]
        assert second == ["push", *first[-12:]]
        assert bench.device.calls == [
            *("push", "free graph 1", "free allocate 2", "free pinned 2", "free allocate 1", "free pinned 1"),
            *("free context", "free event 4", "free event 3", "free event 2", "free event 1", "free stream 1"),
            *("free engine", "free runtime", "pop"),
        ]

    def test_transfers_and_compute_are_timed_apart(self, make: Callable[..., Bench]) -> None:
        bench = make()
        with bench.runner as runner:
            assert runner.last_timings_ms is None
            bench.infer(images(2))
            timings = runner.last_timings_ms
        assert timings is not None
        assert (timings.h2d, timings.compute, timings.d2h) == (2.0, 2.0, 2.0)  # a call each, and the event's own

    def test_names_precision_and_shapes(self, make: Callable[..., Bench]) -> None:
        runner = make().runner
        assert (runner.name, runner.precision, runner.graph_precision) == ("tensorrt", "unknown", "fp32")
        assert runner.inputs == (TensorSpec("input", "float32", (None, 3, 4, 4)),)
        assert runner.outputs == (TensorSpec("logits", "float32", (None, 5)),)
        with runner:
            assert runner.precision == "fp32"

    def test_construction_touches_nothing_and_activation_comes_back(self, make: Callable[..., Bench]) -> None:
        bench = make()
        assert bench.device.calls == []
        bench.runner.deactivate()
        for _ in range(2):
            with bench.runner:
                bench.runner.activate()
                np.testing.assert_array_equal(bench.infer(images(1)), expected(images(1)))
            bench.runner.deactivate()
            bench.assert_nothing_left()
        assert bench.device.calls.count("runtime") == 2
        with pytest.raises(ValueError, match="not active"):
            bench.infer(images(1))

    def test_a_version_compatible_engine_brings_its_own_runtime(
        self, make: Callable[..., Bench], tmp_path: Path
    ) -> None:
        bench = make(record=write_engine(tmp_path, options={"version_compatible": True}))
        with bench.runner:
            assert "deserialize host code True" in bench.device.calls


class TestBatches:
    @pytest.mark.parametrize(
        ("profiles", "batch", "index"),
        [
            ([(1, 4, 8)], 1, 0),
            ([(1, 4, 8)], 8, 0),
            ([(1, 4, 8)], 9, None),
            ([(2, 4, 8)], 1, None),
            ([(1, 4, 8), (5, 16, 16)], 4, 0),
            ([(1, 4, 8), (5, 16, 16)], 6, 0),  # tuned for 4, and 16 is further
            ([(1, 1, 64), (8, 8, 8)], 8, 1),
            ([(1, 8, 64), (8, 8, 8)], 8, 1),  # the narrower one
            ([(1, 1, 1), (4, 4, 4)], 2, None),
        ],
    )
    def test_the_profile_tuned_nearest_is_chosen(
        self, profiles: list[tuple[int, int, int]], batch: int, index: int | None
    ) -> None:
        assert profile_index([BatchProfile(*profile) for profile in profiles], batch) == index

    def test_each_batch_size_has_its_profile_and_its_context(self, make: Callable[..., Bench]) -> None:
        bench = make()
        with bench.runner:
            for batch in (8, 9, 8, 16):
                bench.infer(images(batch))
            chosen = [call for call in bench.device.calls if call.startswith("profile")]
            assert chosen == [f"profile {index} on {STREAM}" for index in (0, 1, 1)]
            assert bench.trt.alive.count("context") == 3

    @pytest.mark.parametrize("batch", [17, 64])
    def test_a_batch_outside_every_profile_is_refused_before_tensorrt_sees_it(
        self, make: Callable[..., Bench], batch: int
    ) -> None:
        bench = make()
        with bench.runner:
            before = list(bench.device.calls)
            with pytest.raises(RunnerError) as raised:
                bench.infer(images(batch))
            assert bench.device.calls == before
        assert f"batch {batch} is outside every profile of {bench.record.name}, 1:4:8, 5:16:16" in str(raised.value)
        assert raised.value.hint.endswith(f"evit-deploy build-trt --batch {batch}")

    def test_only_so_many_batch_sizes_are_kept(self, make: Callable[..., Bench]) -> None:
        bench = make()
        with bench.runner:
            for batch in range(1, MAX_BATCH_SIZES + 1):
                bench.infer(images(batch))
            bench.infer(images(1))  # used again: 2 is now the one not used for longest
            bench.infer(images(MAX_BATCH_SIZES + 1))
            assert bench.trt.alive.count("context") == MAX_BATCH_SIZES
            assert len([thing for thing in bench.device.live if thing.startswith("graph")]) == MAX_BATCH_SIZES
            contexts = bench.device.calls.count("context")
            bench.infer(images(1))
            assert bench.device.calls.count("context") == contexts
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
            assert bench.device.calls.count("context") == contexts + 1
        bench.assert_nothing_left()

    @pytest.mark.parametrize(
        "array",
        [images(2)[:, :, :3], images(2).astype(np.float64), images(0)],
        ids=["other-size", "other-dtype", "empty"],
    )
    def test_a_feed_that_does_not_fit(self, make: Callable[..., Bench], array: np.ndarray) -> None:
        bench = make()
        with bench.runner, pytest.raises(RunnerError) as raised:
            bench.infer(array)
        assert raised.value.hint == "the model takes input float32[N,3,4,4]"

    def test_profiles_in_words(self) -> None:
        assert describe_profiles([BatchProfile(1, 8, 64), BatchProfile(2, 2, 2)]) == "1:8:64, 2:2:2"


class TestGraphs:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"device": FakeDevice(no_graphs="cuda-bindings cannot be imported")}, "cuda-bindings cannot be imported"),
            ({"faults": ["execute in a capture"]}, "the work fails in a capture: tensorrt: TensorRT did not execute"),
        ],
        ids=["no-library", "not-capturable"],
    )
    def test_what_cannot_be_captured_runs_without_and_says_so_once(
        self, make: Callable[..., Bench], caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str
    ) -> None:
        bench = make(**options)
        with bench.runner as runner, caplog.at_level(logging.WARNING, logger="evit_deploy"):
            assert runner.graph_fallback == ""
            for batch in (2, 2, 3):
                np.testing.assert_array_equal(bench.infer(images(batch)), expected(images(batch)))
                assert not runner.captured
            assert runner.graph_fallback.startswith(reason)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"tensorrt: runs without a CUDA graph: {reason}")
        assert len([call for call in bench.device.calls if call.startswith("capture")]) == 1
        bench.assert_nothing_left()

    def test_graphs_that_are_not_asked_for(self, make: Callable[..., Bench]) -> None:
        bench = make(cuda_graph=False)
        with bench.runner as runner:
            bench.infer(images(2))
            assert runner.graph_fallback == "not asked for"
            assert not [call for call in bench.device.calls if call.startswith("capture")]


# The device's; TensorRT does not raise, it refuses.
ACTIVATION_STEPS = ("push", "stream", *(f"event {n}" for n in range(1, 5)))
INFERENCE_STEPS = (
    *("push 2", "synchronize 1", "pinned 1", "allocate 1", "pinned 2", "allocate 2", "copy_in 1", "synchronize 2"),
    *("record 1", "copy_in 2", "record 2", "launch", "record 3", "copy_out", "record 4", "synchronize 3", "elapsed 3"),
)


class TestFailures:
    @pytest.mark.parametrize("step", ACTIVATION_STEPS)
    def test_an_activation_that_fails_gives_everything_back(self, make: Callable[..., Bench], step: str) -> None:
        bench = make(device=FakeDevice(fail_at=[step]))
        with pytest.raises(RunnerError, match=r"tensorrt: loading the engine failed: .*it was asked to") as raised:
            bench.runner.activate()
        bench.assert_nothing_left()
        assert raised.value.__traceback__ is not None  # whose frames are alive, and hold nothing of TensorRT's
        with pytest.raises(ValueError, match="not active"):
            bench.infer(images(1))

    @pytest.mark.parametrize("step", INFERENCE_STEPS)
    def test_an_inference_that_fails_costs_the_buffers_and_nothing_else(
        self, make: Callable[..., Bench], step: str
    ) -> None:
        bench = make(device=FakeDevice(fail_at=[step]))
        with bench.runner:
            with pytest.raises(RunnerError, match=r"inference failed with batch 2: .*it was asked to"):
                bench.infer(images(2))
            if step != "push 2":
                assert not {thing.split()[0] for thing in bench.device.live} & {"allocate", "pinned", "graph"}
                assert "context" not in bench.trt.alive
            bench.device._fail_at = set()
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
        bench.assert_nothing_left()

    @pytest.mark.parametrize("step", ["event 2", "stream"])
    def test_too_little_memory_for_the_engine(self, make: Callable[..., Bench], step: str) -> None:
        bench = make(device=FakeDevice(fail_at=[step], out_of_memory=True))
        with pytest.raises(LimitError, match="loading the engine failed: out of memory: use a smaller batch"):
            bench.runner.activate()
        bench.assert_nothing_left()

    def test_too_little_memory_for_a_batch(self, make: Callable[..., Bench]) -> None:
        bench = make(device=FakeDevice(fail_at=["allocate 3"], out_of_memory=True))
        with bench.runner:
            bench.infer(images(1))
            with pytest.raises(LimitError, match="batch 8: out of memory: use a smaller batch"):
                bench.infer(images(8))
            np.testing.assert_array_equal(bench.infer(images(1)), expected(images(1)))
        bench.assert_nothing_left()

    @pytest.mark.parametrize(
        ("message", "kind"),
        [("the magic tag is wrong", RunnerError), ("Cuda failure: 2: out of memory", LimitError)],
        ids=["damaged", "memory"],
    )
    def test_a_plan_that_tensorrt_refuses(
        self, make: Callable[..., Bench], message: str, kind: type[Exception]
    ) -> None:
        bench = make(faults=["deserialize"], message=message)
        with pytest.raises(kind, match=f"TensorRT did not load the engine; its last message: {message}"):
            bench.runner.activate()
        bench.assert_nothing_left()

    def test_an_engine_with_other_tensors_than_its_json(self, make: Callable[..., Bench]) -> None:
        bench = make(faults=["tensors"])
        with pytest.raises(RunnerError, match="the engine has input input_2, output logits_2, and its JSON says other"):
            bench.runner.activate()
        bench.assert_nothing_left()

    def test_a_type_that_numpy_lacks(self, make: Callable[..., Bench], tmp_path: Path) -> None:
        io = [IO[0], {**IO[1], "dtype": "bfloat16"}]
        bench = make(record=write_engine(tmp_path, io=io))
        with pytest.raises(RunnerError, match=r"logits bfloat16\[N,5\] has a type that NumPy lacks"):
            bench.runner.activate()
        bench.assert_nothing_left()

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("context", "no execution context for batch 2"),
            ("profile", "TensorRT refuses optimization profile 0"),
            ("shape", r"TensorRT refuses input float32\[N,3,4,4\] of shape \[2, 3, 4, 4\]"),
            ("address", "TensorRT refuses the address of input"),
            ("infer", "input is not specified enough"),
            ("infer raises", "inference failed with batch 2: shape inference failed"),
            ("output", r"the engine's output has shape \[2, 1, 5\] for batch 2, expected logits float32\[N,5\]"),
            ("execute", "did not execute the engine; its last message: something is wrong"),
        ],
    )
    def test_what_tensorrt_refuses_for_a_batch(self, make: Callable[..., Bench], fault: str, words: str) -> None:
        bench = make(faults=[fault])
        with bench.runner:
            with pytest.raises(RunnerError, match=words):
                bench.infer(images(2))
            assert "context" not in bench.trt.alive
            assert not [call for call in bench.device.calls if call.startswith("copy_out")]
            bench.trt.faults.clear()
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
        bench.assert_nothing_left()

    def test_ctrl_c_in_an_inference_leaves_the_runner_usable(self, make: Callable[..., Bench]) -> None:
        bench = make(on_execute=KeyboardInterrupt)
        with bench.runner:
            with pytest.raises(KeyboardInterrupt):
                bench.infer(images(2))
            calls = bench.device.calls
            under_way = calls[calls.index(f"execute on {STREAM}") : calls.index("free context")]
            assert f"synchronize {STREAM}" in under_way
            bench.trt.on_execute = lambda: None
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
        bench.assert_nothing_left()


def changed_plan(record: EngineRecord) -> None:
    record.engine_path.write_bytes(b"THE plan of an engine")


def cut_plan(record: EngineRecord) -> None:
    record.engine_path.write_bytes(record.engine_path.read_bytes()[:-1])


def lost_plan(record: EngineRecord) -> None:
    record.engine_path.unlink()


def changed_json(record: EngineRecord) -> None:
    record.path.write_text(record.path.read_text(encoding="utf-8").replace('"sm89"', '"sm80"'), encoding="utf-8")


class TestRefusals:
    """Before TensorRT sees the file."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (changed_plan, "has changed since it was built"),
            (cut_plan, "is truncated: 20 of 21 bytes"),
            (lost_plan, "is missing"),
            (changed_json, "has changed since the engine was built"),
        ],
        ids=["changed", "truncated", "missing", "json"],
    )
    def test_a_changed_engine(
        self, make: Callable[..., Bench], change: Callable[[EngineRecord], None], words: str
    ) -> None:
        bench = make()
        change(bench.record)
        with pytest.raises(BundleError, match=words) as raised:
            bench.runner.activate()
        assert bench.device.calls == []
        assert raised.value.hint

    def test_an_engine_that_was_built_again(self, make: Callable[..., Bench], tmp_path: Path) -> None:
        bench = make()
        write_engine(bench.record.path.parent, profiles=PROFILES, plan=b"another plan")
        with pytest.raises(BundleError, match="was built again meanwhile: run the command again"):
            bench.runner.activate()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"tensorrt_version": "11.3.0.1"}, f"built with TensorRT 11.3.0.1, and {VERSION} is installed here"),
            ({"targets": ["sm80", "sm90"]}, "GPU here, which is sm89: it was built for sm80, sm90"),
        ],
        ids=["version", "gpu"],
    )
    def test_an_engine_of_another_version_or_gpu(
        self, make: Callable[..., Bench], tmp_path: Path, changes: dict[str, Any], words: str
    ) -> None:
        bench = make(record=write_engine(tmp_path, **changes))
        with pytest.raises(BundleError, match=words):
            bench.runner.activate()
        assert bench.device.calls == []

    def test_an_engine_of_another_plugin(
        self, make: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plug_in(monkeypatch, found_hash="b" * 64)
        bench = make(record=write_engine(tmp_path, plugin=JIT_PLUGIN), read_onnx=lambda: b"onnx")
        with pytest.raises(
            BundleError, match="needs the plugin's kernels aaaaaaaaaaaa, and those here are bbbbbbbbbbbb"
        ):
            bench.runner.activate()
        assert bench.device.calls == []

    def test_plugins_without_the_graph_they_are_in(self, make: Callable[..., Bench], tmp_path: Path) -> None:
        bench = make(record=write_engine(tmp_path, plugin=JIT_PLUGIN))
        with pytest.raises(BundleError, match="name its bundle as well"):
            bench.runner.activate()
        assert bench.device.calls == []

    def test_no_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpus", lambda: ())
        with pytest.raises(BuiltNotRunError) as raised:
            TensorRtRunner(write_engine(tmp_path)).activate()
        assert str(raised.value) == "built, not run: no GPU"
        assert raised.value.exit_code == 4

    def test_a_gpu_and_no_pycuda(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpus", lambda: ("a GPU",))
        monkeypatch.setitem(sys.modules, "pycuda", None)
        with pytest.raises(BuiltNotRunError, match="built, not run: PyCUDA is not installed"):
            TensorRtRunner(write_engine(tmp_path)).activate()

    def test_a_gpu_and_no_tensorrt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        device = FakeDevice()
        runner = TensorRtRunner(write_engine(tmp_path, flavor="tensorrt"), open_device=lambda: device)
        with pytest.raises(BuiltNotRunError, match="built, not run: TensorRT is not installed"):
            runner.activate()
        assert device.calls == []


def plug_in(monkeypatch: pytest.MonkeyPatch, *, found_hash: str = "a" * 64, device: FakeDevice | None = None) -> None:
    """Two plugin layers in every graph, and registrations written down among the device's calls."""

    class Layer:
        op_type = "EvitLiteMLA"

    def register(flavor: Any, names: list[str], *, form: str, arches: list[int], launcher: Any, **_: Any) -> None:
        assert device is not None
        assert launcher in (None, device.launcher)
        assert (form, arches) == ("jit", [89])
        device.calls.append(f"{'forget' if launcher is None else 'register'} {','.join(names)}")

    def compile_for(layers: list[Any], arches: list[int], progress: Callable[[str], None]) -> None:
        assert device is not None
        device.calls.append(f"compile {len(layers)} for {arches}")

    monkeypatch.setattr("evit_deploy.trt.operators.plugin_layers", lambda onnx: [Layer(), Layer()])
    monkeypatch.setattr("evit_deploy.trt.plugin_kernels.kernel_hash", lambda layers, arches: found_hash)
    monkeypatch.setattr("evit_deploy.trt.plugin_kernels.compile_for", compile_for)
    monkeypatch.setattr("evit_deploy.trt.plugin.register_plugins", register)


class TestPlugins:
    @pytest.fixture
    def bench(self, make: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
        device = FakeDevice()
        plug_in(monkeypatch, device=device)
        record = write_engine(tmp_path, plugin=JIT_PLUGIN)
        return make(device=device, record=record, read_onnx=lambda: b"onnx", aux_streams=2)

    def test_they_are_registered_before_the_engine_is_read_and_forgotten_after_it(self, bench: Bench) -> None:
        with bench.runner:
            bench.infer(images(2))
        calls = bench.device.calls
        assert calls[:4] == ["push", "compile 2 for [89]", "register EvitLiteMLA", "runtime"]
        assert calls[-4:] == ["free engine", "free runtime", "forget EvitLiteMLA", "pop"]
        bench.assert_nothing_left()

    def test_one_engine_with_them_is_active_at_a_time(self, bench: Bench) -> None:
        other = TensorRtRunner(bench.record, read_onnx=lambda: b"onnx", open_device=lambda: bench.device)
        with bench.runner:
            with pytest.raises(RunnerError, match="another engine with plugins is active in this process: deactivate"):
                other.activate()
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
        with other:
            pass
        bench.assert_nothing_left()

    def test_every_stream_of_theirs_is_one_of_ours(self, bench: Bench) -> None:
        with bench.runner:
            bench.infer(images(2))
            assert bench.device.calls.count("stream") == 3
            assert "aux_streams 0x102,0x103" in bench.device.calls
            executed = bench.device.calls.index(f"execute on {STREAM}")
            assert bench.device.calls.index("aux_streams 0x102,0x103") < executed

    def test_without_them_tensorrt_keeps_streams_of_its_own(self, make: Callable[..., Bench]) -> None:
        bench = make(aux_streams=2)
        with bench.runner:
            bench.infer(images(2))
        assert bench.device.calls.count("stream") == 1
        assert not [call for call in bench.device.calls if call.startswith("aux_streams")]

    @pytest.mark.parametrize(
        ("error", "kind", "words"),
        [
            (EvitDeployError("no kernel for sm_75", hint="--no-plugin"), EvitDeployError, "no kernel for sm_75"),
            (ValueError("dims differ"), RunnerError, "a plugin failed: dims differ"),
        ],
        ids=["ours", "python"],
    )
    def test_what_fails_inside_them_is_what_the_user_reads(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
    ) -> None:
        errors: list[Exception] = []

        def take() -> list[Exception]:
            taken, errors[:] = list(errors), []
            return taken

        monkeypatch.setattr(plugin_module, "take_plugin_errors", take)
        bench.trt.on_execute = lambda: errors.append(error)
        with bench.runner:
            with pytest.raises(kind, match=words):
                bench.infer(images(2))
            bench.trt.on_execute = lambda: None
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
        bench.assert_nothing_left()

    def test_a_failure_inside_them_in_a_capture_is_a_fall_back(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def take() -> list[Exception]:
            return [ValueError("not now")] if bench.device.captured_work is not None else []

        monkeypatch.setattr(plugin_module, "take_plugin_errors", take)
        with bench.runner as runner:
            np.testing.assert_array_equal(bench.infer(images(2)), expected(images(2)))
            assert not runner.captured
            assert "a plugin failed: not now" in runner.graph_fallback
        bench.assert_nothing_left()
