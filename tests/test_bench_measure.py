"""The benchmark engine: the plan and the schedule on a simulated clock, and whole runs with real child processes.

The arms of the real runs are small NumPy models in a module of their own that each child process imports.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from evit_deploy.backends import BACKENDS, Backend, resolve_backends
from evit_deploy.bench.assemble import AA_SUFFIX, Subject, _compare_more, assemble_rows
from evit_deploy.bench.measure import check_batches, default_batches, make_states, run_bench
from evit_deploy.bench.plan import BlockCost, Effort, plan_rest
from evit_deploy.bench.process import WorkerError
from evit_deploy.bench.report import BenchReport, BenchRow, ParityResult
from evit_deploy.bench.schedule import Schedule
from evit_deploy.bench.state import ArmState
from evit_deploy.bench.statistics import BASELINE, NO_DIFFERENCE, WITHHELD
from evit_deploy.bench.workdir import PREFIX, working_folder
from evit_deploy.bench.worker import Worker
from evit_deploy.bundle import Bundle
from evit_deploy.bundle.writer import BundleWriter
from evit_deploy.errors import BundleError, UsageError
from evit_deploy.parity.gate import TOLERANCES
from evit_deploy.specs import ModelSpec, Preprocessing, variant_config

SHORT = Effort(target_processes=2, max_rounds=2, min_round_s=0.01, warmup_s=0.0)

ARMS_MODULE = '''
import os, signal, sys, time
import numpy as np
from evit_deploy.errors import RunnerError
from evit_deploy.runners.base import Runner, TensorSpec

class Linear(Runner):
    """Logits by one matrix product; faults are planted by name."""
    name = "linear"
    precision = "fp32"

    def __init__(self, fault="", pause_s=0.0):
        self.fault, self.pause_s, self.calls = fault, pause_s, 0

    def activate(self):
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "refuse":
            raise RunnerError("linear: the graph cannot be loaded", hint="export again")
        if self.fault == "missing":
            import a_module_that_is_not_there
        if self.fault == "garbage":
            print("{this is not the protocol}")
            os.write(1, b"neither is this" + bytes(range(128, 256)) + b"\\n" * 3)
            os.system("echo nor what a child prints")
            sys.stdin.read()
        self.weight = np.random.default_rng(0).standard_normal((48, 10)).astype(np.float32)
        if self.fault == "wrong":
            self.weight = np.random.default_rng(1).standard_normal((48, 10)).astype(np.float32)

    def deactivate(self):
        pass

    def infer(self, feed):
        self.calls += 1
        if self.fault == "segfault" and self.calls > 2:
            print("about to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "raise" and self.calls > 2:
            raise RuntimeError("first line\\nsecond line")
        if self.pause_s:
            time.sleep(self.pause_s)
        images = feed["input"]
        logits = images.reshape(len(images), -1)[:, :48] @ self.weight
        if self.fault == "nan":
            logits[-1, 3] = np.nan
        if self.fault == "picky":
            logits[images[:, 0, 0, 0] > 5] += 1
        if self.fault == "unnamed":
            return {"output_0": logits}
        if self.fault == "softmax":
            e = np.exp(logits - logits.max(1, keepdims=True))
            return {"probabilities": e / e.sum(1, keepdims=True)}
        return {"logits": logits}

    @property
    def inputs(self):
        return (TensorSpec("input", "float32", (None, 3, 8, 8)),)

    @property
    def outputs(self):
        return (TensorSpec("logits", "float32", (None, 10)),)

def plain(context): return Linear(pause_s=0.001)
def slow(context): return Linear(pause_s=0.006)
def __getattr__(name):
    return lambda context: Linear(fault=name, pause_s=0.001)
'''


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Backend]:
    (tmp_path / "arms_of_this_test.py").write_text(ARMS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: Backend(name, name, f"arms_of_this_test:{name}")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "tiny.evit", max_batch=4)


def write_bundle(path: Path, **onnx: Any) -> Bundle:
    """A bundle whose two files no arm of these tests reads."""
    spec = ModelSpec("msa", "custom", 10, 8, variant_config("msa", "m1"))
    manifest = {"model": spec.to_json(), "preprocessing": Preprocessing().to_json(), "origin": {}, "onnx": onnx}
    with BundleWriter(path) as writer:
        (writer.path / "model.onnx").write_bytes(b"model")
        (writer.path / "weights.safetensors").write_bytes(b"weights")
        return writer.commit(manifest)


def run(
    bundle: Bundle, backends: list[Backend], *, reference: Backend, batches: tuple[int, ...] = (2,), **options: Any
) -> BenchReport:
    settings = {"duration_s": 120.0, "threads": 1, "effort": SHORT, **options}
    return run_bench(bundle, batches=batches, backends=backends, reference=reference, **settings)


def row_of(report: BenchReport, backend: str, batch: int = 2) -> BenchRow:
    return next(row for row in report.rows if row.backend == backend and row.batch == batch)


class TestWholeRuns:
    def test_rows_of_two_arms_at_two_batch_sizes(self, bundle: Bundle, arms: Callable[[str], Backend]) -> None:
        said: list[str] = []
        report = run(
            bundle, [arms("plain"), arms("slow")], reference=arms("plain"), batches=(3, 1), progress=said.append
        )
        assert [(row.batch, row.backend) for row in report.rows] == [
            (batch, name) for batch in (1, 3) for name in ("plain", "plain" + AA_SUFFIX, "slow")
        ]
        assert said
        for row in report.rows:
            assert row.status == "ok", row.reason
            assert row.latency is not None
            assert row.latency.samples >= row.rounds * SHORT.min_calls
            assert row.processes == 2
            assert row.precision == "fp32"
            assert row.parity is not None
            assert row.parity.passed
            assert row.peak_memory_bytes is not None
            assert 1 << 23 < row.peak_memory_bytes < 1 << 30
            assert row.onnx_sha256 == bundle.onnx_sha256
        slow = row_of(report, "slow", 3)
        assert slow.ratio is not None
        assert slow.ratio.against == "plain"
        assert slow.ratio.estimate is not None
        assert slow.ratio.estimate.value < 0.7
        baseline = row_of(report, "plain", 3).ratio
        assert baseline is not None
        assert baseline.verdict == BASELINE
        schema = json.loads((Path(__file__).parents[1] / "docs" / "schemas" / "bench.schema.json").read_text())
        jsonschema.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)), schema)

    @pytest.mark.parametrize("batch", [1, 4])
    def test_an_image_behind_the_first_batch_counts(
        self, bundle: Bundle, arms: Callable[[str], Backend], tmp_path: Path, batch: int
    ) -> None:
        images = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
        images[:, 0, 0, 0] = 0
        images[6, 0, 0, 0] = 9
        np.save(tmp_path / "images.npy", images)
        backends = [arms("plain"), arms("picky")]
        report = run(bundle, backends, reference=arms("plain"), batches=(batch,), inputs=tmp_path / "images.npy")
        good, bad = (row_of(report, name, batch).parity for name in ("plain", "picky"))
        assert good is not None
        assert bad is not None
        compared = {1: 10, 4: 12}[batch]  # the last batch is filled up
        assert (good.passed, good.images) == (True, compared)
        assert (bad.passed, bad.images) == (False, compared)
        short = run(bundle, backends, reference=arms("plain"), batches=(batch,))
        random = row_of(short, "plain", batch).parity
        assert random is not None
        assert random.images == batch

    def test_printing_libraries_cannot_disturb_the_protocol(
        self, bundle: Bundle, arms: Callable[[str], Backend], capfd: pytest.CaptureFixture[str]
    ) -> None:
        report = run(bundle, [arms("plain"), arms("garbage")], reference=arms("plain"))
        assert row_of(report, "garbage").status == "ok"
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("fault", "status", "words"),
        [
            ("segfault", "failed", ["SIGSEGV", "about to die"]),
            ("raise", "failed", ["RuntimeError: first line"]),
            ("refuse", "failed", ["cannot be loaded", "export again"]),
            ("missing", "skipped", ["a_module_that_is_not_there"]),
        ],
    )
    def test_an_arm_that_cannot_run_is_a_row_that_says_why(
        self, bundle: Bundle, arms: Callable[[str], Backend], fault: str, status: str, words: list[str]
    ) -> None:
        report = run(bundle, [arms("plain"), arms(fault)], reference=arms("plain"))
        row = row_of(report, fault)
        assert (row.status, row.latency, row.ratio) == (status, None, None)
        assert all(word in row.reason for word in words), row.reason
        assert "\n" not in row.reason
        assert row_of(report, "plain").status == "ok"
        assert report.exit_code in (0, 5)

    @pytest.mark.parametrize(
        ("fault", "words"),
        [("wrong", ""), ("nan", "NaN in row 1 of 2"), ("unnamed", "no output named 'logits'")],
    )
    def test_no_speedup_is_reported_of_a_wrong_result(
        self, bundle: Bundle, arms: Callable[[str], Backend], fault: str, words: str
    ) -> None:
        report = run(bundle, [arms("slow"), arms(fault)], reference=arms("slow"))
        row = row_of(report, fault)
        assert row.parity is not None
        assert row.parity.passed is False
        assert words in row.parity.reason
        assert row.latency is not None
        assert row.ratio is not None
        assert (row.ratio.estimate, row.ratio.verdict) == (None, WITHHELD)
        assert "failed parity" in row.ratio.reason
        assert report.exit_code == 3
        assert "FAIL" in report.to_text()
        json.dumps(report.to_json(), allow_nan=False)

    def test_no_speedup_is_reported_over_a_wrong_baseline(self, bundle: Bundle, arms: Callable[[str], Backend]) -> None:
        report = run(bundle, [arms("wrong"), arms("plain")], reference=arms("plain"))
        ratio = row_of(report, "plain").ratio
        assert ratio is not None
        assert (ratio.estimate, ratio.verdict, ratio.reason) == (None, WITHHELD, "wrong failed parity")

    def test_probabilities_are_compared_with_the_softmax_of_the_logits(
        self, bundle: Bundle, arms: Callable[[str], Backend]
    ) -> None:
        report = run(bundle, [arms("softmax")], reference=arms("plain"))
        parity = row_of(report, "softmax").parity
        assert parity is not None
        assert parity.passed

    def test_without_a_reference_nothing_is_called_verified(
        self, bundle: Bundle, arms: Callable[[str], Backend]
    ) -> None:
        report = run(bundle, [arms("plain"), arms("slow")], reference=arms("refuse"))
        row = row_of(report, "slow")
        assert row.parity is not None
        assert row.parity.passed is None
        assert row.ratio is not None
        assert row.ratio.verdict == WITHHELD
        assert report.exit_code == 4

    def test_nothing_is_left_behind(
        self, bundle: Bundle, arms: Callable[[str], Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        run(bundle, [arms("plain"), arms("segfault")], reference=arms("plain"))
        assert list(temporary.iterdir()) == []
        assert children() == []

    def test_ctrl_c_ends_every_process(
        self, bundle: Bundle, arms: Callable[[str], Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))

        def interrupt(line: str) -> None:
            if "fresh processes" in line:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

        with pytest.raises(KeyboardInterrupt):
            run(bundle, [arms("plain"), arms("hang")], reference=arms("plain"), progress=interrupt)
        assert list(temporary.iterdir()) == []
        assert children() == []

    def test_the_folder_of_a_killed_benchmark_is_removed_by_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        abandoned, young, other = (tmp_path / f"{prefix}1" for prefix in (PREFIX, PREFIX + "young", "other-"))
        with working_folder() as used:
            for folder in (abandoned, young, other):
                folder.mkdir()
                (folder / "images1.npy").write_bytes(b"x")
            for folder in (abandoned, other, used):
                os.utime(folder, (0, 0))
            with working_folder() as folder:
                assert folder.is_dir()
            assert not abandoned.exists()
            assert used.is_dir()
            assert young.is_dir()
            assert other.is_dir()
        assert not used.exists()

    def test_a_hanging_arm_costs_its_part_of_the_budget(self, bundle: Bundle, arms: Callable[[str], Backend]) -> None:
        report = run(bundle, [arms("plain"), arms("hang")], reference=arms("plain"), duration_s=12.0)
        row = row_of(report, "hang")
        assert (row.status, row.over_budget) == ("skipped", True)
        assert "still loading after 4 s (budget 12 s)" in row.reason
        assert children() == []

    def test_a_replaced_bundle_is_noticed(self, bundle: Bundle, arms: Callable[[str], Backend]) -> None:
        def replace(line: str) -> None:
            (bundle.path / "model.onnx").write_bytes(b"other model")

        with pytest.raises(BundleError, match="replaced during the benchmark"):
            run(bundle, [arms("plain")], reference=arms("plain"), progress=replace)


def children() -> list[int]:
    """Processes started by this one that still exist."""
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)]


class Simulation:
    """Workers whose costs are known, on a clock that only they advance.

    Args:
        call_s: seconds per image and arm.
        compile_s: what the first call of a batch size costs more, per arm; a tenth of it in later processes.
        load_s: until a worker is ready.
    """

    def __init__(
        self, call_s: dict[str, float], compile_s: dict[str, float] | None = None, load_s: float = 1.0
    ) -> None:
        self.now = 0.0
        self.call_s = call_s
        self.compile_s = compile_s or {}
        self.load_s = load_s
        self.compiled: set[tuple[str, int]] = set()
        self.measuring: list[str] = []
        self.checked: list[tuple[str, int, int]] = []
        self.alive: set[SimulatedWorker] = set()
        self.random = np.random.default_rng(0)

    def launch(self, arm: Backend, label: str) -> SimulatedWorker:
        return SimulatedWorker(self, arm.name, self.now + self.load_s)

    def spend(self, cost_s: float, timeout_s: float) -> None:
        self.now += min(cost_s, timeout_s)
        if cost_s > timeout_s:
            raise WorkerError("late", timed_out=True)

    def schedule(self, arms: list[str], batches: list[int], duration_s: float, **options: Any) -> Schedule:
        states, _ = make_states([Backend(name, name, "no:module") for name in arms], batches, None)
        return Schedule(
            states,
            ArmState("reference", Backend("reference", "", "no:module")),
            self.launch,
            make_inputs=lambda batch: {},
            batches=batches,
            duration_s=duration_s,
            started=0.0,
            clock=lambda: self.now,
            **options,
        )


class SimulatedWorker:
    def __init__(self, simulation: Simulation, name: str, ready_at: float) -> None:
        self.simulation = simulation
        self.name = name
        self.ready_at = ready_at
        self.batch = 0
        simulation.alive.add(self)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        self.simulation.spend(max(0.0, self.ready_at - self.simulation.now), timeout_s)
        return {
            "event": "ready",
            "load_s": 1.0,
            "precision": "fp32",
            "graph_precision": "fp32",
            "notes": [],
            "versions": {},
        }

    def request(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        sim = self.simulation
        idle = {"idle_s": 1.0, "idle_cpu_s": 0.0}
        if command["command"] == "prepare":
            self.batch = command["batch"]
            key = (self.name, self.batch)
            extra_s = sim.compile_s.get(self.name, 0.0) * (0.1 if key in sim.compiled else 1.0)
            call_s = sim.call_s[self.name] * self.batch
            sim.spend(extra_s + (1 + command["estimate_calls"]) * call_s, timeout_s)
            sim.compiled.add(key)
            return {"first_call_s": extra_s + call_s, "call_s": call_s, "outputs": "none", **idle}
        if command["command"] == "check":
            sim.checked.append((self.name, command["batch"], command["calls"]))
            sim.spend(command["calls"] * sim.call_s[self.name] * self.batch, timeout_s)
            return {"outputs": "none", "rows": command["calls"] * self.batch, **idle}
        sim.measuring.append(self.name)
        call_s = sim.call_s[self.name] * self.batch * float(np.exp(sim.random.normal(0.0, 0.01)))
        calls = max(command["min_calls"], int(command["min_s"] / call_s) + 1)
        sim.spend((calls + command["warmup_calls"]) * call_s, timeout_s)
        return {"latencies_s": [call_s] * calls, "peak_memory_bytes": 1 << 20, **idle}

    def close(self) -> None:
        self.simulation.alive.discard(self)


FAST = {"reference": 0.01, "a": 0.01, "b": 0.005, "c": 0.002}


def processes(schedule: Schedule, name: str, batch: int) -> int:
    return next(state for state in schedule.states if state.name == name).processes(batch)


def lost(schedule: Schedule, name: str, batch: int) -> str:
    state = next(state for state in schedule.states if state.name == name)
    return state.lost[batch].reason if batch in state.lost else ""


class TestSchedule:
    def test_more_images_are_run_once_in_a_share_of_the_time(self) -> None:
        sim = Simulation({"reference": 0.2, "a": 0.01, "b": 0.3})
        sim.schedule(["a", "b"], [1, 8], 300.0, make_checks=lambda batch: {"calls": 64 // batch}).run()
        assert sim.now <= 300.0
        calls = {(name, batch): calls for name, batch, calls in sim.checked}
        assert len(sim.checked) == 2 * 4, "the baseline a has its copy"
        assert (calls["a", 1], calls["a", 8]) == (64, 8)
        assert 0 < calls["reference", 1] <= 30
        assert 0 < calls["b", 1] <= 20

    def test_a_call_that_takes_more_than_the_share_is_not_made(self) -> None:
        sim = Simulation({"reference": 0.01, "a": 1.0})
        sim.schedule(["a"], [1], 40.0, make_checks=lambda batch: {"calls": 64}).run()
        assert {name for name, _, _ in sim.checked} == {"reference"}

    def test_no_more_images(self) -> None:
        sim = Simulation(FAST)
        sim.schedule(["a"], [1], 30.0, make_checks=lambda batch: None).run()
        assert sim.checked == []

    @pytest.mark.parametrize("duration_s", [2.0, 5.0, 12.0, 30.0, 60.0, 300.0])
    @pytest.mark.parametrize("compile_s", [0.0, 4.0, 1000.0])
    @pytest.mark.parametrize("slowness", [0.1, 1.0, 20.0])
    def test_the_budget_is_kept(self, duration_s: float, compile_s: float, slowness: float) -> None:
        sim = Simulation({k: v * slowness for k, v in FAST.items()}, {"b": compile_s})
        sim.schedule(["a", "b", "c"], [1, 8, 64], duration_s).run()
        assert sim.now <= duration_s
        assert not sim.alive

    def test_enough_time_gives_every_process_and_round(self) -> None:
        sim = Simulation(FAST)
        schedule = sim.schedule(["a", "b", "c"], [1, 8], 600.0)
        schedule.run()
        assert schedule.processes_done == Effort().target_processes
        for state in schedule.states:
            for batch in (1, 8):
                assert len(state.samples[batch]) == Effort().target_processes * Effort().max_rounds
        assert sim.now < 300.0, "the run ends when everything is measured, not when the budget is spent"

    def test_little_time_still_gives_two_processes(self) -> None:
        sim = Simulation(FAST)
        schedule = sim.schedule(["a", "b", "c"], [1, 8], 14.5)
        schedule.run()
        assert [processes(schedule, name, 8) >= 2 for name in ("a", "a" + AA_SUFFIX, "b", "c")] == [True] * 4

    def test_a_batch_size_that_does_not_fit_says_how_much_time_it_needs(self) -> None:
        sim = Simulation(FAST)
        schedule = sim.schedule(["a", "b", "c"], [1, 64], 20.0)
        schedule.run()
        assert processes(schedule, "a", 1) >= 2
        reason = lost(schedule, "a", 64)
        assert "does not fit into the budget of 20 s" in reason
        needed_s = float(reason.split("about ")[1].split(" s")[0])
        again = Simulation(FAST).schedule(["a", "b", "c"], [1, 64], needed_s)
        again.run()
        assert processes(again, "a", 64) >= 2

    def test_long_compilation_is_given_up_and_the_others_are_measured(self) -> None:
        sim = Simulation(FAST, {"b": 1000.0})
        schedule = sim.schedule(["a", "b", "c"], [1, 8], 60.0)
        schedule.run()
        assert "preparing batch 1 (compilation) was not done after" in lost(schedule, "b", 1)
        assert all(processes(schedule, name, 8) >= 2 for name in ("a", "c"))

    def test_compilation_of_the_smaller_batch_sizes_is_kept(self) -> None:
        sim = Simulation(FAST, {"b": 12.0})
        schedule = sim.schedule(["a", "b", "c"], [1, 8, 16], 60.0)
        schedule.run()
        assert processes(schedule, "b", 1) >= 2
        assert "preparing batch 8 (compilation) would take about 12 s" in lost(schedule, "b", 8)
        assert lost(schedule, "b", 16)
        assert all(processes(schedule, name, 16) >= 2 for name in ("a", "c"))

    def test_costly_compilation_does_not_cost_the_others_their_processes(self) -> None:
        sim = Simulation(FAST, {"b": 24.0})
        schedule = sim.schedule(["a", "b"], [1], 80.0)
        schedule.run()
        assert processes(schedule, "b", 1) >= 2
        assert processes(schedule, "a", 1) == 5

    def test_rounds_are_interleaved_and_shuffled(self) -> None:
        sim = Simulation(FAST)
        schedule = sim.schedule(["a", "b", "c"], [1], 600.0)
        schedule.run()
        size = len(schedule.states)
        rounds = [tuple(sim.measuring[i : i + size]) for i in range(0, len(sim.measuring), size)]
        assert all(sorted(r) == sorted(["a", "a", "b", "c"]) for r in rounds)
        assert len(set(rounds)) > 6

    def test_the_order_is_seeded(self) -> None:
        orders = []
        for seed in (1, 1, 2):
            sim = Simulation(FAST)
            sim.schedule(["a", "b", "c"], [1], 60.0, seed=seed).run()
            orders.append(sim.measuring)
        assert orders[0] == orders[1] != orders[2]

    def test_identical_arms_show_no_difference(self) -> None:
        sim = Simulation({"reference": 0.01, "a": 0.01, "b": 0.01})
        schedule = sim.schedule(["a", "b"], [1], 60.0)
        schedule.run()
        rows, aa = verified_rows(schedule, [1])
        assert aa[0].half_range is not None
        assert aa[0].half_range < 0.03
        assert [row.ratio.verdict for row in rows] == [BASELINE, NO_DIFFERENCE, NO_DIFFERENCE]


def verified_rows(schedule: Schedule, batches: list[int]) -> Any:
    """The rows with outputs that pass the gate."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.npz"
        np.savez(path, logits=np.random.default_rng(0).standard_normal((1, 10)).astype(np.float32))
        for state in (schedule.reference, *schedule.states):
            state.outputs = {batch: [path] for batch in batches}
        return assemble_rows(schedule.states, schedule.reference, schedule.states[0], Subject(batches, 1, "0" * 64, 0))


def test_the_aa_arm_is_mandatory() -> None:
    schedule = Simulation(FAST).schedule(["a", "b"], [1], 60.0)
    assert [state.name for state in schedule.states] == ["a", "a" + AA_SUFFIX, "b"]
    schedule.run()
    without = [state for state in schedule.states if not state.name.endswith(AA_SUFFIX)]
    with pytest.raises(ValueError, match="'a' has no A/A copy"):
        assemble_rows(without, schedule.reference, without[0], Subject([1], 1, "0" * 64, 0))


class TestPlan:
    EFFORT = Effort()

    def plan(self, remaining_s: float, blocks: dict[int, BlockCost], done: int = 0) -> Any:
        return plan_rest(remaining_s, startup_s=2.0, blocks=blocks, processes_done=done, effort=self.EFFORT)

    def test_processes_come_before_rounds(self) -> None:
        plan = self.plan(40.0, {1: BlockCost(0.5, 1.0)})
        assert plan.processes == 5
        assert plan.rounds[1] > 1

    def test_two_processes_or_none(self) -> None:
        assert self.plan(10.0, {1: BlockCost(0.5, 1.0)}).processes == 2
        short = self.plan(7.0, {1: BlockCost(0.5, 1.0)})
        assert (short.processes, short.rounds) == (0, {})
        assert 7.0 + short.missing_s[1] >= 1.15 * 2 * (2.0 + 0.5 + 1.0) - 1e-9

    def test_small_batch_sizes_are_admitted_first(self) -> None:
        plan = self.plan(20.0, {64: BlockCost(20.0, 50.0), 1: BlockCost(0.1, 0.5)})
        assert set(plan.rounds) == {1}
        assert set(plan.missing_s) == {64}

    def test_rounds_go_to_the_batch_size_that_had_the_least_time(self) -> None:
        plan = self.plan(60.0, {1: BlockCost(0.0, 0.5), 8: BlockCost(0.0, 2.0)})
        assert plan.rounds[1] > plan.rounds[8]

    def test_the_plan_fits(self) -> None:
        for remaining_s in np.linspace(1, 200, 40):
            plan = self.plan(float(remaining_s), {1: BlockCost(0.4, 0.7), 8: BlockCost(1.0, 3.0)})
            costs = {1: (0.4, 0.7), 8: (1.0, 3.0)}
            cost_s = plan.processes * (2.0 + sum(costs[b][0] + n * costs[b][1] for b, n in plan.rounds.items()))
            assert cost_s <= remaining_s

    def test_nothing_after_the_target(self) -> None:
        assert self.plan(1000.0, {1: BlockCost(0.1, 0.1)}, done=5).processes == 0

    def test_no_arms_left(self) -> None:
        assert self.plan(1000.0, {}).processes == 0


class TestArguments:
    def test_batches_are_sorted(self) -> None:
        assert check_batches((8, 1), max_batch=64, fixed_batch=None) == [1, 8]

    @pytest.mark.parametrize(
        ("batches", "words"),
        [
            ((), "no batch size"),
            ((0,), "batch size 0 .* takes 1 to 64"),
            ((-1,), "batch size -1"),
            ((1, 65), "batch size 65 .* takes 1 to 64"),
            ((8, 8), "8 is given twice"),
            ((1.5,), "1.5"),
            ((True,), "True"),
        ],
    )
    def test_impossible_batches_say_what_is_allowed(self, batches: tuple[Any, ...], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            check_batches(batches, max_batch=64, fixed_batch=None)

    def test_a_fixed_graph_takes_its_batch_only(self) -> None:
        assert check_batches((4,), max_batch=4, fixed_batch=4) == [4]
        with pytest.raises(UsageError, match="fixed to 4"):
            check_batches((1,), max_batch=4, fixed_batch=4)

    @pytest.mark.parametrize(
        ("onnx", "expected"),
        [({}, (1, 8, 64)), ({"max_batch": 16, "batch": None}, (1, 8)), ({"max_batch": 4, "batch": 4}, (4,))],
        ids=["unknown", "up to 16", "fixed to 4"],
    )
    def test_the_default_batches_fit_the_bundle(
        self, tmp_path: Path, onnx: dict[str, Any], expected: tuple[int, ...]
    ) -> None:
        assert default_batches(write_bundle(tmp_path / "b.evit", **onnx)) == expected

    def test_an_unknown_backend_gets_a_suggestion(self) -> None:
        with pytest.raises(UsageError) as caught:
            resolve_backends(["onnxruntim"])
        assert "did you mean 'onnxruntime'?" in caught.value.hint

    def test_a_backend_twice_and_none_at_all(self) -> None:
        with pytest.raises(UsageError, match="given twice"):
            resolve_backends(["torch-eager", "torch-eager"])
        with pytest.raises(UsageError, match="no backend"):
            resolve_backends([])

    def test_all_known_arms_by_default(self) -> None:
        always = [arm.name for arm in resolve_backends(None) if arm.default == "always"]
        assert always == ["torch-eager", "torch-compile", "onnxruntime"]
        assert all(arm.why_not() is None for arm in BACKENDS.values() if arm.name in ("torch-eager", "onnxruntime"))

    def test_the_baseline_is_the_named_one_or_the_first_that_can_run(self) -> None:
        able, unable = Backend("able", "", "m:f"), Backend("unable", "", "m:f", modules=("a_module_that_is_not_there",))
        states, base = make_states([unable, able], [1], None)
        assert [state.name for state in states] == ["unable", "able", "able" + AA_SUFFIX]
        assert base.name == "able"
        assert "pip install a_module_that_is_not_there" in states[0].lost[1].reason
        assert make_states([unable, able], [1], "unable")[1].name == "unable"
        with pytest.raises(UsageError, match="'abel' is not measured"):
            make_states([able], [1], "abel")

    @pytest.mark.parametrize("options", [{"duration_s": 0.0}, {"duration_s": float("nan")}, {"threads": 0}], ids=str)
    def test_impossible_settings(self, bundle: Bundle, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="must be a positive number"):
            run_bench(bundle, batches=(1,), **options)

    def test_a_missing_compiler_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "no-such-compiler" in (BACKENDS["torch-compile"].why_not() or "")


class TestEstimate:
    """A reference call in a slow spell of the machine once made a benchmark of 220 s ask for 1080 s."""

    @pytest.mark.parametrize(("calls", "seconds"), [(1, 0.2), (3, 0.0)])
    def test_the_least_of_the_calls_counts(self, tmp_path: Path, calls: int, seconds: float) -> None:
        spell = [0.0, 0.2, 0.0, 0.2]

        class Slow:
            inputs = (SimpleNamespace(name="images", dtype="float32"),)

            def infer(self, feed: object) -> dict[str, np.ndarray]:
                time.sleep(spell.pop(0))
                return {"logits": np.zeros((1, 2), np.float32)}

        images = tmp_path / "images.npy"
        np.save(images, np.zeros((1, 3, 4, 4), np.float32))
        reply = Worker(Slow(), str(tmp_path / "out")).prepare(1, str(images), 2, estimate_calls=calls)  # type: ignore[arg-type]
        assert (reply["call_s"] >= 0.2) is (seconds > 0)
        assert len(spell) == 3 - calls


class TestMoreImages:
    """Each arm has run as many as its time allowed."""

    def test_a_worker_holds_one_batch_of_them_at_a_time(self, tmp_path: Path) -> None:
        class Sums:
            inputs = (SimpleNamespace(name="input", dtype="float32"),)

            def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {"logits": feed["input"].sum(axis=(1, 2, 3))[:, None]}

        images = np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype(np.float32)
        np.save(tmp_path / "images.npy", images)
        worker = Worker(Sums(), str(tmp_path / "out"))  # type: ignore[arg-type]
        tracemalloc.start()
        try:
            reply = worker.check(4, 16, str(tmp_path / "images.npy"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < images.nbytes / 4, "more than a quarter of the images would count as the runtime's memory"
        assert reply["rows"] == 64
        with np.load(reply["outputs"]) as outputs:
            np.testing.assert_array_equal(outputs["logits"][:, 0], images.sum(axis=(1, 2, 3)))

    @staticmethod
    def compared(tmp_path: Path, rows: int, truth_rows: int, given: int | None = None) -> ParityResult | None:
        logits = np.random.default_rng(0).standard_normal((16, 10)).astype(np.float32)
        states = []
        for name, count in (("candidate", rows), ("truth", truth_rows)):
            state = ArmState(name, Backend(name, "", "no:module"))
            path = tmp_path / f"{name}.npz"
            kept = count if given is None or name == "truth" else given
            np.savez(path, logits=logits[:kept] + (name == "candidate") * 1e-7)
            if count:
                state.checked[2] = path, count
            states.append(state)
        return _compare_more(*states, 2, TOLERANCES["fp32"])

    @pytest.mark.parametrize(("rows", "truth_rows", "images"), [(8, 8, 8), (8, 4, 4), (4, 8, 4)])
    def test_the_fewer_of_both_are_compared(self, tmp_path: Path, rows: int, truth_rows: int, images: int) -> None:
        result = self.compared(tmp_path, rows, truth_rows)
        assert result is not None
        assert (result.passed, result.images) == (True, images)

    @pytest.mark.parametrize(("rows", "truth_rows"), [(0, 8), (8, 0)])
    def test_one_had_no_time(self, tmp_path: Path, rows: int, truth_rows: int) -> None:
        assert self.compared(tmp_path, rows, truth_rows) is None

    @pytest.mark.parametrize(("rows", "truth_rows"), [(8, 8), (8, 4), (4, 8)])
    def test_a_missing_row_fails(self, tmp_path: Path, rows: int, truth_rows: int) -> None:
        result = self.compared(tmp_path, rows, truth_rows, given=rows - 1)
        assert result is not None
        assert result.passed is False
