"""The report: exit codes, the JSON document against its schema, the table, and the verdicts made from samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from evit_deploy.backends import Backend
from evit_deploy.bench.assemble import AA_SUFFIX, Subject, assemble_rows, compare_outputs
from evit_deploy.bench.report import BenchReport, BenchRow
from evit_deploy.bench.state import ArmState, Lost, RoundSample
from evit_deploy.bench.statistics import FASTER, NO_DIFFERENCE, SLOWER, UNSTABLE, WITHHELD
from evit_deploy.parity.gate import TOLERANCES

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "schemas" / "bench.schema.json").read_text())
LOGITS = np.random.default_rng(0).standard_normal((1, 10)).astype(np.float32)
CALLS = 4
PROTOCOL: dict[str, Any] = {
    "duration_s": 60.0,
    "elapsed_s": 41.5,
    "baseline": "torch-eager",
    "batches": [1],
    "seed": 0,
    "processes": 5,
    "target_processes": 5,
    "min_processes": 2,
    "max_rounds": 20,
    "warmup_calls": 2,
    "warmup_s": 0.05,
    "min_calls": 3,
    "min_round_s": 0.15,
    "transfers": "none (CPU)",
    "idle_cpu_share": 0.0,
    "min_difference": 0.03,
    "unstable_spread": 0.25,
    "bootstrap_resamples": 4000,
}
ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00",
    "command_line": ["evit-deploy", "bench"],
    "threads": 2,
    "versions": {"torch": "2.0", "timm": None},
    "cpu": {"model": "a CPU"},
    "platform": "Linux",
    "thread_variables": {},
    "governor": None,
    "load_average_start": [0.1, 0.1, 0.1],
    "load_average_end": None,
}


class Measured:
    """A benchmark at batch 1 whose samples are made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = self._arm("reference", LOGITS)
        self.states: list[ArmState] = []

    def add(
        self,
        name: str,
        latency_s: float,
        *,
        spread: float = 0.005,
        processes: int = 5,
        outputs: np.ndarray = LOGITS,
        precision: str = "fp32",
    ) -> ArmState:
        """An arm with `processes` x 6 rounds of log-normal spread."""
        state = self._arm(name, outputs)
        state.precision = state.graph_precision = precision
        rng = np.random.default_rng(len(self.states))
        state.samples[1] = [
            RoundSample(p, r, (latency_s * float(np.exp(rng.normal(0.0, spread))),) * CALLS)
            for p in range(processes)
            for r in range(6)
        ]
        self.states.append(state)
        return state

    def report(self) -> BenchReport:
        subject = Subject([1], 2, "0" * 64, 0)
        rows, aa = assemble_rows(self.states, self.reference, self.states[0], subject)
        return BenchReport("m0.evit", "msra-m0", "0" * 64, rows, aa, ENVIRONMENT, PROTOCOL)

    def _arm(self, name: str, outputs: np.ndarray) -> ArmState:
        path = self.folder / f"{name.replace('/', '')}.npz"
        np.savez(path, logits=outputs)
        return ArmState(
            name, Backend(name, "", "m:f"), outputs={1: [path]}, first_call_s={1: [0.5]}, peak_memory_bytes={1: 1 << 28}
        )


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    """A baseline of 10 ms and its A/A copy."""
    bench = Measured(tmp_path)
    bench.add("torch-eager", 0.010)
    bench.add("torch-eager" + AA_SUFFIX, 0.010)
    return bench


def row_of(report: BenchReport, backend: str) -> BenchRow:
    return next(row for row in report.rows if row.backend == backend)


def verdict_of(report: BenchReport, backend: str) -> str:
    ratio = row_of(report, backend).ratio
    assert ratio is not None
    return ratio.verdict


@pytest.mark.parametrize(
    ("latency_s", "expected"), [(0.004, FASTER), (0.025, SLOWER), (0.010, NO_DIFFERENCE), (0.0098, NO_DIFFERENCE)]
)
def test_verdicts_from_samples(measured: Measured, latency_s: float, expected: str) -> None:
    measured.add("onnxruntime", latency_s)
    report = measured.report()
    assert verdict_of(report, "onnxruntime") == expected
    assert report.exit_code == 0
    ratio = row_of(report, "onnxruntime").ratio
    assert ratio is not None
    assert ratio.estimate is not None
    assert ratio.estimate.value == pytest.approx(0.010 / latency_s, rel=0.02)


def test_throughput_is_images_per_second(measured: Measured) -> None:
    measured.add("onnxruntime", 0.004, spread=0.0)
    assert row_of(measured.report(), "onnxruntime").throughput_ips == pytest.approx(250.0)


@pytest.mark.parametrize("which", ["torch-eager", "onnxruntime"])
def test_unstable_rounds_are_no_comparison(tmp_path: Path, which: str) -> None:
    bench = Measured(tmp_path)
    bench.add("torch-eager", 0.010, spread=0.5 if which == "torch-eager" else 0.005)
    bench.add("torch-eager" + AA_SUFFIX, 0.010)
    bench.add("onnxruntime", 0.001, spread=0.5 if which == "onnxruntime" else 0.005)
    report = bench.report()
    assert verdict_of(report, "onnxruntime") == UNSTABLE
    ratio = row_of(report, "onnxruntime").ratio
    assert ratio is not None
    assert f"the rounds of {which} spread by" in ratio.reason
    assert report.exit_code == 5


def test_identical_arms_that_differ_make_every_comparison_unstable(tmp_path: Path) -> None:
    bench = Measured(tmp_path)
    bench.add("torch-eager", 0.010)
    bench.add("torch-eager" + AA_SUFFIX, 0.014)
    bench.add("onnxruntime", 0.001)
    report = bench.report()
    assert verdict_of(report, "onnxruntime") == UNSTABLE
    assert report.exit_code == 5


def test_what_identical_arms_differ_by_is_no_speedup(tmp_path: Path) -> None:
    bench = Measured(tmp_path)
    bench.add("torch-eager", 0.010)
    bench.add("torch-eager" + AA_SUFFIX, 0.0112)
    bench.add("onnxruntime", 0.0091)
    assert verdict_of(bench.report(), "onnxruntime") == NO_DIFFERENCE
    bench.states[1] = Measured(tmp_path).add("torch-eager" + AA_SUFFIX, 0.010)
    assert verdict_of(bench.report(), "onnxruntime") == FASTER


def test_one_process_is_no_comparison(measured: Measured) -> None:
    measured.add("onnxruntime", 0.001, processes=1)
    report = measured.report()
    ratio = row_of(report, "onnxruntime").ratio
    assert ratio is not None
    assert (ratio.estimate, ratio.verdict) == (None, WITHHELD)
    assert "fewer than 2 processes" in ratio.reason


@pytest.mark.parametrize("fault", ["wrong", "nan", "inf", "shape"])
def test_a_red_gate_withholds_the_speedup(measured: Measured, fault: str) -> None:
    outputs = LOGITS.copy()
    outputs[0, 0] = {"wrong": outputs[0, 0] + 1.0, "nan": np.nan, "inf": np.inf, "shape": 0.0}[fault]
    measured.add("onnxruntime", 0.001, outputs=outputs[:, :9] if fault == "shape" else outputs)
    report = measured.report()
    row = row_of(report, "onnxruntime")
    assert row.parity is not None
    assert row.parity.passed is False
    assert row.parity.nan == (1 if fault in ("nan", "inf") else 0)
    assert row.ratio is not None
    assert (row.ratio.estimate, row.ratio.verdict) == (None, WITHHELD)
    assert report.exit_code == 3
    validate(report)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", ["wrong", "nan", "inf", "shape", "name"])
def test_one_bad_process_of_several_fails_the_gate(fault: str, place: int) -> None:
    """Also one whose error is no number: it must not count as the smallest."""
    truth, good = {"logits": LOGITS}, {"logits": LOGITS * np.float32(1 + 1e-6)}
    assert compare_outputs(truth, [good, good, good], TOLERANCES["fp32"]).passed
    bad = {
        "wrong": {"logits": LOGITS + 1.0},
        "nan": {"logits": np.where(np.arange(10) == 3, np.float32(np.nan), LOGITS)},
        "inf": {"logits": np.where(np.arange(10) == 3, np.float32(np.inf), LOGITS)},
        "shape": {"logits": LOGITS[:, :9]},
        "name": {"features": LOGITS},
    }[fault]
    processes = [good, good, good]
    processes[place] = bad
    result = compare_outputs(truth, processes, TOLERANCES["fp32"])
    assert result.passed is False
    assert result.reason
    assert result.nan == (1 if fault in ("nan", "inf") else 0)


def test_a_precision_without_tolerance_is_not_verified(measured: Measured) -> None:
    measured.add("onnxruntime", 0.001, precision="unknown")
    report = measured.report()
    assert verdict_of(report, "onnxruntime") == WITHHELD
    assert report.exit_code == 4


def test_a_failed_parity_outranks_an_unstable_row(tmp_path: Path) -> None:
    bench = Measured(tmp_path)
    bench.add("torch-eager", 0.010, spread=0.6)
    bench.add("torch-eager" + AA_SUFFIX, 0.010, spread=0.6)
    bench.add("onnxruntime", 0.001, outputs=LOGITS + 1.0)
    assert bench.report().exit_code == 3


@pytest.mark.parametrize(
    ("lost", "expected"),
    [(Lost("skipped", "torch is not installed"), 4), (Lost("skipped", "does not fit", over_budget=True), 5)],
    ids=["not installed", "no time"],
)
def test_nothing_could_run(tmp_path: Path, lost: Lost, expected: int) -> None:
    bench = Measured(tmp_path)
    bench.states = [ArmState(name, Backend(name, "", "m:f"), lost={1: lost}) for name in ("a", "a" + AA_SUFFIX)]
    report = bench.report()
    assert [row.status for row in report.rows] == ["skipped", "skipped"]
    assert report.exit_code == expected
    assert lost.reason in report.to_text()
    validate(report)


def test_one_backend_that_cannot_run_is_no_failure_of_the_others(measured: Measured) -> None:
    measured.states.append(
        ArmState("torch-compile", Backend("torch-compile", "", "m:f"), lost={1: Lost("skipped", "no C++ compiler")})
    )
    report = measured.report()
    assert report.exit_code == 0
    assert "  torch-compile: skipped: no C++ compiler" in report.to_text()


def test_an_arm_that_broke_later_keeps_no_latency(measured: Measured) -> None:
    state = measured.add("onnxruntime", 0.001, processes=2)
    state.lost[1] = Lost("failed", "the process was ended by signal SIGSEGV")
    row = row_of(measured.report(), "onnxruntime")
    assert (row.status, row.latency, row.ratio) == ("failed", None, None)


def test_an_arm_that_ran_out_of_time_later_keeps_its_latency(measured: Measured) -> None:
    state = measured.add("onnxruntime", 0.001, processes=2)
    state.lost[1] = Lost("skipped", "a round was not done", over_budget=True)
    assert (row_of(measured.report(), "onnxruntime").status, row_of(measured.report(), "onnxruntime").reason) == (
        "ok",
        "",
    )


def test_the_document_fits_its_schema(measured: Measured) -> None:
    measured.add("onnxruntime", 0.004)
    measured.add("other", 0.004, processes=1)
    measured.states.append(
        ArmState("torch-compile", Backend("torch-compile", "", "m:f"), lost={1: Lost("failed", "why")})
    )
    document = validate(measured.report())
    row = next(row for row in document["rows"] if row["backend"] == "onnxruntime")
    assert set(row["latency_ms"]) == {"p50", "p90", "p95", "p99", "mean"}
    assert row["samples"] == 5 * 6 * CALLS
    assert set(row["ratio"]) >= {"against", "value", "ci_low", "ci_high", "verdict"}
    assert document["schema"] == "evit-deploy/bench"


@pytest.mark.parametrize("field", ["rows", "environment", "aa", "protocol"])
def test_the_schema_refuses_a_document_that_lacks_a_part(measured: Measured, field: str) -> None:
    document = measured.report().to_json()
    del document[field]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_schema_refuses_a_speedup_that_is_withheld(measured: Measured) -> None:
    document = measured.report().to_json()
    document["rows"][1]["ratio"]["verdict"] = WITHHELD
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_table(measured: Measured) -> None:
    measured.add("onnxruntime", 0.004)
    text = measured.report().to_text()
    lines = text.splitlines()
    assert lines[0] == "msra-m0  m0.evit  model.onnx 000000000000"
    header = next(line for line in lines if "p99" in line)
    assert "speedup over torch-eager" in header
    row = next(line for line in lines if line.startswith("  onnxruntime"))
    assert "2.50x [" in row
    assert "faster" in row
    assert "pass" in row
    assert max(len(line) for line in lines) <= 150
    assert "two identical arms differed by up to" in text
    assert "took 42 s of 60 s" in text
    assert not text.endswith("\n")


def test_how_many_images_were_compared_is_said_where_it_is_not_the_batch(measured: Measured) -> None:
    report = measured.report()
    counts = [[48, 48], [1, 1], [3, 48], [0, 0]]
    said = ["parity compares 48 images", None, "parity compares 3 to 48 images", None]
    for images, line in zip(counts, said, strict=True):
        rows = [
            replace(row, parity=replace(row.parity, images=count))
            for row, count in zip(report.rows, images, strict=True)
            if row.parity
        ]
        found = [text for text in replace(report, rows=rows).to_text().splitlines() if "parity compares" in text]
        assert found == ([f"  {line}"] if line else [])


def test_p99_of_few_calls_is_marked(measured: Measured) -> None:
    assert "* fewer than 100 calls" not in measured.report().to_text()
    few = measured.add("onnxruntime", 0.004)
    few.samples[1] = few.samples[1][:20]
    text = measured.report().to_text()
    assert "* fewer than 100 calls: p99 is the slowest call" in text
    assert "*" in next(line for line in text.splitlines() if line.startswith("  onnxruntime"))


def validate(report: BenchReport) -> dict[str, Any]:
    """The document after a round trip through strict JSON text, checked against the schema."""
    document: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    return document
