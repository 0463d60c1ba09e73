"""The GPU benchmarks without a GPU: the gate, the budget, what is compared with what, and a whole run on the CPU.

No speed is asserted here.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evit_kernels.registry import OPERATORS
from torch import Tensor

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import budget as budget_module
from benchmarks.gpu import kernels, models, opponents, ptx
from benchmarks.gpu.budget import Budget, OutOfTimeError, Task, run_tasks, time_limit
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.floor import layer_floor
from benchmarks.gpu.gate import TESTS, Checks, run_checks
from benchmarks.gpu.kernels import OURS, Bench, Case, error_of
from benchmarks.gpu.plan import plan
from benchmarks.gpu.settings import KEY_MODELS, NAMES
from benchmarks.gpu.sizes import MAPS, first_and_last, meta_arguments, random_arguments, sizes_of
from benchmarks.gpu.timing import (
    MAX_COPIES,
    SMOKE,
    Estimate,
    copies_needed,
    estimate,
    half_range,
    instability,
    speedup,
    verdict,
)
from benchmarks.result import RATIO, RESULTS, Row, read_results
from evit_deploy.cost import published_costs
from evit_deploy.errors import EXIT_MISSING, EXIT_OK, EXIT_PARITY, EXIT_USAGE
from evit_deploy.specs import ModelSpec
from tests import attention_references as references
from tests.attention_references import rms_relative

ROOT = Path(__file__).resolve().parent.parent
GREEN = Checks("python -m pytest", passed=3, failed=0, skipped=0, seconds=1.0, last_line="3 passed in 1.00s")
RED = replace(GREEN, failed=1, last_line="1 failed, 3 passed in 1.00s")
LIMITS = Ceilings(4e12, {"fp16": 8e14, "bf16": 8e14, "fp32": 5e13}, 4e12)


def checks(result: Checks) -> Callable[[float], Checks]:
    return lambda timeout_s: result


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Device("cpu"), lambda: LIMITS, SMOKE, compiled=False)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The whole program on the CPU: the folder of its results and its exit code."""
    folder = tmp_path_factory.mktemp("gpu")
    code = program.main(["--device", "cpu", "--results", str(folder)], checks=checks(GREEN))
    return folder, code


class TestTheGate:
    def write(self, folder: Path, *bodies: str) -> Path:
        lines = ["import pytest"]
        for index, body in enumerate(bodies):
            lines += ["@pytest.mark.gpu", f"def test_{index}():", f"    {body}"]
        path = folder / "test_made_up.py"
        path.write_text("\n".join([*lines, ""]))
        return path

    @pytest.mark.parametrize(
        ("bodies", "counts", "green", "workers"),
        [
            (("pass", "pass"), (2, 0, 0), True, 2),
            (("pass", "assert False"), (1, 1, 0), False, 2),
            (("pass", "pytest.skip('no reason')"), (1, 0, 1), False, 0),
            ((), (0, 0, 0), False, 0),
        ],
        ids=["green", "red", "skipped", "nothing"],
    )
    def test_green_is_something_passed_and_nothing_else(
        self, tmp_path: Path, bodies: tuple[str, ...], counts: tuple[int, int, int], green: bool, workers: int
    ) -> None:
        result = run_checks([self.write(tmp_path, *bodies)], timeout_s=300, workers=workers)
        assert (result.passed, result.failed, result.skipped) == counts
        assert result.green is green

    def test_a_file_that_cannot_be_imported_is_red(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "pass")
        path.write_text("import a_module_that_is_not_there\n" + path.read_text())
        result = run_checks([path], timeout_s=300, workers=0)
        assert result.failed > 0
        assert not result.green

    def test_a_file_that_is_not_there_is_red(self, tmp_path: Path) -> None:
        assert not run_checks([tmp_path / "test_absent.py"], timeout_s=300, workers=0).green

    def test_tests_that_do_not_end_are_red(self, tmp_path: Path) -> None:
        result = run_checks([self.write(tmp_path, "import time; time.sleep(600)")], timeout_s=3, workers=0)
        assert not result.green
        assert result.last_line == "not done after 3 s"

    def test_its_files_are_there_and_have_tests_for_a_gpu(self) -> None:
        for name in TESTS:
            assert "pytest.mark.gpu" in (ROOT / name).read_text(encoding="utf-8")

    def test_a_red_gate_measures_and_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code = program.main(["--device", "cpu", "--results", str(tmp_path / "r")], checks=checks(RED))
        captured = capsys.readouterr()
        assert code == EXIT_PARITY
        assert captured.out == ""
        assert "not green: nothing is measured" in captured.err
        assert "1 failed, 3 passed" in captured.err
        assert not (tmp_path / "r").exists()


class TestTheProgram:
    def test_without_a_gpu_it_says_so_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        def never(timeout_s: float) -> Checks:
            raise AssertionError

        assert program.main([], checks=never) == EXIT_MISSING
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert "finds no CUDA GPU: nothing was measured" in captured.err

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--device", "cpu"], "figures of a CPU mean nothing"),
            (["--device", "cpu", "--results", str(RESULTS)], "figures of a CPU mean nothing"),
            (["gpu-speed"], "unknown benchmark 'gpu-speed'"),
            (["--device", "tpu", "--results", "x"], "no such device: 'tpu'"),
        ],
        ids=["no-folder", "the-published-folder", "name", "device"],
    )
    def test_what_cannot_be_asked_for(
        self, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert program.main(arguments, checks=checks(GREEN)) == EXIT_USAGE
        assert words in capsys.readouterr().err

    def test_the_command_that_is_written_down_gives_the_same_options(self) -> None:
        words = ["gpu-kernels", "gpu-ptx", "--models", "msa-m1,mit-b0", "--budget-s", "60", "--device", "cpu"]
        command = program._command(program._parser().parse_args(words))
        assert command == f"python -m benchmarks.gpu {' '.join(words)}"
        assert program._command(program._parser().parse_args([])) == "python -m benchmarks.gpu"
        assert len(program._parser().parse_args(["--models", "all"]).models) > len(KEY_MODELS)

    def test_every_benchmark_has_a_result_of_the_schema(self, smoke_run: tuple[Path, int]) -> None:
        import jsonschema

        folder, code = smoke_run
        assert code == EXIT_OK
        schema = json.loads((ROOT / "benchmarks/result.schema.json").read_text(encoding="utf-8"))
        documents = read_results(folder)
        assert set(documents) == set(NAMES)
        for document in documents.values():
            jsonschema.validate(document, schema)
            assert document["command"] == "python -m benchmarks.gpu --device cpu"
            assert document["protocol"]["quick"] is True
            assert document["protocol"]["left_out"] == []
            assert document["protocol"]["checks"]["passed"] == GREEN.passed
            assert document["protocol"]["gpu"]["name"].startswith("none")

    def test_a_result_tells_nothing_about_whose_machine_it_was(self, smoke_run: tuple[Path, int]) -> None:
        text = "".join(path.read_text(encoding="utf-8") for path in smoke_run[0].glob("*.json"))
        for private in (str(ROOT), str(smoke_run[0]), str(Path.home()), sys.prefix, socket.gethostname()):
            assert f"{private}/" not in text
            assert f'"{private}"' not in text

    def test_every_kernel_row_has_its_numerical_check_and_its_floor(self, smoke_run: tuple[Path, int]) -> None:
        rows = read_results(smoke_run[0])["gpu-kernels"]["rows"]
        speedups = [row for row in rows if row["quantity"] == kernels.SPEEDUP]
        assert {row["subject"].split()[0] for row in speedups} == set(OPERATORS)
        assert {row["quantity"] for row in rows} == {kernels.SPEEDUP, "share of the floor"}
        for row in speedups:
            arms = row["details"]["arms"]
            precision = row["subject"].rpartition(" ")[2]
            for name in (OURS, f"{OURS} (A/A)", "eager-definition"):
                assert arms[name]["rms_rel"] <= kernels.MAX_ERRORS[precision]
                assert arms[name]["median_s"]["value"] > 0
            assert row["details"]["best"] in arms
            assert row["details"]["floor"]["seconds"] > 0
            assert all((arm["median_s"] is None) == (arm["reason"] is not None) for arm in arms.values())

    def test_every_model_row_has_its_parity(self, smoke_run: tuple[Path, int]) -> None:
        rows = read_results(smoke_run[0])["gpu-models"]["rows"]
        assert {row["subject"] for row in rows} == {f"{model}, fp32" for model in KEY_MODELS}
        for row in rows:
            if row["quantity"] == "speedup over torch-eager":
                for arm in ("torch-fused", "torch-fused (A/A)", "torch-eager"):
                    assert row["details"]["arms"][arm]["parity"]["passed"] is True

    def test_what_needs_a_gpu_has_a_reason_instead_of_a_number(self, smoke_run: tuple[Path, int]) -> None:
        (row,) = read_results(smoke_run[0])["gpu-ptx"]["rows"]
        assert (row["value"], row["reason"]) == (None, "needs a GPU")

    def test_a_budget_that_is_spent_lists_what_is_missing(self, tmp_path: Path) -> None:
        arguments = ["gpu-kernels", "--device", "cpu", "--budget-s", "0.001", "--models", "msra-m3"]
        assert program.main([*arguments, "--results", str(tmp_path)], checks=checks(GREEN)) == EXIT_OK
        documents = read_results(tmp_path)
        assert set(documents) == {"gpu-ceilings"}


def wrong(operator: str, factor: float) -> Any:
    """The operator with a kernel that computes something else."""
    right = OPERATORS[operator]
    return replace(right, call=lambda *arguments: right.call(*arguments) * factor)


class TestNoNumberForAWrongResult:
    @pytest.fixture
    def case(self) -> Case:
        return Case(sizes_of(["mit-b1"], smoke=True)[0], 3, "fp32")

    @pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf"), 0.0], ids=str)
    def test_ours(self, bench: Bench, case: Case, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(OPERATORS, "lite_mla", wrong("lite_mla", factor))
        (row,) = kernels.run_case(bench, case)
        assert row.value is None
        assert row.reason.startswith("withheld: WrongResultError: differs from the definition by ")

    def test_another(self, bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            opponents, "timm_lite_mla", lambda qkv, aggregated, dim, eps: qkv[:, : 2 * qkv.shape[1] // 3]
        )
        speed, share = kernels.run_case(bench, case)
        arm = speed.details["arms"]["eager-timm"]
        assert arm["median_s"] is None
        assert "differs from the definition" in arm["reason"]
        assert speed.details["best"] == "eager-definition"
        assert share.value is not None

    def test_an_arm_that_raises_does_not_cost_the_others(
        self, bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(qkv: Tensor, aggregated: Tensor, dim: int, eps: float) -> Tensor:
            raise ValueError("no such backend\non this machine")

        monkeypatch.setattr(opponents, "timm_lite_mla", broken)
        speed, _ = kernels.run_case(bench, case)
        assert speed.details["arms"]["eager-timm"]["reason"] == "ValueError: no such backend on this machine"
        assert speed.value is not None

    def test_ours_in_a_whole_model(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "benchmarks.gpu.model_arms.graphed", lambda device, module: lambda images: module(images) + 1e-3
        )
        (row,) = models.run_case(bench, models.Case("msra-m3", 2, "fp32", ()))
        assert row.value is None
        assert row.reason.startswith("withheld: failed parity")

    def test_the_program_says_so_in_its_exit_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(OPERATORS, "lite_mla", wrong("lite_mla", 1.01))
        arguments = ["gpu-kernels", "--device", "cpu", "--models", "mit-b1", "--results", str(tmp_path)]
        assert program.main(arguments, checks=checks(GREEN)) == EXIT_PARITY
        assert all(row["value"] is None for row in read_results(tmp_path)["gpu-kernels"]["rows"])
        assert "withheld" in capsys.readouterr().out

    def test_one_wrong_image_at_the_end_of_a_batch_is_seen(self) -> None:
        truth = torch.ones(2, 4, dtype=torch.float64)
        result = torch.ones(5, 4)
        assert error_of(result, truth) == 0
        result[-1] = 2
        assert error_of(result, truth) > 0.5
        result[-1], result[2, 0] = 1, float("nan")
        assert error_of(result, truth) != error_of(result, truth)
        assert error_of(torch.ones(5, 3), truth) != 0


class TestOpponents:
    @pytest.mark.parametrize("shape", ["odd", "padded-both", "no-padding", "below-small-window", "head-dim-48"])
    @pytest.mark.parametrize("backend", ["math", "flash"])
    def test_sdpa_is_multi_scale_attention(self, shape: str, backend: str) -> None:
        arguments = references.multi_scale_arguments(*references.MULTI_SCALE_SHAPES[shape])
        expected = OPERATORS["multi_scale_attention"].definition(**arguments)
        arm = opponents.opponents_of("multi_scale_attention", compiled=False)[f"sdpa-{backend}"]()
        assert rms_relative(arm(*arguments.values()), expected) < 1e-12

    @pytest.mark.parametrize("shape", ["odd", "padded-both", "padded-by-one", "head-dim-48"])
    def test_flex_attention_is_multi_scale_attention(self, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        arguments = references.multi_scale_arguments(*references.MULTI_SCALE_SHAPES[shape])
        expected = OPERATORS["multi_scale_attention"].definition(**arguments)
        arm = opponents.opponents_of("multi_scale_attention")["flex"]()
        assert rms_relative(arm(*arguments.values()), expected) < 1e-12

    @pytest.mark.parametrize("shape", references.LITE_MLA_SHAPES)
    def test_timms_code_is_lite_mla(self, shape: str) -> None:
        arguments = references.lite_mla_arguments(*references.LITE_MLA_SHAPES[shape])
        expected = OPERATORS["lite_mla"].definition(**arguments)
        assert rms_relative(opponents.timm_lite_mla(**arguments), expected) < 1e-5  # in FP32, as timm has it

    def test_timms_code_is_timms(self) -> None:
        from evit_deploy.models.timm_import import import_timm

        module = import_timm("timm.models.efficientvit_mit").LiteMLA(32, 32, dim=8, scales=(5,)).eval()
        module.proj = torch.nn.Identity()
        x = torch.randn(2, 32, 6, 7, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            qkv = module.qkv(x)
            (aggregate,) = module.aggreg
            assert torch.equal(opponents.timm_lite_mla(qkv, aggregate(qkv), 8, module.eps), module(x))

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_torch_compile_is_among_them_and_the_cheap_ones_come_first(self, operator: str) -> None:
        names = list(opponents.opponents_of(operator))
        cheap = list(opponents.opponents_of(operator, compiled=False))
        assert "compile-definition" in names
        assert names[: len(cheap)] == cheap


class TestSizes:
    def test_every_key_model_has_its_own(self) -> None:
        sizes = sizes_of(KEY_MODELS)
        assert {(size.model, size.operator) for size in sizes} == {
            ("msa-m3", "multi_scale_attention"),
            ("msa-m3", "projected_multi_scale_attention"),
            ("mit-b1", "lite_mla"),
            ("msra-m3", "cascaded_attention"),
        }
        per_model = {model: sum(size.calls for size in sizes if size.model == model) for model in KEY_MODELS}
        assert per_model == {"msa-m3": 14, "mit-b1": 7, "msra-m3": 6}
        assert [size.rank for size in sizes] == sorted(size.rank for size in sizes)

    @pytest.mark.parametrize("model", KEY_MODELS)
    def test_batch_precision_and_layout(self, model: str) -> None:
        size = sizes_of([model], smoke=True)[0]
        meta = meta_arguments(size, 5, "bf16")
        values = random_arguments(meta, size.operator, torch.device("cpu"), 0)
        tensors = [value for value in values if isinstance(value, Tensor)]
        maps = MAPS[size.operator]
        assert all(value.dtype == torch.bfloat16 for value in tensors)
        assert [value.shape[0] for value in tensors[:maps]] == [5] * maps
        assert [v.shape for v in tensors[maps:]] == [a.shape for a in size.arguments[maps : len(tensors)]]
        if size.operator not in ("multi_scale_attention", "projected_multi_scale_attention"):
            assert values[0].is_contiguous(memory_format=torch.channels_last)
            assert not values[0].is_contiguous()
        ends = first_and_last(values, size.operator, torch.float64)
        assert torch.equal(ends[0][1], values[0][4].double())
        result = OPERATORS[size.operator].call(*values)
        assert error_of(result, OPERATORS[size.operator].definition(*ends)) < 0.1
        assert 0.01 < float(result.float().square().mean()) < 100

    def test_different_copies_have_different_numbers(self) -> None:
        size = sizes_of(["msra-m3"], smoke=True)[0]
        meta = meta_arguments(size, 2, "fp32")
        first, second = (random_arguments(meta, size.operator, torch.device("cpu"), seed) for seed in (0, 1))
        assert not torch.equal(first[0], second[0])


class TestThePlan:
    @pytest.fixture(scope="class")
    def tasks(self) -> list[Task]:
        device = SimpleNamespace(is_gpu=True)
        return plan(Bench(device, lambda: LIMITS))  # type: ignore[arg-type]

    def test_what_matters_most_comes_first(self, tasks: list[Task]) -> None:
        first = [task for task in tasks if task.benchmark == kernels.NAME][: len(OPERATORS)]
        assert {task.label.split()[0] for task in first} == set(OPERATORS)
        assert all("fp16, batch 64" in task.label for task in first)
        early = tasks[: 2 * len(OPERATORS) + 2 * len(KEY_MODELS)]  # each operator twice, each model twice
        assert {task.benchmark for task in early} == {kernels.NAME, ptx.NAME, models.NAME}
        for model in KEY_MODELS:
            assert any(task.label.startswith(f"{model}, fp16, batch 1:") for task in early)
            assert any(task.label.startswith(f"{model}, fp16, batch 64:") for task in early)

    def test_every_case_that_was_promised_is_in_it_once(self, tasks: list[Task]) -> None:
        labels = [(task.benchmark, task.label) for task in tasks]
        assert len(set(labels)) == len(labels)
        for size in sizes_of(KEY_MODELS):
            for batch in (1, 64, 256):
                for precision in ("fp16", "bf16"):
                    assert (kernels.NAME, f"{size.label}, {precision}, batch {batch}") in labels
        for model in KEY_MODELS:
            for batch in (1, 8, 64, 256):
                for precision in ("fp16", "bf16"):
                    arms = "torch-fused, torch-eager, " + ", ".join(models_modes())
                    assert (models.NAME, f"{model}, {precision}, batch {batch}: {arms}") in labels
        assert any("fp32" in label for _, label in labels)
        assert sum(name == ptx.NAME for name, _ in labels) == 2 * len(OPERATORS)


def models_modes() -> tuple[str, ...]:
    from benchmarks.gpu.model_arms import MODES

    return tuple(MODES)


class TestTheBudget:
    def task(self, run: Callable[[], list[Row]], estimate_s: float = 0.0, label: str = "a") -> Task:
        return Task("gpu-kernels", label, estimate_s, run)

    def run(self, tasks: list[Task], total_s: float) -> tuple[list[str], list[tuple[str, list[Row]]]]:
        found: list[tuple[str, list[Row]]] = []
        left = run_tasks(tasks, Budget(total_s), lambda line: None, lambda task, rows: found.append((task.label, rows)))
        return left, found

    def test_what_does_not_fit_is_left_out_and_smaller_things_still_run(self) -> None:
        row = Row("x", "y", RATIO, 1.0)
        tasks = [self.task(lambda: [row], 1e6, "large"), self.task(lambda: [row], 0.0, "small")]
        left, found = self.run(tasks, 60.0)
        assert left == ["gpu-kernels: large: about 1000000 s were needed"]
        assert found == [("small", [row])]

    def test_what_takes_too_long_is_cut_off_even_if_it_catches_everything(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(budget_module, "_REPEAT_S", 0.05)

        def stubborn() -> list[Row]:
            for _ in range(3):
                try:
                    time.sleep(60)
                except BaseException:  # noqa: BLE001 - as libraries do
                    continue
            time.sleep(60)
            return []

        left, found = self.run([self.task(stubborn)], 0.2)
        assert left == ["gpu-kernels: a: the time was up before it was done"]
        assert found == []

    def test_a_task_that_breaks_has_a_reason_and_does_not_cost_the_next(self) -> None:
        def broken() -> list[Row]:
            raise RuntimeError("an illegal\nmemory access")

        left, found = self.run([self.task(broken), self.task(list, label="b")], 60.0)
        assert left == []
        ((_, (row,)), (label, _)) = found
        assert (row.value, row.reason) == (None, "RuntimeError: an illegal memory access")
        assert label == "b"

    def test_limits_nest(self) -> None:
        with pytest.raises(OutOfTimeError), time_limit(0.2), time_limit(60.0):
            time.sleep(30)
        with time_limit(60.0):
            with pytest.raises(OutOfTimeError), time_limit(0.1):
                time.sleep(30)
            time.sleep(0.3)  # the inner limit is gone
        time.sleep(0.1)

    def test_the_outer_limit_comes_back(self) -> None:
        def inner_then_wait() -> None:
            with time_limit(60.0):
                pass
            time.sleep(30)

        with pytest.raises(OutOfTimeError), time_limit(0.3):
            inner_then_wait()


class TestStatistics:
    def test_a_median_and_its_interval(self) -> None:
        result = estimate([1.0, 2.0, 3.0, 4.0, 100.0])
        assert result.value == 3.0
        assert result.low <= 3.0 <= result.high

    def test_a_speedup_is_paired(self) -> None:
        ours, theirs = [1.0, 10.0, 100.0], [2.0, 20.0, 200.0]
        assert speedup(ours, theirs) == Estimate(2.0, 2.0, 2.0)

    def test_two_identical_arms(self) -> None:
        assert half_range([1.0, 2.0], [1.0, 2.0]) == 0
        assert half_range([1.0] * 5, [1.1] * 5) == pytest.approx(0.1)
        assert half_range([1.1] * 5, [1.0] * 5) == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("low", "high", "aa", "expected"),
        [
            (1.04, 1.2, 0.0, "faster"),
            (1.02, 1.2, 0.0, "no difference"),
            (1.04, 1.2, 0.05, "no difference"),
            (0.8, 0.96, 0.0, "slower"),
            (0.8, 0.98, 0.0, "no difference"),
        ],
    )
    def test_verdicts(self, low: float, high: float, aa: float, expected: str) -> None:
        assert verdict(Estimate((low + high) / 2, low, high), aa) == expected

    @pytest.mark.parametrize(("aa", "stable"), [(0.0, True), (0.3, False), (float("nan"), False), (None, False)])
    def test_instability(self, aa: float | None, stable: bool) -> None:
        assert (instability(aa) == "") is stable

    @pytest.mark.parametrize(
        ("call_bytes", "l2_bytes", "copies"),
        [(10**9, 6 * 10**7, 2), (10**7, 6 * 10**7, 12), (1, 6 * 10**7, MAX_COPIES), (5, 0, 2)],
    )
    def test_copies_exceed_the_cache_twice(self, call_bytes: int, l2_bytes: int, copies: int) -> None:
        assert copies_needed(call_bytes, l2_bytes) == copies


class TestTheLayerFloor:
    @pytest.mark.parametrize("model", KEY_MODELS)
    def test_products_are_the_multiply_adds_of_the_model(self, model: str) -> None:
        operations = Ceilings(1e30, {"fp16": 1.0}, 1e30)
        seconds, layers = layer_floor(ModelSpec.published(model), 2, "fp16", operations)
        assert layers > 20
        # Kernels take windows' padding and zeros around small convolutions along, and fold sums into products.
        assert seconds / 4 == pytest.approx(published_costs()[model].multiply_adds, rel=0.05)

    def test_bytes_grow_with_the_batch_and_halve_with_the_precision(self) -> None:
        limits = Ceilings(1.0, {"fp16": 1e30, "fp32": 1e30}, 1e30)
        spec = ModelSpec.published("msra-m3")
        one, two, three = (layer_floor(spec, batch, "fp16", limits)[0] for batch in (1, 2, 3))
        assert two - one == three - two > 0
        assert layer_floor(spec, 2, "fp32", limits)[0] == pytest.approx(2 * two)
