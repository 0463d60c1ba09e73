"""The file an evaluation goes on from: what it keeps, what it refuses, and how it survives being cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evit_deploy.errors import EvitDeployError, InputDataError, RunnerError, UsageError
from evit_deploy.evaluation.answers import NO_ANSWER, top_classes
from evit_deploy.evaluation.state import EvaluationState

KEY = {"bundle": "b" * 64, "data": "d" * 64, "versions": {"onnxruntime": "1.23"}}
IMAGES, K, CLASSES = 6, 2, 4
TOP = np.array([[0, 1], [3, 2]], np.int32)


def opened(path: Path | None, runners: Sequence[str] = ("reference", "ort"), **key: Any) -> EvaluationState:
    return EvaluationState(path, {**KEY, **key}, runners, IMAGES, K, CLASSES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A state with images 0 and 1 answered by both runners, 2 unreadable, and 3 answered by the reference alone."""
    with opened(tmp_path / "state.jsonl") as state:
        for runner in ("reference", "ort"):
            state.add_answers(runner, [0, 1], TOP)
        state.add_unreadable(2, "no image")
        state.add_answers("reference", [3], np.full((1, K), NO_ANSWER))
    return tmp_path / "state.jsonl"


# Answers


def test_top_classes_are_the_largest_ties_in_order_of_class_and_padding_dropped() -> None:
    logits = np.array([[1, 3, 2, 3], [0, 0, 0, 0], [9, 9, 9, 9]], np.float16)
    assert top_classes({"logits": logits}, 2, 4, 3, "ort").tolist() == [[1, 3, 2], [0, 1, 2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_no_answer(bad: float) -> None:
    logits = np.array([[1, 3, bad, 0], [1, 3, 2, 0]], np.float32)
    assert top_classes({"logits": logits}, 2, 4, 2, "ort").tolist() == [[NO_ANSWER] * 2, [1, 2]]


@pytest.mark.parametrize(
    "outputs",
    [{}, {"a": np.zeros((2, 3))}, {"a": np.zeros((1, 4))}, {"a": np.zeros(8)}, {n: np.zeros((2, 4)) for n in "ab"}],
    ids=["none", "classes", "rows", "flat", "two"],
)
def test_another_output_is_an_error(outputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(RunnerError, match=r"ort: expected one output \[2, 4\]"):
        top_classes(outputs, 2, 4, 2, "ort")


# The file


def test_what_was_kept_is_there_again(path: Path) -> None:
    with opened(path) as state:
        assert state.answers["ort"].tolist() == [[0, 1], [3, 2]] + [[-1, -1]] * 4
        assert state.answers["reference"][3].tolist() == [NO_ANSWER] * 2
        assert state.unreadable == {2: "no image"}
        assert state.pending() == [3, 4, 5]
        assert state.resumed == 3
        assert not state.needs("reference", [1, 3])
        assert state.needs("ort", [1, 3])


def test_another_backend_is_added_and_the_others_are_kept(path: Path) -> None:
    with opened(path, ["reference", "openvino"]) as state:
        assert state.pending() == [0, 1, 3, 4, 5]
        assert state.resumed == 1
        state.add_answers("openvino", [0, 1], TOP)
    with opened(path, ["ort", "openvino"]) as state:
        assert state.pending() == [3, 4, 5]


def test_answers_are_in_the_file_as_soon_as_they_are_there(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as state:
        state.add_answers("ort", [4, 5], TOP)
        line = (tmp_path / "state").read_text(encoding="ascii").splitlines()[-1]
        assert json.loads(line) == {"runner": "ort", "positions": [4, 5], "top": TOP.tolist()}


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(None) as state:
        state.add_answers("ort", [0, 1], TOP)
        assert not state.needs("ort", [0, 1])
    assert not list(tmp_path.iterdir())


def test_a_file_cut_anywhere_is_continued_with_its_whole_lines(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for size in range(len(whole) + 1):
        cut.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        with opened(cut) as state:
            assert state.needs("reference", [0]) == (lines < 2)
            assert state.needs("ort", [0]) == (lines < 3)
            assert bool(state.unreadable) == (lines >= 4)
            state.add_unreadable(5, "added")
        with opened(cut) as state:
            assert state.unreadable[5] == "added"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"bundle": "c" * 64}, "was begun with another bundle"),
        ({"data": "c" * 64}, "was begun with other images"),
        ({"versions": {"onnxruntime": "1.24"}}, "was begun with other versions of the packages"),
    ],
)
def test_another_evaluation_is_refused_and_the_file_stays(path: Path, key: dict[str, Any], said: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputDataError, match=said):
        opened(path, **key)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes\n", b"no newline", b"{}\n", b"[]\n", b'{"schema": "x"}\n', b"\xff\xfe\n"])
def test_a_file_that_is_no_state_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputDataError, match="is no state of an evaluation"):
        opened(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "7",
        '{"runner": "ort", "positions": [6], "top": [[0, 1]]}',
        '{"runner": "ort", "positions": [-1], "top": [[0, 1]]}',
        '{"runner": "ort", "positions": [0], "top": [[0, 4]]}',
        '{"runner": "ort", "positions": [0], "top": [[0]]}',
        '{"runner": "ort", "positions": [0, 1], "top": [[0, 1]]}',
        '{"runner": "ort", "positions": [0], "top": [[-1, -1]]}',
        '{"runner": "ort", "positions": [0], "top": [[0.0, 1]]}',
        '{"unreadable": 6, "reason": "x"}',
        '{"unreadable": 0, "reason": null}',
        '{"unreadable": 0}',
    ],
)
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    with path.open("a", encoding="ascii") as file:
        file.write(line + "\n")
    with pytest.raises(InputDataError, match=r"line 6 of .*state.jsonl is damaged"):
        opened(path)


def test_two_evaluations_never_write_one_file(path: Path) -> None:
    with opened(path), pytest.raises(UsageError, match="another evaluation is writing"):
        opened(path)
    with opened(path) as state:
        assert state.resumed == 3


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no plain file"):
        opened(tmp_path)
    with pytest.raises(EvitDeployError, match="cannot be written: No such file"):
        opened(tmp_path / "absent" / "state.jsonl")
