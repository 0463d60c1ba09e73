"""`bench --select`: the fastest backend within a tolerance, why the others lost, and that fast and wrong never wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evit_deploy.backends import BACKENDS, Backend, deployable_backends, registry
from evit_deploy.bench.assemble import AA_SUFFIX, Subject, assemble_rows, overridden
from evit_deploy.bench.measure import run_bench
from evit_deploy.bench.plan import Effort
from evit_deploy.bench.report import BenchReport
from evit_deploy.bench.select import BatchSelection, Candidate, select_backends
from evit_deploy.bench.state import ArmState, Lost, RoundSample
from evit_deploy.bundle import Bundle
from evit_deploy.cli.bench import _raise_unless_done
from evit_deploy.errors import LimitError, MissingDependencyError, ParityError, UsageError
from tests.test_bench_report import CALLS, ENVIRONMENT, LOGITS, PROTOCOL
from tests.test_schemas import check

OURS = "onnxruntime"
SHORT = Effort(target_processes=2, max_rounds=2, min_round_s=0.02, warmup_s=0.0)


def checked(report: BenchReport) -> dict[str, Any]:
    document = report.to_json()
    check(document)
    return document


def off_by(error: float, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Logits whose RMS-relative error is `error`, with the same winners."""
    return logits * np.float32(1 + error)


def with_one_class_off(logits: np.ndarray) -> np.ndarray:
    """An error of 0.3 rms in a single number of the first row."""
    changed = logits.copy()
    changed[0, np.abs(logits[0]).argmin()] += 0.3 * np.sqrt(np.square(logits[0]).mean())
    return changed


def with_rows_swapped(logits: np.ndarray) -> np.ndarray:
    return logits[::-1].copy()


class Made:
    """A benchmark at batch 1 whose samples are made up; the first backend is the baseline."""

    def __init__(self, folder: Path, logits: np.ndarray = LOGITS) -> None:
        self.folder = folder
        self.logits = logits
        self.states: list[ArmState] = []
        self.reference = self._state("reference", logits, "fp32")
        self.add(OURS, 0.010, error=1e-7)
        self.add(OURS + AA_SUFFIX, 0.010, error=1e-7)

    def add(
        self,
        name: str,
        latency_s: float,
        *,
        error: float = 0.0,
        outputs: np.ndarray | None = None,
        precision: str = "fp32",
        spread: float = 0.005,
        processes: int = 5,
    ) -> ArmState:
        state = self._state(name, off_by(error, self.logits) if outputs is None else outputs, precision)
        rng = np.random.default_rng(len(self.states))
        state.samples[1] = [
            RoundSample(process, index, (latency_s * float(np.exp(rng.normal(0.0, spread))),) * CALLS)
            for process in range(processes)
            for index in range(6)
        ]
        self.states.append(state)
        return state

    def lose(self, name: str, lost: Lost) -> None:
        self.states.append(ArmState(name, Backend(name, "", "m:f"), lost={1: lost}))

    def report(self, tolerance: float) -> BenchReport:
        subject = Subject([1], 2, "0" * 64, 0, overridden(tolerance, only_widen=True))
        rows, aa = assemble_rows(self.states, self.reference, self.states[0], subject)
        selection = select_backends(self.states, rows, aa, tolerance, seed=0)
        protocol = {**PROTOCOL, "tolerance_rms_rel": tolerance}
        return BenchReport("m0.evit", "msra-m0", "0" * 64, rows, aa, ENVIRONMENT, protocol, selection)

    def select(self, tolerance: float) -> BatchSelection:
        selection = self.report(tolerance).selection
        assert selection is not None
        (batch,) = selection.batches
        return batch

    def _state(self, name: str, outputs: np.ndarray, precision: str) -> ArmState:
        path = self.folder / f"{name.replace('/', '')}.npz"
        np.savez(path, logits=outputs)
        state = ArmState(
            name,
            Backend(name, "", "m:f"),
            precision=precision,
            graph_precision=precision,
            outputs={1: [path]},
            first_call_s={1: [0.5]},
            peak_memory_bytes={1: 1 << 28},
        )
        return state


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def candidate_of(batch: BatchSelection, name: str) -> Candidate:
    return next(candidate for candidate in batch.candidates if candidate.backend == name)


def selected(batch: BatchSelection) -> str | None:
    return batch.selected.backend if batch.selected else None


class TestChoice:
    def test_the_fastest_within_the_tolerance(self, made: Made) -> None:
        made.add("openvino", 0.009, error=2e-7)
        made.add("openvino-bf16", 0.005, error=3e-3, precision="bf16")
        batch = made.select(1e-2)
        assert selected(batch) == "openvino-bf16"
        assert batch.selected is not None
        assert "the fastest within the tolerance" in batch.selected.reason
        slower = candidate_of(batch, OURS)
        assert (slower.verdict, slower.reason) == ("slower", "slower: takes 2.00x as long as openvino-bf16")
        assert slower.slowdown is not None
        assert slower.slowdown.ci_low < 2.0 < slower.slowdown.ci_high
        assert candidate_of(batch, "openvino").verdict == "slower"

    def test_a_narrower_tolerance_leaves_it_out(self, made: Made) -> None:
        made.add("openvino-bf16", 0.005, error=3e-3, precision="bf16")
        batch = made.select(1e-5)
        assert selected(batch) == OURS
        lost = candidate_of(batch, "openvino-bf16")
        assert (lost.verdict, lost.reason) == ("over the tolerance", "over the tolerance: 3.0e-03 > 1e-05")
        assert batch.selected is not None
        assert "the only one within the tolerance" in batch.selected.reason

    def test_a_tie_goes_to_the_more_accurate(self, made: Made) -> None:
        made.add("openvino-bf16", 0.0099, error=3e-3, precision="bf16")
        batch = made.select(1e-2)
        assert selected(batch) == OURS
        assert batch.selected is not None
        assert "no difference to openvino-bf16, and more accurate" in batch.selected.reason
        lost = candidate_of(batch, "openvino-bf16")
        assert lost.verdict == "no difference"
        assert lost.reason.startswith("no difference, less accurate: 3.0e-03 > ")

    def test_more_than_3_percent_slower_in_the_median_is_no_tie(self, made: Made) -> None:
        made.add("openvino", 0.0092, error=3e-6, spread=0.2)
        batch = made.select(1e-2)
        assert selected(batch) == "openvino"
        lost = candidate_of(batch, OURS)
        assert lost.verdict == "slower"
        assert lost.reason.endswith("x: not certain")
        assert lost.slowdown is not None
        assert lost.slowdown.ci_low < 1.0 < lost.slowdown.value

    def test_the_fastest_is_so_in_the_rounds_that_both_share(self, made: Made) -> None:
        """Three of five processes ran in a slow spell that hit one backend's median, not its ratios."""
        state = made.add("openvino", 0.0095, error=3e-6)
        for arm in (*made.states,):
            slow = [dataclasses.replace(one, latencies_s=(3 * one.latencies_s[0],) * CALLS) for one in arm.samples[1]]
            arm.samples[1] = [b if b.process in (0, 1) else a for a, b in zip(arm.samples[1], slow, strict=True)]
        ours = made.states[0]
        ours.samples[1] += [RoundSample(2, index, (0.009,) * CALLS) for index in range(6, 40)]
        assert np.median([one.latencies_s for one in ours.samples[1]]) < np.median(
            [one.latencies_s for one in state.samples[1]]
        )
        assert selected(made.select(1e-2)) == "openvino"

    def test_a_tie_of_about_the_same_accuracy_goes_to_the_faster(self, made: Made) -> None:
        made.add("openvino", 0.0099, error=9e-7, spread=0.02)
        batch = made.select(1e-5)
        assert selected(batch) == "openvino"
        assert candidate_of(batch, OURS).reason.endswith("x: not certain")

    def test_a_tie_does_not_take_in_one_that_is_slower_than_the_fastest(self, made: Made) -> None:
        made.add("accurate", 0.0120)
        made.add("near", 0.0099, error=2e-6)
        batch = made.select(1e-2)
        assert selected(batch) == OURS
        assert candidate_of(batch, "accurate").verdict == "slower"

    @pytest.mark.parametrize(
        ("outputs", "verdict", "words"),
        [
            (np.random.default_rng(1).standard_normal((1, 10)), "over the tolerance", "over the tolerance: 1."),
            (np.zeros((1, 10)), "over the tolerance", "over the tolerance: 1.0e+00 > 0.01"),
            (np.full((1, 10), np.nan), "wrong", "wrong: "),
            (np.where(np.arange(10) == 3, np.inf, LOGITS), "wrong", "wrong: "),
            (LOGITS[:, :5], "wrong", "wrong: "),
        ],
        ids=["other", "zeros", "nan", "inf", "shape"],
    )
    def test_fast_and_wrong_is_never_selected(self, made: Made, outputs: np.ndarray, verdict: str, words: str) -> None:
        made.add("fast", 0.001, outputs=outputs.astype(np.float32), precision="int8")
        batch = made.select(1e-2)
        assert selected(batch) == OURS
        lost = candidate_of(batch, "fast")
        assert (lost.verdict, lost.slowdown) == (verdict, None)
        assert lost.reason.startswith(words)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (with_one_class_off, "wrong: max_rel 0.3 exceeds 0.25 in row 0 of 2"),
            (with_rows_swapped, "wrong: rows 0 and 1 are swapped"),
        ],
        ids=["one class", "swapped"],
    )
    def test_an_rms_within_the_tolerance_is_not_enough(
        self, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], words: str
    ) -> None:
        rng = np.random.default_rng(2)
        first = rng.standard_normal(1000)
        logits = np.stack([first, first + 0.02 * rng.standard_normal(1000)]).astype(np.float32)
        bench = Made(tmp_path, logits)
        bench.add("fast", 0.001, outputs=change(logits))
        batch = bench.select(5e-2)
        assert selected(batch) == OURS
        lost = candidate_of(batch, "fast")
        assert lost.rms_rel is not None
        assert lost.rms_rel < 5e-2
        assert (lost.verdict, lost.reason, lost.slowdown) == ("wrong", words, None)

    def test_one_wrong_process_is_enough(self, made: Made) -> None:
        state = made.add("fast", 0.001, error=1e-7)
        path = made.folder / "later.npz"
        np.savez(path, logits=off_by(0.3))
        state.outputs[1].append(path)
        assert selected(made.select(1e-2)) == OURS

    def test_a_wide_tolerance_is_wider_than_the_precisions_own(self, made: Made) -> None:
        made.add("rough", 0.005, error=4e-4)
        assert selected(made.select(1e-3)) == "rough"
        assert selected(made.select(1e-5)) == OURS

    @pytest.mark.parametrize(
        ("lost", "verdict", "reason"),
        [
            (Lost("skipped", "openvino is not installed"), "cannot run", "cannot run: openvino is not installed"),
            (Lost("failed", "the process ended"), "failed", "failed: the process ended"),
        ],
    )
    def test_what_could_not_run_says_why(self, made: Made, lost: Lost, verdict: str, reason: str) -> None:
        made.lose("openvino", lost)
        found = candidate_of(made.select(1e-2), "openvino")
        assert (found.verdict, found.reason) == (verdict, reason)

    def test_without_an_interval_the_medians_decide(self, made: Made) -> None:
        made.add("once", 0.005, error=1e-7, processes=1)
        batch = made.select(1e-2)
        assert selected(batch) == "once"
        assert candidate_of(batch, OURS).slowdown is None
        assert "takes 2.0" in candidate_of(batch, OURS).reason


class TestReport:
    def test_text_and_json_say_the_same(self, made: Made) -> None:
        made.add("openvino-bf16", 0.005, error=3e-3, precision="bf16")
        report = made.report(1e-2)
        document = checked(report)
        (batch,) = document["selection"]["batches"]
        assert batch["selected"] == "openvino-bf16"
        text = report.to_text()
        assert "selected at rms_rel <= 0.01" in text
        assert "batch 1: openvino-bf16 in bf16, " in text
        assert "onnxruntime: slower: takes 2.00x as long as openvino-bf16" in text
        assert report.exit_code == 0
        _raise_unless_done(report)

    def test_none_within_is_a_parity_failure(self, made: Made) -> None:
        report = made.report(1e-9)
        assert checked(report)["selection"]["batches"][0]["selected"] is None
        assert "batch 1: none" in report.to_text()
        assert report.exit_code == 3
        with pytest.raises(ParityError, match="no backend stays within 1e-09"):
            _raise_unless_done(report)

    def test_a_wrong_candidate_only_loses(self, made: Made) -> None:
        made.add("fast", 0.001, outputs=np.zeros_like(LOGITS))
        assert made.report(1e-2).exit_code == 0
        unselected = dataclasses.replace(made.report(1e-2), selection=None)
        assert unselected.exit_code == 3

    def test_an_unstable_choice_is_said(self, made: Made) -> None:
        made.add("shaky", 0.005, error=1e-7, spread=0.6)
        report = made.report(1e-2)
        assert "(the rounds of shaky spread by " in report.to_text()
        assert report.exit_code == 5
        with pytest.raises(LimitError):
            _raise_unless_done(report)

    @pytest.mark.parametrize(("over_budget", "code"), [(True, 5), (False, 4)])
    def test_nothing_measured_proves_nothing(self, tmp_path: Path, over_budget: bool, code: int) -> None:
        bench = Made(tmp_path)
        bench.states = [
            ArmState(name, Backend(name, "", "m:f"), lost={1: Lost("skipped", "why", over_budget)})
            for name in (OURS, OURS + AA_SUFFIX)
        ]
        report = bench.report(1e-2)
        assert report.exit_code == code
        with pytest.raises(LimitError if over_budget else MissingDependencyError):
            _raise_unless_done(report)


class TestRun:
    @pytest.mark.exhaustive
    def test_the_digits_model(self, digits_bundle: Bundle) -> None:
        """Whole, with real processes: what is selected is within the tolerance, and bf16 is not at 1e-5."""
        report = run_bench(
            digits_bundle,
            batches=(2,),
            backends=["onnxruntime", "openvino", "openvino-bf16"],
            select=True,
            tolerance=1e-5,
            threads=1,
            effort=SHORT,
            duration_s=120.0,
        )
        document = checked(report)
        (batch,) = document["selection"]["batches"]
        verdicts = {one["backend"]: one["verdict"] for one in batch["candidates"]}
        assert batch["selected"] in ("onnxruntime", "openvino")
        assert verdicts["openvino-bf16"] == (
            "over the tolerance" if BACKENDS["openvino-bf16"].why_not() is None else "cannot run"
        )
        rows = {row["backend"]: row for row in document["rows"]}
        assert rows["openvino"]["precision"] == "fp32"
        assert rows["openvino"]["notes"]
        assert document["environment"]["versions"]["openvino"]

    def test_a_selection_needs_a_tolerance(self, digits_bundle: Bundle) -> None:
        with pytest.raises(UsageError, match="selecting a backend needs a tolerance: for example --tolerance 1e-2"):
            run_bench(digits_bundle, select=True)

    @pytest.mark.parametrize("tolerance", [-1.0, 1.0, float("nan")])
    def test_what_is_no_tolerance(self, digits_bundle: Bundle, tolerance: float) -> None:
        with pytest.raises(UsageError, match="is no tolerance"):
            run_bench(digits_bundle, tolerance=tolerance)

    def test_candidates_are_what_can_run_here(self, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "find_gpus", lambda: ())
        isa: dict[str, Any] = {"bf16": True}
        monkeypatch.setattr(registry, "cpu_isa", lambda: isa)
        names = ["onnxruntime", "openvino", "openvino-bf16", "openvino-mixed"]
        assert [backend.name for backend in deployable_backends(digits_bundle)] == names
        isa["bf16"] = False
        assert [backend.name for backend in deployable_backends(digits_bundle)] == names[:2]
