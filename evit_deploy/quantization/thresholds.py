"""From a histogram of magnitudes to the one that becomes 127; what is larger saturates."""

from __future__ import annotations

import numpy as np

from evit_deploy.quantization.histogram import BINS, Histogram

METHODS = ("entropy", "percentile", "minmax")
PERCENTILE = 99.99  # of the magnitudes, zeros included
LEVELS = 128  # magnitudes of a symmetric int8
_STRIDE = 16  # bins between two thresholds that entropy tries: one in 256 of the range


def threshold(histogram: Histogram, method: str) -> float:
    """The threshold of one tensor; 0 where every value was 0.

    Args:
        histogram: its magnitudes.
        method: "minmax": the largest; "percentile": the one that PERCENTILE of the values do not exceed; "entropy": the
            one whose rounding and saturation lose the least information (Kullback-Leibler divergence).
    """
    if method == "minmax":
        return histogram.highest
    chosen = {"percentile": _percentile_bins, "entropy": _entropy_bins}[method](histogram.counts)
    return min(histogram.highest, chosen * histogram.bin_width)


def _percentile_bins(counts: np.ndarray) -> int:
    wanted = counts.sum() * (PERCENTILE / 100)
    return int(np.searchsorted(np.cumsum(counts), wanted)) + 1


def _entropy_bins(counts: np.ndarray) -> int:
    """The number of bins to keep, as TensorRT's entropy calibration defines it.

    Source: NVIDIA, "8-bit Inference with TensorRT", GTC 2017, s7310; bin 0 as in NVIDIA's pytorch-quantization, for
    the zeros of a ReLU say nothing about where to saturate.
    """
    counts = counts.copy()
    counts[0] = counts[1]
    if not counts.any():
        return BINS
    sizes = np.arange(LEVELS, BINS + 1, _STRIDE)
    divergences = [_divergence(counts, int(size)) for size in sizes]
    # Of equals the widest: it saturates least.
    return int(sizes[len(sizes) - 1 - int(np.argmin(divergences[::-1]))])


def _divergence(counts: np.ndarray, size: int) -> float:
    """KL divergence from the histogram that saturates at `size` bins to the same in LEVELS levels; may be infinite."""
    kept = counts[:size]
    saturated = kept.astype(np.float64)
    saturated[-1] += counts[size:].sum()
    level = np.arange(size) * LEVELS // size
    occupied = saturated > 0
    total = np.bincount(level, weights=kept, minlength=LEVELS)
    share = np.bincount(level, weights=occupied, minlength=LEVELS)
    rounded = np.where(occupied, (total / np.maximum(share, 1))[level], 0.0)
    if not rounded.any():
        return np.inf
    p, q = saturated / saturated.sum(), rounded / rounded.sum()
    known = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[known] * np.log(p[known] / q[known])))
