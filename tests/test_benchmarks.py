"""The benchmarks: goals, results and their table, the footprint of a command, and a whole short run of each.

No speed is asserted here.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks import against_eager, export_speed, kernels, readme, suite
from benchmarks.arms import PLAIN_ONNX
from benchmarks.comparison import FULL, MIN_PROCESSES, Case, rows_of
from benchmarks.footprint import measure_command
from benchmarks.help_time import heavy_imports
from benchmarks.kernel_tables import kernels_table
from benchmarks.result import BYTES, COUNT, RATIO, RESULTS, SECONDS, Goal, Result, Row, read_results, write_result
from benchmarks.settings import Settings
from benchmarks.table import markdown, quantity
from benchmarks.workspace import workspace
from evit_deploy.backends import BACKENDS
from evit_deploy.bench.report import AAResult, BenchReport, BenchRow, ParityResult, Ratio
from evit_deploy.bench.statistics import LatencySummary, RatioEstimate
from evit_deploy.errors import EXIT_LIMIT, EXIT_MISSING, EXIT_OK, EvitDeployError
from evit_deploy.kernels import KernelRow, needed_kernels
from evit_deploy.specs import ModelSpec, variant_names
from tests.tiers import tiered
from tests.tiny_bundle import TINY_SPEC

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "benchmarks/result.schema.json").read_text(encoding="utf-8"))
MEBIBYTE = 1024**2
SPEEDUP = Goal(">=", 1.15)


def result(*rows: Row, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "benchmark": "made-up",
        "title": "a benchmark of the tests",
        "goal": "at least 1.15x",
        "command": "python -m benchmarks made-up",
        "protocol": {"quick": False},
        "rows": rows,
    }
    return Result(**{**fields, **changes})


def speedup(value: float | None, **changes: Any) -> Row:
    fields = {"subject": "mit-b1", "quantity": "speedup", "unit": RATIO, "value": value, "batch": 1, "goal": SPEEDUP}
    return Row(**{**fields, **changes})


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        pytest.param(Goal(">=", 1.15), 1.15, True, id="at-least-equal"),
        pytest.param(Goal(">=", 1.15), 1.1499, False, id="at-least-below"),
        pytest.param(Goal("<", 90.0), 89.9, True, id="under"),
        pytest.param(Goal("<", 90.0), 90.0, False, id="under-equal"),
        pytest.param(Goal("<=", 0), 0.0, True, id="at-most-equal"),
        pytest.param(Goal("<=", 0), 1.0, False, id="at-most-above"),
        pytest.param(Goal(">=", 1.15), float("nan"), False, id="nan-at-least"),
        pytest.param(Goal("<", 90.0), float("nan"), False, id="nan-under"),
    ],
)
def test_goals(goal: Goal, value: float, met: bool) -> None:
    assert goal.met(value) is met


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        pytest.param(speedup(1.2, ci_low=1.1, ci_high=1.3), True, id="interval-begins-below-the-goal"),
        pytest.param(speedup(1.1, ci_low=1.0, ci_high=1.3), False, id="interval-ends-above-the-goal"),
        pytest.param(
            speedup(1.2, ci_low=1.16, ci_high=1.3, reason="withheld: parity failed"), False, id="does-not-count"
        ),
        pytest.param(
            speedup(1.3, ci_low=1.16, ci_high=1.5, reason="unstable", unstable=True), True, id="unstable-and-all-above"
        ),
        pytest.param(
            speedup(1.3, ci_low=1.14, ci_high=1.5, reason="unstable", unstable=True),
            False,
            id="unstable-and-partly-below",
        ),
        pytest.param(speedup(1.3, reason="unstable", unstable=True), False, id="unstable-without-interval"),
        pytest.param(speedup(None, reason="withheld: parity failed"), False, id="no-value"),
        pytest.param(speedup(9.9, goal=None), None, id="no-goal"),
    ],
)
def test_a_row_is_judged_by_its_value_or_an_unstable_one_by_its_interval(row: Row, reached: bool | None) -> None:
    assert row.reached is reached
    assert row.to_json()["ci_low"] == row.ci_low


@pytest.mark.parametrize(
    ("rows", "reached"),
    [
        pytest.param((speedup(1.2), speedup(9.9, goal=None)), True, id="rows-without-goal-do-not-matter"),
        pytest.param((speedup(1.2), speedup(1.1)), False, id="one-of-two"),
        pytest.param((speedup(9.9, goal=None),), False, id="nothing-promised"),
    ],
)
def test_a_result_is_reached_by_all_its_goals(rows: tuple[Row, ...], reached: bool) -> None:
    assert result(*rows).reached is reached


def test_a_result_is_valid_and_comes_back_from_its_file(tmp_path: Path) -> None:
    document = result(speedup(1.23456789, ci_low=1.1, ci_high=1.4), speedup(None, reason="skipped")).to_json()
    jsonschema.validate(document, SCHEMA)
    assert document["rows"][0]["value"] == 1.2346
    path = write_result(document, tmp_path / "new")
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    assert read_results(path.parent) == {"made-up": document}


@pytest.mark.parametrize("change", [{"value": None}, {"goal": None}, {"reached": None}, {"unit": "ms"}], ids=str)
def test_the_schema_refuses_rows_that_contradict_themselves(change: dict[str, Any]) -> None:
    document = result(speedup(1.2)).to_json()
    document["rows"][0].update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "evit-deploy/benchmark", "schema_version": 2}'])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(EvitDeployError, match=r"other\.json"):
        read_results(tmp_path)


def arm_row(name: str, ratio: Ratio, **changes: Any) -> BenchRow:
    latency = LatencySummary(5.0, 5.5, 6.0, 7.0, 5.1, 100)
    parity = ParityResult(True, max_abs=1e-6, rms_rel=1e-7, tolerance_rms_rel=2e-5)
    fields = {"backend": name, "batch": 1, "status": "ok", "latency": latency, "ratio": ratio, "parity": parity}
    return BenchRow(**{**fields, **changes})


def bench_report(ratio: Ratio, base: Mapping[str, Any] | None = None) -> BenchReport:
    itself = Ratio(PLAIN_ONNX.name, RatioEstimate(1.0, 1.0, 1.0, 6, 24), "baseline")
    return BenchReport(
        bundle="b.evit",
        model="mit-b1",
        onnx_sha256="0" * 64,
        rows=(arm_row(PLAIN_ONNX.name, itself, **(base or {})), arm_row("onnxruntime", ratio)),
        aa=(AAResult(1, (PLAIN_ONNX.name, f"{PLAIN_ONNX.name} (A/A)"), 0.01, None),),
        environment={"load_average_start": None, "load_average_end": None},
        protocol={"duration_s": 70.0, "elapsed_s": 60.0, "idle_cpu_share": 0.01},
    )


def ratio_of(verdict: str, *, processes: int = 6, value: float | None = 1.2, reason: str = "") -> Ratio:
    estimate = None if value is None else RatioEstimate(value, 1.1, 1.3, processes, 4 * processes)
    return Ratio(PLAIN_ONNX.name, estimate, verdict, reason)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        pytest.param(bench_report(ratio_of("faster")), "", id="faster"),
        pytest.param(bench_report(ratio_of("no difference")), "", id="no-difference"),
        pytest.param(bench_report(ratio_of("unstable", reason="it spread")), "unstable: it spread", id="unstable"),
        pytest.param(
            bench_report(ratio_of("unstable", processes=4, reason="it spread")),
            "measured in 4 fresh processes, 5 are needed: give it more time",
            id="unstable-and-too-few-processes",
        ),
        pytest.param(
            bench_report(ratio_of("withheld", value=None, reason="parity failed")),
            "withheld: parity failed",
            id="withheld",
        ),
        pytest.param(
            bench_report(ratio_of("faster", processes=4)),
            "measured in 4 fresh processes, 5 are needed: give it more time",
            id="too-few-processes",
        ),
        pytest.param(
            bench_report(ratio_of("faster"), {"status": "failed", "reason": "it died"}),
            "plain-onnx failed: it died",
            id="baseline-failed",
        ),
    ],
)
def test_a_ratio_counts_only_where_the_engine_stands_by_it(report: BenchReport, reason: str) -> None:
    (row,) = rows_of(report, Case("mit-b1", SPEEDUP, 70.0), export_speed.COMPARISON, MIN_PROCESSES)
    assert row.reason == reason
    assert row.reached is (not reason)
    jsonschema.validate(result(row).to_json(), SCHEMA)


def test_a_full_measurement_takes_enough_processes() -> None:
    assert FULL.target_processes >= MIN_PROCESSES >= 5


def test_what_is_promised() -> None:
    goals = {model: export_speed.case_of(model).goal for model in ("mit-b1", "mit-l1", "msra-m3", "msa-m3", "msa-m1")}
    assert goals == {
        "mit-b1": Goal(">=", 1.15),
        "mit-l1": Goal(">=", 1.15),
        "msra-m3": Goal(">=", 0.98),
        "msa-m3": Goal(">=", 1.3),
        "msa-m1": None,
    }
    assert export_speed.COMPARISON.batches == (1, 8)
    assert against_eager.COMPARISON.batches == (1,)
    assert {model: goal.limit for model, goal in against_eager.GOALS.items()} == {
        "msra-m3": 3.0,
        "mit-b1": 2.7,
        "msa-m3": 2.0,
    }
    assert against_eager.COMPARISON.baseline is BACKENDS["torch-eager"]


def test_the_table_has_every_row_and_its_conditions() -> None:
    arms = {"baseline": {"p50_ms": 63.51}, "ours": {"p50_ms": 5.234}}
    document = result(
        speedup(1.234, ci_low=1.1, ci_high=1.4, details=arms),
        Row("msa-m3", "wall time", SECONDS, 91.4, goal=Goal("<", 90.0)),
        Row("msa-m3", "peak memory", BYTES, 1.5 * 1024**3),
        speedup(None, reason="withheld: parity failed"),
    ).to_json()
    lines = markdown([document]).splitlines()
    assert lines[2:6] == [
        "| speedup | mit-b1 | 1 | 1.23x | 1.10 to 1.40 | 63.5 -> 5.2 ms | >= 1.15x | yes |",
        "| wall time | msa-m3 | - | 91 s | - | - | < 90 s | **no** |",
        "| peak memory | msa-m3 | - | 1.5 GiB | - | - | - | - |",
        "| speedup | mit-b1 | 1 | - (withheld: parity failed) | - | - | >= 1.15x | **no** |",
    ]
    assert {line.count("|") for line in lines[:6]} == {9}
    assert document["machine"]["cpu"] in lines[-1]
    assert document["versions"]["torch"] in lines[-1]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.149, RATIO, "1.15x"),
        (0.0724, SECONDS, "0.072 s"),
        (47.68, SECONDS, "48 s"),
        (3.9e-6, SECONDS, "3.9 us"),
        (512.0 * MEBIBYTE, BYTES, "512 MiB"),
        (3.0 * 1024**3, BYTES, "3.0 GiB"),
        (0.0, COUNT, "0"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_the_command_that_is_written_down_gives_the_same_settings() -> None:
    settings = Settings(2, 45.0, ("mit-b1", "msra-m0"), (1, 8), 192, quick=True)
    words = settings.command("export-speed").split()
    assert words[:3] == ["python", "-m", "benchmarks"]
    options = program._parser().parse_args(words[3:])
    assert (
        Settings(options.threads, options.duration, options.models, options.batch, options.image_size, options.quick)
        == settings
    )
    assert Settings().command("export-speed") == "python -m benchmarks export-speed"


def test_a_table_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["table", "--results", str(tmp_path)]) == EXIT_MISSING
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "python -m benchmarks" in captured.err


@pytest.mark.exhaustive
def test_the_plain_export_is_plain_and_computes_the_same() -> None:
    import onnxruntime
    import torch

    from benchmarks.plain import plain_export
    from evit_deploy.models import load_model
    from evit_deploy.models.random_weights import random_state_dict

    module = load_model(TINY_SPEC, random_state_dict(TINY_SPEC, 0))
    graph = plain_export(module, TINY_SPEC.image_size)
    types = Counter(node.op_type for node in graph.graph.node)
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert "Attention" not in types
    assert types["Softmax"] == 3 * sum(TINY_SPEC.config["depths"])
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = np.random.default_rng(0).standard_normal((batch, *TINY_SPEC.input_shape)).astype(np.float32)
        with torch.inference_mode():
            expected = module(torch.from_numpy(images)).numpy()
        (logits,) = session.run(["logits"], {"input": images})
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


ALLOCATE = "import time; block = bytearray({size}); block[::4096] = b'x' * len(block[::4096]); time.sleep({pause})"
CHILD = (
    "import subprocess, sys; "
    + ALLOCATE.format(size=150 * MEBIBYTE, pause=0)
    + "; subprocess.run([sys.executable, '-c', {code!r}])"
)


def test_the_footprint_of_a_command_is_its_peak(tmp_path: Path) -> None:
    ours = np.ones(300 * MEBIBYTE // 8)  # what this process holds must not count
    code = ALLOCATE.format(size=150 * MEBIBYTE, pause=0.3) + "; del block; time.sleep(0.3); print('done')"
    footprint = measure_command([sys.executable, "-c", code], cwd=tmp_path)
    assert 150 * MEBIBYTE < footprint.peak_bytes < 250 * MEBIBYTE < ours.nbytes
    assert footprint.wall_s > 0.6
    assert footprint.max_processes == 1
    assert footprint.stdout == "done\n"


def test_the_footprint_of_a_command_includes_what_it_starts(tmp_path: Path) -> None:
    code = CHILD.format(code=ALLOCATE.format(size=150 * MEBIBYTE, pause=0.5))
    footprint = measure_command([sys.executable, "-c", code], cwd=tmp_path)
    assert footprint.peak_bytes > 300 * MEBIBYTE
    assert footprint.max_processes == 2


def test_a_command_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(EvitDeployError, match="exit code 3") as caught:
        measure_command(
            [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], cwd=tmp_path
        )
    assert caught.value.details == ("no such thing",)


def test_heavy_imports_are_seen(child_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment["PYTHONPATH"])
    start = [sys.executable, "-X", "importtime", "-c"]
    assert heavy_imports([*start, "import evit_deploy.specs"]) == []
    assert heavy_imports([*start, "import evit_deploy, numpy.linalg"]) == ["numpy"]
    with pytest.raises(EvitDeployError, match="importtime"):
        heavy_imports([sys.executable, "-c", "import evit_deploy"])


def test_a_workspace_is_gone_at_the_end() -> None:
    folders = []

    def interrupted() -> None:
        with workspace(lambda line: None) as space:
            (space.folder / "model.onnx").write_bytes(b"x")
            folders.append(space.folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folders[0].exists()


# What the fast tier runs; the other tier runs them all.
FAST_BENCHMARKS = ("help-time",)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]) -> tuple[Path, str]:
    """Every benchmark on a small model in a process of its own: the folder of the results, and what was printed."""
    return run_short(tmp_path_factory.mktemp("benchmarks"), "all", child_environment)


@pytest.fixture(scope="module", params=tiered((*FAST_BENCHMARKS, "all"), FAST_BENCHMARKS.__contains__))
def some_short_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]
) -> tuple[str, Path, str]:
    """What was run, and of one benchmark or of all what `short_run` has."""
    if request.param == "all":
        return request.param, *request.getfixturevalue("short_run")
    return request.param, *run_short(tmp_path_factory.mktemp(request.param), request.param, child_environment)


def run_short(folder: Path, name: str, child_environment: dict[str, str]) -> tuple[Path, str]:
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--results", str(folder / "results")]
    command += ["--models", "mit-b0", "--image-size", "64", "--batch", "1,2", "--threads", "1"]
    environment = {**child_environment, "TMPDIR": str(folder / "tmp")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (EXIT_OK, EXIT_LIMIT), done.stderr
    assert list((folder / "tmp").glob("evit-deploy-bench-*")) == [], "the work folder is still there"
    return folder / "results", done.stdout


def test_a_run_writes_one_valid_result_per_benchmark(some_short_run: tuple[str, Path, str]) -> None:
    asked, folder, _ = some_short_run
    names = program.IN_ALL if asked == "all" else (asked,)
    documents = read_results(folder)
    assert set(documents) == set(names)
    assert {path.name for path in folder.iterdir()} == {f"{name}.json" for name in names}
    for name, document in documents.items():
        jsonschema.validate(document, SCHEMA)
        assert document["command"].startswith(f"python -m benchmarks {name} --models mit-b0")
        assert document["protocol"]["quick"] is True
        assert document["versions"]["torch"]


def test_all_is_every_benchmark_that_does_not_take_long() -> None:
    assert set(program.IN_ALL) == set(program.BENCHMARKS) - {kernels.NAME, suite.NAME}


def test_a_result_tells_nothing_about_whose_machine_it_was(some_short_run: tuple[str, Path, str]) -> None:
    _, folder, _ = some_short_run
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
    for private in (str(ROOT), str(folder), str(Path.home()), sys.prefix, socket.gethostname()):
        assert f"{private}/" not in text
        assert f'"{private}"' not in text


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "batches", "baseline"),
    [("export-speed", [1, 2], "plain-onnx"), ("against-eager", [1, 2], "torch-eager")],
)
def test_a_comparison_has_parity_in_the_same_row(
    short_run: tuple[Path, str], name: str, batches: list[int], baseline: str
) -> None:
    rows = read_results(short_run[0])[name]["rows"]
    assert [row["batch"] for row in rows] == batches
    for row in rows:
        assert row["details"]["ours"]["backend"] == "onnxruntime"
        assert row["details"]["baseline"]["backend"] == baseline
        for arm in (row["details"]["ours"], row["details"]["baseline"]):
            assert arm["precision"] == "fp32"
            assert arm["p50_ms"] > 0
            assert arm["parity"]["passed"] is True
            assert arm["parity"]["rms_rel"] < arm["parity"]["tolerance_rms_rel"]
        assert row["value"] > 0
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["details"]["processes"] == 2
        assert row["details"]["aa_half_range"] is not None


@pytest.mark.exhaustive
def test_the_cost_of_an_export_is_measured_with_its_verification(short_run: tuple[Path, str]) -> None:
    wall, peak = read_results(short_run[0])["export-cost"]["rows"]
    assert wall["details"]["verdict"] == "pass"
    assert wall["value"] > sum(wall["details"]["seconds"].values())
    assert peak["value"] > 300 * MEBIBYTE  # torch alone takes more


@pytest.mark.exhaustive
def test_help_imports_nothing_heavy(short_run: tuple[Path, str]) -> None:
    seconds, imports = read_results(short_run[0])["help-time"]["rows"]
    assert imports["details"]["imported"] == []
    assert {"torch", "timm", "onnx"} <= set(imports["details"]["looked_for"])
    assert seconds["details"]["min_s"] <= seconds["value"] <= seconds["details"]["max_s"]


def test_the_table_is_printed_from_the_files(
    some_short_run: tuple[str, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, printed = some_short_run
    assert program.main(["table", "--results", str(folder)]) == EXIT_OK
    assert capsys.readouterr().out == printed
    assert "the figures mean nothing" in printed


@pytest.fixture(scope="module")
def short_kernels(
    tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """The result `kernels` of a small model, and its text."""
    pytest.importorskip("triton", reason="Triton is needed to compile kernels")  # published for Linux only
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "benchmarks", "kernels", "--quick", "--models", "mit-b0", "--image-size", "64"]
    environment = {**child_environment, "EVIT_DEPLOY_KERNEL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--results", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert not (folder / "cache").exists(), "what is measured must be compiled, not remembered"
    return read_results(folder)[kernels.NAME], (folder / "kernels.json").read_text(encoding="utf-8")


def test_kernels_are_rows_with_what_ptxas_says(short_kernels: tuple[dict[str, Any], str]) -> None:
    document, text = short_kernels
    jsonschema.validate(document, SCHEMA)
    assert document["protocol"]["run_on_a_gpu"] is False
    assert document["versions"]["triton"]
    for row in document["rows"]:
        assert row["value"] == 0
        assert row["reached"] is True
        assert row["details"]["arches"].keys() == {"80"}
        assert row["details"]["arches"]["80"]["registers"] > 0
    assert str(ROOT) not in text


def kernels_document(**facts: Any) -> dict[str, Any]:
    """A made-up result of one kernel on two architectures; `facts` are those of the second."""
    good = {"target": "sm_80", "registers": 96, "spill_bytes": 0, "shared_bytes": 4096, "threads": 128}
    details = {
        "operator": "lite_mla",
        "size": "14x14 8x16",
        "channels_last": True,
        "dtype": "fp16",
        "model": "mit-b0",
        "arches": {"80": good, "90": {**good, **facts}},
    }
    row = Row("lite_mla fp16", kernels.QUANTITY, COUNT, float("reason" in facts), goal=Goal("<=", 0), details=details)
    protocol = {"quick": False, "arches": [80, 90]}
    return result(row, benchmark=kernels.NAME, protocol=protocol).to_json()


@pytest.mark.parametrize(
    ("facts", "cell", "verdict"),
    [
        pytest.param({"shared_bytes": 8704}, "96 / 8.5", "All of them are within", id="fine"),
        pytest.param({"spill_bytes": 4}, "96 / 4, **4 B spilled**", "All of them are within", id="spills"),
        pytest.param(
            {"state": "refused", "reason": "spills"}, "**refused**", "**1 of them are not there.**", id="none"
        ),
    ],
)
def test_the_table_of_kernels(facts: dict[str, Any], cell: str, verdict: str) -> None:
    text = kernels_table(kernels_document(**facts))
    assert f"| 14x14 8x16 cl | `mit-b0` | fp16 | 96 / 4 | {cell} |" in text
    assert text.startswith("`lite_mla`\n\n| size | first in | dtype | sm_80 | sm_90 |\n| --- ")
    assert f"2 kernels. {verdict}" in text


def test_a_kernel_that_is_refused_misses_the_goal() -> None:
    row = kernels._row(
        [
            KernelRow(
                operator="lite_mla",
                size="14x14 8x16",
                channels_last=False,
                model="mit-b0",
                image_size=224,
                dtype="fp16",
                arch=arch,
                state=state,
                reason=reason,
                target=None if reason else "sm_80",
                registers=None if reason else 96,
                spill_bytes=None if reason else 0,
                shared_bytes=None if reason else 4096,
                threads=None if reason else 128,
                triton_version=None,
                key="0" * 64,
            )
            for arch, state, reason in ((80, "compiled", ""), (90, "failed", "ptxas /tmp/tmpx/kernel.ptx, line 3: no"))
        ]
    )
    assert (row.value, row.reached) == (1.0, False)
    assert row.details["arches"]["90"] == {"state": "failed", "reason": "ptxas kernel.ptx, line 3: no"}
    jsonschema.validate(result(row).to_json(), SCHEMA)


def test_published_kernels_are_all_that_are_needed() -> None:
    """Every published model, dtype and architecture, whatever has changed since the result was written."""
    from evit_kernels.aot import ARCHES

    document = read_results(RESULTS)[kernels.NAME]
    needed = needed_kernels([ModelSpec.published(name) for name in variant_names()])
    found = [(details := row["details"])["operator"] + details["size"] + details["dtype"] for row in document["rows"]]
    assert found == [kernel.launch.operator + kernel.size + kernel.launch.dtype for kernel in needed]
    assert all(row["details"]["arches"].keys() == {str(arch) for arch in ARCHES} for row in document["rows"])


def test_quick_figures_are_never_published_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(RESULTS.glob("*"))
    quick = {"help-time": lambda settings, space: result(speedup(1.2), protocol={"quick": settings.quick})}
    monkeypatch.setattr(program, "BENCHMARKS", quick)
    assert program.main(["help-time", "--quick"]) == EXIT_OK
    assert "the figures mean nothing" in capsys.readouterr().out
    assert sorted(RESULTS.glob("*")) == before


def test_every_result_is_published_and_a_full_run() -> None:
    results = read_results(RESULTS).items()
    published = {name: result for name, result in results if not name.startswith("gpu-")}  # those need a GPU
    assert published.keys() | {suite.NAME} == program.BENCHMARKS.keys()  # that one was never measured whole yet
    for name, document in published.items():
        jsonschema.validate(document, SCHEMA)
        assert name in program.BENCHMARKS
        assert document["protocol"]["quick"] is False
        assert document["command"] == f"python -m benchmarks {name}", "published with options"


def test_readme_and_docs_say_what_the_results_say() -> None:
    results = read_results(RESULTS)
    for name in readme.DOCUMENTS:
        text = (readme.ROOT / name).read_text(encoding="utf-8")
        assert "<!-- figures: " in text
        assert readme.filled(text, results, program.SPEED) == text, f"python -m benchmarks readme rewrites {name}"


def test_a_figure_typed_by_hand_is_noticed() -> None:
    results = read_results(RESULTS)
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    forged = text.replace("verdict: pass", "verdict: certainly")
    assert forged != text
    assert readme.filled(forged, results, program.SPEED) == text


def test_an_unknown_section_or_a_missing_result_is_an_error() -> None:
    with pytest.raises(EvitDeployError, match="no figures are called 'nonsense'"):
        readme.filled("<!-- figures: nonsense -->\n\n<!-- /figures -->", {}, program.SPEED)
    with pytest.raises(EvitDeployError, match="there is no result of tour"):
        readme.filled("<!-- figures: tour 0 -->\n\n<!-- /figures -->", {}, program.SPEED)


class TestSuite:
    REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_slow[x]" time="2.5"/>
<testcase classname="tests.test_a" name="test_fast" time="0.5"><skipped/></testcase>
</testsuite></testsuites>"""

    def test_the_slowest_come_first_and_all_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "r.xml").write_text(self.REPORT, encoding="utf-8")
        wall, processor, tests = suite._rows(suite.FAST, suite.Cost(481.0, 900.0, ""), tmp_path / "r.xml")
        assert [test["test"] for test in wall.details["slowest"]] == [
            "tests.test_a::test_slow[x]",
            "tests.test_a::test_fast",
        ]
        assert (wall.value, wall.reached, processor.value, tests.value) == (481.0, False, 900.0, 2.0)

    def test_a_suite_that_fails_has_no_time(self, tmp_path: Path) -> None:
        path = tmp_path / "test_planted.py"
        path.write_text("def test_it():\n    assert False\n", encoding="utf-8")
        with pytest.raises(EvitDeployError, match="ended with 1: mend the tests first"):
            suite._pytest(["-q", str(path)], expected=(0,))

    @pytest.mark.exhaustive
    def test_a_quick_run_has_both_tiers(self, tmp_path: Path) -> None:
        code = program.main(["suite", "--quick", "--results", str(tmp_path)])
        assert code in (EXIT_OK, EXIT_LIMIT)  # a busy machine collects slowly
        (document,) = read_results(tmp_path).values()
        jsonschema.validate(document, SCHEMA)
        assert {row["subject"] for row in document["rows"]} == {"both tiers", suite.FAST, suite.EXHAUSTIVE}
