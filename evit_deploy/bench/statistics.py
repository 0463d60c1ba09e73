"""Percentiles, paired ratios, a hierarchical bootstrap, and the verdict.

A round compares two arms within the same process-round and the same round, so a slow minute of the machine hits both.
Processes differ among each other by more than rounds do (memory placement, load order), therefore the bootstrap
resamples processes first and rounds within them second. Percentile intervals of few processes are too narrow; they
are widened by the factor sqrt(n / (n - 1)) * t(n - 1) / z that Hesterberg (2015, "What Teachers Should Know About the
Bootstrap", section 5.1) gives for the mean of n values.

Ratios are speedups: baseline latency / arm latency, larger than 1 where the arm is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_DIFFERENCE = 0.03  # byte-identical models differed by up to 2.6 % on a two-core machine
UNSTABLE_SPREAD = 0.25  # interquartile range / median above which a latency is not reproducible
MIN_PROCESSES = 2  # one process says nothing about the spread between processes
RESAMPLES = 4000

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no difference"
UNSTABLE = "unstable"
WITHHELD = "withheld"
BASELINE = "baseline"

_Z_975 = 1.959964
# 97.5 % quantile of Student's t for 1..20 degrees of freedom.
_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles and mean of single calls, in milliseconds, and how many calls there were."""

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    samples: int


@dataclass(frozen=True)
class RatioEstimate:
    """A speedup with its 95 % interval and the number of processes and paired rounds behind it."""

    value: float
    ci_low: float
    ci_high: float
    processes: int
    rounds: int


def summarize_latencies(latencies_s: Sequence[float]) -> LatencySummary:
    """Percentiles of the pooled calls of one arm.

    Percentiles are order statistics (the smallest value with at least q % of the calls at or below it), never
    interpolated: with fewer than 100 calls p99 is the largest latency seen, which `samples` lets the reader tell.

    Args:
        latencies_s: seconds per call, at least one.

    Raises:
        ValueError: no latencies, or one that is not a positive finite number.
    """
    values = np.asarray(latencies_s, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"latencies must be positive and finite, got {values.size} values")
    p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99), method="inverted_cdf") * 1e3
    return LatencySummary(float(p50), float(p90), float(p95), float(p99), float(values.mean() * 1e3), int(values.size))


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range divided by the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
    return float((high - low) / median)


def estimate_ratio(
    ratios: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> RatioEstimate | None:
    """The speedup over all processes with a 95 % interval from the hierarchical bootstrap.

    The estimate is the geometric mean over processes of the median over the rounds of each.

    Args:
        ratios: one sequence per process of the paired ratios of its rounds; empty sequences are left out.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Returns:
        The estimate, or None with fewer than two processes: their spread is then unknown.
    """
    logs = [np.log(np.asarray(process, dtype=np.float64)) for process in ratios if len(process)]
    n = len(logs)
    if n < MIN_PROCESSES:
        return None
    rng = np.random.default_rng(seed)
    # medians[p]: for every resample and every slot an independent resample of the rounds of process p  # [S, n]
    medians = np.stack([np.median(rng.choice(p, size=(resamples, n, len(p))), axis=2) for p in logs])
    drawn = rng.integers(0, n, size=(resamples, n))
    rows, slots = np.indices((resamples, n))
    resampled = medians[drawn, rows, slots].mean(axis=1)
    center = float(np.mean([np.median(p) for p in logs]))
    low, high = np.percentile(resampled, (2.5, 97.5))
    widen = _small_sample_factor(n)
    return RatioEstimate(
        value=math.exp(center),
        ci_low=math.exp(center - widen * max(0.0, center - float(low))),
        ci_high=math.exp(center + widen * max(0.0, float(high) - center)),
        processes=n,
        rounds=sum(len(p) for p in logs),
    )


def aa_half_range(ratios: Sequence[Sequence[float]]) -> float | None:
    """The largest deviation from 1 that two identical arms showed in any process; None without a process.

    The deviation of one process is that of the median of its rounds, taken to the side above 1 (0.98 counts as 1.0204).
    """
    logs = [abs(float(np.median(np.log(process)))) for process in ratios if len(process)]
    return math.exp(max(logs)) - 1.0 if logs else None


def judge(ratio: RatioEstimate, *, half_range: float, unstable: bool) -> str:
    """The verdict on one ratio.

    Args:
        ratio: the speedup and its interval.
        half_range: of the A/A arm, see `aa_half_range`.
        unstable: the latencies of one of the two arms, or the A/A arm itself, spread too much to compare.

    Returns:
        "unstable"; "faster" or "slower" where the whole interval lies beyond max(3 %, half_range); "no difference".
    """
    if unstable:
        return UNSTABLE
    threshold = 1.0 + max(MIN_DIFFERENCE, half_range)
    if ratio.ci_low > threshold:
        return FASTER
    if ratio.ci_high < 1.0 / threshold:
        return SLOWER
    return NO_DIFFERENCE


def _small_sample_factor(n: int) -> float:
    """How much wider than the percentile bootstrap the interval of n processes must be."""
    degrees = n - 1
    t = _T_975[degrees - 1] if degrees <= len(_T_975) else _Z_975 + 2.4 / degrees
    return math.sqrt(n / (n - 1)) * t / _Z_975
