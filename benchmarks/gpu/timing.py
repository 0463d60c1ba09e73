"""Arms side by side: each a CUDA graph of many calls on rotating inputs, replayed in shuffled rounds.

A graph leaves out the gaps between launches, which a kernel is not to blame for. Its calls go through copies of the
inputs that together exceed the L2 cache twice over, and keep as many results alive, so that nothing is read from the
cache that a call left there. One arm takes part twice (A/A).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.device import Device
from evit_deploy.bench.statistics import MIN_DIFFERENCE, UNSTABLE_SPREAD

RESAMPLES = 2000
MAX_COPIES = 512  # of the inputs: beyond that a graph has too many nodes
MIN_GRAPH_S = 1e-3  # events resolve half a microsecond
MAX_CALLS = 1024
AA_SUFFIX = " (A/A)"


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: in each, every arm once, in shuffled order.
        min_graph_s: a graph repeats its calls until it takes this long.
        model_round_s: calls of a whole model in a round take about this long.
    """

    rounds: int = 25
    min_graph_s: float = MIN_GRAPH_S
    model_round_s: float = 0.03


SMOKE = Effort(rounds=2, min_graph_s=0.0, model_round_s=0.0)


@dataclass(frozen=True)
class Prepared:
    """Work that can be enqueued again and again.

    Attributes:
        enqueue: starts it.
        calls: calls of the arm in it.
    """

    enqueue: Callable[[], object]
    calls: int


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % bootstrap interval over rounds."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "ci_low": self.low, "ci_high": self.high}


def copies_needed(call_bytes: int, l2_bytes: int) -> int:
    """Copies of a call's tensors that together exceed the cache twice over; at most MAX_COPIES."""
    return max(2, min(MAX_COPIES, -(-2 * l2_bytes // max(1, call_bytes))))


def prepare(
    device: Device, call: Callable[..., object], inputs: Sequence[Sequence[Any]], min_graph_s: float = MIN_GRAPH_S
) -> Prepared:
    """Calls on every copy of the inputs, as one CUDA graph (on a CPU: one after the other).

    Args:
        device: where the inputs live.
        call: the arm.
        inputs: its arguments, copy by copy.
        min_graph_s: go through the copies again until the graph takes about this long.

    Raises:
        RuntimeError: a call fails, or cannot be captured.
    """
    if device.stream is None:
        return Prepared(lambda: [call(*arguments) for arguments in inputs], len(inputs))
    import torch

    from evit_deploy.runners.cuda_graph import capture

    device.stream.wait_stream(torch.cuda.default_stream(device.torch_device))
    with torch.cuda.stream(device.stream):
        call(*inputs[0])
    once_s = min(device.elapsed_s(lambda: call(*inputs[0])) for _ in range(3))
    passes = max(1, -(-int(1e9 * min_graph_s) // max(1, int(1e9 * once_s * len(inputs)))))
    calls = len(inputs) * max(1, min(passes, MAX_CALLS // len(inputs)))

    def work() -> deque[object]:
        results: deque[object] = deque(maxlen=len(inputs))  # kept alive: a result must not land where the last one did
        for index in range(calls):
            results.append(call(*inputs[index % len(inputs)]))
        return results

    captured = capture(work, device.stream, warmups=1)
    return Prepared(captured.replay, calls)


def measure(device: Device, arms: Mapping[str, Prepared], effort: Effort, *, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of each arm, one value per round.

    Args:
        device: where the arms run.
        arms: what is compared.
        effort: number of rounds.
        seed: of the shuffling.
    """
    shuffler = random.Random(seed)
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(effort.rounds + 1):
        shuffler.shuffle(names)
        for name in names:
            elapsed = device.elapsed_s(arms[name].enqueue) / arms[name].calls
            if index:  # the first round warms up
                seconds[name].append(elapsed)
    return seconds


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median of what each round gave."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(data, size=(RESAMPLES, data.size))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return Estimate(float(np.median(data)), float(low), float(high))


def speedup(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Estimate:
    """How many times faster ours is, from the ratios within rounds."""
    return estimate([t / o for o, t in zip(ours, theirs, strict=True)], seed=seed)


def half_range(first: Sequence[float], second: Sequence[float]) -> float:
    """How far the ratio of two identical arms, with its interval, is from 1."""
    ratio = speedup(first, second)
    return max(max(end, 1.0 / end) for end in (ratio.low, ratio.value, ratio.high)) - 1.0


def instability(aa_half_range: float | None) -> str:
    """Why no ratio of this measurement counts, "" where they do."""
    if aa_half_range is None:
        return "there is no A/A result"
    if not aa_half_range <= UNSTABLE_SPREAD:
        return f"unstable: two identical arms differed by {100 * aa_half_range:.0f} %"
    return ""


def verdict(ratio: Estimate, aa_half_range: float) -> str:
    """ "faster" or "slower" where the whole interval lies beyond what two identical arms differ by."""
    threshold = 1.0 + max(MIN_DIFFERENCE, aa_half_range)
    if ratio.low > threshold:
        return "faster"
    return "slower" if ratio.high < 1.0 / threshold else "no difference"
