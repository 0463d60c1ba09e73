"""The check every runner makes before it runs: do the arrays fit the inputs?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evit_deploy.errors import RunnerError
from evit_deploy.runners.base import FeedDict, TensorSpec


def describe(spec: TensorSpec) -> str:
    """ "input float32[N,3,224,224]": N stands for a dynamic dimension."""
    dims = ",".join("N" if dim is None else str(dim) for dim in spec.shape)
    return f"{spec.name} {spec.dtype}[{dims}]"


def check_feed(feed: FeedDict, inputs: Sequence[TensorSpec], runner: str) -> None:
    """Compare the names, dtypes and shapes of `feed` with what the model takes.

    Raises:
        RunnerError: the first difference, what was expected and what was given.
    """

    def wrong(what: str) -> RunnerError:
        return RunnerError(f"{runner}: {what}", hint=f"the model takes {'; '.join(describe(spec) for spec in inputs)}")

    names = [spec.name for spec in inputs]
    if sorted(feed) != sorted(names):
        raise wrong(f"inputs are named {sorted(names)}, got {sorted(feed)}")
    for spec in inputs:
        array = feed[spec.name]
        if not isinstance(array, np.ndarray):
            raise wrong(f"input {spec.name!r} is no NumPy array, got {type(array).__name__}")
        if array.dtype.name != spec.dtype:
            raise wrong(f"input {spec.name!r} has dtype {array.dtype.name}")
        fits = array.ndim == len(spec.shape) and all(
            want is None or want == got for want, got in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise wrong(f"input {spec.name!r} has shape {list(array.shape)}")
        if array.size == 0:
            raise wrong(f"input {spec.name!r} is empty, got shape {list(array.shape)}")
