"""The benchmarks of trained models: what is chosen, what counts as reached, and what their tables say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from benchmarks import breaking, precision_error, selection
from benchmarks.result import Goal, Result, Row
from benchmarks.settings import WEIGHT_SEED, Settings
from benchmarks.trained import TRAINED, trained_models
from benchmarks.workspace import Workspace
from evit_deploy import api
from evit_deploy.bench.report import BenchReport
from evit_deploy.models.random_weights import random_state_dict
from evit_deploy.parity.report import VerifyReport, VerifyRow
from evit_deploy.specs import ModelSpec
from tests.test_benchmarks import SCHEMA
from tests.test_select import OURS, Made

BF16 = "openvino-bf16"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def select(report: BenchReport, measure: Callable[..., Row], model: str = "msra-m3") -> Row:
    assert report.selection is not None
    (batch,) = report.selection.batches
    row = measure(model, batch, report, Settings())
    jsonschema.validate(document(row), SCHEMA)
    return row


def document(row: Row) -> dict[str, Any]:
    command = Settings().command(selection.NAME)
    return Result(selection.NAME, selection.TITLE, selection.GOAL, command, {"quick": False}, [row]).to_json()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        (Settings(), TRAINED),
        (Settings(models=("msra-m3", "msa-m5")), ("msra-m3",)),
        (Settings(models=("msa-m5",)), ("digits",)),
        (Settings(quick=True), ("digits",)),
    ],
)
def test_the_models_that_are_trained(settings: Settings, chosen: tuple[str, ...]) -> None:
    assert trained_models(settings) == chosen


class TestSpeedup:
    def test_of_what_is_selected(self, made: Made) -> None:
        made.add(BF16, 0.005, error=8e-3, precision="bf16")
        row = select(made.report(selection.LOOSE), selection._speedup)
        assert row.value == pytest.approx(2.0, rel=0.05)
        assert row.goal == Goal(">=", 1.3)
        assert row.reached
        assert f"| `{BF16}` in bf16 | 8.0e-03 | 5 ms | 2.0" in selection.selection_table(document(row))

    def test_one_that_is_over_the_tolerance_gains_nothing(self, made: Made) -> None:
        made.add(BF16, 0.005, error=1.2e-2, precision="bf16")
        row = select(made.report(selection.LOOSE), selection._speedup)
        assert (row.value, row.reached) == (1.0, False)
        table = selection.selection_table(document(row))
        assert f"| `{OURS}` in fp32 |" in table
        assert "| it is that | >= 1.3x: **not reached** |" in table
        assert f"{BF16}: over the tolerance: 1.2e-02 > 0.01 (would be 2.0" in table

    def test_too_few_processes_do_not_count(self, made: Made) -> None:
        made.add(BF16, 0.005, error=8e-3, precision="bf16", processes=4)
        row = select(made.report(selection.LOOSE), selection._speedup)
        assert row.reached is False
        assert "4 fresh processes" in row.reason

    def test_none_is_selected(self, made: Made) -> None:
        row = select(made.report(1e-9), selection._speedup)
        assert (row.value, row.reached, row.reason) == (None, False, "no backend was selected")
        assert "| none | - | - | - |" in selection.selection_table(document(row))


class TestNearBest:
    @staticmethod
    def near_best(run: BenchReport, other: BenchReport) -> Row:
        return select(
            run, lambda model, batch, report, settings: selection._near_best(model, batch, report, other, settings)
        )

    def test_the_fastest_one(self, made: Made) -> None:
        made.add("openvino", 0.008, error=1e-6)
        report = made.report(selection.TIGHT)
        row = self.near_best(report, report)
        assert (row.value, row.reached) == (1.0, True)
        assert row.details["selected"] == "openvino"

    def test_a_slower_one_that_was_taken_for_its_accuracy(self, made: Made) -> None:
        made.add("openvino", 0.00985, error=5e-6, spread=0.02)
        report = made.report(selection.TIGHT)
        row = self.near_best(report, report)
        assert row.details["selected"] == OURS
        assert row.value == pytest.approx(0.985, abs=0.01)
        assert row.reached

    @pytest.mark.parametrize(("latency_s", "value"), [(0.008, 1.0), (0.0125, 0.8)])
    def test_another_run_judges_the_choice(
        self, made: Made, tmp_path_factory: pytest.TempPathFactory, latency_s: float, value: float
    ) -> None:
        made.add("openvino", 0.008, error=1e-6)
        other = Made(tmp_path_factory.mktemp("other"))
        other.add("openvino", latency_s, error=1e-6)
        row = self.near_best(made.report(selection.TIGHT), other.report(selection.LOOSE))
        assert row.details["selected"] == "openvino"
        assert row.value == pytest.approx(value, rel=0.05)
        assert row.reached is (value == 1.0)

    def test_one_that_is_over_the_tolerance_is_no_rival(self, made: Made) -> None:
        made.add(BF16, 0.005, error=8e-3, precision="bf16")
        row = self.near_best(made.report(selection.TIGHT), made.report(selection.LOOSE))
        assert (row.value, row.reached) == (1.0, True)

    def test_rounds_that_spread_do_not_count(self, made: Made) -> None:
        made.add("openvino", 0.005, error=1e-6, spread=0.4)
        report = made.report(selection.TIGHT)
        row = self.near_best(report, report)
        assert row.details["selected"] == "openvino"
        assert row.reached is False
        assert row.reason.startswith("unstable: the rounds of openvino spread by")

    def test_a_rival_that_the_other_run_lacks(self, made: Made, tmp_path_factory: pytest.TempPathFactory) -> None:
        made.add("openvino", 0.008, error=1e-6)
        other = Made(tmp_path_factory.mktemp("other"))
        row = self.near_best(made.report(selection.TIGHT), other.report(selection.LOOSE))
        assert (row.value, row.reached) == (None, False)
        assert row.reason == "the other run has no figure for openvino"


def verify_row(rms_rel: float | None) -> VerifyRow:
    return VerifyRow("torch-fp32 -> openvino", "heldout/", 1, False, "logits", "pass", rms_rel=rms_rel)


def test_the_worst_image_counts_and_nan_is_no_number() -> None:
    rows = [verify_row(rms_rel=value) for value in (1e-3, 3e-3, 2e-3)]
    assert precision_error._worst(rows) == 3e-3
    assert precision_error._worst([*rows, verify_row(rms_rel=None)]) is None
    assert precision_error._worst([]) is None


class TestBreaking:
    def test_only_queries_and_keys_are_larger(self) -> None:
        (case,) = breaking.QUICK_CASES
        spec = replace(ModelSpec.published(case.model), image_size=case.image_size)
        before, after = random_state_dict(spec, WEIGHT_SEED), breaking.breaking_weights(case, spec)
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert changed
        assert all(re.search(case.pattern, name) for name in changed)
        for name in changed:
            torch.testing.assert_close(after[name][: case.rows], case.factor * before[name][: case.rows])
            torch.testing.assert_close(after[name][case.rows :], before[name][case.rows :])

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("fault", [False, True], ids=["as it is", "planted NaN"])
    def test_they_break_a_plain_conversion_and_not_ours(
        self, fault: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        verify = api.verify

        def faulty(*arguments: Any, **options: Any) -> VerifyReport:
            report = verify(*arguments, **options)
            return replace(report, rows=tuple(replace(row, nan=1, rms_rel=None) for row in report.rows))

        if fault:
            monkeypatch.setattr(api, "verify", faulty)
        space = Workspace(tmp_path, lambda line: None)
        plain, half, wide = breaking.breaking_rows(Settings(quick=True), space, ("torch-half",))
        assert plain.value is not None
        assert plain.value > 0
        assert plain.reached
        assert (half.details["computed_in"], half.reached) == ("fp16", not fault)
        assert (wide.details["computed_in"], wide.reached) == ("bf16", not fault)

    def test_nothing_compared_is_no_zero(self) -> None:
        compared, not_run = verify_row(rms_rel=1e-3), verify_row(rms_rel=None)
        assert breaking._not_finite([compared]) == 0
        assert breaking._not_finite([compared, replace(not_run, nan=10, inf=2)]) == 12
        assert breaking._not_finite([compared, not_run]) is None
        assert breaking._not_finite([]) is None
