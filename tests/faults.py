"""A runner that spoils what another one gives, one planted fault at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evit_deploy.runners.base import FeedDict, Runner, TensorSpec

Fault = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class FaultyRunner(Runner):
    """`runner` with `fault` applied to each inference's outputs; batches below `from_batch` stay sound."""

    def __init__(self, runner: Runner, fault: Fault, *, from_batch: int = 1, precision: str = "fp32") -> None:
        self.name = f"faulty {runner.name}"
        self.precision = precision
        self._runner = runner
        self._fault = fault
        self._from_batch = from_batch

    def activate(self) -> None:
        self._runner.activate()

    def deactivate(self) -> None:
        self._runner.deactivate()

    def infer(self, feed: FeedDict) -> dict[str, np.ndarray]:
        outputs = {name: value.copy() for name, value in self._runner.infer(feed).items()}
        rows = len(next(iter(feed.values())))
        return self._fault(outputs) if rows >= self._from_batch else outputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.outputs


def on_logits(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """A fault of the one output `logits`."""
    return lambda outputs: {**outputs, "logits": change(outputs["logits"])}


def set_element(row: int, value: float) -> Fault:
    """One element of one row becomes `value`."""

    def change(logits: np.ndarray) -> np.ndarray:
        logits[row, 2] = value
        return logits

    return on_logits(change)


def swap_rows(first: int, second: int) -> Fault:
    """Two rows in each other's place."""

    def change(logits: np.ndarray) -> np.ndarray:
        logits[[first, second]] = logits[[second, first]]
        return logits

    return on_logits(change)


def relative_noise(rms_rel: float) -> Fault:
    """Seeded normal noise of the given RMS relative to each row's."""

    def change(logits: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).standard_normal(logits.shape)
        noise /= np.sqrt(np.mean(noise**2, axis=1, keepdims=True))
        scale = np.sqrt(np.mean(logits.astype(np.float64) ** 2, axis=1, keepdims=True))
        return (logits + rms_rel * scale * noise).astype(np.float32)

    return on_logits(change)


def leak_previous_row(share: float) -> Fault:
    """Each row gets a share of the row before it."""

    def change(logits: np.ndarray) -> np.ndarray:
        logits[1:] += share * logits[:-1].copy()
        return logits

    return on_logits(change)
