"""From answers and labels to the figures of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evit_deploy.evaluation.answers import NO_ANSWER
from evit_deploy.evaluation.report import ChangedAnswer, ClassRow

MAX_CHANGED = 100  # beyond it nobody looks at single images


def correct_images(top: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [N]: the label is the most likely class."""
    right: np.ndarray = top[:, 0] == labels
    return right


def within_k(top: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [N]: the label is among the k most likely classes."""
    right: np.ndarray = (top == labels[:, None]).any(axis=1)
    return right


def answered(top: np.ndarray) -> np.ndarray:
    """bool [N]: the output was finite."""
    finite: np.ndarray = top[:, 0] != NO_ANSWER
    return finite


def agreeing(top: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """bool [N]: both answered, and the same class is the most likely one."""
    same: np.ndarray = (top[:, 0] == reference[:, 0]) & answered(top)
    return same


def changed_answers(
    top: np.ndarray, reference: np.ndarray, labels: np.ndarray, image_name: Callable[[int], str]
) -> tuple[ChangedAnswer, ...]:
    """The first images that do not agree.

    Args:
        top, reference: int32 [N, k].
        labels: int64 [N].
        image_name: from a row to what messages call the image.
    """
    rows = np.flatnonzero(~agreeing(top, reference))[:MAX_CHANGED]
    return tuple(
        ChangedAnswer(image_name(int(row)), int(labels[row]), _class(reference[row, 0]), _class(top[row, 0]))
        for row in rows
    )


def class_rows(
    answers: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str] | None
) -> tuple[ClassRow, ...]:
    """One row for each class with images: the one with the lowest share in any runner first, then by class.

    Args:
        answers: int32 [N, k] by runner, the reference first.
        labels: int64 [N].
        class_names: by class.
    """
    images = np.bincount(labels)
    correct = {
        name: np.bincount(labels[correct_images(top, labels)], minlength=len(images)) for name, top in answers.items()
    }
    rows = [
        ClassRow(
            index,
            None if class_names is None else class_names[index],
            int(images[index]),
            {name: int(counts[index]) for name, counts in correct.items()},
        )
        for index in range(len(images))
        if images[index]
    ]
    return tuple(sorted(rows, key=lambda row: (min(row.correct.values()) / row.images, row.index)))


def _class(value: np.int32) -> int | None:
    return None if value == NO_ANSWER else int(value)
