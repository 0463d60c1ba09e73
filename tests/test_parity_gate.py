"""The gate, with the real reference and graph, and one planted fault per test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from evit_deploy.errors import EXIT_MISSING, EXIT_OK, EXIT_PARITY, MissingDependencyError, RunnerError, UsageError
from evit_deploy.images.sources import ArrayInputs
from evit_deploy.parity import VerifyReport, tolerance_for, verify_runner
from evit_deploy.parity.gate import TOLERANCES, Tolerance, overall, rows_within, worst_row
from evit_deploy.parity.metrics import compare_rows
from evit_deploy.parity.verify import default_batches
from evit_deploy.runners import OnnxRuntimeRunner, Runner, TorchRunner
from evit_deploy.specs import Preprocessing
from tests.faults import Fault, FaultyRunner, leak_previous_row, on_logits, relative_noise, set_element, swap_rows
from tests.small_models import IMAGE_SIZE, SmallNet, random_images, save, small_graph

SCHEMA = Path(__file__).parent.parent / "docs" / "schemas" / "verify.schema.json"
BATCHES = (1, 3, 8)


def reference(module: torch.nn.Module | None = None, **options: bool) -> TorchRunner:
    return TorchRunner(module or SmallNet(), image_shape=(3, IMAGE_SIZE, IMAGE_SIZE), name="torch-fp32", **options)


def verify(candidate: Runner, *, oracle: Runner | None = None, batches: tuple[int, ...] | None = BATCHES, **options):
    report = verify_runner(oracle or reference(), candidate, batches=batches, **options)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["verdict"] == report.verdict
    return report


def verify_fault(fault: Fault, *, from_batch: int = 1, **options) -> VerifyReport:
    return verify(FaultyRunner(OnnxRuntimeRunner(small_graph()), fault, from_batch=from_batch), **options)


def assert_fails(report: VerifyReport, words: str) -> None:
    assert report.verdict == "fail"
    assert report.exit_code == EXIT_PARITY
    assert any(words in reason for reason in report.reasons), report.reasons


class TestSoundCandidates:
    def test_the_graph_of_the_same_weights_passes_at_every_batch_and_order(self):
        report = verify(OnnxRuntimeRunner(small_graph()))
        assert (report.verdict, report.exit_code, report.reasons) == ("pass", EXIT_OK, ())
        assert [(row.batch, row.permuted) for row in report.rows] == [
            (1, False),
            (3, False),
            (3, True),
            (8, False),
            (8, True),
        ]
        assert all(row.spread > 0.1 for row in report.rows)
        assert report.rows[0].images >= 4

    def test_noise_inside_the_tolerance_passes(self):
        report = verify_fault(relative_noise(1e-5))
        assert report.verdict == "pass"
        assert max(row.rms_rel for row in report.rows) == pytest.approx(1e-5, rel=0.1)

    def test_default_batches_are_smallest_odd_optimal_largest(self):
        assert default_batches(64) == (1, 3, 8, 64)
        assert default_batches(2) == (1, 2)
        assert default_batches(1) == (1,)

    def test_a_fixed_batch_is_compared_at_that_batch_only(self):
        report = verify(OnnxRuntimeRunner(small_graph(batch=3)), batches=None)
        assert report.verdict == "pass"
        assert {row.batch for row in report.rows} == {3}

    def test_a_fixed_batch_of_one_sees_several_images(self):
        report = verify(OnnxRuntimeRunner(small_graph(batch=1)), batches=None)
        assert report.verdict == "pass"
        assert report.rows[0].images == 4
        assert report.rows[0].spread > 0.1

    def test_a_fixed_batch_takes_a_shorter_last_batch_of_files(self, tmp_path: Path):
        np.save(tmp_path / "five.npy", random_images(5))
        source = ArrayInputs(tmp_path / "five.npy", IMAGE_SIZE, Preprocessing())
        report = verify(OnnxRuntimeRunner(small_graph(batch=3)), batches=None, inputs=[source])
        assert report.verdict == "pass"
        assert [(row.batch, row.permuted, row.images) for row in report.rows] == [(3, False, 5), (3, True, 3)]

    def test_another_batch_than_the_fixed_one_is_a_usage_error(self):
        with pytest.raises(UsageError, match="fixed batch of 3, got 1, 3"):
            verify_runner(reference(), OnnxRuntimeRunner(small_graph(batch=3)), batches=(1, 3))

    def test_uint8_graphs_get_the_pixels_and_the_reference_their_normalization(self):
        preprocessing = Preprocessing()
        graph = small_graph(pixels=(preprocessing.mean, preprocessing.std))
        assert verify(OnnxRuntimeRunner(graph), preprocessing=preprocessing).verdict == "pass"

    def test_a_wrong_mean_in_the_graph_fails(self):
        graph = small_graph(pixels=((0.5, 0.5, 0.5), Preprocessing().std))
        assert verify(OnnxRuntimeRunner(graph), preprocessing=Preprocessing()).verdict == "fail"

    def test_softmax_graphs_are_compared_with_the_softmax_of_the_reference(self):
        candidate = OnnxRuntimeRunner(small_graph(output="probabilities", softmax=True))
        report = verify(candidate, oracle=reference(softmax=True))
        assert report.verdict == "pass"
        assert {row.output for row in report.rows} == {"probabilities"}

    def test_fp16_graphs_get_the_fp16_tolerance_and_a_note_of_what_ran(self):
        report = verify(OnnxRuntimeRunner(small_graph(dtype=np.float16)))
        assert report.verdict == "pass"
        assert (report.precision, report.executed_precision) == ("fp16", "fp32")
        assert report.tolerance == TOLERANCES["fp16"]
        assert "computed in fp32" in report.notes[0]

    def test_both_runners_are_released(self):
        oracle, candidate = reference(), OnnxRuntimeRunner(small_graph())
        verify(candidate, oracle=oracle)
        for runner in (oracle, candidate):
            with pytest.raises(ValueError, match="not active"):
                runner.infer({"input": random_images(1)})

    def test_the_same_seed_gives_the_same_numbers(self):
        first, second = (verify(OnnxRuntimeRunner(small_graph(), threads=1), seed=5) for _ in range(2))
        assert first.rows == second.rows
        assert first.rows != verify(OnnxRuntimeRunner(small_graph(), threads=1), seed=6).rows

    def test_progress_names_each_batch(self):
        lines: list[str] = []
        verify(OnnxRuntimeRunner(small_graph()), progress=lines.append)
        assert [line.split(": ")[1] for line in lines] == ["batch 1", "batch 3", "batch 8"]


class TestPlantedFaults:
    def test_nan_in_one_row(self):
        report = verify_fault(set_element(3, math.nan), from_batch=8)
        assert_fails(report, "NaN in row 3 of 8")
        failed = [row for row in report.rows if not row.passed]
        assert [(row.batch, row.permuted, row.nan) for row in failed] == [(8, False, 1), (8, True, 1)]
        assert (failed[0].worst_row, failed[0].worst_label) == (3, "3")
        assert all(row.rms_rel is None for row in failed)

    def test_inf_in_one_row(self):
        assert_fails(verify_fault(set_element(5, -math.inf), from_batch=8), "Inf in row 5 of 8")

    def test_everything_nan(self):
        assert_fails(verify_fault(on_logits(lambda x: x * math.nan)), "NaN in every row of 8")

    @pytest.mark.parametrize("precision", sorted(TOLERANCES))
    def test_two_rows_swapped_at_any_tolerance(self, precision: str):
        report = verify_fault(swap_rows(2, 5), from_batch=8, precision=precision)
        assert_fails(report, "rows 2 and 5 are swapped")
        assert {row.batch for row in report.rows if not row.passed} == {8}

    def test_all_rows_rotated(self):
        report = verify_fault(on_logits(lambda x: np.roll(x, 1, axis=0)))
        assert_fails(report, "row 0 holds the output of row 7")

    def test_weights_of_another_seed(self):
        report = verify(OnnxRuntimeRunner(small_graph(seed=1)))
        assert_fails(report, "the outputs differ everywhere")
        assert_fails(report, "other weights?")
        assert not any(row.passed for row in report.rows)

    def test_an_output_missing(self):
        report = verify(OnnxRuntimeRunner(small_graph(output="scores")))
        assert_fails(report, "output 'logits' is missing; the model has: scores")

    def test_no_output_at_all(self):
        assert_fails(verify_fault(lambda outputs: {}), "output 'logits' is missing; the model has: no outputs")

    def test_a_surplus_output(self):
        report = verify_fault(lambda outputs: {**outputs, "extra": outputs["logits"]})
        assert_fails(report, "surplus output 'extra'")

    @pytest.mark.parametrize(
        ("change", "got"),
        [
            (lambda x: x[:, :9], "[3, 9]"),
            (lambda x: x[:1], "[1, 10]"),
            (lambda x: x[..., None], "[3, 10, 1]"),
            (lambda x: x[0, 0], "[]"),
            (lambda x: x[:, :0], "[3, 0]"),
        ],
        ids=["classes", "rows", "rank", "scalar", "empty"],
    )
    def test_a_wrong_shape(self, change, got: str):
        assert_fails(
            verify_fault(on_logits(change), batches=(3,)), f"shape of 'logits' differs: got {got}, expected [3, 10]"
        )

    def test_a_graph_of_another_image_size(self):
        module = torch.nn.Sequential(torch.nn.AvgPool2d(2), SmallNet())
        oracle = TorchRunner(module, image_shape=(3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
        report = verify(OnnxRuntimeRunner(small_graph()), oracle=oracle)
        assert_fails(report, "the model takes input float32[N,3,16,16], expected [3, 32, 32]")

    def test_a_graph_of_two_inputs(self):
        names = ("input", "other", "logits")
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 16, 16]) for name in names]
        node = helper.make_node("Add", ["input", "other"], ["logits"])
        report = verify(OnnxRuntimeRunner(save(helper.make_graph([node], "two", values[:2], values[2:]))))
        assert_fails(report, "the model has 2 inputs (input, other), expected one")

    def test_a_wrong_dtype(self):
        assert_fails(verify_fault(on_logits(lambda x: x.astype(np.int64))), "dtype of 'logits' differs: got int64")

    def test_a_row_that_leaks_into_the_next(self):
        report = verify_fault(leak_previous_row(0.01))
        assert_fails(report, "with the order of the batch: an output depends on its place or on the other rows")
        assert next(row for row in report.rows if row.batch == 1).passed

    @pytest.mark.parametrize("precision", sorted(TOLERANCES))
    def test_row_0_broadcast(self, precision: str):
        report = verify_fault(on_logits(lambda x: np.repeat(x[:1], len(x), axis=0)), precision=precision)
        assert_fails(report, "rows 1 and 2 repeat row 0: the candidate ignores these images")

    def test_a_constant_answer(self):
        assert_fails(verify_fault(on_logits(np.ones_like)), "repeat row 0")

    def test_zeros(self):
        assert verify_fault(on_logits(np.zeros_like), batches=(1,)).verdict == "fail"

    def test_fp16_sized_errors_fail_fp32_and_pass_fp16(self):
        assert_fails(verify_fault(relative_noise(1e-3)), "rms_rel 0.001 exceeds 2e-05")
        assert verify_fault(relative_noise(1e-3), precision="fp16").verdict == "pass"

    def test_one_wrong_class_in_one_row(self):
        def change(logits: np.ndarray) -> np.ndarray:
            logits[1, 4] *= 1.001
            return logits

        assert_fails(verify_fault(on_logits(change), from_batch=3), "in row 1 of 3")

    def test_a_fault_at_the_largest_batch_only(self):
        report = verify_fault(relative_noise(0.01), from_batch=8)
        assert_fails(report, "every row of 8")
        assert [row.passed for row in report.rows] == [True, True, True, False, False]

    def test_near_duplicate_images_are_no_swap(self, tmp_path: Path):
        images = random_images(1) + 1e-7 * random_images(4, seed=1)
        np.save(tmp_path / "nearly.npy", np.concatenate([images.astype(np.float32), random_images(2, seed=2)]))
        source = ArrayInputs(tmp_path / "nearly.npy", IMAGE_SIZE, Preprocessing())
        report = verify(OnnxRuntimeRunner(small_graph(dtype=np.float16)), inputs=[source])
        assert report.verdict == "pass", report.reasons

    def test_top1_decides_where_the_tolerance_is_overridden(self):
        loose = Tolerance("custom", rms_rel=0.9, max_rel=0.01, min_agreement=1.0)
        first = compare_rows(np.array([[1.0, 0.9, 0.0]]), np.array([[0.9, 1.0, 0.0]]), tie_rel=loose.max_rel)
        assert not first.top1[0]
        assert not rows_within(first, loose)[0]


class TestComparingNothing:
    def test_no_batches(self):
        report = verify(OnnxRuntimeRunner(small_graph()), batches=())
        assert_fails(report, "nothing was compared")
        assert report.rows == ()

    def test_no_input_sources(self):
        assert_fails(verify(OnnxRuntimeRunner(small_graph()), inputs=[]), "nothing was compared")

    def test_no_elements_in_the_output(self):
        class Empty(SmallNet):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return super().forward(images)[:, :0]

        candidate = FaultyRunner(OnnxRuntimeRunner(small_graph()), on_logits(lambda x: x[:, :0]))
        assert_fails(verify(candidate, oracle=reference(Empty())), "nothing was compared: 'logits' has no elements")

    def test_a_reference_of_zeros(self):
        zeros = SmallNet()
        torch.nn.init.zeros_(zeros.head.weight)
        torch.nn.init.zeros_(zeros.head.bias)
        candidate = FaultyRunner(OnnxRuntimeRunner(small_graph()), on_logits(np.zeros_like))
        report = verify(candidate, oracle=reference(zeros))
        assert_fails(report, "the reference output is zero in every row of 8")
        assert_fails(report, "does not depend on the input")

    @pytest.mark.parametrize("weight", [0.0, 1e-7], ids=["constant", "nearly constant"])
    def test_a_reference_that_ignores_the_image(self, weight: float):
        constant = SmallNet()
        with torch.no_grad():
            constant.head.weight.mul_(weight)
        answer = constant.head.bias.detach().numpy()
        candidate = FaultyRunner(OnnxRuntimeRunner(small_graph()), on_logits(lambda x: np.tile(answer, (len(x), 1))))
        report = verify(candidate, oracle=reference(constant))
        assert all(row.passed for row in report.rows)
        assert_fails(report, "the reference's output does not depend on the input")

    def test_a_reference_with_nan_is_no_reference(self):
        class Undefined(SmallNet):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return super().forward(images) * torch.nan

        report = verify_fault(on_logits(lambda x: x * math.nan), oracle=reference(Undefined()))
        assert_fails(report, "the reference itself has NaN or Inf in every row of 8")

    def test_one_image_over_and_over_is_noted(self, tmp_path: Path):
        np.save(tmp_path / "same.npy", np.repeat(random_images(1), 4, axis=0))
        source = ArrayInputs(tmp_path / "same.npy", IMAGE_SIZE, Preprocessing())
        report = verify(OnnxRuntimeRunner(small_graph()), inputs=[source])
        assert report.verdict == "pass"
        assert "all compared images are the same" in report.notes[0]

    def test_a_runner_against_itself(self):
        runner = reference()
        with pytest.raises(ValueError, match="same runner"):
            verify_runner(runner, runner)


class Unable(FaultyRunner):
    """Refuses at activation, or from a batch size on."""

    def __init__(self, error: Exception, *, at_activation: bool, from_batch: int = 1) -> None:
        def refuse(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise error

        super().__init__(OnnxRuntimeRunner(small_graph()), refuse, from_batch=from_batch)
        self._error = error if at_activation else None

    def activate(self) -> None:
        if self._error is not None:
            raise self._error
        super().activate()


def test_a_negative_seed_is_a_usage_error():
    with pytest.raises(UsageError, match="seed"):
        verify_runner(reference(), OnnxRuntimeRunner(small_graph()), seed=-1)


class TestCannotRun:
    @pytest.mark.parametrize("error", [RunnerError("no kernel for Foo"), MissingDependencyError("not installed")])
    @pytest.mark.parametrize("at_activation", [True, False])
    def test_unverified_with_the_reason(self, error: Exception, at_activation: bool):
        report = verify(Unable(error, at_activation=at_activation))
        assert (report.verdict, report.exit_code) == ("unverified", EXIT_MISSING)
        assert all(row.reason == f"could not run: {error.args[0]}" for row in report.rows)
        assert not any(row.passed for row in report.rows)

    def test_a_graph_that_runs_at_batch_1_only_fails(self):
        report = verify(Unable(RunnerError("Reshape"), at_activation=False, from_batch=3))
        assert_fails(report, "could not run: Reshape")
        assert [row.status for row in report.rows] == ["pass", "fail", "fail", "fail", "fail"]

    def test_a_broken_graph(self):
        node = helper.make_node("Nonsense", ["input"], ["logits"], name="the_culprit")
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 10]) for name in ("input", "logits")]
        report = verify(OnnxRuntimeRunner(save(helper.make_graph([node], "broken", values[:1], values[1:]))))
        assert report.verdict == "unverified"
        assert "Nonsense" in report.reasons[0]

    def test_the_reference_must_run(self):
        with pytest.raises(RunnerError, match="no kernel"):
            verify(OnnxRuntimeRunner(small_graph()), oracle=Unable(RunnerError("no kernel"), at_activation=True))


class TestTolerance:
    @pytest.mark.parametrize("precision", sorted(TOLERANCES))
    def test_the_table_refuses_zeros_nan_and_inf(self, precision: str):
        sound = np.array([[1.0, -2.0, 3.0]])
        for spoiled in (np.zeros_like(sound), sound * math.nan, sound * math.inf, -sound):
            assert not rows_within(compare_rows(sound, spoiled), TOLERANCES[precision]).any()

    def test_an_overridden_limit_is_used_and_printed(self):
        tolerance = tolerance_for("fp32", rms_rel=1e-2)
        assert (tolerance.rms_rel, tolerance.max_rel) == (1e-2, 5e-2)
        report = verify_fault(relative_noise(1e-3), tolerance=tolerance)
        assert report.verdict == "pass"
        assert "rms_rel <= 0.01, max_rel <= 0.05 (custom, from fp32)" in report.table()
        assert report.to_json()["tolerance"]["rms_rel"] == 1e-2

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1.0, -1e-3])
    @pytest.mark.parametrize("name", ["rms_rel", "max_rel"])
    def test_a_limit_that_limits_nothing_is_refused(self, name: str, value: float):
        with pytest.raises(UsageError, match="is no tolerance"):
            tolerance_for("fp32", **{name: value})

    def test_an_unknown_precision_gets_a_suggestion(self):
        with pytest.raises(UsageError) as raised:
            tolerance_for("fp31")
        assert "did you mean" in raised.value.hint

    def test_the_worst_row_is_the_first_that_is_not_finite(self):
        sound = np.ones((3, 4))
        spoiled = sound.copy()
        spoiled[0] += 0.5
        spoiled[2, 1] = math.nan
        assert worst_row(compare_rows(sound, spoiled), TOLERANCES["fp32"]) == 2
        spoiled[2, 1] = 1.0
        assert worst_row(compare_rows(sound, spoiled), TOLERANCES["fp32"]) == 0

    def test_no_verdicts_are_a_failure(self):
        assert overall([]) == "fail"
        assert overall(["pass", "unverified"]) == "unverified"
        assert overall(["pass", "unverified", "fail"]) == "fail"
        assert overall(["pass"]) == "pass"
