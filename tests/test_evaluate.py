"""`evaluate` on the trained digits: figures against a count by hand, planted faults, resuming, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evit_deploy import api
from evit_deploy.bundle import Bundle
from evit_deploy.errors import InputDataError, MissingDependencyError, RunnerError, UsageError
from evit_deploy.evaluation import EvaluationReport, candidates
from evit_deploy.evaluation.tally import class_rows
from evit_deploy.runners.base import FeedDict, Runner, TensorSpec
from tests.in_process import cli
from tests.tiny_bundle import write_tiny

if TYPE_CHECKING:
    from evit_deploy.evaluation.report import EvaluationRow

IMAGES = 60
Fault = Callable[[np.ndarray], np.ndarray]
evaluate = partial(api.evaluate, threads=1)  # a second one gains nothing on 32x32 pixels


class Faulty(Runner):
    """Another runner whose logits a function changes; it counts its calls and the images it was given."""

    def __init__(self, runner: Runner, fault: Fault) -> None:
        self.name = runner.name
        self.precision = runner.precision
        self.batches: list[int] = []
        self._runner = runner
        self._fault = fault

    def activate(self) -> None:
        self._runner.activate()
        self.precision = self._runner.precision

    def deactivate(self) -> None:
        self._runner.deactivate()

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        self.batches += [len(value) for value in feed.values()]
        return {name: self._fault(value.copy()) for name, value in self._runner.infer(feed).items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.outputs


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], list[Faulty]]:
    """Put a fault behind every backend; the reference stays as it is."""
    real = candidates.backend_runner

    def planted(fault: Fault) -> list[Faulty]:
        made: list[Faulty] = []

        def make(*arguments: object, **options: object) -> Runner:
            made.append(Faulty(real(*arguments, **options), fault))  # type: ignore[arg-type]
            return made[-1]

        monkeypatch.setattr(candidates, "backend_runner", make)
        return made

    return planted


@pytest.fixture(scope="module")
def data(digits_heldout: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty of the digits, six with a label that is wrong by one."""
    images, labels = digits_heldout[0][:IMAGES], digits_heldout[1][:IMAGES].copy()
    labels[::10] = (labels[::10] + 1) % 10
    path = tmp_path_factory.mktemp("evaluate") / "val.npz"
    np.savez_compressed(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def answers(digits_bundle: Bundle, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The logits [60, 10] in ONNX Runtime, all at once, and the labels."""
    import onnxruntime

    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    session = onnxruntime.InferenceSession(digits_bundle.onnx_path, providers=["CPUExecutionProvider"])
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.5
    (logits,) = session.run(None, {"input": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))})
    return logits, labels


def backend_row(report: EvaluationReport) -> EvaluationRow:
    return report.rows[1]


# Figures


def test_the_figures_are_those_of_a_count_by_hand(
    digits_bundle: Bundle, data: Path, answers: tuple[np.ndarray, np.ndarray]
) -> None:
    logits, labels = answers
    report = evaluate(digits_bundle, data)
    order = np.argsort(-logits, axis=1)
    correct = int((order[:, 0] == labels).sum())
    assert 45 < correct <= 54
    for row in report.rows:
        assert row.correct == correct
        assert row.top1 == correct / IMAGES
        assert row.topk == (order[:, :5] == labels[:, None]).any(axis=1).mean()
        assert row.no_answer == 0
    assert [row.backend for row in report.rows] == ["reference", "onnxruntime"]
    assert (backend_row(report).agreement, backend_row(report).top1_drop_points) == (1.0, 0.0)
    assert (report.verdict, report.exit_code, report.k) == ("pass", 0, 5)
    assert report.data.images == report.data.read == IMAGES
    by_class = {row.index: row for row in report.classes}
    for index in range(10):
        of_class = labels == index
        assert by_class[index].images == of_class.sum()
        assert by_class[index].correct["onnxruntime"] == (order[of_class, 0] == index).sum()
    shares = [row.top1("reference") for row in report.classes]
    assert shares == sorted(shares)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_size_changes_nothing(digits_bundle: Bundle, data: Path, batch: int) -> None:
    usual, other = evaluate(digits_bundle, data), evaluate(digits_bundle, data, batch=batch)
    assert other.to_json() == usual.to_json()


def test_a_folder_gives_what_its_archive_gives(digits: Path, digits_bundle: Bundle) -> None:
    folder = evaluate(digits_bundle, digits / "classes")
    archive = evaluate(digits_bundle, digits / "heldout.npz")
    assert [row.correct for row in folder.rows] == [row.correct for row in archive.rows]
    assert folder.classes == archive.classes
    assert folder.rows[0].top1 > 0.97
    assert folder.data.sha256 != archive.data.sha256


def test_preprocessed_images_give_what_pixels_give(digits_bundle: Bundle, data: Path, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        images = np.ascontiguousarray(((arrays["images"].astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2))
        np.savez(tmp_path / "floats.npz", images=images, labels=arrays["labels"])
    floats, pixels = evaluate(digits_bundle, tmp_path / "floats.npz"), evaluate(digits_bundle, data)
    assert [row.correct for row in floats.rows] == [row.correct for row in pixels.rows]


def test_every_batch_of_a_backend_has_one_size(
    digits_bundle: Bundle, data: Path, plant: Callable[[Fault], list[Faulty]]
) -> None:
    made = plant(lambda logits: logits)
    evaluate(digits_bundle, data, batch=7)
    assert made[0].batches == [7] * 9


def test_a_class_is_judged_by_its_worst_backend() -> None:
    labels = np.array([0, 0, 1, 1, 3, 3])
    right, second = labels[:, None].astype(np.int32), np.array([[0], [0], [1], [0], [3], [3]], np.int32)
    rows = class_rows({"reference": right, "ort": second}, labels, ["a", "b", "c", "d"])
    assert [row.name for row in rows] == ["b", "a", "d"]
    assert rows[0].correct == {"reference": 2, "ort": 1}


# Faults


def test_a_backend_that_confuses_two_classes_is_found(
    digits_bundle: Bundle, data: Path, plant: Callable[[Fault], list[Faulty]]
) -> None:
    """It answers 4 for every 3: agreement, drop, the class and the images say so, and the gate closes."""
    before = evaluate(digits_bundle, data)
    threes = next(row for row in before.classes if row.index == 3)

    def confuse(logits: np.ndarray) -> np.ndarray:
        logits[logits.argmax(1) == 3, 4] = 1e3
        return logits

    plant(confuse)
    report = evaluate(digits_bundle, data, max_top1_drop=0.5)
    row = backend_row(report)
    lost = threes.correct["reference"]
    assert lost > 0
    assert row.correct == before.rows[0].correct - lost + sum(
        change.label == 4 for change in row.changed
    )  # a wrong label may make it right
    assert report.rows[0] == before.rows[0]
    assert row.agreement is not None
    assert round((1 - row.agreement) * IMAGES) == len(row.changed) >= lost
    assert {(change.reference, change.answer) for change in row.changed} == {(3, 4)}
    assert report.classes[0].index == 3
    assert report.classes[0].correct["onnxruntime"] == 0
    assert (report.verdict, report.exit_code) == ("fail", 3)
    assert "points below the reference, allowed are 0.5" in report.failures[0]
    assert evaluate(digits_bundle, data, max_top1_drop=50).verdict == "pass"
    assert evaluate(digits_bundle, data).verdict == "pass"


def test_the_gate_is_exact(digits_bundle: Bundle, data: Path, plant: Callable[[Fault], list[Faulty]]) -> None:
    """Three of sixty images are 5 points: allowed at 5, not below."""
    left = 3

    def lose_three(logits: np.ndarray) -> np.ndarray:
        nonlocal left
        for row in logits:
            label = next(labels)
            if left and row.argmax() == label:
                row[label] = -1e3
                left -= 1
        return logits

    plant(lose_three)
    with np.load(data) as arrays:
        wanted = arrays["labels"]
    for allowed, verdict in ((5.0, "pass"), (4.99, "fail")):
        labels, left = iter(wanted), 3
        report = evaluate(digits_bundle, data, batch=10, max_top1_drop=allowed)
        assert backend_row(report).top1_drop_points == 5.0
        assert report.verdict == verdict


def test_nan_is_no_answer_and_fails_without_a_gate(
    digits_bundle: Bundle, data: Path, plant: Callable[[Fault], list[Faulty]]
) -> None:
    def poison(logits: np.ndarray) -> np.ndarray:
        logits[1, 5] = np.nan
        return logits

    plant(poison)
    report = evaluate(digits_bundle, data, batch=10)
    row = backend_row(report)
    assert row.no_answer == 6
    assert row.agreement == 54 / IMAGES
    assert all(change.answer is None for change in row.changed)
    assert report.failures == ("onnxruntime: NaN or Inf for 6 of 60 images",)
    assert report.exit_code == 3
    done = cli("evaluate", "--threads", "1", digits_bundle.path, "--data", data, "--batch", "10")
    assert done.code == 3
    assert done.error.startswith("evit-deploy: error: evaluation failed, onnxruntime: NaN or Inf for 6 of 60 images:")
    assert "no answer" in done.out


# Images that cannot be read


@pytest.fixture
def spoiled(digits: Path, tmp_path: Path) -> Path:
    """The digits' folders, one picture cut and one no picture."""
    folder = tmp_path / "val"
    shutil.copytree(digits / "classes", folder)
    pictures = sorted(folder.glob("*/*.png"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:60])
    pictures[200].write_bytes(b"text")
    return folder


def test_unreadable_images_are_listed_and_not_counted(digits_bundle: Bundle, digits: Path, spoiled: Path) -> None:
    whole = evaluate(digits_bundle, digits / "classes")
    report = evaluate(digits_bundle, spoiled)
    pictures = sorted(spoiled.glob("*/*.png"))
    assert [name for name, _ in report.data.unreadable] == [
        str(pictures[index].relative_to(spoiled)) for index in (3, 200)
    ]
    assert (report.data.images, report.data.read) == (360, 358)
    assert sum(row.images for row in report.classes) == 358
    assert whole.rows[0].correct - 2 <= report.rows[0].correct <= whole.rows[0].correct
    assert (report.verdict, report.exit_code) == ("incomplete", 1)


def test_unreadable_images_are_exit_code_1_behind_the_whole_report(digits_bundle: Bundle, spoiled: Path) -> None:
    done = cli("evaluate", "--threads", "1", digits_bundle.path, "--data", spoiled, "--json")
    assert done.code == 1
    assert done.error.startswith("evit-deploy: error: 2 of 360 images cannot be read, first ")
    assert len(json.loads(done.out)["data"]["unreadable"]) == 2
    text = cli("evaluate", "--threads", "1", digits_bundle.path, "--data", spoiled).out
    assert "358 of 10 classes, 2 more cannot be read" in text
    assert "cannot be read, and not counted in any figure: 2 of 360 images" in text


def test_no_readable_image_is_an_error(digits_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "val" / "zero").mkdir(parents=True)
    (tmp_path / "val" / "zero" / "0.png").write_bytes(b"text")
    with pytest.raises(InputDataError, match=r"none of the 1 images of val/ can be read, first zero/0\.png"):
        evaluate(digits_bundle, tmp_path / "val")


# Going on


def test_an_interrupted_evaluation_goes_on_where_it_ended(
    digits_bundle: Bundle, data: Path, tmp_path: Path, plant: Callable[[Fault], list[Faulty]]
) -> None:
    """Interrupted in the third batch of 10; the second run asks for the other 40 images only."""
    calls = 0

    def die(logits: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RunnerError("the machine went away")
        return logits

    state = tmp_path / "state.jsonl"
    made = plant(die)
    with pytest.raises(RunnerError):
        evaluate(digits_bundle, data, batch=10, state=state)
    resumed = evaluate(digits_bundle, data, batch=10, state=state)
    assert made[1].batches == [10] * 4
    assert "continued from" in resumed.notes[-1]
    assert "20 of 60 images were done" in resumed.notes[-1]
    fresh = evaluate(digits_bundle, data, batch=10)
    assert resumed.rows == fresh.rows
    assert resumed.classes == fresh.classes
    again = evaluate(digits_bundle, data, state=state)
    assert made[3].batches == []
    assert again.rows == fresh.rows


def test_unreadable_images_are_known_when_it_goes_on(digits_bundle: Bundle, spoiled: Path, tmp_path: Path) -> None:
    first = evaluate(digits_bundle, spoiled, state=tmp_path / "state")
    second = evaluate(digits_bundle, spoiled, state=tmp_path / "state")
    assert second.data == first.data
    assert second.rows == first.rows


@pytest.mark.parametrize("change", ["bundle", "labels", "limit"])
def test_a_changed_bundle_or_data_is_refused(digits_bundle: Bundle, data: Path, tmp_path: Path, change: str) -> None:
    state = tmp_path / "state.jsonl"
    evaluate(digits_bundle, data, state=state, limit=20)
    before = state.read_bytes()
    bundle, changed, limit = digits_bundle, data, 20
    if change == "bundle":
        other = dict(digits_bundle.manifest, created="2000-01-01T00:00:00+00:00", manifest_sha256="0" * 64)
        bundle = Bundle(digits_bundle.path, other, digits_bundle._identities)
    elif change == "labels":
        with np.load(data) as arrays:
            changed = tmp_path / "val.npz"
            np.savez_compressed(changed, images=arrays["images"], labels=(arrays["labels"] + 1) % 10)
    else:
        limit = 21
    said = "another bundle" if change == "bundle" else "other images"
    with pytest.raises(InputDataError, match=f"was begun with {said}"):
        evaluate(bundle, changed, state=state, limit=limit)
    assert state.read_bytes() == before


# Notes and refusals


def test_few_images_are_said_where_a_gate_cannot_see_one(digits_bundle: Bundle, data: Path) -> None:
    (note,) = evaluate(digits_bundle, data, limit=20, max_top1_drop=0.5).notes
    assert note == "one of 20 images is 5 points: a drop of 0.5 allows not one to be lost"


def test_a_model_of_three_classes_has_no_top_5(random_three: Bundle, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "val.npz", images=images, labels=np.arange(9) % 3)
    report = evaluate(random_three, tmp_path / "val.npz")
    assert report.k == 3
    assert [row.topk for row in report.rows] == [1.0, 1.0]
    assert "the model has 3 classes: top-3 stands where top-5 would" in report.notes
    assert "random weights" in report.notes[0]
    done = cli("evaluate", "--threads", "1", random_three.path, "--data", tmp_path / "val.npz")
    assert done.code == 0
    assert "top-3" in done.out


@pytest.fixture(scope="module")
def random_three(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Random weights of three classes, whose graph is exported without a check."""
    from safetensors.torch import save_file

    from evit_deploy.bundle.writer import BundleWriter
    from evit_deploy.models import load_model
    from evit_deploy.models.fused import fused_model
    from evit_deploy.models.random_weights import random_state_dict
    from evit_deploy.onnx.export import export_graph
    from tests.tiny_bundle import TINY_SPEC, tiny_manifest

    state_dict = random_state_dict(TINY_SPEC, 0)
    graph = export_graph(fused_model(load_model(TINY_SPEC, state_dict), TINY_SPEC), TINY_SPEC, opset=20)
    target = tmp_path_factory.mktemp("three") / "three.evit"
    with BundleWriter(target) as writer:
        (writer.path / "model.onnx").write_bytes(graph.SerializeToString())
        save_file(state_dict, writer.path / "weights.safetensors")
        return writer.commit(tiny_manifest())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backends": ["onnxrutnime"]}, "unknown backend 'onnxrutnime'"),
        ({"backends": ["onnxruntime", "onnxruntime"]}, "given twice"),
        ({"backends": []}, "no backend to run"),
        ({"backends": ["torch-half"]}, "torch-half does not run this bundle: its graph is fp32"),
        ({"batch": 65}, "batch 65 cannot be run: the bundle's largest batch is 64"),
        ({"batch": 0}, "a batch has at least one image"),
        ({"limit": 0}, "a limit of 0 images"),
        ({"max_top1_drop": -1.0}, "a drop of -1.0 is none"),
        ({"max_top1_drop": float("nan")}, "a drop of nan is none"),
        ({"threads": 0}, "0 threads cannot run anything"),
        ({"engine": "x.engine"}, "an engine is given, and no backend runs it"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_runs(
    digits_bundle: Bundle, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate(digits_bundle, tmp_path / "absent", **options)  # type: ignore[arg-type]


def test_a_backend_that_cannot_run_here_is_exit_code_4(
    digits_bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evit_deploy.backends.registry.find_gpus", list)
    with pytest.raises(MissingDependencyError, match="backend torch-fused cannot run"):
        evaluate(digits_bundle, data, backends=["onnxruntime", "torch-fused"])


def test_a_fixed_batch_is_taken_from_the_graph(tmp_path: Path) -> None:
    bundle = write_tiny(
        tmp_path / "tiny.evit", onnx={"precision": "fp32", "dynamic_batch": False, "batch": 4, "max_batch": 4}
    )
    assert candidates.choose_batch(bundle, (), None) == 4
    with pytest.raises(UsageError, match="the graph has a fixed batch of 4"):
        candidates.choose_batch(bundle, (), 2)


@pytest.mark.parametrize(
    ("sizes", "chosen"), [(range(1, 65), 8), ((1, 2, 4), 4), ((16, 32), 16), ((), None)], ids=["any", "4", "16", "none"]
)
def test_the_batch_is_one_that_every_backend_takes(
    digits_bundle: Bundle, sizes: Sequence[int], chosen: int | None
) -> None:
    from evit_deploy.backends import Backend

    reason = "not in its profile"
    backend = Backend("x", "x", "x:x", batch_requirement=lambda batch: None if batch in sizes else reason)
    if chosen is None:
        with pytest.raises(UsageError, match="no batch size can be run by all of x: not in its profile"):
            candidates.choose_batch(digits_bundle, (backend,), None)
    else:
        assert candidates.choose_batch(digits_bundle, (backend,), None) == chosen


# The command


def test_the_command_prints_tables_on_stdout_and_progress_on_stderr(digits_bundle: Bundle, data: Path) -> None:
    done = cli(
        "evaluate", "--threads", "1", digits_bundle.path, "--data", data, "--classes", "3", "--max-top1-drop", "0.5"
    )
    assert done.code == 0
    lines = done.out.splitlines()
    assert any(line.split()[:2] == ["onnxruntime", "fp32"] for line in lines)
    assert "7 more classes: --classes 0 prints all" in lines
    assert "60 of 60 images" not in done.out
    assert "56 of 60 images, top-1: reference" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--data", "absent"), 1, "no such file or folder: absent"),
        (("--backend", "x"), 2, "unknown backend 'x'"),
        (("--max-top1-drop", "101"), 2, "a drop of 101.0"),
        (("--resume", "absent/state"), 2, "there is no folder absent"),
        ((), 2, "Missing option '--data'"),
    ],
)
def test_a_refusal_is_one_line(
    digits_bundle: Bundle, data: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    more = ("--data", str(data)) if arguments and "--data" not in arguments else ()
    done = cli("evaluate", "--threads", "1", digits_bundle.path, *more, *arguments)
    assert (done.code, done.out) == (code, "")
    assert said in done.error
