"""Percentiles, paired ratios, the hierarchical bootstrap and the verdict, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evit_deploy.bench.statistics import (
    FASTER,
    MIN_DIFFERENCE,
    NO_DIFFERENCE,
    SLOWER,
    UNSTABLE,
    RatioEstimate,
    aa_half_range,
    estimate_ratio,
    judge,
    relative_spread,
    summarize_latencies,
)

POSITIVE = st.floats(min_value=1e-5, max_value=1e3)
RATIOS = st.lists(st.lists(st.floats(min_value=0.01, max_value=100.0), min_size=1, max_size=6), min_size=2, max_size=6)


def draw_ratios(
    rng: np.random.Generator,
    true: float,
    *,
    processes: int = 5,
    rounds: int = 6,
    between: float = 0.02,
    within: float = 0.05,
) -> list[list[float]]:
    """Log-normal ratios with an offset per process, as byte-identical models show them."""
    offsets = rng.normal(0.0, between, processes)
    return [list(true * np.exp(offset + rng.normal(0.0, within, rounds))) for offset in offsets]


def verdicts(true: float, *, runs: int = 100, processes: int = 5) -> list[str]:
    rng = np.random.default_rng(0)
    found = []
    for run in range(runs):
        ratio = estimate_ratio(draw_ratios(rng, true, processes=processes), seed=run, resamples=500)
        half_range = aa_half_range(draw_ratios(rng, 1.0, processes=processes))
        assert ratio is not None
        assert half_range is not None
        found.append(judge(ratio, half_range=half_range, unstable=False))
    return found


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_equal_arms_with_process_offsets_show_no_difference(processes: int) -> None:
    assert verdicts(1.0, processes=processes).count(NO_DIFFERENCE) >= 99


@pytest.mark.parametrize(("true", "expected"), [(1.5, FASTER), (1 / 1.5, SLOWER)])
def test_a_real_difference_is_seen(true: float, expected: str) -> None:
    assert verdicts(true).count(expected) >= 99


def test_a_large_difference_is_seen_with_two_processes() -> None:
    assert verdicts(3.0, processes=2).count(FASTER) >= 90


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        estimate = estimate_ratio(draw_ratios(rng, 1.2, processes=3), seed=run, resamples=300)
        assert estimate is not None
        covered += estimate.ci_low <= 1.2 <= estimate.ci_high
    assert covered >= 0.93 * 300


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_interval_of_few_processes_that_differ_covers_the_truth(processes: int) -> None:
    """Percentiles of the bootstrap alone cover it in 55, 74 and 83 % of the cases."""
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        ratios = draw_ratios(rng, 1.2, processes=processes, between=0.05, within=0.002)
        estimate = estimate_ratio(ratios, seed=run, resamples=300)
        assert estimate is not None
        covered += estimate.ci_low <= 1.2 <= estimate.ci_high
    assert covered >= 0.91 * 300


def test_rounds_of_one_process_are_no_evidence_between_processes() -> None:
    """Offsets of whole processes must widen the interval, however many rounds each has."""
    ratios = [[0.9] * 100, [1.1] * 100, [0.9] * 100, [1.1] * 100]
    estimate = estimate_ratio(ratios)
    assert estimate is not None
    assert estimate.ci_low < 0.93
    assert estimate.ci_high > 1.07


def test_one_process_gives_no_estimate() -> None:
    assert estimate_ratio([[1.0, 1.1, 0.9]]) is None
    assert estimate_ratio([[1.0, 1.1], []]) is None
    assert estimate_ratio([]) is None


def test_identical_processes_have_an_interval_without_width() -> None:
    estimate = estimate_ratio([[2.0, 2.0], [2.0], [2.0, 2.0, 2.0]])
    assert estimate is not None
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx((2.0, 2.0, 2.0))
    assert (estimate.processes, estimate.rounds) == (3, 6)


def test_the_bootstrap_is_seeded() -> None:
    ratios = draw_ratios(np.random.default_rng(0), 1.1)
    assert estimate_ratio(ratios, seed=3) == estimate_ratio(ratios, seed=3)
    assert estimate_ratio(ratios, seed=3) != estimate_ratio(ratios, seed=4)


@settings(max_examples=40, deadline=None)
@given(RATIOS)
def test_the_interval_holds_the_estimate(ratios: list[list[float]]) -> None:
    estimate = estimate_ratio(ratios, resamples=100)
    assert estimate is not None
    assert 0 < estimate.ci_low <= estimate.value * (1 + 1e-12)
    assert estimate.value <= estimate.ci_high * (1 + 1e-12)
    flat = [r for process in ratios for r in process]
    assert min(flat) * (1 - 1e-9) <= estimate.value <= max(flat) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(RATIOS)
def test_swapping_the_arms_inverts_the_estimate(ratios: list[list[float]]) -> None:
    forward = estimate_ratio(ratios, resamples=50)
    backward = estimate_ratio([[1 / r for r in process] for process in ratios], resamples=50)
    assert forward is not None
    assert backward is not None
    assert forward.value == pytest.approx(1 / backward.value)
    assert aa_half_range(ratios) == pytest.approx(aa_half_range([[1 / r for r in process] for process in ratios]))


@settings(max_examples=60, deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=200))
def test_percentiles_are_ordered_and_were_measured(latencies_s: list[float]) -> None:
    summary = summarize_latencies(latencies_s)
    ordered = [summary.p50_ms, summary.p90_ms, summary.p95_ms, summary.p99_ms]
    assert ordered == sorted(ordered)
    measured = np.array(latencies_s) * 1e3
    assert all(np.isclose(measured, value, rtol=1e-12).any() for value in ordered)
    assert min(measured) * (1 - 1e-9) <= summary.mean_ms <= max(measured) * (1 + 1e-9)
    assert summary.samples == len(latencies_s)


def test_percentiles_of_a_known_list() -> None:
    summary = summarize_latencies([i / 1000 for i in range(1, 201)])
    assert (summary.p50_ms, summary.p90_ms, summary.p95_ms, summary.p99_ms) == pytest.approx((100, 180, 190, 198))
    assert summary.mean_ms == pytest.approx(100.5)


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [math.nan, 1.0], [math.inf]], ids=str)
def test_impossible_latencies_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        summarize_latencies(bad)


@pytest.mark.parametrize(
    ("low", "high", "half_range", "expected"),
    [
        (1.031, 1.2, 0.0, FASTER),
        (1.029, 1.2, 0.0, NO_DIFFERENCE),
        (1.08, 1.2, 0.10, NO_DIFFERENCE),
        (1.11, 1.2, 0.10, FASTER),
        (0.8, 0.97, 0.0, SLOWER),
        (0.8, 0.98, 0.0, NO_DIFFERENCE),
        (0.8, 0.95, 0.10, NO_DIFFERENCE),
        (0.5, 2.0, 0.0, NO_DIFFERENCE),
    ],
)
def test_both_sides_of_every_threshold(low: float, high: float, half_range: float, expected: str) -> None:
    ratio = RatioEstimate(math.sqrt(low * high), low, high, processes=5, rounds=25)
    assert judge(ratio, half_range=half_range, unstable=False) == expected
    assert judge(ratio, half_range=half_range, unstable=True) == UNSTABLE


def test_the_minimum_difference_is_three_percent() -> None:
    assert MIN_DIFFERENCE == 0.03


def test_half_range_is_the_worst_process_on_either_side() -> None:
    assert aa_half_range([[1.0, 1.02, 9.0], [1.0]]) == pytest.approx(0.02)
    assert aa_half_range([[0.8], [1.0]]) == pytest.approx(0.25)
    assert aa_half_range([[], []]) is None


@pytest.mark.parametrize(
    ("values", "expected"), [([], 0.0), ([5.0], 0.0), ([1.0, 1.0, 1.0], 0.0), ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 3)]
)
def test_relative_spread(values: list[float], expected: float) -> None:
    assert relative_spread(values) == pytest.approx(expected)
