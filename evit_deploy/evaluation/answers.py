"""What a runner answered: its k most likely classes for each image, in arrays of fixed size.

`top` is int32 [N, k], most likely first. A row of PENDING has not been asked for yet; a row of NO_ANSWER had NaN or
infinity among its logits, and such an answer is never right.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evit_deploy.errors import RunnerError

MAX_K = 5
PENDING, NO_ANSWER = -1, -2


def pending_answers(images: int, k: int) -> np.ndarray:
    """int32 [images, k], nothing answered yet."""
    return np.full((images, k), PENDING, np.int32)


def top_classes(outputs: Mapping[str, np.ndarray], images: int, classes: int, k: int, runner: str) -> np.ndarray:
    """int32 [images, k] from a runner's output; of equal logits the lower class comes first.

    Args:
        outputs: one array [images or more, classes]; surplus rows are padding.
        images: how many rows count.
        classes: of the model.
        k: how many classes are wanted.
        runner: its name, for messages.

    Raises:
        RunnerError: the output is another one.
    """
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    values = next(iter(outputs.values()), np.empty(0))
    if len(outputs) != 1 or values.ndim != 2 or len(values) < images or values.shape[1] != classes:
        raise RunnerError(
            f"{runner}: expected one output [{images}, {classes}], got {shapes}", hint="export the bundle again"
        )
    logits = values[:images].astype(np.float32)
    top = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    top[~np.isfinite(logits).all(axis=1)] = NO_ANSWER
    return top
