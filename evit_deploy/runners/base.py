"""The one contract every backend fulfils: activate, infer, deactivate.

    with OnnxRuntimeRunner(path, threads=2) as runner:
        outputs = runner.infer({"input": images})

Constructing a runner touches neither the runtime nor a device; `activate` does, and `deactivate` gives everything back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from evit_deploy.errors import MissingDependencyError

FeedDict = Mapping[str, np.ndarray]

NO_GPU = "no GPU"


class BuiltNotRunError(MissingDependencyError):
    """A built engine that this machine cannot run: nothing is known of what it computes.

    Args:
        reason: what is missing, for example "no GPU".
        hint: what the user can do about it.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(f"built, not run: {reason}", hint=hint)


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of one input or output; None stands for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Runner(ABC):
    """One model in one runtime.

    Attributes:
        name: the backend's name in tables and JSON, for example "onnxruntime".
        precision: what the runtime executes, read back where it can be, for example "fp32".
        notes: what a reader of its results should know about how it runs, one line each; known after activation.
    """

    name: str
    precision: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def activate(self) -> None:
        """Load the model; raises MissingDependencyError or RunnerError."""

    @abstractmethod
    def deactivate(self) -> None:
        """Release everything `activate` took; harmless when not active."""

    @abstractmethod
    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        """One forward pass: named input arrays (first dimension: batch) to named output arrays."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, known after activation."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs, known after activation."""

    def __enter__(self) -> Runner:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()
