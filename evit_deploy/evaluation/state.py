"""What an evaluation has found so far, in a file that a later one continues from.

The file is JSON, one document a line: first what was evaluated (hashes of the bundle and the data, versions), then
answers and unreadable images as they come, flushed line by line. A kill leaves at most half a line at the end, which is
cut off. Answers stand under the runner's identity, so that a later evaluation can add a backend.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from evit_deploy.bundle.filelock import try_flock
from evit_deploy.errors import EvitDeployError, InputDataError, UsageError
from evit_deploy.evaluation.answers import NO_ANSWER, PENDING, pending_answers

SCHEMA = "evit-deploy/evaluate-state"
SCHEMA_VERSION = 1
_BEGIN_AGAIN = "name another file, or remove this one to begin again"
_KEY_TITLES = {"bundle": "another bundle", "data": "other images", "versions": "other versions of the packages"}


class EvaluationState:
    """Answers of some runners to N images, in memory and, where there is a path, in a file.

    Args:
        path: the file, which need not exist; None keeps nothing.
        key: what was evaluated: "bundle" and "data" hashes, "versions".
        runners: identities of those that are asked.
        images: N.
        k: classes per answer.
        classes: of the model.

    Attributes:
        answers: int32 [N, k] per runner, see `answers`.
        classes: of the model.
        unreadable: reason per position of an image that could not be read.
        resumed: how many images every runner had answered, or that were known unreadable, when the file was opened.

    Raises:
        InputDataError: the file is no such file, damaged, or of another evaluation.
        UsageError: another process writes it.
        EvitDeployError: it cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        key: Mapping[str, Any],
        runners: Sequence[str],
        images: int,
        k: int,
        classes: int,
    ) -> None:
        self.answers = {runner: pending_answers(images, k) for runner in runners}
        self.unreadable: dict[int, str] = {}
        self._path = path
        self.classes = classes
        self._file: BinaryIO | None = None
        if path is not None:
            self._file = self._open(path)
            try:
                self._load(self._file, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "key": dict(key)})
            except BaseException:
                self._file.close()
                raise
        self.resumed = images - len(self.pending())

    def __enter__(self) -> EvaluationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def pending(self) -> list[int]:
        """Positions of the images that some runner has not answered yet, ascending."""
        waiting = np.any([top[:, 0] == PENDING for top in self.answers.values()], axis=0)
        waiting[list(self.unreadable)] = False
        return [int(position) for position in np.flatnonzero(waiting)]

    def needs(self, runner: str, positions: Sequence[int]) -> bool:
        """Whether a runner has not answered all of these images."""
        return bool((self.answers[runner][positions, 0] == PENDING).any())

    def add_answers(self, runner: str, positions: Sequence[int], top: np.ndarray) -> None:
        """Keep int32 [n, k] for n images."""
        self.answers[runner][positions] = top
        self._append({"runner": runner, "positions": list(positions), "top": top.tolist()})

    def add_unreadable(self, position: int, reason: str) -> None:
        """Keep why an image could not be read."""
        self.unreadable[position] = reason
        self._append({"unreadable": position, "reason": reason})

    def _open(self, path: Path) -> BinaryIO:
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is no plain file", hint="name a file that the evaluation may write")
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error
        if not try_flock(file.fileno()):
            file.close()
            raise UsageError(f"another evaluation is writing {path}", hint="wait for it, or name another file")
        return file

    def _load(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        data = file.read()
        first = _line(header)
        if not data or (b"\n" not in data and first.startswith(data)):
            self._rewind(file, 0)
            self._write(file, first)
            return
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        self._check_header(_parsed(lines[0]) if lines else None, header)
        for number, line in enumerate(lines[1:], start=2):
            if not self._take(_parsed(line)):
                raise InputDataError(f"line {number} of {self._path} is damaged", hint=_BEGIN_AGAIN)
        self._rewind(file, end)

    def _check_header(self, found: Any, header: Mapping[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("key"), dict):
            raise InputDataError(f"{self._path} is no state of an evaluation", hint=_BEGIN_AGAIN)
        for name, value in header["key"].items():
            if found["key"].get(name) != value:
                raise InputDataError(f"{self._path} was begun with {_KEY_TITLES[name]}", hint=_BEGIN_AGAIN)
        if found != header:
            raise InputDataError(f"{self._path} was begun by another version of evit-deploy", hint=_BEGIN_AGAIN)

    def _take(self, document: Any) -> bool:
        """Keep what a line says; False where it says nothing that could have been written."""
        if not isinstance(document, dict):
            return False
        images, k = next(iter(self.answers.values())).shape
        if document.keys() == {"unreadable", "reason"}:
            position = document["unreadable"]
            if not _all_between([position], 0, images) or not isinstance(document["reason"], str):
                return False
            self.unreadable[position] = document["reason"]
            return True
        if document.keys() != {"runner", "positions", "top"}:
            return False
        positions, top = document["positions"], document["top"]
        if not isinstance(positions, list) or not isinstance(top, list) or len(positions) != len(top):
            return False
        rows = all(isinstance(row, list) and len(row) == k for row in top)
        if not rows or not _all_between(positions, 0, images):
            return False
        if not all(_all_between(row, 0, self.classes) or row == [NO_ANSWER] * k for row in top):
            return False
        if positions and document["runner"] in self.answers:
            self.answers[document["runner"]][positions] = top
        return True

    def _append(self, document: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._write(self._file, _line(document))

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _rewind(self, file: BinaryIO, size: int) -> None:
        file.seek(size)
        file.truncate()

    def _unwritable(self, error: OSError) -> EvitDeployError:
        return EvitDeployError(
            f"{self._path} cannot be written: {error.strerror or error}", hint="free some space or name another file"
        )


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _all_between(values: Sequence[Any], low: int, high: int) -> bool:
    return all(type(value) is int and low <= value < high for value in values)
